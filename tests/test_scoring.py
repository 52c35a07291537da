"""Scores on plain arrays against obvious loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import tracer
from tracer.scoring import RunningTopK, add_dot_products, row_weights, self_influence


def test_row_weights():
    slope, norm = np.array([-0.5, 2.0, 0.0, 3.0]), np.array([2.0, 4.0, 1.0, 0.0])
    np.testing.assert_array_equal(row_weights("tracin", slope, norm), slope)
    np.testing.assert_array_equal(row_weights("cosine", slope, norm), [-0.5, 0.25, 0.0, 0.0])
    with pytest.raises(tracer.InputError, match="did you mean 'cosine'"):
        row_weights("cosines", slope, norm)


def test_dot_products_add_up():
    scores = torch.ones(3, 2)
    train, target = torch.randn(3, 5), torch.randn(2, 5)
    add_dot_products(scores, train, target)
    torch.testing.assert_close(scores, 1 + train @ target.T)


def test_self_influence_of_large_and_small_norms():
    found = self_influence(np.float32([1e-10, -1.0]), np.float32([1e-12, 1e15]))
    np.testing.assert_allclose(found, [1e-44, 1e30], rtol=1e-6)


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("tile", [1, 3, 20])
def test_running_top_k(largest, tile):
    scores = torch.randn(17, 4, generator=torch.Generator().manual_seed(0))
    running = RunningTopK(4, 5, largest)
    for start in range(0, 17, tile):
        running.update(start, scores[start : start + tile])
    found = running.result()
    values, indices = torch.topk(scores, 5, dim=0, largest=largest)
    np.testing.assert_array_equal(found.indices, indices.T)
    np.testing.assert_array_equal(found.scores, values.T)


def test_equal_scores_come_in_the_order_of_their_rows():
    running = RunningTopK(1, 4)
    running.update(0, torch.tensor([[1.0], [2.0], [1.0], [2.0]]))
    assert running.result().indices.tolist() == [[1, 3, 0, 2]]
