"""SOURCE: made-up features against matrix exponentials in float64, and gradient descent on a quadratic."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scoring_cases import scorer
from store_cases import stored_features
from torch import nn

from tracer import attribute
from tracer.errors import CallOrderError, InputError
from tracer.scoring.estimators import Estimate
from tracer.store import RowTable

SHARED = {"shared_projection": True}
SHAPES = [(60, 5, 12), (12, 5, 60), (33, 1, 33), (1, 2, 3)]


def shared(path, num_rows, num_targets, dim, *args, rates=(5.0, 60.0, 20.0), settings=SHARED, **options):
    return scorer(path, num_rows, num_targets, dim, *args, rates=rates, settings=settings, **options)


def exponential(matrix):
    """The matrix exponential by its series, of a matrix halved until it is small, squared again."""
    halvings = max(0, math.ceil(math.log2(max(1e-9, np.abs(matrix).sum(1).max()))) + 1)
    small, term = matrix / 2**halvings, np.eye(len(matrix))
    total = term
    for order in range(1, 25):
        term = term @ small / order
        total = total + term
    return np.linalg.matrix_power(total, 2**halvings)


def columns(table):
    features = stored_features(table, 0, table.num_rows).astype(np.float64)
    return features, *(table.column(name).astype(np.float64) for name in ("loss_grad", "loss_hess"))


def reference(found, rates, target="output", model_ids=None, targets=None) -> np.ndarray:
    """The change of targets at the end of each segment, averaged: matrices first, one after another in time."""
    model_ids = range(len(rates)) if model_ids is None else model_ids
    moved, total = [], 0.0  # moved: what each segment's examples do to the weights, [k, N], carried on in time
    for model_id in model_ids:
        train, loss_grad, w = columns(found.store.checkpoint(model_id))
        rate, dim = rates[model_id] / len(train), train.shape[1]
        curvature = train.T @ (w[:, None] * train)
        joint = np.zeros((2 * dim, 2 * dim))  # its exponential has the integral of the first block's
        joint[:dim, :dim], joint[:dim, dim:] = -rate * curvature, np.eye(dim)
        joint = exponential(joint)
        moved = [joint[:dim, :dim] @ one for one in moved] + [rate * joint[:dim, dim:] @ (loss_grad[:, None] * train).T]
        table = found.store.targets("test", model_id) if targets is None else found.store.checkpoint(model_id)
        features, own, _ = columns(table)
        side = np.sign(own) if target == "output" else own
        total = total + sum((side[:, None] * features @ one).T for one in moved) / len(model_ids)
    return total


def assert_close(scores, expected, tolerance=1e-6):
    assert scores.shape == expected.shape
    assert np.abs(expected).max() > 0
    assert np.abs(np.asarray(scores) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("target", ["loss", "output"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_the_formula(tmp_path, shape, target):
    rates = (5.0, 60.0, 20.0)
    found = shared(tmp_path, *shape)
    assert_close(found.scores("test", Estimate("source", target), None), reference(found, rates, target))


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("magnitude", [1e-12, 1e12])
def test_rounded_rows_of_any_size_are_taken_as_they_are_stored(tmp_path, storage, magnitude):
    rates = tuple(rate / magnitude**2 for rate in (5.0, 20.0))
    found = shared(tmp_path, 70, 4, 20, storage, magnitude, rates=rates)
    assert_close(found.scores("test", Estimate("source"), None), reference(found, rates), 1e-5)


@pytest.mark.parametrize("rates", [(1e-9, 1e-9), (1e9, 1e9), (0.0, 5.0), (5.0, 0.0)])
def test_short_and_endless_segments(tmp_path, rates):
    found = shared(tmp_path, 60, 5, 6, rates=rates)
    assert_close(
        found.scores("test", Estimate("source"), None), reference(found, [min(rate, 1e5) for rate in rates]), 1e-3
    )


def test_groups_are_sums_of_targets_also_in_little_memory(tmp_path):
    expected = reference(shared(tmp_path, 60, 7, 12), (5.0, 60.0, 20.0))
    groups = np.array([0, 2, -1, 0, 2, 2, 0])
    summed = np.stack([expected[:, groups == group].sum(1) for group in range(3)], axis=1)
    for memory_bytes in (1 << 12, 1 << 30):
        found = shared(tmp_path / str(memory_bytes), 60, 7, 12, memory_bytes=memory_bytes)
        assert_close(found.scores("test", Estimate("source"), None), expected)
        assert_close(found.scores("test", Estimate("source", groups=groups), None), summed)


def test_top_is_the_head_of_the_sorted_scores(tmp_path):
    found = shared(tmp_path, 60, 5, 12)
    expected = reference(found, (5.0, 60.0, 20.0))
    for kind, sign in (("proponents", -1), ("opponents", 1)):
        indices, _ = found.top("test", 4, kind, Estimate("source"), None)
        np.testing.assert_array_equal(indices, np.argsort(sign * expected, axis=0)[:4].T)


def test_self_influence_is_the_score_of_an_example_on_its_own_loss(tmp_path):
    for memory_bytes in (1 << 12, 1 << 30):
        found = shared(tmp_path / str(memory_bytes), 60, 5, 12, memory_bytes=memory_bytes)
        own = np.diagonal(reference(found, (5.0, 60.0, 20.0), "loss", targets="train"))
        np.testing.assert_allclose(found.self_influence(None, Estimate("source")), own, rtol=1e-9)
        np.testing.assert_allclose(found.self_influence([2, 0, 1], Estimate("source")), own, rtol=1e-9)


def test_checkpoints_are_in_the_order_of_their_numbers_and_another_rate_is_another_result(tmp_path):
    rates = (5.0, 60.0, 20.0)
    found = shared(tmp_path, 60, 5, 12)
    for chosen in ([2, 0, 1], [2, 1]):
        expected = reference(found, rates, model_ids=sorted(chosen))
        assert_close(found.scores("test", Estimate("source"), chosen), expected)
    found.store.checkpoint(1).set_attributes(learning_rate=6.0)
    assert_close(found.scores("test", Estimate("source"), None), reference(found, (5.0, 6.0, 20.0)))


@pytest.mark.parametrize(
    ("options", "model_ids", "message"),
    [
        ({"settings": {}}, None, "featurize into another save_dir with shared_projection=True"),
        ({"rates": (1.0, None)}, None, r"checkpoints \[1\] have none. Pass for each the sum over the steps"),
        ({}, [0, 2], r"skips checkpoints \[1\]"),
        ({"settings": {**SHARED, "preconditioner": "kfac"}}, None, "unrolls steps of SGD or Adam"),
    ],
)
def test_stores_without_what_it_needs_are_refused(tmp_path, options, model_ids, message):
    found = shared(tmp_path, 20, 3, 4, **options)
    for ask in (
        lambda: found.scores("test", Estimate("source"), model_ids),
        lambda: found.self_influence(model_ids, Estimate("source")),
        lambda: found.check_query(2, "proponents", Estimate("source"), model_ids, None),
    ):
        with pytest.raises(InputError, match=message):
            ask()


@pytest.mark.parametrize(
    ("losses", "warned"), [((2.3, 0.4, 2.2), True), ((2.3, 0.4, 0.5), False), ((0.5, 0.4, 0.41), False)]
)
def test_a_loss_that_rises_as_if_another_run_began_is_named(tmp_path, caplog, losses, warned):
    found = shared(tmp_path, 20, 3, 4)
    column = RowTable.column
    loss_of = dict(enumerate(losses))

    def losses_of(table, name, *args):
        values = column(table, name, *args)
        return np.full_like(values, loss_of[int(table.path.name)]) if name == "loss" else values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowTable, "column", losses_of)
        found.scores("test", Estimate("source"), None)
    said = "the mean loss rises from 0.4 at checkpoint 1 to 2.2 at checkpoint 2"
    assert (said in caplog.text) == ("takes all checkpoints for one run" in caplog.text) == warned


def test_one_checkpoint_and_exact_features_have_one_projection(tmp_path):
    alone = shared(tmp_path / "alone", 20, 3, 4, settings={})
    assert_close(alone.scores("test", Estimate("source"), [1]), reference(alone, (5.0, 60.0), model_ids=[1]))
    exact = shared(tmp_path / "exact", 20, 3, 4, settings={"projector": {"kind": "none"}})
    assert_close(exact.scores("test", Estimate("source"), None), reference(exact, (5.0, 60.0, 20.0)))


def test_there_is_no_regularization(tmp_path):
    with pytest.raises(InputError, match="which has no kernel to regularize"):
        Estimate("source", regularization=1.0)


def test_features_must_be_stored(tmp_path):
    x, y = torch.randn(20, 5), torch.randint(0, 3, (20,))
    states = [({"weight": torch.randn(3, 5), "bias": torch.randn(3)}, 1.0) for _ in range(2)]
    options = {"projector": "none", "progress": False, "save_dir": tmp_path}
    found = attribute(nn.Linear(5, 3), "image_classification", (x, y), (x, y), states, **options)
    with pytest.raises(CallOrderError, match="estimator='source' needs stored features"):
        found.tracer.finalize_scores("targets", "source")


def regression(num_rows=30, dim=4):
    """Least squares at its optimum, where gradients stay what they are: inputs, labels, weights, loss gradients."""
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(num_rows, size, generator=generator, dtype=torch.float64) for size in (dim, 1))
    y = x @ torch.arange(1.0, dim + 1, dtype=torch.float64).unsqueeze(1) + noise
    best = torch.linalg.lstsq(x, y).solution
    return x, y, best, 2 * (x @ best - y) * x


def linear(dim=4):
    return nn.Linear(dim, 1, bias=False).double()


def test_one_segment_of_a_quadratic_is_unrolled_gradient_descent(tmp_path):
    x, y, best, gradients = regression()
    targets, rate, steps = x[:5] + 1, 2e-7, 2_000_000
    options = {"projector": "none", "save_dir": tmp_path, "estimator": "source", "progress": False}
    checkpoint = ({"weight": best.T}, rate * steps)
    found = attribute(linear(), "regression", (x, y), (targets, targets[:, :1]), [checkpoint], **options)
    hessian = 2 * x.T @ x / len(x)
    kept = torch.eye(len(hessian), dtype=torch.float64) - rate * hessian
    # dw of the last step, of one more copy of z with weight 1/N: −η/N Σ_s (I − ηH)^s ∇L(z), a geometric series
    series = torch.linalg.solve(hessian, torch.eye(len(hessian)).double() - torch.linalg.matrix_power(kept, steps))
    change = -(gradients @ series @ targets.T) / len(x)
    sign = -torch.sign(2 * (targets @ best - targets[:, :1])).squeeze(1)  # a proponent moves f to the label
    closed = -gradients @ torch.linalg.solve(hessian, torch.eye(4).double() - torch.matrix_exp(-rate * steps * hessian))
    assert_close(found.scores, (closed @ targets.T / len(x) * sign).numpy(), 1e-6)
    assert_close(found.scores, (change * sign).numpy(), 1e-5)


def test_many_segments_of_a_quadratic_are_unrolled_gradient_descent(tmp_path):
    x, y, _, _ = regression()
    target, rate, steps = x[:1] + 1, 0.01, 12
    model, weights = linear(), torch.ones(len(x), dtype=torch.float64, requires_grad=True)
    value, states, ends = torch.zeros(4, 1, dtype=torch.float64), [], []
    for _ in range(steps):
        residual = x @ value - y
        value = value - rate * x.T @ (2 * weights.unsqueeze(1) * residual) / len(x)  # recorded by autograd
        states.append(({"weight": value.detach().T.clone()}, rate))
        ends.append(target @ value)
    options = {"projector": "none", "save_dir": tmp_path, "estimator": "source", "progress": False}
    label = torch.full((1, 1), 1e3, dtype=torch.float64)
    found = attribute(model, "regression", (x, y), (target, label), states, **options)
    (expected,) = torch.autograd.grad(torch.stack(ends).mean(), weights)
    assert_close(found.scores[:, 0], expected.numpy(), 0.05)  # of the order of rate times curvature


def test_attribute_makes_a_store_with_a_shared_projection(tmp_path):
    x, y = torch.randn(20, 5), torch.randint(0, 3, (20,))
    states = [({"weight": torch.randn(3, 5), "bias": torch.randn(3)}, 1.0) for _ in range(2)]
    options = {"proj_dim": 8, "estimator": "source", "progress": False}
    found = attribute(nn.Linear(5, 3), "image_classification", (x, y), (x, y), states, save_dir=tmp_path, **options)
    assert found.tracer.store.manifest.shares_projection
    assert np.isfinite(found.scores).all() and np.abs(found.scores).max() > 0
    loss = found.tracer.finalize_scores("targets", "source", target="loss")
    np.testing.assert_allclose(found.self_influence(), np.diagonal(loss), rtol=1e-3)
    with pytest.raises(InputError, match="expected shared_projection=True"):
        options["shared_projection"] = False
        attribute(nn.Linear(5, 3), "image_classification", (x, y), (x, y), states, save_dir=tmp_path / "b", **options)
