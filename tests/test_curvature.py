"""Kernels against numpy's inverse and pseudo-inverse, and the choice of the regularization against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tracer.curvature import Kernel, Moments, choose_regularization, misfit


def rows_of(num_rows: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num_rows, dim)) * 10.0 ** rng.uniform(-2, 1, dim)


def kernels(rows: np.ndarray) -> list[Kernel]:
    """The kernel as a matrix, and in the basis of its rows."""
    a = torch.from_numpy(rows)
    return [Kernel(a.T @ a), Kernel.of_rows(2 * a, torch.full((len(a),), 0.25, dtype=torch.float64))]


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9, 9), (1, 5)])
@pytest.mark.parametrize("regularization", [1e-3, 1.0, 1e6])
def test_solutions_are_those_of_the_inverse_as_far_as_rows_see_them(shape, regularization):
    rows, x = rows_of(*shape), rows_of(3, shape[1], 1)
    expected = x @ np.linalg.inv(rows.T @ rows + regularization * np.eye(shape[1])) @ rows.T
    for kernel in kernels(rows):
        found = kernel.solve(torch.from_numpy(x), regularization).numpy() @ rows.T
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7 * np.abs(expected).max())


def test_a_matrix_is_solved_for_everything():
    rows, x = rows_of(7, 40), rows_of(3, 40, 1)
    expected = x @ np.linalg.inv(rows.T @ rows + 0.1 * np.eye(40))
    found = kernels(rows)[0].solve(torch.from_numpy(x), 0.1).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-7 * np.abs(expected).max())


def test_what_no_row_sees_is_left_out_of_solutions_in_the_basis_of_rows():
    rows = np.zeros((2, 3))
    rows[:, :2] = [[1.0, 2.0], [3.0, 4.0]]
    found = kernels(rows)[1].solve(torch.ones(1, 3, dtype=torch.float64), 0.1)
    assert abs(float(found[0, 2])) < 1e-12 < float(found.abs().max())


def test_rows_of_weight_zero_are_seen():
    rows, weights = torch.from_numpy(rows_of(3, 9)), torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    kernel = rows.T @ (weights[:, None] * rows) + 0.5 * torch.eye(9, dtype=torch.float64)
    found = Kernel.of_rows(rows, weights).solve(rows, 0.5) @ rows.T
    torch.testing.assert_close(found, rows @ torch.linalg.inv(kernel) @ rows.T)


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (1, 5)])
def test_without_regularization_they_are_those_of_the_pseudo_inverse(shape):
    rows, x = rows_of(*shape), rows_of(3, shape[1], 1)
    rows[0] = rows[-1]  # two equal rows: the kernel of few rows is singular too
    expected = x @ np.linalg.pinv(rows) @ np.linalg.pinv(rows).T
    for kernel in kernels(rows):
        found = kernel.solve(torch.from_numpy(x), 0.0).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_a_regularization_below_rounding_still_gives_finite_solutions():
    for kernel in kernels(np.ones((3, 4)) * 1e8):
        assert torch.isfinite(kernel.solve(torch.ones(1, 4, dtype=torch.float64), 1e-30)).all()


def test_another_regularization_is_another_solution():
    kernel, x = kernels(rows_of(20, 4))[0], torch.from_numpy(rows_of(1, 4, 1))
    first = kernel.solve(x, 1.0)
    assert not torch.allclose(first, kernel.solve(x, 10.0))
    torch.testing.assert_close(first, kernel.solve(x, 1.0))


def regression(num_rows: int = 60, dim: int = 12, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Features, weights, gains and slopes of a logistic regression that was stopped early."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((num_rows, dim)) * 10.0 ** rng.uniform(-1.5, 0.5, dim)
    theta = np.zeros(dim)
    for _ in range(200):
        theta += 0.01 * features.T @ (1 / (1 + np.exp(features @ theta)))
    gain = features @ theta
    wrong = 1 / (1 + np.exp(gain))
    return features, wrong * (1 - wrong), gain, -wrong


def moments_of(features: np.ndarray, w: np.ndarray, gain: np.ndarray, slope: np.ndarray) -> Moments:
    squares = np.square(features).sum(1)
    vectors = (torch.from_numpy(features.T @ values) for values in (w * gain, -slope))
    return Moments(len(w), float(w @ squares), *vectors, float(w @ np.square(gain)))


def slow_misfit(features, w, gain, slope, regularization) -> float:
    root = np.sqrt(w)
    a, y = root[:, None] * features, root * (gain - slope / w)
    values, vectors = np.linalg.eigh(a @ a.T)
    hat = vectors * (1 - np.exp(-np.maximum(values, 0) / regularization)) @ vectors.T
    return float(np.square(root * gain - hat @ y).sum())


@pytest.mark.parametrize("shape", [(60, 12), (12, 60), (400, 300)])
def test_misfit_is_that_of_gradient_flow(shape):
    values = regression(*shape)
    a = np.sqrt(values[1])[:, None] * values[0]
    grid = torch.logspace(-1, 3, 5, dtype=torch.float64)
    expected = [slow_misfit(*values, float(regularization)) for regularization in grid]
    for kernel in kernels(a):
        np.testing.assert_allclose(misfit(kernel, moments_of(*values), grid).numpy(), expected, rtol=1e-6, atol=1e-8)


def test_the_choice_has_the_least_misfit_over_the_share():
    values = regression()
    a = np.sqrt(values[1])[:, None] * values[0]
    chosen = choose_regularization(kernels(a)[0], moments_of(*values), share=0.25)
    assert chosen.rule == "training"
    grid = np.logspace(-4, 4, 801)
    best = grid[np.argmin([slow_misfit(*values, regularization) for regularization in grid])]
    assert chosen.value == pytest.approx(best / 0.25, rel=0.06)


def test_the_choice_recovers_for_how_long_gradient_descent_ran():
    features, w, _, _ = regression()
    labels = np.random.default_rng(1).standard_normal(len(w)) + features @ np.ones(features.shape[1])
    theta, rate, steps = np.zeros(features.shape[1]), 1e-4, 20_000
    for _ in range(steps):
        theta -= rate * features.T @ (w * (features @ theta - labels))
    gain = features @ theta
    moments = moments_of(features, w, gain, w * (gain - labels))
    a = np.sqrt(w)[:, None] * features
    for kernel in kernels(a):
        chosen = choose_regularization(kernel, moments, share=1.0)
        assert chosen.value == pytest.approx(1 / (rate * steps), rel=0.05)  # the losses' sum: N is in it


def test_where_everything_was_learnt_the_trace_decides():
    features, w, _, _ = regression()
    gain = features @ np.ones(12)  # exactly what the features can say, with nothing left to learn
    moments = moments_of(features, w, gain, np.zeros(60))
    a = np.sqrt(w)[:, None] * features
    chosen = choose_regularization(kernels(a)[0], moments)
    assert chosen.rule == "trace"
    assert chosen.value == pytest.approx(2 * moments.trace / 60)


def test_without_gains_the_trace_decides():
    features, w, gain, slope = regression()
    moments = moments_of(features, w, 0 * gain, slope)
    chosen = choose_regularization(Kernel(torch.eye(12, dtype=torch.float64)), moments)
    assert chosen.rule == "trace"
    assert chosen.value == pytest.approx(2 * moments.trace / 60)


def test_kernels_of_zeros_have_a_regularization():
    zero = torch.zeros(3, dtype=torch.float64)
    kernel = Kernel.of_rows(torch.zeros(2, 3, dtype=torch.float64), zero[:2])
    chosen = choose_regularization(kernel, Moments(2, 0, zero, zero, 0))
    assert chosen.value > 0
