"""Scores of stored rows against float64, in bounded memory, written behind and read ahead."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring_cases import expected, scorer

from tracer.errors import InputError, StoreError
from tracer.scoring import read_ahead
from tracer.scoring.estimators import Estimate
from tracer.scoring.matmul import int8_products_are_exact
from tracer.scoring.write_scores import write_scores


@pytest.mark.parametrize("estimator", ["tracin", "cosine"])
@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 3, 33), (67, 130, 5), (2100, 2, 8)])
@pytest.mark.parametrize("memory_bytes", [1 << 14, 1 << 30])
def test_scores_equal_products_in_float64(tmp_path, estimator, storage, shape, memory_bytes):
    found = scorer(tmp_path, *shape, storage, memory_bytes=memory_bytes)
    wanted = expected(found, estimator)
    scores = found.scores("test", Estimate(estimator), None)
    assert np.abs(scores - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
@pytest.mark.parametrize("magnitude", [1e-15, 1e15])
def test_small_and_large_gradients_stay_within_float32(tmp_path, storage, magnitude):
    found = scorer(tmp_path, 40, 3, 64, storage, magnitude)
    wanted = expected(found)
    assert np.abs(found.scores("test", Estimate(), None) - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_integer_products_give_the_same_scores(tmp_path, monkeypatch):
    found = scorer(tmp_path, 300, 11, 200, "int8")
    converted = np.array(found.scores("test", Estimate(), None))
    shutil.rmtree(found.store.path / "scores")
    calls = []
    right = torch._int_mm
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)
    monkeypatch.setattr("torch._int_mm", lambda a, b: calls.append(a.shape) or right(a, b))
    int8_products_are_exact.cache_clear()
    np.testing.assert_allclose(found.scores("test", Estimate(), None), converted, rtol=1e-5, atol=1e-5)
    int8_products_are_exact.cache_clear()
    assert len(calls) > 1


def open_scores(found, **options):
    tiles, _ = found._tile_scorer("test", Estimate(), None)
    shape = found.num_rows, tiles.num_targets
    return tiles, found.store.scores("test", "tracin", shape, {"a": 1}, tile_rows=10)


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
    with pytest.raises(InputError, match="rows 5 to 20 are no whole tiles"):
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


def test_own_memory_grows_with_neither_rows_nor_targets(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from timing import peak_mb

    peaks = []
    for number, (num_rows, num_targets) in enumerate([(2_000, 200), (2_000, 4_000), (40_000, 200)]):
        found = scorer(tmp_path / str(number), num_rows, num_targets, 64, "float16", memory_bytes=8 << 20)
        found.scores("test", Estimate(), None)
        for name in ("scores", "top"):
            shutil.rmtree(found.store.path / name, ignore_errors=True)
        peaks.append(peak_mb(lambda found=found: found.scores("test", Estimate(), None)))
    assert max(peaks) <= 16, peaks


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise")
def test_rows_are_read_ahead_once_and_in_order(tmp_path, monkeypatch):
    found = scorer(tmp_path, 400, 3, 16, "float16", memory_bytes=1 << 16)
    asked = []
    monkeypatch.setattr("tracer.store.RowTable.prefetch", lambda table, *rows: asked.append((table.path.name, *rows)))
    monkeypatch.setattr(read_ahead, "_AHEAD_BYTES", 64 * 32)
    monkeypatch.setattr(read_ahead, "_READ_BYTES", 50 * 32)
    found.top("test", 3, "proponents", Estimate(), None)
    for name in ("0", "1"):
        ranges = [(start, stop) for table, start, stop in asked if table == name]
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == 400


def test_prefetch_changes_nothing(tmp_path, monkeypatch):
    found = scorer(tmp_path, 30, 3, 16)
    table = found.store.checkpoint(0)
    before = table.features(0, 30)
    table.prefetch(3, 30)
    table.prefetch(5, 5)
    with pytest.raises(InputError, match="expected 0 <= start <= stop <= 30"):
        table.prefetch(0, 31)
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    table.prefetch(0, 30)
    np.testing.assert_array_equal(table.features(0, 30), before)
