"""Summaries of scores against loops over the whole matrix, and the estimate of wrong labels."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tracer
from tracer.report import summaries
from tracer.report.health import CALIBRATION, Z, estimate_wrong_labels
from tracer.report.summaries import contradiction_threshold, summarize_scores

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


def class_means(scores, kept=slice(None)):
    """The mean scaled score of each training example over the targets of each class with targets."""
    scaled = scores / np.sqrt((scores**2).mean(axis=0))
    chosen = np.arange(M)[kept]
    return np.stack([scaled[:, chosen[TARGET[chosen] == c]].mean(axis=1) for c in range(C - 1)], axis=1)


def ratios(means):
    return np.maximum(-means.min(axis=1), 0) / np.maximum(means.max(axis=1), 1e-300)


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


def test_harm_over_help_and_the_class_that_is_harmed(found):
    means = class_means(SCORES)
    finite = np.isfinite(found.classes.ratio)
    np.testing.assert_allclose(found.classes.ratio[finite], ratios(means)[finite], rtol=1e-4)
    assert finite.sum() > N / 2
    assert (ratios(means)[~finite] > 1e100).all()
    assert found.classes.harmed.tolist() == means.argmin(axis=1).tolist()


def test_contradicted_rows_stand_out_from_the_lower_half(found):
    logs = np.log(np.clip(ratios(class_means(SCORES)), 1e-3, 1e3))
    low, middle = np.quantile(logs, [0.1, 0.5])
    assert contradiction_threshold(found.classes.ratio) == pytest.approx(
        np.exp(middle + 1.25 * (middle - low)), rel=1e-4
    )
    above = ratios(class_means(SCORES)) > np.exp(middle + 1.25 * (middle - low))
    assert found.classes.contradicted.tolist() == above.tolist()
    assert 0 < above.sum() < N


def test_shares_with_a_part_of_the_targets_left_out(found):
    num_folds = min(10, int(np.bincount(TARGET).min()))
    place = np.array([np.sum(TARGET[:target] == TARGET[target]) for target in range(M)])
    expected = []
    for fold in range(num_folds):
        # each column is scaled by its own root mean square, so leaving out other columns does not change it
        ratio = ratios(class_means(SCORES, place % num_folds != fold))
        expected.append((ratio > contradiction_threshold(ratio)).mean())
    np.testing.assert_allclose(found.classes.fold_shares, expected, atol=1e-9)


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
    assert not found.classes.contradicted.any()


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


def flipped_rows(rate, num_rows=2000, num_targets=200, num_classes=5, seed=0):
    """Scores like those of gradients, similarity times agreement of labels, with a share of wrong labels."""
    rng = np.random.default_rng(seed)
    content, targets = rng.integers(0, num_classes, num_rows), np.arange(num_targets) % num_classes
    labels = content.copy()
    wrong = rng.random(num_rows) < rate
    labels[wrong] = (labels[wrong] + rng.integers(1, num_classes, wrong.sum())) % num_classes
    alike = content[:, None] == targets[None]
    similar = np.where(alike, 1.0, 0.35) * np.exp(0.2 * rng.normal(size=alike.shape))
    agrees = np.where(labels[:, None] == targets[None], 1.0, np.where(alike, -0.8, -0.2))
    return similar * agrees * rng.gamma(1, 1, (num_rows, 1)), labels, targets, wrong, content


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.3])
def test_the_estimate_follows_the_share_of_wrong_labels(rate):
    scores, labels, targets, wrong, content = flipped_rows(rate)
    classes = summarize_scores(scores, labels, targets).classes
    estimate = estimate_wrong_labels(classes)
    assert estimate.low <= wrong.mean() + 0.02
    assert estimate.high >= wrong.mean() - 0.02
    if rate:
        assert classes.contradicted[wrong].mean() > 0.9
        assert classes.contradicted[~wrong].mean() < 0.15
        assert (classes.harmed == content)[wrong].mean() > 0.95


def test_the_estimate_corrects_for_the_calibration_and_its_interval_for_chance():
    scores, labels, targets, _, _ = flipped_rows(0.2)
    classes = summarize_scores(scores, labels, targets).classes
    found = estimate_wrong_labels(classes)
    share, folds = classes.contradicted.mean(), classes.fold_shares
    jackknife = (len(folds) - 1) / len(folds) * ((folds - folds.mean()) ** 2).sum()
    error = np.sqrt(share * (1 - share) / len(labels) + jackknife)
    assert found.error == pytest.approx(error)
    alpha, beta = CALIBRATION.false_positive, CALIBRATION.detected
    assert found.share == pytest.approx((share - alpha) / (beta - alpha))
    high_alpha, high_beta = CALIBRATION.false_positive_range[1], CALIBRATION.detected_range[1]
    assert found.low == pytest.approx((share - Z * error - high_alpha) / (high_beta - high_alpha))
    assert found.low < found.share < found.high
