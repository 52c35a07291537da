"""The kernel of all outputs: influence of linear models, against solutions in closed form and slow loops in float64."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from torch import nn

import tracer
from tracer import Tracer, attribute
from tracer.api import hidden_curvature, shared_sums
from tracer.api.hidden_curvature import LabelDraws, ListedLabels, planned
from tracer.errors import CallOrderError
from tracer.store.hidden_rows import load_hidden

EXACT = {"projector": "none", "storage": "float32", "progress": False}
RIDGE = 3.0


def softmax_case(classes=4, count=60, dim=5):
    torch.manual_seed(0)
    x, y = torch.randn(count + 6, dim).double(), torch.randint(0, classes, (count + 6,))
    model = nn.Linear(dim, classes).double()
    return model, (x[:count], y[:count]), (x[count:], y[count:])


def loss_gradients(model, rows):
    found = []
    for x, y in zip(*rows, strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), y[None])
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(found)


def gauss_newton(model, x):
    """Return the Gauss-Newton matrix of the sum of cross-entropies."""
    total = 0.0
    for one in x:
        logits = model(one[None])[0]
        jacobian = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(each, list(model.parameters()), retain_graph=True)])
                for each in logits
            ]
        )
        p = logits.detach().softmax(0)
        total = total + jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    return total


def softmax_influence(model, train, targets):
    kernel = gauss_newton(model, train[0]) + RIDGE * torch.eye(sum(p.numel() for p in model.parameters())).double()
    return (loss_gradients(model, train) @ torch.linalg.solve(kernel, loss_gradients(model, targets).T)).numpy()


def states_of(model, number=1):
    torch.manual_seed(1)
    return [
        {name: value + 0.2 * step * torch.randn_like(value) for name, value in model.state_dict().items()}
        for step in range(number)
    ]


def attributed(path, model, train, targets, states):
    options = {"save_dir": path, "estimator": "influence", **EXACT}
    return attribute(model, "image_classification", train, targets, states, **options)


def influence_of(found, **options):
    given = {"target": "loss", "regularization": RIDGE, **options}
    return np.asarray(found.tracer.finalize_scores("targets", "influence", **given))


def close(found, expected, relative=1e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=relative * np.abs(expected).max())


def test_influence_of_a_softmax_is_that_of_its_gauss_newton_matrix(tmp_path):
    model, train, targets = softmax_case()
    found = attributed(tmp_path, model, train, targets, [model.state_dict()])
    close(influence_of(found), softmax_influence(model, train, targets))


@pytest.mark.parametrize("outputs", [1, 3, 10])
def test_influence_of_a_linear_regression_is_its_closed_form(tmp_path, outputs):
    torch.manual_seed(2)
    x, y = torch.randn(50, 4).double(), torch.randn(50, outputs).double()
    model = nn.Linear(4, outputs).double()
    one = torch.cat([x, torch.ones(50, 1)], 1)
    theta = torch.linalg.solve(one.T @ one + outputs / 2 * RIDGE * torch.eye(5), one.T @ y)
    state = {"weight": theta[:-1].T.contiguous(), "bias": theta[-1]}
    model.load_state_dict(state)
    train, targets = (x[:40], y[:40]), (x[40:], y[40:])
    found = attribute(model, "regression", train, targets, [state], save_dir=tmp_path, estimator="influence", **EXACT)
    # the loss is the mean over outputs: its Hessian is 2 / m of each output's Gram matrix, its gradient 2 / m r xᵀ
    gram = one[:40].T @ one[:40] * 2 / outputs + RIDGE * torch.eye(5)
    residual = (model(x) - y).detach()
    leverage = one[:40] @ torch.linalg.solve(gram, one[40:].T)
    expected = (2 / outputs) ** 2 * leverage * (residual[:40] @ residual[40:].T)
    close(influence_of(found), expected.numpy())


def ridge_optimum(outputs):
    """Return a regression at the optimum of its penalized loss, and its penalty as λ of the summed loss."""
    torch.manual_seed(3)
    x, y = torch.randn(80, 4).double(), torch.randn(80, outputs).double()
    gram = x.T @ x * 2 / outputs + RIDGE * torch.eye(4)
    theta = torch.linalg.solve(gram, x.T @ y * 2 / outputs)
    model = nn.Linear(4, outputs, bias=False).double()
    model.load_state_dict({"weight": theta.T.contiguous()})
    return model, (x, y)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("options", [EXACT, {"proj_dim": 512, "progress": False}])
def test_a_penalized_optimum_has_its_own_regularization(tmp_path, outputs, options):
    model, rows = ridge_optimum(outputs)
    found = attribute(
        model, "regression", rows, rows, [model.state_dict()], save_dir=tmp_path, estimator="influence", **options
    )
    chosen = found.tracer.regularization("influence")
    assert chosen.rule == "optimum"
    assert chosen.value == pytest.approx(RIDGE, rel=1e-4 if options is EXACT else 0.1)


def test_weights_that_are_no_optimum_have_none(tmp_path):
    model, train, targets = softmax_case()
    found = attributed(tmp_path, model, train, targets, states_of(model))
    assert found.tracer.regularization("influence").rule != "optimum"


def test_sketches_of_more_values_than_rows_give_the_scores_of_exact_features(tmp_path):
    model, train, targets = softmax_case()
    given = {"save_dir": tmp_path, "estimator": "influence", "proj_dim": 1 << 14, "storage": "float32"}
    found = attribute(model, "image_classification", train, targets, [model.state_dict()], progress=False, **given)
    close(influence_of(found), softmax_influence(model, train, targets), 0.05)


def label_kernels(tmp_path, count):
    """Return the sum over labels at a checkpoint of another set's density, for a number of seeds, ``[S, k, k]``."""
    model, train, targets = softmax_case()
    found = []
    for seed in range(count):
        options = {**EXACT, "seed": seed, "save_dir": tmp_path / str(seed), "estimator": "influence"}
        made = attribute(model, "image_classification", train, targets, states_of(model, 2), **options)
        rows = load_hidden(made.tracer.store, 1)
        weights = np.abs(made.tracer.store.checkpoint(1).column("loss_grad")).astype(np.float64)[rows.examples]
        found.append(np.einsum("n,nk,nl->kl", weights, rows.features, rows.features, optimize=True))
    return np.stack(found)


def test_drawn_labels_have_the_sum_over_all_as_their_mean(tmp_path, monkeypatch):
    (exact,) = label_kernels(tmp_path / "listed", 1)
    for name, value in (("MAX_LISTED", 0), ("MIN_ROWS", 64), ("MAX_ROWS", 64)):
        monkeypatch.setattr(hidden_curvature, name, value)
    drawn = label_kernels(tmp_path / "drawn", 24)
    noise = drawn.std(0) / len(drawn) ** 0.5
    assert (np.abs(drawn.mean(0) - exact) <= 5 * noise + 1e-6).all()
    assert np.trace(exact) > 10 * np.trace(noise)  # so that the test can fail


def test_few_labels_are_listed_and_many_are_drawn_by_density():
    density = np.array([0.0, 1.0, 3.0, 0.5])
    few = planned(density, 3, None, 0)
    assert few.draws is ListedLabels and few.counts.tolist() == [0, 3, 3, 3] and few.scales.tolist() == [1.0] * 4
    many = planned(np.tile(density, 1000), 3, None, 0)
    assert many.draws is LabelDraws and many.counts.sum() == pytest.approx(4000, abs=1)
    expected = np.tile(density, 1000) * 4000 / 4500
    clear = many.counts[expected > 0]
    assert (np.abs(clear - expected[expected > 0]) < 1.01).all()
    np.testing.assert_allclose(
        many.scales[expected > 0] * expected[expected > 0], 1.0, rtol=2e-3
    )  # so sums are unbiased
    assert planned(np.tile(density, 1000), 3, 10, 0).draws is ListedLabels  # exact features
    assert planned(density, None, 10, 0).draws is LabelDraws
    assert planned(np.ones(100), None, None, 0).counts.tolist() == [4] * 100
    assert not planned(np.zeros(4), 3, None, 0).counts.any()


def logit_parts(model, rows):
    """Return for each example its input with a one, p, the label, and the gradient of the margin in the logits."""
    for x, y in zip(*rows, strict=True):
        p = model(x[None])[0].softmax(0).detach()
        errors = torch.eye(len(p)).double() - p  # of each label
        yield torch.cat([x, torch.ones(1).double()]), p, y, errors


def test_weights_are_averaged_over_checkpoints(tmp_path):
    model, train, targets = softmax_case()
    states = states_of(model, 2)
    found = attributed(tmp_path, model, train, targets, states)

    def at(state, rows):
        model.load_state_dict(state)
        return list(logit_parts(model, rows))

    def shares(rows):  # |Q|, [2, n]
        return torch.tensor([[1 - p[y] for _, p, y, _ in at(state, rows)] for state in states])

    q = shares(train)
    own, others = (q.square() * (1 - q)).mean(0), q.mean(0)
    expected = 0.0
    for state in states:
        kernel = RIDGE * torch.eye(4 * 6).double()
        for (one, p, y, errors), given, rest in zip(at(state, train), own, others, strict=True):
            gradient = errors[y] / (1 - p[y])  # of the margin
            matrix = given * torch.outer(gradient, gradient)
            for c in set(range(4)) - {int(y)}:
                matrix = matrix + rest * p[c] / (1 - p[y]) * torch.outer(errors[c], errors[c])
            kernel = kernel + torch.kron(matrix, torch.outer(one, one))
        margins = [
            torch.stack([torch.kron(errors[y] / (1 - p[y]), one) for one, p, y, errors in at(state, rows)])
            for rows in (train, targets)
        ]
        own_share = torch.stack([1 - p[y] for _, p, y, _ in at(state, targets)])
        expected = expected + margins[0] @ torch.linalg.solve(kernel, margins[1].T) * own_share / 2
    close(influence_of(found), (expected * q.mean(0)[:, None]).numpy())


def store_without_labels(path, model, train, targets):
    traced = Tracer(model, "image_classification", len(train[0]), path, **EXACT)
    traced.load_checkpoint(model.state_dict(), 0)
    traced.featurize(train, num_samples=len(train[0]))
    traced.finalize_features()
    traced.start_scoring_checkpoint(model.state_dict(), 0, len(targets[0]), "targets")
    traced.score(targets, num_samples=len(targets[0]))
    return traced


def scored(traced):
    return np.array(traced.finalize_scores("targets", "influence", target="loss", regularization=RIDGE))


def test_a_kernel_of_f_alone_is_said_and_its_scores_are_replaced_later(tmp_path, caplog):
    model, train, targets = softmax_case()
    traced = store_without_labels(tmp_path, model, train, targets)
    with caplog.at_level(logging.WARNING, "tracer"):
        before = scored(traced)
        scored(traced)
    assert caplog.text.count("fit_kernel") == 1
    traced.fit_kernel(train)
    caplog.clear()
    after = scored(traced)
    assert "fit_kernel" not in caplog.text
    expected = softmax_influence(model, train, targets)
    close(after, expected)
    assert np.abs(before - expected).max() > 0.01 * np.abs(expected).max()


def test_labels_of_replaced_examples_do_not_stay(tmp_path, caplog):
    model, train, targets = softmax_case()
    traced = store_without_labels(tmp_path, model, train, targets)
    traced.fit_kernel(train)
    train[0][7] = -train[0][7]
    traced.replace([7])
    traced.load_checkpoint(model.state_dict(), 0)
    traced.featurize((train[0][7:8], train[1][7:8]), inds=[7])
    traced.finalize_features()
    with caplog.at_level(logging.WARNING, "tracer"):
        scored(traced)
    assert "fit_kernel" in caplog.text
    traced.fit_kernel(train)
    close(scored(traced), softmax_influence(model, train, targets))


def test_an_interrupted_pass_resumes(tmp_path, monkeypatch):
    model, train, targets = softmax_case()
    traced = store_without_labels(tmp_path, model, train, targets)
    monkeypatch.setattr(shared_sums, "_SAVE_SECONDS", 0.0)
    compute, seen = hidden_curvature.HiddenFit._batch, []

    def stopping(self, plan, featurizer, batch, inds):
        seen.append(len(inds))
        if len(seen) == 4:
            raise RuntimeError("stop")
        return compute(self, plan, featurizer, batch, inds)

    monkeypatch.setattr(hidden_curvature.HiddenFit, "_batch", stopping)
    with pytest.raises(RuntimeError, match="stop"):
        traced.fit_kernel(train, batch_size=8)
    traced.fit_kernel(train, batch_size=8)
    assert sum(seen) == 60 + 8  # one batch failed, and no other was computed twice
    close(scored(traced), softmax_influence(model, train, targets))
    assert len(list((tmp_path / "curvature" / "0").glob("*/zarr.json"))) == 1
    assert tracer.verify(tmp_path).ok


def test_processes_share_the_pass(tmp_path):
    model, train, targets = softmax_case()
    store_without_labels(tmp_path, model, train, targets).close()
    both = [Tracer(model, "image_classification", 60, tmp_path, process=(rank, 2), **EXACT) for rank in range(2)]
    for each in both:
        each.load_checkpoint(model.state_dict(), 0)
        each.fit_kernel(train)
    both[0].close()
    close(scored(both[1]), softmax_influence(model, train, targets))


def test_whitened_and_preconditioned_rows_have_labels_of_their_own_kind(tmp_path):
    model, train, targets = softmax_case()
    options = {"preconditioner": "kfac", "save_dir": tmp_path, "estimator": "influence", **EXACT}
    found = attribute(model, "image_classification", train, targets, [model.state_dict()], **options)
    rows, store = load_hidden(found.tracer.store, 0), found.tracer.store
    assert rows.facts.labels == "others" and rows.facts.weights is None
    assert len(list((tmp_path / "curvature" / "0").glob("*/zarr.json"))) == 2  # the whitening stays
    assert np.isfinite(influence_of(found)).all() and store.catalog.has_checkpoint(0)


def test_what_cannot_be_fitted_says_so(tmp_path):
    model, train, _ = softmax_case()
    traced = Tracer(model, "image_classification", 60, tmp_path / "a", **EXACT)
    with pytest.raises(CallOrderError, match="load_checkpoint"):
        traced.fit_kernel(train)
    traced.load_checkpoint(model.state_dict(), 0)
    with pytest.raises(CallOrderError, match="finalize"):
        traced.fit_kernel(train)
    without = Tracer(model, "image_classification", 60, tmp_path / "b", projector="none", storage="none")
    without.load_checkpoint(model.state_dict(), 0)
    with pytest.raises(CallOrderError, match="storage"):
        without.fit_kernel(train)
