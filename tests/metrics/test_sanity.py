"""Class agreement and the randomization check against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import tracer
from tracer import metrics


def data():
    generator = np.random.default_rng(0)
    indices = np.array([generator.permutation(30)[:4] for _ in range(7)])
    return indices, generator.integers(0, 3, size=30), generator.integers(0, 3, size=7)


def test_class_agreement():
    indices, train_labels, target_labels = data()
    expected = [
        sum(train_labels[row] == target_labels[target] for row in rows) / 4 for target, rows in enumerate(indices)
    ]
    found = metrics.class_agreement(indices, train_labels, target_labels)
    np.testing.assert_allclose(found.per_target, expected)
    assert found.mean == pytest.approx(np.mean(expected))


def test_chance_is_the_agreement_of_all_rows():
    _, train_labels, target_labels = data()
    everything = np.tile(np.arange(30), (7, 1))
    found = metrics.class_agreement(everything, train_labels, target_labels)
    assert found.chance == pytest.approx(found.mean)
    unseen = metrics.class_agreement(everything, train_labels, target_labels * 0 + 9)
    assert unseen.chance == unseen.mean == 0


def test_class_agreement_of_texts_and_tensors():
    indices, train_labels, target_labels = data()
    expected = metrics.class_agreement(indices, train_labels, target_labels)
    names = np.array(["cat", "dog", "bird"])
    for same in (
        (indices, names[train_labels], names[target_labels].tolist()),
        (torch.tensor(indices), torch.tensor(train_labels), torch.tensor(target_labels)),
    ):
        found = metrics.class_agreement(*same)
        np.testing.assert_array_equal(found.per_target, expected.per_target)
        assert found.chance == pytest.approx(expected.chance)


def test_class_agreement_errors():
    indices, train_labels, target_labels = data()
    with pytest.raises(tracer.InputTypeError, match=r"train_labels \[N\] must hold real numbers, got dtype <U"):
        metrics.class_agreement(indices, train_labels.astype(str), target_labels)
    with pytest.raises(
        tracer.InputError, match=r"indices \[M, k\] and target_labels \[M\] must agree in M, got 7 and 6"
    ):
        metrics.class_agreement(indices, train_labels, target_labels[:6])
    with pytest.raises(tracer.InputError, match="must be row indices from 0 to 19"):
        metrics.class_agreement(indices, train_labels[:20], target_labels)
    with pytest.raises(tracer.InputError, match="must name each row once"):
        metrics.class_agreement(indices * 0, train_labels, target_labels)


def test_randomization_check():
    generator = np.random.default_rng(1)
    scores = generator.normal(size=(25, 6))
    randomized = scores * [1, -1, 0, 1, -1, 0] + generator.normal(size=(25, 6))
    expected = [stats.spearmanr(scores[:, m], randomized[:, m]).statistic for m in range(6)]
    found = metrics.randomization_check(scores, randomized)
    np.testing.assert_allclose(found.per_target, expected, atol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.mean_absolute == pytest.approx(np.mean(np.abs(expected)))


def test_unrelated_scores_have_the_mean_absolute_value_that_is_documented():
    found = metrics.randomization_check(*np.random.default_rng(2).normal(size=(2, 400, 500)))
    assert found.mean_absolute == pytest.approx(0.8 / 20, rel=0.15)  # 4 standard errors of a mean of 500
    assert abs(found.mean) < 0.01


def test_targets_of_constant_scores_are_left_out():
    scores, randomized = np.random.default_rng(3).normal(size=(2, 9, 3))
    scores[:, 0], randomized[:, 2] = 1, 2
    found = metrics.randomization_check(scores, randomized)
    assert np.isnan(found.per_target).tolist() == [True, False, True]
    assert found.mean == found.per_target[1]


def test_randomization_check_errors():
    scores = np.random.default_rng(4).normal(size=(9, 3))
    with pytest.raises(tracer.InputError, match=r"must be \[N, M\] alike .* got \[9, 3\] and \[9, 2\]"):
        metrics.randomization_check(scores, scores[:, :2])
    with pytest.raises(tracer.InputError, match="with N of at least 2"):
        metrics.randomization_check(scores[:1], scores[:1])
    with pytest.raises(tracer.InputError, match="defined for none of 3 targets: the scores of one of the models"):
        metrics.randomization_check(scores, np.ones_like(scores))
    with pytest.raises(tracer.InputError, match=r"randomized \[N, M\] has 27 NaN or infinite values"):
        metrics.randomization_check(scores, scores * np.nan)
