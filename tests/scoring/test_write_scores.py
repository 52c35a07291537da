"""Scores in the store: ranges of tiles, and writes that fail."""

from __future__ import annotations

import numpy as np
import pytest
from scoring_cases import expected, scorer

from tracer.errors import InputError, StoreError
from tracer.scoring.estimators import Estimate
from tracer.scoring.write_scores import write_scores


def open_scores(found, **options):
    tiles, *_ = found._tile_scorer("test", Estimate(), None)
    shape = found.num_rows, tiles.num_targets
    return tiles, found.store.results.scores("test", "tracin", shape, {"a": 1}, tile_rows=10)


def test_ranges_divide_the_work(tmp_path):
    found = scorer(tmp_path, 95, 3, 16)
    tiles, scores = open_scores(found)
    todo = scores.remaining()
    write_scores(tiles, scores, False, ranges=todo[1:3])
    assert np.flatnonzero(scores.tile_done).tolist() == [1, 2]
    write_scores(tiles, scores, False, ranges=[todo[9]])
    assert [start for start, _ in scores.remaining()] == [0, 30, 40, 50, 60, 70, 80]
    matrix = write_scores(tiles, scores, False)
    assert scores.complete
    np.testing.assert_allclose(matrix, expected(found), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="got rows 5 to 20: expected whole tiles"):
        write_scores(tiles, scores, False, ranges=[(5, 20)])


def test_a_failed_write_is_an_error_and_marks_nothing(tmp_path, monkeypatch):
    found = scorer(tmp_path, 95, 3, 16)
    tiles, scores = open_scores(found)

    def fails(*args):
        raise StoreError("the disk is full")

    monkeypatch.setattr(scores, "write", fails)
    with pytest.raises(StoreError, match="the disk is full"):
        write_scores(tiles, scores, False)
    assert not scores.tile_done.any()
