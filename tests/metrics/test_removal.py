"""Leave-one-out and leave-k-out correlations against loops over scipy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import tracer
from tracer import metrics


def loop_correlations(scores, groups, changes):
    """Pearson's and Spearman's correlation of each target, with sums of scores row by row."""
    predicted = np.array([[sum(scores[row, m] for row in rows) for m in range(scores.shape[1])] for rows in groups])
    columns = [(predicted[:, m], changes[:, m]) for m in range(scores.shape[1])]
    return [[correlation(*pair).statistic for pair in columns] for correlation in (stats.pearsonr, stats.spearmanr)]


def data(num_removals=11, num_rows=20, num_targets=4):
    generator = np.random.default_rng(0)
    return generator.normal(size=(num_rows, num_targets)), generator.normal(size=(num_removals, num_targets)), generator


def assert_correlations(found, expected):
    np.testing.assert_allclose(found.pearson_per_target, expected[0], atol=1e-12)
    np.testing.assert_allclose(found.spearman_per_target, expected[1], atol=1e-12)
    assert found.pearson == pytest.approx(np.mean(expected[0]))
    assert found.spearman == pytest.approx(np.mean(expected[1]))


def test_leave_one_out():
    scores, changes, generator = data()
    rows = generator.permutation(20)[:11]
    expected = loop_correlations(scores, rows[:, None], changes)
    for removed in (rows, rows.tolist(), torch.tensor(rows), rows[:, None]):
        assert_correlations(metrics.removal_correlation(scores, removed, changes), expected)


def test_leave_k_out_by_equally_many_rows():
    scores, changes, generator = data()
    groups = np.array([generator.permutation(20)[:3] for _ in range(11)])
    expected = loop_correlations(scores, groups, changes)
    for removed in (groups, groups.tolist(), torch.tensor(groups), list(torch.tensor(groups))):
        assert_correlations(metrics.removal_correlation(scores, removed, changes), expected)


def test_leave_k_out_by_lists_of_different_length_or_masks():
    scores, changes, generator = data()
    groups = [generator.permutation(20)[: 1 + index] for index in range(11)]
    masks = np.array([np.isin(np.arange(20), rows) for rows in groups])
    expected = loop_correlations(scores, groups, changes)
    for removed in (groups, tuple(group.tolist() for group in groups), masks, masks.tolist(), torch.tensor(masks)):
        assert_correlations(metrics.removal_correlation(scores, removed, changes), expected)


def test_rows_that_raised_the_output_correlate_positively():
    scores = np.array([[2.0], [1.0], [-1.0]])
    with_all, without = 10.0, np.array([[8.0], [9.0], [11.0]])  # what positive scores promise
    assert metrics.removal_correlation(scores, [0, 1, 2], with_all - without).pearson == pytest.approx(1)


def test_constant_predictions_count_as_zero():
    scores, changes, _ = data()
    scores[:, 1] = 0.1
    found = metrics.removal_correlation(scores, np.arange(11), changes)
    assert found.pearson_per_target[1] == found.spearman_per_target[1] == 0
    pairs = np.array([[row, (row + 1) % 20] for row in range(11)])
    assert metrics.removal_correlation(scores, pairs, changes).pearson_per_target[1] == 0


def test_one_large_score_does_not_make_others_rounding():
    scores, changes, _ = data()
    scores[15] = 1e18  # in no removal
    expected = loop_correlations(scores, np.arange(11)[:, None], changes)
    for removed in (np.arange(11), np.eye(11, 20, dtype=bool)):
        assert_correlations(metrics.removal_correlation(scores, removed, changes), expected)


def test_targets_with_constant_changes_are_left_out():
    scores, changes, _ = data()
    changes[:, 0] = 3
    scores[:, 0] = 5  # constant predictions do not make it a 0
    found = metrics.removal_correlation(scores, np.arange(11), changes)
    assert np.isnan(found.pearson_per_target[0]) and np.isnan(found.spearman_per_target[0])
    alone = metrics.removal_correlation(scores[:, 1:], np.arange(11), changes[:, 1:])
    assert (found.pearson, found.spearman) == (alone.pearson, alone.spearman)


def test_an_error_when_all_changes_are_constant():
    scores, changes, _ = data()
    with pytest.raises(tracer.InputError, match="The correlation is defined for none of 4 targets: all removals"):
        metrics.removal_correlation(scores, np.arange(11), np.ones_like(changes))


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (np.arange(10), r"removed \[R\] and changes \[R, M\] must agree in R, got 10 and 11"),
        (np.arange(10, 21), r"removed\[10\] \[k\] must be row indices from 0 to 19, got 20"),
        ([[0, 1]] * 10 + [[3, 3]], r"removed\[10\] names a row twice. Masks of 0 and 1 must be booleans"),
        (np.eye(11, 20, dtype=int), r"removed\[0\] names a row twice. Masks of 0 and 1 must be booleans"),
        (np.ones((11, 19), bool), r"removed\[0\] \[N\] and scores \[N, M\] must agree in N, got 19 and 20"),
        (np.eye(11, 20, k=15, dtype=bool), r"removed\[5\] leaves no row out"),
        (np.ones(20, bool), r"removed must be masks \[R, N\], one for each removal, got one of shape \[20\]"),
        ([[0]] * 10 + [[]], r"removed\[10\] must be \[k\] and not empty"),
        ([], r"removed must be \[R\] and not empty"),
        (np.zeros((1, 1, 1), int), r"removed must be \[R\] and not empty, got shape \[1, 1, 1\]"),
        (np.arange(11.0), r"removed\[0\] \[k\] must hold row indices, integers, got dtype float64"),
        (np.array(["a"] * 11), r"removed\[0\] \[k\] must hold row indices"),
    ],
)
def test_errors_say_what_is_wrong_with_removals(removed, message):
    scores, changes, _ = data()
    with pytest.raises((tracer.InputError, tracer.InputTypeError), match=message):
        metrics.removal_correlation(scores, removed, changes)


def test_errors_say_what_is_wrong_with_changes():
    scores, changes, _ = data()
    with pytest.raises(tracer.InputError, match=r"scores \[N, M\] and changes \[R, M\] must agree in M, got 4 and 3"):
        metrics.removal_correlation(scores, np.arange(11), changes[:, :3])
    with pytest.raises(tracer.InputError, match="at least 2 removals"):
        metrics.removal_correlation(scores, [0], changes[:1])
    with pytest.raises(tracer.InputError, match=r"changes \[R, M\] has 4 NaN or infinite values of 44"):
        metrics.removal_correlation(scores, np.arange(11), np.where(np.arange(11)[:, None] == 2, np.nan, changes))
