"""Thousands of checkpoints: every answer opens a table once, and does the same for each checkpoint."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from click.testing import CliRunner
from scoring_cases import scorer

from tracer import verify
from tracer.cli.app import main
from tracer.scoring.estimators import Estimate
from tracer.scoring.readiness import finalize_features
from tracer.store import RowTable
from tracer.store.arrays.local import _maps
from tracer.store.arrays.local_path import LocalPath

COUNTS = (2, 4, 8)


def ask(found, what: str) -> None:
    """Ask for one thing of a store."""
    if what == "finalize_features":
        finalize_features(found.store, None)
    elif what == "finalize_scores":
        found.scores("test", Estimate(), None)
    elif what == "top":
        found.top("test", 2, "proponents", Estimate(), None)
    elif what == "self_influence":
        found.self_influence(None, Estimate())
    elif what == "verify":
        assert verify(found.store.path, progress=False).ok
    else:
        assert CliRunner().invoke(main, ["info", str(found.store.path)]).exit_code == 0


@pytest.mark.parametrize(
    ("what", "tables"),
    [
        ("finalize_features", 1),
        ("finalize_scores", 2),
        ("finalize_scores again", 2),
        ("top", 2),
        ("top again", 2),
        ("self_influence", 1),
        ("verify", 0),  # which reads the arrays by themselves
        ("info", 2),
    ],
)
def test_the_work_grows_with_the_number_of_checkpoints_and_no_faster(tmp_path, monkeypatch, what, tables):
    opened, seen = [], Counter()

    def counted(cls, name: str, kind: str) -> None:
        real = getattr(cls, name)

        def call(self, *args, **options):
            seen[kind] += 1
            return real(self, *args, **options)

        monkeypatch.setattr(cls, name, call)

    stores = [scorer(tmp_path / str(count), 6, 3, 4, rates=np.linspace(0.1, 1, count)) for count in COUNTS]
    if what.endswith("again"):
        for found in stores:
            ask(found, what.partition(" ")[0])
    monkeypatch.setattr(_maps, "_limit", lambda: 1000)  # maps that are dropped are opened again, by chance
    counted(RowTable, "__init__", "tables")
    counted(LocalPath, "checked", "paths")  # of every file that is opened, and of every folder that is listed
    for found in stores:
        seen.clear()
        ask(found, what.partition(" ")[0])
        opened.append((seen["tables"], seen["paths"]))
    (small, few), (middle, some), (large, many) = opened
    assert (small, middle, large) == tuple(tables * count for count in COUNTS)
    assert many - some == 2 * (some - few)
