"""The estimate of wrong labels: on predictions of a known model, and its posterior against a loop."""

from __future__ import annotations

import numpy as np
import pytest

from tracer.errors import InputError
from tracer.report import label_noise
from tracer.report.label_noise import LabelEvidence, estimate_wrong_labels


def sigmoid(value):
    return 1 / (1 + np.exp(-value))


def predictions(rate, num_classes, size, seed, strength=3.0):
    """Calibrated probabilities of a model of some strength, labels of which a share is wrong, and the right labels."""
    rng = np.random.default_rng(seed)
    odds = strength * rng.normal(size=(size, num_classes))
    probabilities = np.exp(odds) / np.exp(odds).sum(1, keepdims=True)
    right = (probabilities.cumsum(1) < rng.random((size, 1))).sum(1).clip(max=num_classes - 1)
    wrong = rng.permutation(size) < round(rate * size)
    labels = np.where(wrong, (right + rng.integers(1, num_classes, size)) % num_classes, right)
    return probabilities, labels, right


@pytest.mark.parametrize("num_classes", [2, 3, 10])
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.2])
def test_the_interval_holds_the_share_of_wrong_labels_also_of_a_weak_model(num_classes, rate):
    held, errors = [], []
    for seed in range(6):
        probabilities, labels, _ = predictions(rate, num_classes, 1500, seed, strength=4.0)
        targets, target_labels, _ = predictions(0.0, num_classes, 400, 100 + seed, strength=4.0)
        found = estimate_wrong_labels(
            LabelEvidence.of_probabilities(labels, probabilities),
            LabelEvidence.of_probabilities(target_labels, targets),
        )
        held.append(found.low <= rate <= found.high)
        errors.append(abs(found.share - rate))
    assert sum(held) >= 5
    assert np.mean(errors) < 0.02


@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_sure_mistakes_of_several_models_may_be_theirs(rate):
    """Models that are surely wrong on some examples, whatever their labels, say little of wrong labels."""

    def sides(share, size, seed):
        probabilities, labels, _ = predictions(share, 3, size, seed, strength=8.0)
        mistaken = np.random.default_rng(seed).random(size) < 0.08
        probabilities[mistaken] = np.roll(probabilities[mistaken], 1, axis=1)
        return LabelEvidence.of_probabilities(labels, probabilities)

    train, held_out = sides(rate, 2000, 0), sides(0.0, 2000, 1)
    one, several = (estimate_wrong_labels(train, held_out, num_models=count) for count in (1, 2))
    assert one.low > rate + 0.03
    assert several.low <= rate + 0.0025 <= several.high and several.share < one.share  # a step of the grid


def test_thresholds_of_confident_learning_would_count_hard_examples_as_wrong():
    probabilities, labels, _ = predictions(0.0, 10, 2000, 0)
    evidence = LabelEvidence.of_probabilities(labels, probabilities)
    assert (~evidence.agrees).mean() > 0.2
    assert estimate_wrong_labels(evidence).share < 0.02


def test_an_estimate_is_shown_in_one_line():
    probabilities, labels, _ = predictions(0.1, 5, 2000, 1)
    shown = repr(estimate_wrong_labels(LabelEvidence.of_probabilities(labels, probabilities)))
    assert "% of 2,000 labels, 95 % interval" in shown and len(shown) < 100


def test_suspects_are_wrong_labels_and_the_suggestion_is_the_right_one():
    probabilities, labels, right = predictions(0.1, 5, 2000, 1, strength=8.0)
    found = estimate_wrong_labels(LabelEvidence.of_probabilities(labels, probabilities))
    wrong = labels != right
    assert wrong[found.suspects].mean() > 0.8
    assert (found.suggested == right)[found.suspects & wrong].mean() > 0.9
    expected, truth = found.confidence.mean(), wrong.mean()
    assert abs(expected - truth) < 0.02


def test_the_posterior_is_that_of_a_loop_over_the_grid(monkeypatch):
    monkeypatch.setattr(label_noise, "_SLOPES", np.array([0.5, 1.0, 2.0]))
    monkeypatch.setattr(label_noise, "_OFFSETS", np.array([-1.0, 0.0, 1.0]))
    monkeypatch.setattr(label_noise, "_NUM_BINS", 10_000)  # a bin for each example
    sides = [predictions(rate, 3, 80, seed) for rate, seed in ((0.2, 0), (0.0, 1))]
    train, held_out = (LabelEvidence.of_probabilities(labels, values) for values, labels, _ in sides)
    rates, posterior, slope, _ = label_noise._posterior(train, held_out, 3)
    shares, total, weighted = label_noise._HELD_OUT_SHARES, np.zeros(len(rates)), 0.0
    for a in (0.5, 1.0, 2.0):
        for b in (-1.0, 0.0, 1.0):
            density = np.exp(-0.5 * np.log(a) ** 2 - 0.5 * (b / 2) ** 2)

            def likelihood(evidence, rate, a=a, b=b):
                right = sigmoid(a * evidence.confidence + b)
                agreed = right * (1 - rate) + (1 - right) * rate / 2
                return np.where(evidence.agrees, agreed, 1 - agreed).prod()

            widths = np.gradient(shares)
            own = sum(
                likelihood(held_out, share) * (1 - share) ** 20 * width
                for share, width in zip(shares, widths, strict=True)
            )
            here = np.array([likelihood(train, rate) for rate in rates]) * own * density
            total += here
            weighted += a * here.sum()
    np.testing.assert_allclose(posterior, total / total.sum(), rtol=1e-3, atol=1e-9)
    assert slope == pytest.approx(weighted / total.sum(), rel=1e-3)


def test_a_correction_widens_the_interval():
    probabilities, labels, _ = predictions(0.2, 4, 800, 3)
    evidence = LabelEvidence.of_probabilities(labels, probabilities)
    rows = np.arange(len(labels))
    memorized = probabilities.copy()
    memorized[rows, labels] += 0.5
    plain = LabelEvidence.of_probabilities(labels, memorized / memorized.sum(1, keepdims=True))
    alone, both = estimate_wrong_labels(evidence), estimate_wrong_labels(evidence, None, plain)
    assert both.share == alone.share
    assert both.low < alone.low
    assert both.high > alone.high


def test_labels_without_relation_to_predictions_are_not_told_apart():
    rng = np.random.default_rng(0)
    probabilities, labels, _ = predictions(0.0, 10, 1000, 0)
    assert LabelEvidence.of_probabilities(labels, probabilities).tells_classes_apart()
    assert not LabelEvidence.of_probabilities(rng.permutation(labels), probabilities).tells_classes_apart()


def test_the_mean_of_models_sums_up_the_probability_of_each_rival():
    parts = [
        LabelEvidence.of_probabilities([0], [values])
        for values in ([0.4, 0.5, 0.1], [0.3, 0.1, 0.6], [0.2, 0.45, 0.35])
    ]
    found = LabelEvidence.mean(parts)
    assert found.own.tolist() == pytest.approx([0.3])
    assert found.rival.tolist() == [1]
    assert found.rival_probability.tolist() == pytest.approx([0.95 / 3])


@pytest.mark.parametrize(
    ("labels", "probabilities"),
    [
        ([0, 1], [[0.5, 0.5]]),
        ([0], [[1.0]]),
        ([0], [[0.9, 0.9]]),
        ([2], [[0.5, 0.5]]),
        ([0], [[np.nan, 1.0]]),
        ([0.5], [[0.5, 0.5]]),
    ],
)
def test_what_is_no_probability_is_refused(labels, probabilities):
    with pytest.raises(InputError, match="train_probabilities"):
        LabelEvidence.of_probabilities(labels, probabilities)
