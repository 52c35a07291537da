"""Every projector is the same linear map for every form and shape of a gradient, leading and trailing ones included."""

import pytest
import torch
from projection_cases import OnlyDense, all_forms, assert_is_linear_map, matrix_of, normal
from torch import nn

from tracer.gradients.layers import conv_weight_gradient
from tracer.projection import make_projector

SHAPES = [
    (),
    (1,),
    (7,),
    (1, 1),
    (1, 6),
    (6, 1),
    (1, 1, 16),
    (1, 5, 4),
    (5, 1, 4),
    (4, 5, 1),
    (1, 1, 1, 6),
    (1, 1, 6, 1),
    (1, 3, 2, 2),
    (3, 1, 2, 1),
    (2, 3, 1, 2),
]
KINDS = ["sketch", "rademacher", "gaussian", "factored", "none"]
CONVOLUTIONS = {
    "one by one": (nn.Conv2d(1, 1, 1), (5, 5)),
    "one output": (nn.Conv2d(5, 1, (1, 3), padding=1), (5, 5)),
    "one input": (nn.Conv2d(1, 4, (3, 1)), (5, 5)),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4), (7,)),
    "one output, groups": (nn.Conv1d(2, 2, 1, groups=2), (7,)),
    "three dimensions": (nn.Conv3d(2, 1, (1, 2, 1)), (3, 3, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_forms_go_through_one_linear_map(kind, shape):
    for proj_dim in (6, 64):  # fewer and more buckets than entries
        projector = make_projector(kind, {"other": (3, 2), "weight": shape}, proj_dim, seed=1)
        for gradient in all_forms(shape).values():
            assert_is_linear_map(projector, "weight", gradient)
            assert_is_linear_map(projector, "weight", gradient.scaled(normal(*shape, seed=5)))
        assert_is_linear_map(projector, "weight", OnlyDense(normal(6, *shape)).fold(2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_go_through_the_map_of_built_gradients(kind, name):
    module, size = CONVOLUTIONS[name]
    module = module.double()
    x = normal(3, module.in_channels, *size)
    gradient = conv_weight_gradient(module, x, normal(*module(x).shape, seed=1))
    for proj_dim in (6, 64):
        projector = make_projector(kind, {"weight": tuple(module.weight.shape)}, proj_dim, seed=1)
        assert_is_linear_map(projector, "weight", gradient)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_sketch_gives_each_entry_one_bucket_and_few_entries_one_each(shape):
    for proj_dim in (6, 64):
        projector = make_projector("sketch", {"weight": shape}, proj_dim, seed=1)
        matrix = matrix_of(projector, "weight")
        assert ((matrix != 0).sum(1) == 1).all()
        assert (matrix.abs().sum(1) == 1).all()
        if len(matrix) <= proj_dim:
            torch.testing.assert_close(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS[:-1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inner_products_are_unbiased_over_seeds(kind, shape):
    count, proj_dim, total = 300, 8, 0
    for seed in range(count):
        matrix = matrix_of(make_projector(kind, {"weight": shape}, proj_dim, seed), "weight")
        total = total + matrix @ matrix.T
    off = total / count - torch.eye(len(total), dtype=torch.float64)
    # An entry of PPᵀ has a variance of about 1/k; of a factored one, whose sides may be single numbers, at most 1.
    bound = 5.5 * ((2.0 if kind == "gaussian" else 1.0) / (count * (1 if kind == "factored" else proj_dim))) ** 0.5
    assert off.abs().max() < bound
