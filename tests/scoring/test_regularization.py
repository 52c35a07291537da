"""Kernels against numpy's inverse and pseudo-inverse, and the choice of the regularization against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scoring_cases import slow_leave_one_out

from tracer.scoring.gram_kernel import GramKernel
from tracer.scoring.regularization import LAMBDAS, Kernel, choose_regularization, leave_one_out


def rows_of(num_rows: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((num_rows, dim)) * 10.0 ** rng.uniform(-2, 1, dim)


def kernels(rows: np.ndarray, w: np.ndarray | None = None) -> list[Kernel | GramKernel]:
    """The kernel as a matrix, and by inner products of rows; of weight one by default."""
    a, w = torch.from_numpy(rows), torch.ones(len(rows), dtype=torch.float64) if w is None else torch.from_numpy(w)
    return [Kernel(a.T @ (w[:, None] * a)), GramKernel(a, w)]


@pytest.mark.parametrize("shape", [(40, 7), (7, 40), (9, 9), (1, 5)])
@pytest.mark.parametrize("regularization", [1e-3, 1.0, 1e6])
def test_scores_of_solutions_are_those_of_the_inverse(shape, regularization):
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


def test_solutions_in_the_basis_of_the_examples_have_no_part_that_none_of_them_sees():
    rows = np.zeros((2, 3))
    rows[:, :2] = [[1.0, 2.0], [3.0, 4.0]]
    found = kernels(rows)[1].solve(torch.ones(1, 3, dtype=torch.float64), 0.1)
    assert abs(float(found[0, 2])) < 1e-12 < float(found.abs().max())


def test_rows_of_weight_zero_are_seen():
    rows, weights = torch.from_numpy(rows_of(3, 9)), torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64)
    kernel = rows.T @ (weights[:, None] * rows) + 0.5 * torch.eye(9, dtype=torch.float64)
    found = GramKernel(rows, weights).solve(rows, 0.5) @ rows.T
    torch.testing.assert_close(found, rows @ torch.linalg.inv(kernel) @ rows.T)


@pytest.mark.parametrize("regularization", [1e-3, 1.0, 1e6])
def test_leverages_of_a_kernels_own_rows_are_those_of_the_inverse(regularization):
    rows, weights = rows_of(7, 40), np.array([1.0, 0.0, 2.0, 1e-9, 0.5, 1.0, 1.0])
    inverse = np.linalg.inv(rows.T @ (weights[:, None] * rows) + regularization * np.eye(40))
    found = kernels(rows, weights)[1].leverages(slice(5), regularization)
    np.testing.assert_allclose(found, np.einsum("nk,kl,nl->n", rows, inverse, rows)[:5], rtol=1e-7)


def test_leverages_are_refused_for_a_regularization_near_rounding():
    rows = rows_of(7, 40)
    assert kernels(rows)[1].leverages(slice(5), 1e-12 * np.square(rows).sum()) is None


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
    """Features, weights, output changes and Q of a logistic regression that was stopped early."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((num_rows, dim)) * 10.0 ** rng.uniform(-1.5, 0.5, dim)
    theta = np.zeros(dim)
    for _ in range(200):
        theta += 0.01 * features.T @ (1 / (1 + np.exp(features @ theta)))
    output_change = features @ theta
    wrong = 1 / (1 + np.exp(output_change))
    return features, wrong * (1 - wrong), output_change, -wrong


@pytest.mark.parametrize("shape", [(60, 12), (12, 60), (400, 300)])
def test_rows_are_predicted_by_the_others(shape):
    features, w, output_change, loss_grad = regression(*shape)
    own = w * output_change - loss_grad
    lambdas = torch.logspace(-1, 3, 5, dtype=torch.float64)
    rows = np.array([0, 3, 11])
    expected = np.stack(
        [slow_leave_one_out(features, w, output_change, loss_grad, rows, float(x)) for x in lambdas], axis=1
    )
    pull, *chosen = (torch.from_numpy(values) for values in (features.T @ own, features[rows], w[rows], own[rows]))
    for kernel in kernels(features, w):
        found = leave_one_out(kernel.seen(pull, chosen[0], rows), *chosen[1:], lambdas)
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-9)


def test_examples_of_hardly_any_weight_are_predicted_by_the_others():
    features, w, output_change, loss_grad = regression(12, 60)
    w[:4] = [0.0, 1e-12, 1e-9, 1e-7]
    own = w * output_change - loss_grad
    rows = np.arange(12)[::-1].copy()
    expected = slow_leave_one_out(features, w, output_change, loss_grad, rows, 20.0)
    pull, *chosen = (torch.from_numpy(values) for values in (features.T @ own, features[rows], w[rows], own[rows]))
    for kernel in kernels(features, w):
        found = leave_one_out(
            kernel.seen(pull, chosen[0], rows), *chosen[1:], torch.tensor([20.0], dtype=torch.float64)
        )
        np.testing.assert_allclose(found[:, 0].numpy(), expected, rtol=1e-6, atol=1e-9)


def test_predictions_hardly_depend_on_the_example_itself():
    features, w, output_change, loss_grad = regression(400, 12)
    own = w * output_change - loss_grad
    theta = {}
    for kept in (np.arange(400), np.arange(1, 400)):
        phi = features[kept]
        values, vectors = np.linalg.eigh(phi.T @ (w[kept, None] * phi))
        theta[len(kept)] = vectors * (-np.expm1(-values / 2.0) / values) @ vectors.T @ phi.T @ own[kept]
    kernel = kernels(features, w)[0]
    pull, *chosen = (torch.from_numpy(values) for values in (features.T @ own, features[:1], w[:1], own[:1]))
    seen = kernel.seen(pull, chosen[0], np.arange(1))
    found = float(leave_one_out(seen, *chosen[1:], torch.tensor([2.0], dtype=torch.float64)))
    apart, together = features[0] @ theta[399], features[0] @ theta[400]
    assert found == pytest.approx(apart, abs=0.05 * abs(together - apart))


def test_examples_that_mostly_predict_themselves_have_no_prediction():
    features, w, output_change, loss_grad = regression(12, 60)
    own = w * output_change - loss_grad
    pull, *chosen = (torch.from_numpy(values) for values in (features.T @ own, features, w, own))
    kernel = kernels(features, w)[1]
    seen = kernel.seen(pull, chosen[0], np.arange(12))
    found = leave_one_out(seen, *chosen[1:], torch.tensor([1e-9, 1e3], dtype=torch.float64))
    assert found[:, 0].isnan().all()
    assert found[:, 1].isfinite().all()


def test_a_correlation_that_noise_could_have_falls_back_to_the_trace():
    rng = np.random.default_rng(2)
    chosen = []
    for _ in range(40):
        output_changes = torch.from_numpy(rng.standard_normal(100))
        noise, other = torch.from_numpy(rng.standard_normal((2, 100)))
        angles = torch.linspace(0, 3, len(LAMBDAS), dtype=torch.float64)
        predictions = noise[:, None] * angles.cos() + other[:, None] * angles.sin()
        chosen.append(choose_regularization(1.0, predictions, output_changes).rule)
    assert chosen.count("trace") > 30


def test_the_choice_is_the_best_correlation_over_the_share():
    output_changes = torch.from_numpy(np.random.default_rng(0).standard_normal(50))
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal(50))
    noise = (
        noise
        - noise.mean()
        - (noise @ (output_changes - output_changes.mean()))
        / (output_changes - output_changes.mean()).square().sum()
        * output_changes
    )
    logs = torch.log10(LAMBDAS)
    predictions = (
        7 * output_changes[:, None] + 3 + (1 + (logs - 1.03).square()) * noise[:, None]
    )  # best where the noise is least
    chosen = choose_regularization(2.0, predictions, output_changes, share=0.25)
    assert chosen.rule == "held-out"
    assert chosen.value == pytest.approx(2.0 * 10**1.03 / 0.25, rel=0.02)


def test_predictions_that_always_get_better_fall_back_to_the_trace():
    output_changes = torch.arange(5, dtype=torch.float64)
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    for strengths in (torch.linspace(0, 1, len(LAMBDAS)), torch.linspace(1, 0, len(LAMBDAS))):
        chosen = choose_regularization(
            3.0, output_changes[:, None] + strengths * noise[:, None], output_changes, share=0.25
        )
        assert (chosen.rule, chosen.value) == ("trace", 12.0)


def test_predictions_that_are_wrong_throughout_fall_back_to_the_trace():
    output_changes = torch.arange(5, dtype=torch.float64)
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0, 0.0], dtype=torch.float64)
    strengths = (torch.linspace(-1, 1, len(LAMBDAS)).square() - 1) * 5
    chosen = choose_regularization(
        3.0, strengths * noise[:, None] - output_changes[:, None], output_changes, share=0.25
    )
    assert (chosen.rule, chosen.value) == ("trace", 12.0)


def test_without_output_changes_the_trace_decides():
    nothing = torch.zeros(4, len(LAMBDAS), dtype=torch.float64)
    chosen = choose_regularization(3.0, nothing, nothing[:, 0], share=0.5)
    assert (chosen.rule, chosen.value) == ("trace", 6.0)


def test_kernels_of_zeros_predict_nothing():
    zero = torch.zeros(2, dtype=torch.float64)
    for kernel in kernels(np.zeros((2, 3)), np.zeros(2)):
        features = torch.zeros(2, 3, dtype=torch.float64)
        found = leave_one_out(kernel.seen(features[0], features, np.arange(2)), zero, zero, LAMBDAS)
        assert found.eq(0).all()
