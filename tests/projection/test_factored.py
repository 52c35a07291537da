"""Two-sided projection: shares of the budget, exact small parameters, one linear map for every form."""

import pytest
import torch
from projection_cases import all_forms, assert_is_linear_map, assert_unbiased, dense, matrix_of, oracle_rows, outer

from tracer.errors import InputError
from tracer.gradients.per_sample import DenseGradient
from tracer.projection import factored
from tracer.projection.factored import FactoredProjector, share_out, side_dims


@pytest.mark.parametrize("form", all_forms((3, 2)))
@pytest.mark.parametrize("proj_dim", [1, 12, 40, 1000], ids="smallest both-sides rows-kept exact".split())
def test_every_form_is_the_same_linear_map(form, proj_dim):
    projector = FactoredProjector({"weight": (5, 17)}, proj_dim, 0)
    assert_is_linear_map(projector, "weight", all_forms((5, 17))[form])


@pytest.mark.parametrize("shape", [(30,), (), (1, 30), (30, 1), (2, 3, 2, 2)])
def test_vectors_scalars_and_kernels_are_linear_too(shape):
    assert_is_linear_map(FactoredProjector({"weight": shape}, 7, 0), "weight", dense(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precisions_give_float32_features(dtype):
    projector = FactoredProjector({"weight": (13, 7)}, 12, 0)
    for gradient in all_forms((13, 7), dtype=dtype).values():
        assert projector.project({"weight": gradient}).features.dtype == torch.float32
        assert_is_linear_map(projector, "weight", gradient, rtol=1e-5)


def test_blocks_of_samples_change_nothing(monkeypatch):
    rows = factored.row_blocks
    monkeypatch.setattr(factored, "row_blocks", lambda batch_size, _: rows(batch_size, 1, 2))
    for gradient in all_forms((13, 7)).values():
        assert_is_linear_map(FactoredProjector({"weight": (13, 7)}, 12, 0), "weight", gradient)


def test_the_map_is_a_kronecker_product_of_its_sides():
    projector = FactoredProjector({"weight": (6, 8)}, 12, 0)
    out_side, in_side = projector.sides("weight", torch.device("cpu"))
    expected = torch.kron(out_side.double(), in_side.double())
    torch.testing.assert_close(matrix_of(projector, "weight"), expected)


def test_small_parameters_are_kept_exactly():
    projector = FactoredProjector({"weight": (30, 40), "bias": (6,)}, 100, 0)
    values = dense((6,))
    start, out_dim, in_dim = projector.columns["bias"]
    features = projector.project({"bias": values}).features
    assert torch.equal(features[:, start : start + out_dim * in_dim], values.values)


def test_the_budget_is_shared_and_never_exceeded():
    assert share_out([5, 1000, 1000], 105) == [5, 50, 50]
    assert share_out([3, 3], 100) == [3, 3]
    shapes = {"a": (64, 3, 3, 3), "b": (64,), "c": (10, 1000), "d": (512, 256), "e": ()}
    for proj_dim in (5, 16, 100, 999, 10_000):
        projector = FactoredProjector(shapes, proj_dim, 0)
        assert 0.7 * proj_dim <= projector.dim <= proj_dim or projector.dim == 5
        ends = [start + out_dim * in_dim for start, out_dim, in_dim in projector.columns.values()]
        assert [0, *ends[:-1]] == [where.start for where in projector.columns.values()]
        assert ends[-1] == projector.dim


@pytest.mark.parametrize(("rows", "cols", "share"), [(7, 9, 20), (1, 50, 13), (50, 1, 13), (3, 400, 99), (8, 8, 64)])
def test_sides_fit_their_share(rows, cols, share):
    out_dim, in_dim = side_dims(rows, cols, share)
    assert 1 <= out_dim <= rows
    assert 1 <= in_dim <= cols
    assert out_dim * in_dim <= share < (out_dim + 1) * (in_dim + 1) or (out_dim, in_dim) == (rows, cols)


def test_a_budget_below_the_number_of_parameters_is_refused():
    with pytest.raises(InputError, match=r"each of the 3 parameters, got proj_dim=2; pass proj_dim=48 or more"):
        FactoredProjector({"a": (2,), "b": (2,), "c": (2,)}, 2, 0)


def test_parameters_without_entries_take_no_share():
    projector = FactoredProjector({"a": (0, 4), "b": (2,)}, 2, 0)
    result = projector.project({"a": DenseGradient(torch.zeros(3, 0, 4)), "b": DenseGradient(torch.ones(3, 2))})
    assert result.features.tolist() == [[1.0, 1.0]] * 3


def test_sides_are_keyed_by_name():
    one = FactoredProjector({"a": (9, 8), "b": (9, 8)}, 32, 3)
    other = FactoredProjector({"b": (9, 8), "a": (9, 8)}, 32, 3)
    cpu = torch.device("cpu")
    assert all(torch.equal(*pair) for pair in zip(one.sides("a", cpu), other.sides("a", cpu), strict=True))
    assert not torch.equal(one.sides("a", cpu)[0], one.sides("b", cpu)[0])


def test_inner_products_are_unbiased_over_seeds():
    gradient = outer((12, 15), batch_size=4)
    rows = oracle_rows(gradient)
    assert_unbiased(
        lambda seed: FactoredProjector({"weight": (12, 15)}, 36, seed).project({"weight": gradient}).features, rows
    )


def test_an_empty_batch_has_empty_features():
    for gradient in all_forms((13, 7), batch_size=0).values():
        assert FactoredProjector({"weight": (13, 7)}, 12, 0).project({"weight": gradient}).features.shape == (0, 12)


def test_projected_values_are_pinned():
    ramp = torch.arange(20, dtype=torch.float32).reshape(1, 4, 5)
    features = FactoredProjector({"weight": (4, 5)}, 6, 6).project({"weight": DenseGradient(ramp)}).features
    expected = torch.tensor([[49.80629, -12.24745, 18.77942, -24.4949, 8.16497, -8.16497]])
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)
