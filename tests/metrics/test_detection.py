"""Finding mislabelled rows against scikit-learn and against random orders of tied rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import tracer
from tracer import metrics


def data(num_rows=40, num_wrong=9, whole=False):
    generator = np.random.default_rng(0)
    wrong = generator.permutation(num_rows) < num_wrong
    scores = generator.normal(size=num_rows) + wrong
    return (np.round(scores) if whole else scores), wrong


def loop_curve(scores, wrong):
    """The share found when rows are checked one by one."""
    found = [0.0]
    for row in sorted(range(len(scores)), key=lambda row: -scores[row]):
        found.append(found[-1] + wrong[row] / wrong.sum())
    return np.array(found)


def test_the_curve_of_distinct_scores():
    scores, wrong = data()
    np.testing.assert_allclose(metrics.mislabel_detection(scores, wrong).curve, loop_curve(scores, wrong), atol=1e-12)


def test_the_curve_with_ties_is_the_mean_over_random_orders():
    scores, wrong = data(num_rows=12, num_wrong=4, whole=True)
    assert len(np.unique(scores)) < 6
    generator = np.random.default_rng(1)
    orders = [generator.permutation(12) for _ in range(4000)]  # the order of rows decides between equal scores
    expected = np.mean([loop_curve(scores[order], wrong[order]) for order in orders], axis=0)
    np.testing.assert_allclose(metrics.mislabel_detection(scores, wrong).curve, expected, atol=0.02)  # 5 deviations


def test_the_order_of_rows_does_not_matter():
    scores, wrong = data(whole=True)
    order = np.random.default_rng(2).permutation(40)
    one, other = metrics.mislabel_detection(scores, wrong), metrics.mislabel_detection(scores[order], wrong[order])
    np.testing.assert_array_equal(one.curve, other.curve)


@pytest.mark.parametrize("whole", [False, True])
def test_roc_auc_is_that_of_scikit_learn(whole):
    scores, wrong = data(whole=whole)
    assert metrics.mislabel_detection(scores, wrong).roc_auc == pytest.approx(roc_auc_score(wrong, scores), abs=1e-12)


@pytest.mark.parametrize("whole", [False, True])
def test_the_area_is_that_under_the_curve_and_follows_from_roc_auc(whole):
    scores, wrong = data(whole=whole)
    found = metrics.mislabel_detection(scores, wrong)
    share = wrong.mean()
    assert found.auc == pytest.approx(np.trapezoid(found.curve, dx=1 / 40))
    assert found.auc == pytest.approx(share / 2 + (1 - share) * found.roc_auc)


def test_best_worst_and_constant_scores():
    _, wrong = data()
    areas = [metrics.mislabel_detection(scores, wrong) for scores in (wrong, ~wrong, np.zeros(40))]
    assert [found.roc_auc for found in areas] == [1, 0, 0.5]
    assert [found.auc for found in areas] == pytest.approx([1 - 9 / 80, 9 / 80, 0.5])


def test_precision_at_k():
    scores, wrong = data()
    found = metrics.mislabel_detection(scores, wrong)
    order = np.argsort(-scores)
    for k in (1, 7, 40):
        assert found.precision_at(k) == pytest.approx(wrong[order[:k]].mean())


def test_precision_among_ties_is_the_expected_one():
    found = metrics.mislabel_detection([1.0, 1.0, 1.0, 0.0], [True, False, False, True])
    assert found.precision_at(1) == pytest.approx(1 / 3)


def test_recall_at_a_share_of_rows():
    scores, wrong = data()
    found = metrics.mislabel_detection(scores, wrong)
    order = np.argsort(-scores)
    for share, checked in ((0, 0), (0.1, 4), (0.26, 10), (1, 40)):
        assert found.recall_at(share) == pytest.approx(wrong[order[:checked]].sum() / 9)


def test_shares_are_rounded_to_the_nearest_row():
    found = metrics.mislabel_detection([3.0, 2.0, 1.0], [False, True, False])
    assert [found.recall_at(share) for share in (0.45, 0.6)] == [0, 1]


def test_tensors_and_numbers_for_labels():
    scores, wrong = data()
    found = metrics.mislabel_detection(torch.tensor(scores), torch.tensor(wrong).int())
    np.testing.assert_array_equal(found.curve, metrics.mislabel_detection(scores, wrong).curve)


def test_errors_say_what_is_wrong():
    scores, wrong = data()
    with pytest.raises(
        tracer.InputError, match=r"scores \[N\] and is_mislabelled \[N\] must agree in N, got 40 and 39"
    ):
        metrics.mislabel_detection(scores, wrong[:39])
    for none, count in ((wrong & False, 0), (wrong | True, 40)):
        with pytest.raises(tracer.InputError, match=f"must have both kinds of rows, got {count} of 40 mislabelled"):
            metrics.mislabel_detection(scores, none)
    with pytest.raises(tracer.InputError, match=r"scores \[N\] has 40 NaN or infinite values"):
        metrics.mislabel_detection(scores * np.nan, wrong)
    with pytest.raises(tracer.InputError, match=r"is_mislabelled \[N\] must be True/False or 0/1, got 2"):
        metrics.mislabel_detection(scores, wrong + 1)
    found = metrics.mislabel_detection(scores, wrong)
    with pytest.raises(tracer.InputError, match="k is 41; expected 1 to 40"):
        found.precision_at(41)
    with pytest.raises(tracer.InputError, match="share must be from 0 to 1, got 1.5"):
        found.recall_at(1.5)
