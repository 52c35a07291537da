"""Brittleness and tail-patch with trainings that are known in closed form, and with a real one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tracer
from tracer import metrics

NUM_ROWS, NUM_TARGETS = 12, 5


class Training:
    """Margins that are sums over the rows that are kept, and a record of what was asked."""

    def __init__(self):
        generator = np.random.default_rng(0)
        self.effects = generator.normal(size=(NUM_ROWS, NUM_TARGETS))
        self.bias = 2.5 - self.effects.sum(axis=0)
        self.bias[3] -= 4  # wrong with all rows
        self.proponents = np.argsort(-self.effects, axis=0)[:6].T
        self.asked = []

    def __call__(self, keep):
        self.asked.append(keep.copy())
        return keep @ self.effects + self.bias

    def loop(self, counts):
        """Margins [M, C] one training at a time."""
        margins = np.full((NUM_TARGETS, len(counts)), np.nan)
        for target in (0, 1, 2, 4):
            for place, count in enumerate(counts):
                kept = [row for row in range(NUM_ROWS) if row not in self.proponents[target][:count]]
                margins[target, place] = self.effects[kept, target].sum() + self.bias[target]
        return margins


def flip(training, **options):
    return metrics.brittleness(training.proponents, training, train_set_size=NUM_ROWS, **options)


def test_margins_after_removals():
    training = Training()
    found = flip(training, counts=[1, 3, 6])
    np.testing.assert_allclose(found.margins, training.loop([1, 3, 6]), atol=1e-12)
    np.testing.assert_allclose(found.initial, [2.5, 2.5, 2.5, -1.5, 2.5])


def test_smallest_counts_and_shares_follow_from_margins():
    training = Training()
    found = flip(training, counts=range(1, 7))
    margins = training.loop(range(1, 7))
    expected = [
        np.nan if target == 3 else next((n + 1 for n in range(6) if margins[target, n] <= 0), np.inf)
        for target in range(NUM_TARGETS)
    ]
    np.testing.assert_array_equal(found.smallest, expected)
    np.testing.assert_allclose(found.share_flipped, (margins[[0, 1, 2, 4]] <= 0).mean(axis=0))


def test_a_target_that_nothing_flips_is_infinite():
    found = metrics.brittleness([[0], [1]], lambda keep: keep[:, :2] + [1.0, -0.5], train_set_size=3)
    np.testing.assert_array_equal(found.smallest, [np.inf, 1])
    assert found.share_flipped.tolist() == [0.5]


def test_flips_that_more_rows_undo_are_found():
    def predict(keep):  # removing two rows flips, removing three does not
        return np.where((~keep).sum(axis=1, keepdims=True) == 2, -1.0, 1.0)

    found = metrics.brittleness([[4, 2, 0]], predict, train_set_size=5)
    assert found.smallest.tolist() == [2]
    assert found.share_flipped.tolist() == [0, 1, 0]


def test_a_margin_of_zero_is_flipped():
    found = metrics.brittleness([[0]], lambda keep: keep[:, :1] * 1.0, train_set_size=2)
    assert found.smallest.tolist() == [1]


def test_one_call_for_all_rows_and_one_for_all_removals():
    training = Training()
    flip(training, counts=[1, 2])
    assert [len(keep) for keep in training.asked] == [1, 8]  # target 3 is wrong already
    assert training.asked[0].all() and training.asked[0].dtype == np.bool_


def test_batches_give_the_same():
    training = Training()
    whole, parts = flip(training), flip(training, batch_size=5)
    # Some processors sum a smaller batch in another order, so the last bit may differ.
    np.testing.assert_allclose(whole.margins, parts.margins, rtol=1e-13)
    assert [len(keep) for keep in training.asked] == [1, 16, 1, 5, 5, 5, 1]


@pytest.mark.parametrize(("k", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_default_counts_are_powers_of_two_and_all(k, counts):
    proponents = [np.arange(k)]
    found = metrics.brittleness(proponents, lambda keep: torch.ones(len(keep), 1), train_set_size=9)
    assert found.counts.tolist() == counts


def test_counts_are_sorted_and_each_tried_once():
    found = metrics.brittleness([range(9)], lambda keep: keep[:, :1] + 1.0, train_set_size=9, counts=[8, 1, 8])
    assert found.counts.tolist() == [1, 8]


def test_brittleness_errors():
    training = Training()
    with pytest.raises(tracer.InputError, match="counts is 7; expected 1 to 6"):
        flip(training, counts=[1, 7])
    with pytest.raises(tracer.InputError, match="counts must name at least one"):
        flip(training, counts=[])
    with pytest.raises(tracer.InputError, match="batch_size is 0; expected 1 or more"):
        flip(training, batch_size=0)
    with pytest.raises(tracer.InputError, match="must be row indices from 0 to 8"):
        metrics.brittleness(training.proponents, training, train_set_size=9)
    with pytest.raises(tracer.InputError, match="None of 1 targets has a positive margin with all rows"):
        metrics.brittleness([[0]], lambda keep: keep[:, :1] - 1.0, train_set_size=2)
    with pytest.raises(tracer.InputError, match=r"predict must return margins \[R, M\] = \[1, 1\], .* got \[1, 2\]"):
        metrics.brittleness([[0]], lambda keep: keep * 1.0, train_set_size=2)
    with pytest.raises(tracer.InputError, match=r"the margins that predict returns \[R, M\] has 1 NaN"):
        metrics.brittleness([[0]], lambda keep: [[np.nan]], train_set_size=2)


class Steps:
    """Changes that differ for each row and target, and a record of what was asked."""

    def __init__(self):
        self.gains = np.random.default_rng(1).normal(size=(NUM_ROWS, NUM_TARGETS))
        self.proponents = np.array([[0, 1, 2], [2, 0, 5], [7, 2, 1], [8, 9, 0], [5, 4, 3]])
        self.asked = []

    def __call__(self, rows, targets):
        self.asked.append((rows.tolist(), targets.tolist()))
        return self.gains[rows][:, targets].prod(axis=0)  # not additive, so together is not the sum of alone


def test_a_step_on_each_proponent():
    steps = Steps()
    found = metrics.tail_patch(steps.proponents, steps, train_set_size=NUM_ROWS)
    expected = [[steps.gains[row, target] for row in rows] for target, rows in enumerate(steps.proponents)]
    np.testing.assert_allclose(found.changes, expected)
    np.testing.assert_allclose(found.per_target, np.mean(expected, axis=1))
    assert found.mean == pytest.approx(np.mean(expected))


def test_rows_that_targets_share_are_stepped_on_once():
    steps = Steps()
    metrics.tail_patch(steps.proponents, steps, train_set_size=NUM_ROWS)
    assert [rows for rows, _ in steps.asked] == [[row] for row in (0, 1, 2, 3, 4, 5, 7, 8, 9)]
    assert steps.asked[2] == ([2], [0, 1, 2])


def test_one_step_on_all_proponents():
    steps = Steps()
    found = metrics.tail_patch(steps.proponents, steps, train_set_size=NUM_ROWS, together=True)
    expected = [steps.gains[rows, target].prod() for target, rows in enumerate(steps.proponents)]
    np.testing.assert_allclose(found.changes, np.array(expected)[:, None])
    np.testing.assert_allclose(found.per_target, expected)
    assert steps.asked[1] == ([2, 0, 5], [1])


def test_tail_patch_errors():
    with pytest.raises(tracer.InputError, match="step must return a change for each of its 2 targets, got 1"):
        metrics.tail_patch([[0], [0]], lambda rows, targets: [1.0], train_set_size=2)
    with pytest.raises(tracer.InputError, match=r"the changes that step returns \[t\] has 1 NaN or infinite value"):
        metrics.tail_patch([[0]], lambda rows, targets: [np.inf], train_set_size=2)
    with pytest.raises(tracer.InputError, match="must be row indices from 0 to 1, got 2"):
        metrics.tail_patch([[2]], lambda rows, targets: [1.0], train_set_size=2)


def test_tail_patch_of_a_real_step_is_the_first_order_change():
    generator = torch.Generator().manual_seed(0)
    train_x, target_x = torch.randn(8, 3, generator=generator), torch.randn(4, 3, generator=generator)
    weight, rate = torch.randn(3, generator=generator), 1e-3

    def step(rows, targets):
        moved = weight + rate * train_x[rows].mean(0)  # the loss of a row is minus its output
        return target_x[targets] @ (moved - weight)

    scores = train_x @ target_x.T
    top = scores.topk(2, dim=0)
    found = metrics.tail_patch(top.indices.T, step, train_set_size=8)
    np.testing.assert_allclose(found.changes, rate * top.values.T, rtol=1e-2)
