"""The registry, and what every projector checks before it projects."""

import pytest
import torch
from projection_cases import dense, outer

import tracer.projection
from tracer.errors import InputError, InputTypeError
from tracer.gradients.per_sample import DenseGradient
from tracer.projection import Projector, make_projector, projector_kinds, register_projector, row_blocks

SHAPES = {"weight": (4, 6), "bias": (4,)}
RANDOM_KINDS = ["sketch", "rademacher", "gaussian", "factored"]


@pytest.fixture
def kinds(monkeypatch):
    monkeypatch.setattr(tracer.projection, "_KINDS", dict(tracer.projection._KINDS))


@pytest.mark.parametrize("kind", [*RANDOM_KINDS, "none"])
def test_every_kind_projects_a_batch(kind):
    projector = make_projector(kind, SHAPES, 16, 0, "cpu")
    result = projector.project({"weight": outer((4, 6), dtype=torch.float32), "bias": dense((4,), dtype=torch.float32)})
    assert projector.kind == kind
    assert result.features.shape == (5, projector.dim)
    assert result.features.dtype == torch.float32
    assert result.squared_norm.dtype == torch.float64


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_settings_hold_what_decides_the_numbers(kind):
    assert make_projector(kind, SHAPES, 16, 5).settings() == {"kind": kind, "version": 1, "proj_dim": 16, "seed": 5}


@pytest.mark.parametrize("kind", [*RANDOM_KINDS, "none"])
def test_a_missing_parameter_counts_as_zero(kind):
    projector = make_projector(kind, SHAPES, 16, 0)
    zero = DenseGradient(torch.zeros(5, 4, dtype=torch.float64))
    with_zero = projector.project({"weight": outer((4, 6)), "bias": zero})
    torch.testing.assert_close(projector.project({"weight": outer((4, 6))}).features, with_zero.features)


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_other_seeds_give_other_numbers(kind):
    first, second = (make_projector(kind, SHAPES, 16, seed).project({"weight": dense((4, 6))}) for seed in (1, 2))
    assert not torch.allclose(first.features, second.features)


def test_one_float64_gradient_makes_float64_features():
    for kind in RANDOM_KINDS:
        projector = make_projector(kind, SHAPES, 16, 0)
        for single, double in (("weight", "bias"), ("bias", "weight")):
            gradients = {
                single: dense(SHAPES[single], dtype=torch.float32),
                double: dense(SHAPES[double]),
            }
            assert projector.project(gradients).features.dtype == torch.float64


def test_an_unknown_kind_is_refused_with_the_nearest_name():
    with pytest.raises(InputError, match="unknown projector 'sketsh': did you mean 'sketch'"):
        make_projector("sketsh", SHAPES, 16, 0)


@pytest.mark.parametrize("proj_dim", [0, -1, 2.0, True, None, "16"])
@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_a_proj_dim_that_is_no_positive_integer_is_refused(kind, proj_dim):
    error = InputError if type(proj_dim) is int else InputTypeError
    with pytest.raises(error, match=f"proj_dim is {proj_dim!r}; expected"):
        make_projector(kind, SHAPES, proj_dim, 0)


def test_a_projector_without_parameters_is_refused():
    for kind in projector_kinds():
        with pytest.raises(InputError, match="shapes is empty"):
            make_projector(kind, {}, 512, 0)


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ({}, "no gradients to project"),
        ({"weihgt": dense((4, 6))}, "no parameter 'weihgt': did you mean 'weight'"),
        ({"weight": dense((6, 4))}, r"'weight' has shape \(4, 6\), its gradients are of shape \(6, 4\)"),
        ({"weight": dense((4, 6)), "bias": dense((4,), batch_size=3)}, "'weight' has 5 on cpu, 'bias' has 3 on cpu"),
    ],
)
def test_gradients_that_do_not_fit_are_refused(gradients, message):
    with pytest.raises(InputError, match=message):
        make_projector("sketch", SHAPES, 16, 0).project(gradients)


def test_a_users_projector_can_be_registered(kinds):
    @register_projector
    class SumProjector(Projector):
        kind = "sum"
        dim = 1

        def add(self, name, gradient, features, squared_norm):
            features += gradient.dense(0, gradient.batch_size).sum(1, keepdim=True)

    assert "sum" in projector_kinds()
    result = make_projector("sum", SHAPES, 16, 0).project({"bias": DenseGradient(torch.ones(2, 4))})
    assert result.features.tolist() == [[4.0], [4.0]]
    assert register_projector(SumProjector) is SumProjector  # again is no harm


def test_a_taken_kind_or_no_projector_is_refused(kinds):
    other = type("Other", (Projector,), {"kind": "sketch"})
    with pytest.raises(InputError, match="'sketch' is taken by SketchProjector"):
        register_projector(other)
    with pytest.raises(InputTypeError, match="needs a class attribute `kind`"):
        register_projector(type("NoKind", (Projector,), {}))
    with pytest.raises(InputTypeError, match="takes a subclass of tracer.projection.Projector"):
        register_projector("sketch")


def test_blocks_cover_the_batch_and_hold_one_sample_at_least():
    assert list(row_blocks(0, 10, 20)) == []
    assert list(row_blocks(3, 1000, 20)) == [(0, 1), (1, 2), (2, 3)]
    assert list(row_blocks(3, 0, 20)) == [(0, 3)]
