"""What was reported done survives a power failure, and a store of few examples does not wait for the disk."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import torch
from power import Power
from store_cases import N, batch, manifest, stored_features
from torch import nn

from tracer import Tracer
from tracer.store import Store
from tracer.store.arrays.local_path import LocalPath
from tracer.store.result_group import load_group, save_group

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="follows descriptors as Linux lists them")


@pytest.fixture(params=[True, False], ids=["together", "one by one"])
def together(request) -> bool:
    return request.param


def check(path, reported: dict[int, np.ndarray]) -> None:
    """Check that a store has all reported rows, that its done rows are right, and that it can be continued."""
    store = Store.open(path, manifest())
    for model_id, rows in reported.items():
        with store.checkpoint(model_id) if len(rows) else store.create_checkpoint(model_id, "a", 0.1) as table:
            done = np.flatnonzero(table.done)
            assert np.isin(rows, done).all(), f"checkpoint {model_id} lost rows"
            np.testing.assert_array_equal(stored_features(table, 0, N)[done], batch(np.arange(N))["features"][done])
            np.testing.assert_array_equal(table.column("loss")[done], batch(np.arange(N))["loss"][done])
            table.write(**batch(table.remaining()))
            assert not len(table.remaining())


def test_reported_rows_survive_a_power_failure_at_any_sync(tmp_path, monkeypatch, together):
    monkeypatch.setattr("tracer.store.arrays.local_path.LocalPath.feature_chunk_bytes", 12 * 5 * 4)
    reported: dict[int, np.ndarray] = {0: np.empty(0, int), 1: np.empty(0, int)}
    failures = 0

    def fail() -> None:
        nonlocal failures
        failures += 1
        power.fail(tmp_path / f"after{failures}")
        expected.append({model_id: rows.copy() for model_id, rows in reported.items()})

    expected: list[dict[int, np.ndarray]] = []
    (tmp_path / "disk").mkdir()
    with monkeypatch.context() as patch:
        power = Power(tmp_path / "disk", patch, together, fail)
        store = Store.open(tmp_path / "disk" / "s", manifest())
        for model_id in reported:
            table = store.create_checkpoint(model_id, "a", 0.1)
            for part in np.array_split(np.arange(N), 2):
                table.write(**batch(part))
                table.flush()
                reported[model_id] = np.flatnonzero(table.done)
            table.set_attributes(finalized=True)
        fail()
    assert failures > 10
    for number, rows in list(enumerate(expected, 1))[::-3]:
        check(tmp_path / f"after{number}" / "s", rows)


def test_reported_scores_survive_a_power_failure(tmp_path, monkeypatch, together):
    (tmp_path / "disk").mkdir()
    values = np.arange(N * 3, dtype=np.float32).reshape(N, 3)
    with monkeypatch.context() as patch:
        power = Power(tmp_path / "disk", patch, together)
        store = Store.open(tmp_path / "disk" / "s", manifest())
        with store.results.scores("test", "tracin", (N, 3), {}) as scores:
            scores.write(0, values)
        power.fail(tmp_path / "after")
    with Store.open_existing(tmp_path / "after" / "s").results.read_scores("test", "tracin") as scores:
        assert scores.complete and not len(scores.damaged_tiles())
        np.testing.assert_array_equal(scores.matrix(), values)


def test_a_result_of_several_arrays_survives_as_a_whole_or_counts_as_missing(tmp_path, monkeypatch, together):
    (tmp_path / "disk").mkdir()
    arrays = {"matrix": np.arange(6.0).reshape(3, 2), "residual_sum": np.ones((1, 2))}
    survivors = []

    def fail() -> None:
        survivors.append(tmp_path / f"after{len(survivors)}")
        power.fail(survivors[-1])

    with monkeypatch.context() as patch:
        power = Power(tmp_path / "disk", patch, together, fail)
        store = Store.open(tmp_path / "disk" / "s", manifest())
        save_group(store.path / "kernels", {}, arrays)
        fail()
    for number, path in enumerate(survivors, 1):
        with contextlib.suppress(FileNotFoundError) if number < len(survivors) else contextlib.nullcontext():
            _, found = load_group(LocalPath(path / "s" / "kernels"))
            assert all((found[name] == arrays[name]).all() for name in arrays)


def test_a_small_store_waits_for_the_disk_at_most_ten_times_a_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    power = Power(tmp_path / "disk", monkeypatch, together=True)
    model = nn.Linear(6, 3)
    x, y, checkpoints = torch.randn(500, 6), torch.arange(500) % 3, 5
    states = [({"weight": torch.randn(3, 6), "bias": torch.randn(3)}, 0.1) for _ in range(checkpoints)]
    with Tracer(model, "image_classification", 500, tmp_path / "disk" / "s", 16, progress=False) as tracer:
        for model_id, (state, rate) in enumerate(states):
            tracer.load_checkpoint(state, model_id, rate)
            for start in range(0, 500, 100):
                tracer.featurize((x[start : start + 100], y[start : start + 100]), num_samples=100)
        tracer.finalize_features()
        for model_id, (state, _) in enumerate(states):
            tracer.start_scoring_checkpoint(state, model_id, 20, "test")
            tracer.score((x[:20], y[:20]), num_samples=20)
        tracer.finalize_scores("test")
    assert power.calls <= 10 * checkpoints
    power.fail(tmp_path / "after")
    assert Tracer.open(tmp_path / "after" / "s").finalize_scores("test").shape == (500, 20)
