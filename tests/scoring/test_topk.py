"""The running top-k selection against torch.topk and a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scoring_cases import strongest

from tracer.errors import NonFiniteError
from tracer.scoring.topk import RunningTopK


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


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("tile", [1, 3, 64])
def test_ties_within_and_across_tiles(largest, tile):
    scores = torch.randint(0, 3, (64, 5), generator=torch.Generator().manual_seed(0)).float()
    running = RunningTopK(5, 9, largest)
    for start in range(0, 64, tile):
        running.update(start, scores[start : start + tile])
    kind = "proponents" if largest else "opponents"
    np.testing.assert_array_equal(running.result().indices, strongest(scores.numpy(), 9, kind))


def test_nan_scores_are_an_error():
    running = RunningTopK(2, 1)
    running.update(0, torch.tensor([[float("inf"), 1.0]]))
    with pytest.raises(NonFiniteError, match="Scores of training examples 5 to 6 are NaN"):
        running.update(5, torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))
