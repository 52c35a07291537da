"""Kronecker factors of gradients in every form, and whitening, against loops over single terms in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from projection_cases import all_forms, matrix_of, normal, oracle_rows
from torch import nn

from tracer.gradients.combined import SumGradient
from tracer.gradients.inner_products import TargetGradients
from tracer.gradients.kronecker import KroneckerSums, SquareSums, multiplied
from tracer.gradients.layers import conv_weight_gradient
from tracer.gradients.per_sample import DenseGradient, OuterGradient, matrix_shape
from tracer.gradients.preconditioning import KroneckerPreconditioner
from tracer.gradients.rows import RowsGradient
from tracer.projection import make_projector

SHAPE = (11, 6)
SIDES = normal(11, 11, seed=4), normal(6, 6, seed=5)


def forms():
    found = all_forms(SHAPE)
    found["folded"] = all_forms(SHAPE, batch_size=10)["only dense"].fold(2)
    x, g = normal(5, 3, 7, seed=8), normal(5, 11, 6, seed=9)
    conv = nn.Conv1d(3, 11, 2).double()
    found["windows"] = conv_weight_gradient(conv, x, g)
    return found


def multiplied_rows(gradient, left, right):
    left, right = (torch.diag(side) if side.ndim == 1 else side for side in (left, right))
    matrix = oracle_rows(gradient).unflatten(1, matrix_shape(gradient.shape))
    return torch.einsum("op,boi,ij->bpj", left, matrix, right).flatten(1)


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("diagonal", ["", "left", "right", "both"])
def test_a_gradient_is_multiplied_from_both_sides_whatever_its_form(form, diagonal):
    gradient = forms()[form]
    left = SIDES[0].diagonal() if diagonal in ("left", "both") else SIDES[0]
    right = SIDES[1].diagonal() if diagonal in ("right", "both") else SIDES[1]
    expected, found = multiplied_rows(gradient, left, right), multiplied(gradient, left, right)
    torch.testing.assert_close(found.dense(0, 5), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.entries(1, 4, 3, 20), expected[1:4, 3:20], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found.squared_norm(), expected.square().sum(1), rtol=1e-9, atol=0)
    for kind in ("sketch", "factored", "none"):
        projector = make_projector(kind, {"weight": gradient.shape}, 20, seed=3)
        features = projector.project({"weight": found}).features
        torch.testing.assert_close(features.double(), expected @ matrix_of(projector, "weight"), rtol=1e-8, atol=1e-8)
    held = TargetGradients()
    held.append(torch.ones(5, dtype=torch.float64), [(0, {"weight": found})])
    held.join()
    products = torch.zeros(5, 5, dtype=torch.float64)
    held.add_products("weight", found, products)
    torch.testing.assert_close(products, expected @ expected.T, rtol=1e-8, atol=1e-8)


def test_forms_that_have_factors_keep_them():
    assert type(multiplied(forms()["sequence"], *SIDES)) is OuterGradient
    assert type(multiplied(forms()["windows"], *SIDES)) is OuterGradient
    assert type(multiplied(forms()["embedding"], SIDES[0].diagonal(), SIDES[1])) is RowsGradient


def terms_of(gradient):
    """Return the outer products that single samples consist of, by form: lists of left and right vectors."""
    if isinstance(gradient, SumGradient):
        found = {}
        for part in gradient.parts():
            for form, terms in terms_of(part).items():
                found.setdefault(form, []).extend(terms)
        return found
    if isinstance(gradient, RowsGradient):
        eye = torch.eye(matrix_shape(gradient.shape)[0], dtype=torch.float64)
        return {
            "rows": [
                (eye[row], value.double())
                for b in range(gradient.batch_size)
                for row, value in zip(gradient.index[b], gradient.values[b], strict=True)
                if value.any()
            ]
        }
    factors = gradient.outer(0, gradient.batch_size)
    if factors is not None:
        pairs = zip(factors[0].flatten(0, 1).double(), factors[1].flatten(0, 1).double(), strict=True)
        return {"outer": [(left, right) for left, right in pairs if left.any() and right.any()]}
    matrices = oracle_rows(gradient).unflatten(1, matrix_shape(gradient.shape))
    return {"built": list(matrices)}


def expected_curvature(gradient):
    rows, cols = matrix_shape(gradient.shape)
    sides, weights = [], []
    for form, terms in terms_of(gradient).items():
        left, right = torch.zeros(rows, rows, dtype=torch.float64), torch.zeros(cols, cols, dtype=torch.float64)
        weight = 0.0
        for term in terms:
            if form == "built":
                norm = term.norm()
                left, right, weight = left + term @ term.T / norm, right + term.T @ term / norm, weight + norm**2
            else:
                left, right = left + torch.outer(term[0], term[0]), right + torch.outer(term[1], term[1])
                weight += float(term[0].square().sum() * term[1].square().sum())
        sides.append((left * rows / left.trace(), right * cols / right.trace()))
        weights.append(float(weight))
    shares = [weight / sum(weights) for weight in weights]
    left, right = (sum(share * both[i] for share, both in zip(shares, sides, strict=True)) for i in (0, 1))
    return left, right, float(oracle_rows(gradient).square().sum()) / gradient.batch_size / (rows * cols)


@pytest.mark.parametrize("form", forms())
def test_curvatures_are_those_of_loops_over_terms_in_any_batches(form):
    gradient = forms()[form]
    sums = KroneckerSums()
    pieces = [gradient]
    if type(gradient) in (OuterGradient, RowsGradient, DenseGradient):
        pieces = [
            gradient.with_tensors([each[start:stop] for each in gradient.tensors()]) for start, stop in ((0, 2), (2, 5))
        ]
    for piece in pieces:
        part = KroneckerSums()
        part.take(0, piece.batch_size, {"weight": piece})
        sums.merge(KroneckerSums.restored(*part.state()))
    found = sums.curvatures(5, {"weight": gradient.shape})["weight"]
    left, right, mean_square = expected_curvature(gradient)
    assert found.mean_square == pytest.approx(mean_square, rel=1e-10)
    for one, other in ((found.left, left), (found.right, right)):
        one = torch.diag(one) if one.ndim == 1 else one
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
        assert float(one.trace()) / len(one) == pytest.approx(1)


def test_padding_has_no_part_in_a_moment():
    left, right = normal(4, 3, 11, seed=1), normal(4, 3, 6, seed=2)
    left[:, 2] = 0
    sums = [KroneckerSums() for _ in range(2)]
    sums[0].take(0, 4, {"w": OuterGradient(left, right, SHAPE)})
    sums[1].take(0, 4, {"w": OuterGradient(left[:, :2], right[:, :2], SHAPE)})
    one, other = (each.curvatures(4, {"w": SHAPE})["w"] for each in sums)
    torch.testing.assert_close(one.right, other.right)


def test_a_large_side_has_a_diagonal(monkeypatch):
    monkeypatch.setattr("tracer.gradients.kronecker.MAX_SIDE", 8)
    gradient = forms()["sequence"]
    sums = KroneckerSums()
    sums.take(0, 5, {"weight": gradient})
    found = sums.curvatures(5, {"weight": SHAPE})["weight"]
    left, right, _ = expected_curvature(gradient)
    torch.testing.assert_close(found.left, left.diagonal(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.right, right, rtol=1e-9, atol=1e-11)


def curvature_of(count=400):
    """Gradients that are single outer products, and their curvature."""
    left, right = normal(count, 1, 11, seed=1) @ normal(11, 11, seed=3), normal(count, 1, 6, seed=2) @ SIDES[1]
    gradient = OuterGradient(left, right, SHAPE)
    sums = KroneckerSums()
    sums.take(0, count, {"weight": gradient})
    return gradient, sums.curvatures(count, {"weight": SHAPE})


def test_whitening_by_kfac_is_the_inverse_root_of_the_damped_kronecker_product():
    gradient, curvatures = curvature_of()
    known, added = curvatures["weight"], 0.1**0.5
    eye = [torch.eye(len(side), dtype=torch.float64) for side in (known.left, known.right)]
    product = torch.kron(known.left + added * eye[0], known.right + added * eye[1]) * known.mean_square * (1 + 1e-8)
    whitened = KroneckerPreconditioner.kfac(curvatures, 0.1).apply("weight", gradient)["weight"].dense(0, 400)
    rows = oracle_rows(gradient)
    torch.testing.assert_close(whitened @ whitened.T, rows @ torch.linalg.solve(product, rows.T), rtol=1e-7, atol=1e-7)


def test_whitening_by_ekfac_makes_second_moments_one_in_the_eigenbasis_but_for_damping():
    gradient, curvatures = curvature_of()
    rotation = KroneckerPreconditioner.rotation(curvatures)
    sums = SquareSums()
    sums.take(0, 400, {"weight": rotation.apply("weight", gradient)["weight"]})
    means = {"weight": sums.squares["weight"] / 400}
    whitened = rotation.ekfac(means, curvatures, 0.1).apply("weight", gradient)["weight"].dense(0, 400)
    damping = 0.1 * means["weight"].mean() * (1 + 1e-7)
    expected = (means["weight"] / (means["weight"] + damping)).flatten()
    torch.testing.assert_close(whitened.square().mean(0), expected, rtol=1e-6, atol=0)
    basis = torch.kron(*rotation.sides["weight"])
    rows = oracle_rows(gradient) @ basis
    torch.testing.assert_close(
        whitened @ whitened.T, rows / (means["weight"].flatten() + damping) @ rows.T, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("zeros", [False, True])
def test_a_parameter_without_gradients_has_the_mean_eigenvalue_of_all(zeros):
    gradient, _ = curvature_of()
    shapes = {"weight": SHAPE, "other": (2, 3)}
    sums, squares = KroneckerSums(), SquareSums()
    given = {"weight": gradient, **({"other": DenseGradient(torch.zeros(400, 2, 3).double())} if zeros else {})}
    sums.take(0, 400, given)
    curvatures = sums.curvatures(400, shapes)
    assert curvatures["other"].mean_square == pytest.approx(curvatures["weight"].mean_square)
    one = DenseGradient(normal(3, 2, 3, seed=6))
    rotation = KroneckerPreconditioner.rotation(curvatures)
    squares.take(0, 400, {name: rotation.apply(name, each)[name] for name, each in given.items()})
    ekfac = rotation.ekfac({name: each / 400 for name, each in squares.squares.items()}, curvatures, 0.1)
    for found, damped in ((KroneckerPreconditioner.kfac(curvatures, 0.1), (1 + 0.1**0.5) ** 2), (ekfac, 1.1)):
        scale = (curvatures["weight"].mean_square * damped) ** -0.5
        whitened = found.apply("other", one)["other"].dense(0, 3)
        torch.testing.assert_close(whitened, oracle_rows(one) * scale, rtol=1e-6, atol=0)


def test_rounding_noise_is_not_whitened_to_the_size_of_gradients():
    gradient, _ = curvature_of()
    noise = DenseGradient(normal(400, 5, seed=7) * 1e-9)
    sums = KroneckerSums()
    sums.take(0, 400, {"weight": gradient, "noise": noise})
    found = KroneckerPreconditioner.kfac(sums.curvatures(400, {"weight": SHAPE, "noise": (5,)}), 0.1)
    lengths = [found.apply("noise", noise)["noise"], found.apply("weight", gradient)["weight"]]
    assert lengths[0].squared_norm().mean() < 1e-6 * lengths[1].squared_norm().mean()


def test_a_preconditioner_is_restored_from_its_state():
    gradient, curvatures = curvature_of()
    known = KroneckerPreconditioner.kfac(curvatures, 0.1)
    again = KroneckerPreconditioner.restored(known.state())
    np.testing.assert_array_equal(
        again.apply("weight", gradient)["weight"].dense(0, 9), known.apply("weight", gradient)["weight"].dense(0, 9)
    )


@pytest.mark.parametrize("form", forms())
def test_the_first_samples_keep_their_form_and_values(form):
    gradient = forms()[form]
    found = gradient.head(2)
    torch.testing.assert_close(found.dense(0, 2), oracle_rows(gradient)[:2], rtol=1e-12, atol=1e-12)
    assert found.batch_size == 2 and (type(found) is type(gradient) or form == "only dense")
