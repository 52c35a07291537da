"""The projector that projects nothing."""

import pytest
import torch
from projection_cases import all_forms, dense, oracle_rows

from tracer.projection.exact import ExactProjector


@pytest.mark.parametrize("form", all_forms((3, 2)))
def test_features_are_the_gradients(form):
    gradient = all_forms((13, 7))[form]
    result = ExactProjector({"weight": (13, 7)}).project({"weight": gradient})
    torch.testing.assert_close(result.features, oracle_rows(gradient))
    torch.testing.assert_close(result.squared_norm, oracle_rows(gradient).square().sum(1))


def test_parameters_lie_in_the_order_of_shapes_and_missing_ones_are_zeros():
    projector = ExactProjector({"a": (2,), "b": (2, 2), "c": ()})
    a, c = dense((2,)), dense(())
    features = projector.project({"c": c, "a": a}).features
    assert projector.dim == 7
    assert torch.equal(features, torch.cat([a.values, torch.zeros(5, 4), c.values[:, None]], 1))


def test_proj_dim_and_seed_change_nothing():
    one, other = ExactProjector({"a": (2,)}, 0, 1), ExactProjector({"a": (2,)}, "many", 2)
    assert one.dim == other.dim == 2
    assert one.settings() == other.settings() == {"kind": "none", "version": 1}


def test_half_precision_becomes_float32():
    gradient = all_forms((13, 7), dtype=torch.bfloat16)["sequence"]
    features = ExactProjector({"weight": (13, 7)}).project({"weight": gradient}).features
    torch.testing.assert_close(features, oracle_rows(gradient).float())
