"""Planted examples against scikit-learn's average precision, and cardinality against a loop."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

import tracer
from tracer import metrics

RNG = np.random.default_rng(0)
SCORES = RNG.normal(size=(60, 7))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("per_target", [False, True])
def test_areas_are_those_of_scikit_learn(whole, per_target):
    scores = np.round(SCORES) if whole else SCORES  # rounded scores have ties
    planted = RNG.random((60, 7) if per_target else 60) < 0.2
    found = metrics.planted_detection(scores, planted)
    columns = planted.T if per_target else [planted] * 7
    expected = [average_precision_score(column, each) for column, each in zip(columns, scores.T, strict=True)]
    np.testing.assert_allclose(found.per_target, expected, atol=1e-12)
    assert found.mean == pytest.approx(np.mean(expected))
    assert found.chance == pytest.approx(planted.mean())


def test_scores_that_put_planted_examples_first_have_an_area_of_one():
    planted = np.arange(60) < 5
    assert metrics.planted_detection(SCORES + 100 * planted[:, None], planted).per_target.tolist() == [1.0] * 7
    assert metrics.planted_detection(np.ones((60, 7)), planted).mean == pytest.approx(5 / 60)


@pytest.mark.parametrize("planted", [np.zeros(60), np.ones(60), np.ones((60, 7)), np.ones(59), np.ones((60, 6))])
def test_what_cannot_be_measured_is_refused(planted):
    with pytest.raises(tracer.InputError, match="both kinds of examples|must agree in"):
        metrics.planted_detection(SCORES, planted)


def test_cardinality_counts_different_examples():
    indices = np.array([RNG.permutation(30)[:4] for _ in range(12)])
    found, counted = metrics.top_cardinality(indices, 30), Counter(indices.ravel().tolist())
    assert (found.cardinality, found.share) == (len(counted), len(counted) / 30)
    assert found.most_common == max(counted.values()) / 12
    same = metrics.top_cardinality(np.tile(np.arange(4), (12, 1)), 100)
    assert (same.cardinality, same.share, same.most_common) == (4, 4 / 48, 1.0)


def test_an_index_out_of_range_is_refused():
    with pytest.raises(tracer.InputError, match="from 0 to 3"):
        metrics.top_cardinality([[0, 4]], 4)
