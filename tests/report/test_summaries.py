"""Summaries of scores against loops over the whole matrix."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tracer
from tracer.report import summaries
from tracer.report.summaries import summarize_scores

N, M, C = 41, 23, 4
RNG = np.random.default_rng(3)
SCORES = RNG.normal(size=(N, M)) * np.exp(RNG.normal(size=M))
TRAIN, TARGET = RNG.integers(0, C, N), np.arange(M) % (C - 1)  # no target of the last class


class Blocks:
    """A matrix that is read in blocks of rows, and records the size of the largest."""

    def __init__(self, scores):
        self.shape, self.largest, self._scores = scores.shape, 0, scores

    def __getitem__(self, rows):
        block = self._scores[rows]
        self.largest = max(self.largest, len(block))
        return block.astype(np.float32)


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(summaries, "_BLOCK_BYTES", 8 * M * 7)  # blocks of seven rows, the last one shorter
    scores = Blocks(SCORES)
    summary = summarize_scores(scores, TRAIN, TARGET, C + 1)
    assert scores.largest == 7
    return summary


def test_means_of_rows_and_targets(found):
    np.testing.assert_allclose(found.train_mean, SCORES.mean(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.train_mean_abs, np.abs(SCORES).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found.target_mean, SCORES.mean(axis=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.target_rms, np.sqrt((SCORES**2).mean(axis=0)), rtol=1e-5)


def test_class_by_class_means(found):
    for a in range(C + 1):
        for b in range(C + 1):
            cell = SCORES[np.ix_(TRAIN == a, TARGET == b)]
            expected = cell.mean() if cell.size else np.nan
            np.testing.assert_allclose(found.classes.influence[a, b], expected, rtol=1e-4, atol=1e-6)
    assert found.classes.train_counts.tolist() == np.bincount(TRAIN, minlength=C + 1).tolist()
    assert found.classes.target_counts.tolist() == np.bincount(TARGET, minlength=C + 1).tolist()


def test_the_strongest_rows_of_each_class(found):
    for c in range(C - 1):
        means = SCORES[:, TARGET == c].mean(axis=1)
        assert found.classes.helpful.indices[c].tolist() == np.argsort(-means)[:10].tolist()
        assert found.classes.harmful.indices[c].tolist() == np.argsort(means)[:10].tolist()
        np.testing.assert_allclose(found.classes.harmful.scores[c], np.sort(means)[:10], rtol=1e-4)
    assert (found.classes.helpful.indices[C - 1 :] == -1).all()


def test_every_score_is_in_a_bin(found):
    assert found.train_step == 1
    assert found.counts.sum() == N * M
    middle = len(found.counts) // 2
    largest = np.abs(SCORES).max()
    assert found.counts[middle + 1 :].sum() == (SCORES > largest * 1e-6).sum()
    assert found.edges[-1] == pytest.approx(largest, rel=1e-6)


def test_bins_hold_every_so_many_rows(monkeypatch):
    monkeypatch.setattr(summaries, "_HISTOGRAM_SCORES", N * M // 4)
    monkeypatch.setattr(summaries, "_BLOCK_BYTES", 8 * M * 7)
    found = summarize_scores(SCORES)
    assert found.counts.sum() == len(range(0, N, found.train_step)) * M
    assert found.train_step == 4


def test_scores_of_zero_are_summarized():
    found = summarize_scores(np.zeros((4, 3)), np.array([0, 1, 0, 1]), np.array([0, 1, 1]))
    assert found.counts.sum() == 12
    assert not found.classes.influence.any()


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (np.zeros((0, 3)), (None, None), "scores have shape [0, 3]"),
        (np.zeros(3), (None, None), "scores have shape [3]"),
        (np.zeros((2, 2)), ([0, -1], [0, 1]), "train_labels"),
        (np.zeros((2, 2)), ([0, 1], [0]), "target_labels have shape [1]"),
    ],
)
def test_what_does_not_fit_is_refused(scores, labels, message):
    with pytest.raises(tracer.InputError, match=re.escape(message)):
        summarize_scores(scores, *labels)


def test_scores_that_are_not_finite_are_refused_by_row():
    scores = np.zeros((5, 2))
    scores[3, 1] = np.nan
    with pytest.raises(tracer.NonFiniteError, match=re.escape("training examples [3]")):
        summarize_scores(scores)
