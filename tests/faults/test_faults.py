"""A few trials of the fault campaign (`make faults` runs hundreds), and that a campaign would find a fault."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from faults.campaign import MEMORY
from faults.trials import GOOD, Stores, Trial
from faults.world import FIRST, NEW, RATES, M, World, checkpoints, examples

from tracer.scoring.read_checks import ReadCheck

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="kills forked processes, as on Linux")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def stores(folder) -> Stores:
    return Stores(folder, World())


def loss_gradients(state, x, y) -> np.ndarray:
    x, y = x.numpy().astype(float), y.numpy()
    logits = x @ state["weight"].numpy().astype(float).T + state["bias"].numpy()
    rest = np.exp(logits - logits.max(1, keepdims=True))
    rest = rest / rest.sum(1, keepdims=True) - np.eye(3)[y]
    return np.concatenate([(rest[:, :, None] * x[:, None, :]).reshape(len(x), -1), rest], 1)


@pytest.mark.parametrize("data", [FIRST, NEW], ids=lambda data: data.name)
def test_the_answers_that_trials_are_judged_by_are_right(stores, data):
    expected = np.zeros((data.size, M))
    for (state, _), rate in zip(checkpoints(), RATES, strict=True):
        train = np.concatenate([loss_gradients(state, *batch) for _, batch in data.batches()])
        expected += rate * train @ loss_gradients(state, *examples(M, 1)).T
    found = stores.truths[data.name, "finalize_scores"]
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
    ("fault", "seed"),
    [
        ("kill", 1),
        ("power failure", 3),
        ("full disk", 5),
        ("two processes", 6),
        ("two processes", 7),
        ("features", 8),
        ("marks", 9),
        ("kernels", 11),
        ("documents of tables", 12),
    ],
)
def test_after_a_fault_answers_are_right_or_refused_with_a_step_that_helps(stores, folder, fault, seed):
    trial = Trial(fault, seed, stores, folder / f"trial{seed}")
    trial.start().end()
    assert trial.outcome in GOOD, "\n".join([trial.outcome, *trial.what])


def test_a_store_that_does_not_check_what_it_reads_is_found_out(stores, folder, monkeypatch):
    monkeypatch.setattr(ReadCheck, "check", lambda self, indices: None)
    outcomes = []
    for seed in range(20):
        trial = Trial("features", seed, stores, folder / str(seed))
        trial.start().end()
        outcomes.append(trial.outcome)
        if "wrong" in outcomes:
            return
    pytest.fail(f"no answer was wrong: {outcomes}")
