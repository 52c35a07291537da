"""The benchmark of label health measures what it says, on a small data set."""

from __future__ import annotations

import json

import numpy as np
import pytest
from benchmark_scripts import script


@pytest.fixture(scope="module")
def health():
    with script("health") as module:
        yield module


@pytest.mark.parametrize("kind", ["uniform", "class-dependent"])
def test_a_share_of_the_labels_is_flipped_as_the_kind_says(health, kind):
    labels = np.arange(900) % 3
    flipped = health.flip(labels, 0.2, kind, np.random.default_rng(0))
    wrong = flipped != labels
    assert wrong.sum() == 180
    if kind == "class-dependent":
        assert (flipped == (labels + 1) % 3)[wrong].all()
        assert wrong[labels == 2].sum() > wrong[labels == 0].sum()
    else:
        assert set(((flipped - labels) % 3)[wrong].tolist()) == {1, 2}


def test_runs_are_written_summarized_and_not_repeated(health, tmp_path, monkeypatch, capsys):
    output = tmp_path / "health.json"
    arguments = ["--cases", "wine", "--rates", "0.1", "--kinds", "uniform", "--seeds", "0", "--output", str(output)]
    health.main(arguments)
    (found,) = json.loads(output.read_text())
    printed = capsys.readouterr().out
    assert "| data | from | 10% |" in printed
    for way, ranking in (("cross-validation", "cross-validated"), ("checkpoints", "mean loss")):
        assert found[way]["low"] <= found["rate"] <= found[way]["high"]
        assert found[way]["precision"][ranking] > 0.5
        assert f"| wine | {way} | {found[way]['share']:.1%}, 1 of 1 |" in printed
    monkeypatch.setattr(health, "run", lambda *settings: pytest.fail("run again"))
    health.main(arguments)
