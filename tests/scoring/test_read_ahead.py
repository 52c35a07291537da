"""Train features are requested in the background, once and in order."""

from __future__ import annotations

import os

import numpy as np
import pytest
from scoring_cases import scorer
from store_cases import stored_features

from tracer.errors import InputError
from tracer.scoring import read_ahead
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import raw_features_at, split_at_gaps


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_rows_are_read_ahead_once_and_in_order(tmp_path, monkeypatch):
    found = scorer(tmp_path, 400, 3, 16, "float16", memory_bytes=1 << 16)
    asked = []
    monkeypatch.setattr("tracer.store.RowTable.prefetch", lambda table, rows: asked.append((table.path.name, rows)))
    monkeypatch.setattr(read_ahead, "_AHEAD_BYTES", 64 * 32)
    monkeypatch.setattr(read_ahead, "_READ_BYTES", 50 * 32)
    found.top("test", 3, "proponents", Estimate(), None)
    for name in ("0", "1"):
        ranges = [each for table, pieces in asked if table == name for each in pieces]
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == 400


def test_prefetch_changes_nothing(tmp_path, monkeypatch):
    found = scorer(tmp_path, 30, 3, 16)
    table = found.store.checkpoint(0)
    before = stored_features(table, 0, 30)
    table.prefetch([(3, 10), (12, 30)])
    table.prefetch([(5, 5)])
    with pytest.raises(InputError, match="expected 0 <= start <= stop <= 30"):
        table.prefetch([(0, 2), (3, 31)])
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    table.prefetch([(0, 30)])
    np.testing.assert_array_equal(stored_features(table, 0, 30), before)


def test_scattered_rows_are_those_of_the_table(tmp_path):
    found = scorer(tmp_path, 9000, 3, 16, "int8")
    rows = np.sort(np.random.default_rng(0).choice(9000, 40, replace=False))
    assert len(split_at_gaps(rows)) > 16
    table = found.store.checkpoint(0)
    raw = np.concatenate([view for _, view in table.raw_features(0, 9000)])
    np.testing.assert_array_equal(raw_features_at(table, rows), raw[rows])
    with pytest.raises(InputError, match="9000"):
        raw_features_at(table, np.append(rows, 9000))
