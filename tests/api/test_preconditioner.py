"""Gradients scaled by Adam's second moments: every form and projector, and scores that equal slow loops in float64."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from adam_cases import MODELS, AdamRun, classify
from projection_cases import (
    all_forms,
    matrix_of,
    normal,
    oracle_rows,
    stand_in,  # noqa: F401  a fixture
)
from torch import nn

import tracer
from tracer import Tracer, attribute
from tracer.gradients.combined import add_gradients
from tracer.gradients.inner_products import TargetGradients
from tracer.gradients.layers import conv_weight_gradient
from tracer.gradients.per_sample import DenseGradient, OuterGradient, ScaledGradient
from tracer.gradients.preconditioning import check_preconditioner
from tracer.gradients.rows import RowsGradient
from tracer.projection import make_projector
from tracer.training.lend_weights import LoadedWeights

SHAPE = (11, 6)
SCALE = normal(*SHAPE, seed=11).abs() + 0.1


def forms():
    """Every form of a gradient of `SHAPE`, a convolution's with and without groups among them."""
    found = all_forms(SHAPE)
    found["folded"] = all_forms(SHAPE, batch_size=10)["only dense"].fold(2)
    return found


def scaled_rows(gradient, scale=SCALE):
    return oracle_rows(gradient) * scale.flatten()


@pytest.mark.parametrize("form", forms())
def test_every_entry_is_scaled_whatever_the_form(form):
    gradient = forms()[form]
    scaled = gradient.scaled(SCALE)
    torch.testing.assert_close(scaled.dense(0, 5), scaled_rows(gradient), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled.dense(1, 3), scaled_rows(gradient)[1:3], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(scaled.squared_norm(), scaled_rows(gradient).square().sum(1), rtol=1e-10, atol=0)
    for first, last in ((0, 66), (3, 5), (12, 18), (60, 66)):
        built = scaled.entries(1, 4, first, last)
        torch.testing.assert_close(built, scaled_rows(gradient)[1:4, first:last], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", ["sequence", "embedding", "dense", "tied"])
def test_rows_fold_before_or_after_they_are_scaled(form):
    gradient = all_forms(SHAPE, batch_size=6)[form]
    expected = scaled_rows(gradient).reshape(3, 2, -1).sum(1)
    torch.testing.assert_close(gradient.scaled(SCALE).fold(2).dense(0, 3), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient.fold(2).scaled(SCALE).dense(0, 3), expected, rtol=1e-10, atol=1e-12)


def test_touched_rows_stay_rows_and_built_values_stay_built():
    assert type(forms()["embedding"].scaled(SCALE)) is RowsGradient
    assert type(forms()["dense"].scaled(SCALE)) is DenseGradient
    joined = add_gradients([forms()["embedding"], forms()["sequence"].scaled(SCALE)])
    torch.testing.assert_close(joined.dense(0, 5), oracle_rows(forms()["embedding"]) + scaled_rows(forms()["sequence"]))


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("kind", ["sketch", "rademacher", "gaussian", "factored", "none"])
def test_a_projector_sees_the_scaled_gradient(kind, form):
    projector = make_projector(kind, {"weight": SHAPE}, 20, seed=3)
    gradient = forms()[form]
    result = projector.project({"weight": gradient.scaled(SCALE)})
    expected = scaled_rows(gradient) @ matrix_of(projector, "weight")
    torch.testing.assert_close(result.features.double(), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
    torch.testing.assert_close(result.squared_norm, scaled_rows(gradient).square().sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", ["vector input", "sequence", "embedding", "tied"])
def test_fast_jl_sees_the_scaled_gradient(form, stand_in):  # noqa: F811
    projector = make_projector("fast_jl", {"weight": SHAPE}, 512, seed=3, device="cpu")
    result = projector.project({"weight": forms()[form].scaled(SCALE)})
    expected = scaled_rows(forms()[form]) @ matrix_of(projector, "weight")
    assert ((result.features - expected).norm(dim=1) <= 1e-3 * expected.norm(dim=1)).all()
    torch.testing.assert_close(result.squared_norm, scaled_rows(forms()[form]).square().sum(1))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["sketch", "rademacher", "factored", "none"])
def test_convolutions_are_scaled(kind, groups):
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups).double()
    x, g = normal(5, 4, 7, 7, seed=1), normal(5, 6, 4, 4, seed=2)
    gradient, scale = conv_weight_gradient(module, x, g), normal(*module.weight.shape, seed=3).abs()
    loss = [(module(x[i : i + 1]) * g[i : i + 1]).sum() for i in range(5)]
    expected = torch.stack([torch.autograd.grad(one, module.weight)[0].flatten() for one in loss]) * scale.flatten()
    projector = make_projector(kind, {"weight": tuple(module.weight.shape)}, 30, seed=1)
    result = projector.project({"weight": gradient.scaled(scale)})
    torch.testing.assert_close(result.features, expected @ matrix_of(projector, "weight"), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.squared_norm, expected.square().sum(1), rtol=1e-9, atol=0)


@pytest.mark.parametrize("other", ["sequence", "embedding", "dense", "tied", "only dense"])
@pytest.mark.parametrize("one", forms())
def test_products_of_all_pairs(one, other):
    rows, targets = forms()[one], all_forms(SHAPE, batch_size=3)[other]
    held = TargetGradients()
    held.append(torch.full((3,), 2.0), [(0, {"weight": targets.scaled(SCALE)})])
    held.join()
    products = torch.zeros(5, 3, dtype=torch.float64)
    squares = held.add_products("weight", rows.scaled(SCALE), products)
    torch.testing.assert_close(products, scaled_rows(rows) @ scaled_rows(targets).T / 2, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(squares, scaled_rows(rows).square().sum(1), rtol=1e-9, atol=0)


def test_half_precision_factors_are_widened_before_they_are_multiplied():
    left, right = (normal(5, 40, n, seed=n).bfloat16() for n in SHAPE)
    scaled = OuterGradient(left, right, SHAPE).scaled(SCALE.float())
    expected = torch.einsum("bto,bti->boi", left.double(), right.double()) * SCALE
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled.entries(0, 5).double(), expected.flatten(1), rtol=0, atol=1e-4)


def trace(run, path, **options):
    options = {"projector": "none", "preconditioner": "adam", "batch_size": 4, **options}
    return attribute(run.model, run.loss, run.train, run.targets, run.checkpoints, save_dir=path, **options)


@pytest.mark.parametrize("storage", ["float32", "none"])
@pytest.mark.parametrize("kind", MODELS)
def test_exact_scores_equal_a_float64_loop(tmp_path, kind, storage):
    run = AdamRun(kind, num_checkpoints=2 if kind == "mlp" else 1)
    found = trace(run, tmp_path / "store", storage=storage)
    for estimator in ("tracin", "cosine"):
        scores = found.tracer.finalize_scores("targets", estimator)
        expected = run.scores(cosine=estimator == "cosine")
        assert np.abs(scores - expected).max() <= 2e-5 * np.abs(expected).max(), estimator


@pytest.mark.parametrize("kind", ["mlp", "odd"])
def test_self_influence_is_exact_whatever_the_projection(tmp_path, kind):
    run = AdamRun(kind, num_checkpoints=1)
    found = trace(run, tmp_path / "store", projector="sketch", proj_dim=16)
    expected = run.checkpoints[0][1] * run.rows(0, run.train).square().sum(1)
    np.testing.assert_allclose(found.self_influence(), expected.numpy(), rtol=1e-5)


def featurizer(run, path, **options):
    """A tracer at the first checkpoint, and what turns batches into features there."""
    tracing = Tracer(run.model, run.loss, 9, path, preconditioner="adam", **options)
    tracing.load_checkpoint(run.checkpoints[0][0], 0)
    return tracing, tracing._session.featurizer


def as_gradients(rows, shapes):
    """Rows ``[n, parameters]`` as gradients by name."""
    parts = rows.split([int(np.prod(shape)) for shape in shapes.values()], dim=1)
    return {
        name: DenseGradient(part.reshape(-1, *shape)) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


@pytest.mark.parametrize("kind", ["sketch", "rademacher", "gaussian", "factored", "none"])
@pytest.mark.parametrize("model", ["conv", "odd"])
def test_features_are_projections_of_scaled_gradients(tmp_path, kind, model):
    run = AdamRun(model, num_checkpoints=1)
    tracing, making = featurizer(run, tmp_path / "store", projector=kind, proj_dim=64)
    projector = tracing._factory._projector(0)
    expected = projector.project(as_gradients(run.rows(0, run.train), tracing._factory.shapes)).features.numpy()
    values = making.compute(run.train, 9)
    np.testing.assert_allclose(values.features, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(values.gradient_norm, run.rows(0, run.train).norm(dim=1).numpy(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["sketch", "rademacher", "gaussian"])
def test_projected_products_err_as_projections_do(tmp_path, kind):
    run = AdamRun("conv", num_checkpoints=1)
    _, making = featurizer(run, tmp_path / "store", projector=kind, proj_dim=128)
    train = making.compute(run.train, 9).features.copy()  # whose memory is used again
    targets = making.compute(run.targets, 4).features
    rows, others = run.rows(0, run.train), run.rows(0, run.targets)
    exact, lengths = rows @ others.T, torch.outer(rows.norm(dim=1), others.norm(dim=1))
    errors = (train @ targets.T - exact.numpy()) / lengths.numpy()
    assert np.sqrt(np.square(errors).mean()) <= 1.5 * (2 / 128) ** 0.5


@pytest.mark.parametrize("kind", ["mlp", "odd"])
def test_a_model_in_float64_is_scaled_in_float64(tmp_path, kind):
    run = AdamRun(kind, double=True, num_checkpoints=1)
    tracing, making = featurizer(run, tmp_path / "store", projector="none")
    projector, rows = make_projector("none", tracing._factory.shapes, 1, 0), []
    sink = SimpleNamespace(begin=rows.clear, take=lambda a, b, given: rows.append(projector.project(given).features))
    making.run(run.train, 9, sink)
    expected = run.rows(0, run.train)
    torch.testing.assert_close(torch.stack(rows).sum(0), expected, rtol=0, atol=1e-9 * float(expected.abs().max()))


def test_forwards_in_half_precision_are_scaled_too(tmp_path):
    run = AdamRun("mlp", num_checkpoints=1)
    _, making = featurizer(run, tmp_path / "store", projector="none", autocast="bfloat16")
    expected = run.rows(0, run.train).numpy()
    np.testing.assert_allclose(making.compute(run.train, 9).features, expected, atol=0.03 * np.abs(expected).max())


@pytest.mark.parametrize("projector", ["sketch", "none"])
def test_step_by_step_queries_and_paths_agree_with_the_one_call(tmp_path, projector):
    run = AdamRun("mlp")  # of two checkpoints
    options = {"projector": projector, "storage": "float32", "preconditioner": "adam"}
    paths = []
    for number, (whole, rate) in enumerate(run.checkpoints):
        torch.save(whole | {"epoch": number}, tmp_path / f"{number}.pt")
        paths.append((tmp_path / f"{number}.pt", rate))
    tracing = Tracer(run.model, run.loss, 9, tmp_path / "steps", **options)
    for number, (path, rate) in enumerate(paths):
        tracing.load_checkpoint(path, number, rate)
        tracing.featurize(run.train, num_samples=9)
    tracing.finalize_features()
    other = Tracer(run.model, run.loss, 9, tmp_path / "steps", **options)  # it knows the weights from the store
    answer = other.query(run.targets, 3)
    for number, (path, _) in enumerate(paths):
        tracing.start_scoring_checkpoint(path, number, 4, "targets")
        tracing.score(run.targets, num_samples=4)
    whole = trace(run, tmp_path / "whole", **options)
    np.testing.assert_allclose(tracing.finalize_scores("targets"), whole.scores, rtol=1e-5, atol=1e-9)
    top = whole.by("scores").top(3)
    np.testing.assert_array_equal(answer.indices, top.indices)
    np.testing.assert_allclose(answer.scores, top.scores, rtol=1e-4, atol=1e-9)


def test_a_score_is_what_a_step_of_adam_does_to_the_target(tmp_path):
    """A tiny step of `torch.optim.Adam` without momentum, whose second moments the row itself hardly changes."""
    run = AdamRun("mlp", double=True, num_checkpoints=1)
    whole, rate = run.checkpoints[0]
    whole["adam"]["param_groups"][0].update(betas=(0.0, 1 - 1e-9), lr=1e-6, weight_decay=0.0)
    for entry in whole["adam"]["state"].values():
        entry["step"] = torch.tensor(1e12)  # no bias is left to correct
    scores = trace(run, tmp_path / "store", storage="float32").scores / rate
    for row in range(9):
        model = copy.deepcopy(run.model).eval()
        model.load_state_dict(whole["model"])
        adam = torch.optim.Adam(model.parameters())
        adam.load_state_dict(copy.deepcopy(whole["adam"]))
        before = classify(model, run.targets).detach()
        classify(model, tuple(column[row : row + 1] for column in run.train)).sum().backward()
        adam.step()
        change = (before - classify(model, run.targets).detach()) / 1e-6
        np.testing.assert_allclose(change.numpy(), scores[row], rtol=1e-3, atol=1e-3 * np.abs(scores).max())


def test_without_a_preconditioner_nothing_is_scaled_and_the_manifest_is_as_it_was(tmp_path):
    run = AdamRun("mlp", num_checkpoints=1)
    whole, rate = run.checkpoints[0]
    plain = attribute(
        run.model, run.loss, run.train, run.targets, [(whole["model"], rate)], save_dir=tmp_path / "a", projector="none"
    )
    assert "preconditioner" not in plain.tracer.store.manifest.settings
    assert LoadedWeights(run.model, whole["model"]).scales is None
    run.gammas = [{name: torch.ones_like(value) for name, value in run.gammas[0].items()}]
    np.testing.assert_allclose(plain.scores, run.scores(), rtol=1e-4, atol=1e-9)


def test_a_training_checkpoint_without_a_preconditioner_is_its_weights(tmp_path):
    run = AdamRun("mlp", num_checkpoints=1)
    stored = []
    for name, checkpoint in (("whole", run.checkpoints[0][0]), ("weights", run.checkpoints[0][0]["model"])):
        tracing = Tracer(run.model, run.loss, 9, tmp_path / name)
        tracing.load_checkpoint(checkpoint, 0)
        stored.append(tracing.store.table_attributes(0)["weights_fingerprint"])
    assert stored[0] == stored[1]


def test_a_store_is_opened_with_the_preconditioner_it_was_made_with(tmp_path):
    run = AdamRun("mlp", num_checkpoints=1)
    options = {"preconditioner": "adam", "projector": "sketch"}
    trace(run, tmp_path / "store", **options)
    with pytest.raises(tracer.MismatchError, match="preconditioner: stored 'adam', asked nothing"):
        trace(run, tmp_path / "store", **{**options, "preconditioner": None})
    Tracer(run.model, run.loss, 9, tmp_path / "plain")
    with pytest.raises(tracer.MismatchError, match="preconditioner: stored nothing, asked 'adam'"):
        Tracer(run.model, run.loss, 9, tmp_path / "plain", preconditioner="adam")


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("second moments", lambda whole: whole["adam"]["state"][0]["exp_avg_sq"].mul_(2)),
        ("second moments", lambda whole: whole["adam"]["state"][1].update(step=7)),
        ("second moments", lambda whole: whole["adam"]["param_groups"][0].update(eps=1e-8)),
        ("weights", lambda whole: whole["model"]["0.bias"].add_(1)),
    ],
)
def test_other_moments_under_a_known_model_id(tmp_path, what, change):
    run = AdamRun("mlp", num_checkpoints=1)
    tracing = trace(run, tmp_path / "store", projector="sketch").tracer
    other = copy.deepcopy(run.checkpoints[0][0])
    tracing.load_checkpoint(other, 0)
    change(other)
    with pytest.raises(tracer.MismatchError, match=f"holds other {what} under model_id=0"):
        tracing.load_checkpoint(other, 0)
    with pytest.raises(tracer.MismatchError, match=f"holds other {what} under model_id=0"):
        tracing.start_scoring_checkpoint(other, 0, 4, "targets")


def test_moments_that_do_not_count_are_not_compared(tmp_path):
    run = AdamRun("mlp", num_checkpoints=1)
    tracing = trace(run, tmp_path / "store", projector="sketch", params="2.*").tracer
    other = copy.deepcopy(run.checkpoints[0][0])
    other["adam"]["state"][0]["exp_avg_sq"].mul_(2)
    other["adam"]["state"][2]["exp_avg"].mul_(2)
    tracing.load_checkpoint(other, 0)


def test_an_unknown_preconditioner(tmp_path):
    with pytest.raises(tracer.InputError, match="preconditioner='adamw' is not known; did you mean 'adam'"):
        Tracer(nn.Linear(2, 2), classify, 3, tmp_path / "store", preconditioner="adamw")


def test_a_sharded_model_is_refused():
    with pytest.raises(
        tracer.InputError, match="fully_shard divides among processes, whose gradients and optimizer state are divided"
    ):
        check_preconditioner("adam", sharded=True)
    assert check_preconditioner(None, sharded=True) is None


def test_a_scaled_gradient_says_where_and_what_it_is():
    scaled = ScaledGradient(forms()["sequence"], SCALE.float())
    assert (scaled.shape, scaled.batch_size, scaled.numel) == (SHAPE, 5, 66)
    assert (scaled.device, scaled.dtype, scaled.outer(0, 1)) == (torch.device("cpu"), torch.float64, None)
