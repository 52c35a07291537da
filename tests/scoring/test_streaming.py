"""Scores of stored features against float64, in bounded memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scoring_cases import expected, scorer

from tracer.scoring.estimators import Estimate
from tracer.scoring.matmul import int8_products_are_exact


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
