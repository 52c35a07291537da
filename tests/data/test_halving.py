"""Batches that do not fit into memory: halves give the same, and no size that failed is tried again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tracer import BatchError, attribute
from tracer.data.halving import Halving


class Limited:
    """A step with memory for so many values."""

    def __init__(self, limit):
        self.limit, self.seen, self.failures = limit, [], []

    def __call__(self, batch, inds):
        size = batch["x"].numel()
        if size > self.limit:
            self.failures.append(size)
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert batch["x"][:, 0].tolist() == inds.tolist() and len(batch["name"]) == len(inds)
        self.seen += inds.tolist()


def batch_of(inds, width=4):
    x = torch.zeros(len(inds), width)
    x[:, 0] = torch.tensor(inds)
    return {"x": x, "name": [str(each) for each in inds]}, np.array(inds)


def test_halves_hold_every_example_once_and_in_order():
    step = Limited(12)
    run = Halving(step)
    run(*batch_of([5, 3, 8, 1, 9, 2, 7]))
    assert step.seen == [5, 3, 8, 1, 9, 2, 7] and step.failures == [28, 16]


def test_a_batch_without_tensors_is_passed_on_for_its_own_error():
    def step(batch, inds):
        raise BatchError("of type object")

    with pytest.raises(BatchError, match="of type object"):
        Halving(step)(object(), np.arange(3))


def test_sizes_that_failed_are_not_tried_again():
    step = Limited(12)
    run = Halving(step)
    for start in range(0, 80, 8):
        run(*batch_of(list(range(start, start + 8))))
    assert step.seen == list(range(80)) and step.failures == [32, 16]


def test_an_example_that_does_not_fit_alone_is_named():
    with pytest.raises(BatchError, match="example 7 alone, which has 40 values"):
        Halving(Limited(12))(*batch_of([7, 8], width=40))


class Hungry(nn.Linear):
    """A layer with memory for three examples."""

    def forward(self, x):
        if len(x) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x)


def test_one_call_finds_the_batch_size_that_fits(tmp_path):
    torch.manual_seed(0)
    x, y = torch.randn(20, 5), torch.arange(20) % 3
    found = []
    for number, layer in enumerate((Hungry(5, 3), nn.Linear(5, 3))):
        torch.manual_seed(1)
        nn.init.normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        checkpoints = [(layer.state_dict(), 0.1)]
        options = {"save_dir": tmp_path / str(number), "batch_size": 16}
        found.append(attribute(layer, "image_classification", (x, y), (x[:7], y[:7]), checkpoints, **options).scores)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-5)
