"""Estimators with a kernel, outputs as targets, groups: made-up features against the formulas in float64."""

from __future__ import annotations

import copy
import errno
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scoring_cases import RATES, fill, scorer, slow_leave_one_out
from store_cases import stored_features

from tracer import attribute
from tracer.errors import CallOrderError, InputError
from tracer.scoring import scorer as scorer_module
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import InMemoryTable
from tracer.scoring.preconditioned_targets import PreconditionedTargets
from tracer.scoring.regularization import LAMBDAS, choose_regularization
from tracer.scoring.scorer import Scorer
from tracer.store.revisions import Revisions

ESTIMATORS = ("trak", "influence")
SHAPES = [(60, 5, 12), (12, 5, 60), (33, 1, 33), (1, 2, 3)]


def columns(found: Scorer, model_id: int, side: str) -> tuple[np.ndarray, ...]:
    """Features, Q, ∂²L/∂f² and norm of all examples, in float64."""
    table = found.store.checkpoint(model_id) if side == "train" else found.store.targets("test", model_id)
    features = stored_features(table, 0, table.num_rows).astype(np.float64)
    return features, *(table.column(name).astype(np.float64) for name in ("loss_grad", "loss_hess", "gradient_norm"))


def reference(found: Scorer, estimate: Estimate, regularization: float = 0.0, groups=None) -> np.ndarray:
    """The estimator's formula, checkpoint by checkpoint, in plain numpy."""
    total, loss_grads = 0.0, []
    mean_loss_hess = np.mean([columns(found, model_id, "train")[2] for model_id in range(len(RATES))], axis=0)
    for model_id, rate in enumerate(RATES):
        train, loss_grad, _, norm = columns(found, model_id, "train")
        target, target_loss_grad, _, target_norm = columns(found, model_id, "targets")
        side = {"loss": target_loss_grad, "output": np.sign(target_loss_grad)}[estimate.target]
        if estimate.estimator == "cosine":
            left, right = np.sign(loss_grad)[:, None] * train / norm[:, None], np.sign(target_loss_grad) / target_norm
            total = total + rate * left @ (right[:, None] * target).T
        elif estimate.estimator == "tracin":
            total = total + rate * (loss_grad[:, None] * train) @ (side[:, None] * target).T
        else:
            w = np.ones_like(loss_grad) if estimate.estimator == "trak" else mean_loss_hess
            kernel = train.T @ (w[:, None] * train)
            inverse = np.linalg.pinv(kernel, hermitian=True)
            if regularization:
                inverse = np.linalg.inv(kernel + regularization * np.eye(len(kernel)))
            total = total + train @ inverse @ (side[:, None] * target).T / len(RATES)
            loss_grads.append(loss_grad)
    scores = total * np.mean(loss_grads, axis=0)[:, None] if loss_grads else total
    if groups is not None:
        scores = np.stack([scores[:, groups == group].sum(1) for group in range(groups.max() + 1)], axis=1)
    return scores


def assert_close(scores, expected, tolerance=1e-6):
    assert scores.shape == expected.shape
    assert np.abs(expected).max() > 0
    assert np.abs(np.asarray(scores) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("target", ["loss", "output"])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_those_of_the_formula(tmp_path, estimator, target, shape):
    found = scorer(tmp_path, *shape)
    estimate = Estimate(estimator, target, 0.7)
    assert_close(found.scores("test", estimate, None), reference(found, estimate, 0.7))


def effect_sizes(found: Scorer, estimator: str, regularization: float) -> np.ndarray:
    """|mean Q| times the root mean square of √(φᵀ (K + λI)⁻¹ φ), or of ‖(K + λI)⁻¹ φ‖, example by example."""
    sides = [columns(found, model_id, "train") for model_id in range(len(RATES))]
    w, loss_grad = (np.mean([side[place] for side in sides], axis=0) for place in (2, 1))
    squares = np.zeros(len(w))
    for features, *_ in sides:
        kernel = features.T @ (w[:, None] * features) + regularization * np.eye(features.shape[1])
        for index, phi in enumerate(features):
            step = np.linalg.solve(kernel, phi)
            squares[index] += (step @ step if estimator == "relatif_theta" else phi @ step) / len(RATES)
    return np.abs(loss_grad) * np.sqrt(squares)


@pytest.mark.parametrize("estimator", ["relatif", "relatif_theta"])
@pytest.mark.parametrize("target", ["loss", "output"])
@pytest.mark.parametrize("shape", SHAPES)
def test_relative_influence_is_influence_over_the_size_of_the_effect(tmp_path, estimator, target, shape):
    found = scorer(tmp_path, *shape)
    estimate, plain = (Estimate(each, target, 0.7) for each in (estimator, "influence"))
    sizes = effect_sizes(found, estimator, 0.7)
    expected = reference(found, plain, 0.7) / sizes[:, None]
    assert_close(found.scores("test", estimate, None), expected)
    indices, scores = found.top("test", 1, "proponents", estimate, None)
    np.testing.assert_array_equal(indices[:, 0], expected.argmax(0))
    np.testing.assert_allclose(scores[:, 0], expected.max(0), rtol=1e-4)
    own = found.self_influence(None, Estimate("influence", regularization=0.7))
    np.testing.assert_allclose(found.self_influence(None, Estimate(estimator, regularization=0.7)), own / sizes)
    if estimator == "relatif":
        np.testing.assert_allclose(sizes, np.sqrt(own), rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(60, 5, 12), (12, 5, 60), (1, 2, 3)])
def test_without_regularization_the_pseudo_inverse_is_taken(tmp_path, estimator, shape):
    found = scorer(tmp_path, *shape)
    estimate = Estimate(estimator, regularization=0.0)
    assert_close(found.scores("test", estimate, None), reference(found, estimate), 1e-5)


@pytest.mark.parametrize("storage", ["float16", "int8"])
@pytest.mark.parametrize("magnitude", [1e-12, 1e12])
def test_rounded_rows_of_any_size_are_taken_as_they_are_stored(tmp_path, storage, magnitude):
    found = scorer(tmp_path, 70, 4, 20, storage, magnitude)
    estimate = Estimate("influence", regularization=magnitude**2)
    assert_close(found.scores("test", estimate, None), reference(found, estimate, magnitude**2), 1e-5)


def learnable(tmp_path, num_rows=60, dim=12):
    """A store whose output changes follow from its features, with noise: a λ in between predicts them best."""
    found = scorer(tmp_path, num_rows, 5, dim)
    for model_id in range(len(RATES)):
        table = found.store.checkpoint(model_id)
        rng = np.random.default_rng(7 + model_id)
        features, rows = stored_features(table, 0, num_rows), np.arange(num_rows)
        output_change = features @ np.linspace(2, 0, dim) + 5 * rng.standard_normal(num_rows)
        names = ("loss", "loss_grad", "loss_hess", "gradient_norm", "label", "fingerprint")
        kept = {name: table.column(name) for name in names}
        kept["loss_grad"] = (0.01 * kept["loss_grad"]).astype(np.float32)
        with found.store.create_checkpoint(10 + model_id, "a", RATES[model_id]) as copy:
            copy.write(rows, features, output_change=output_change.astype(np.float32), **kept)
            copy.set_attributes(finalized=True)
    return found, [10, 11]


def test_the_chosen_regularization_is_the_one_that_is_used(tmp_path):
    found = scorer(tmp_path, 60, 5, 12)
    for estimator in ESTIMATORS:
        chosen = found.regularization(None, Estimate(estimator))
        auto = np.array(found.scores("test", Estimate(estimator), None))
        assert_close(auto, reference(found, Estimate(estimator), chosen.value))
        assert_close(auto, np.asarray(found.scores("test", Estimate(estimator, regularization=chosen.value), None)))


@pytest.mark.parametrize("shape", [(60, 40), (40, 44), (40, 60)])
def test_the_regularization_is_what_predicts_left_out_rows_best(tmp_path, shape):
    found, model_ids = learnable(tmp_path, *shape)
    tables = [found.store.checkpoint(model_id) for model_id in model_ids]
    last = tables[int(np.argmin([table.column("loss").mean() for table in tables]))]
    w = np.mean([table.column("loss_hess").astype(np.float64) for table in tables], axis=0)
    squares = np.square(stored_features(last, 0, shape[0]).astype(np.float64)).sum(1)
    unit, predictions = w @ squares / shape[0], 0
    for table in tables:
        features = stored_features(table, 0, shape[0]).astype(np.float64)
        output_change, loss_grad = (table.column(name).astype(np.float64) for name in ("output_change", "loss_grad"))
        rows = np.arange(shape[0])
        columns = [slow_leave_one_out(features, w, output_change, loss_grad, rows, float(unit * x)) for x in LAMBDAS]
        predictions = predictions + np.stack(columns, axis=1)
    output_changes = torch.from_numpy(last.column("output_change").astype(np.float64))
    expected = choose_regularization(unit, torch.from_numpy(predictions), output_changes)
    assert expected.rule == "held-out"
    for estimator, trace in (("influence", w @ squares), ("trak", squares.sum())):
        chosen = found.regularization(model_ids, Estimate(estimator))
        assert chosen.rule == "held-out"
        assert chosen.value == pytest.approx(expected.value * trace / (w @ squares), rel=1e-4)


def test_the_choice_is_stored(tmp_path, monkeypatch):
    found, model_ids = learnable(tmp_path)
    chosen = found.regularization(model_ids, Estimate("influence"))
    again = Scorer(found.store, torch.device("cpu"), False)
    monkeypatch.setattr("tracer.scoring.kernels.choose_regularization", None)
    assert again.regularization(model_ids, Estimate("influence")) == chosen
    with pytest.raises(TypeError):
        again.regularization([model_ids[0]], Estimate("influence"))  # of other checkpoints it is another choice


def test_a_choice_of_few_rows_is_stored_without_kernels(tmp_path, monkeypatch):
    found = scorer(tmp_path, 12, 5, 60)
    chosen = found.regularization(None, Estimate("influence"))
    monkeypatch.setattr("tracer.scoring.kernels.choose_regularization", None)
    assert Scorer(found.store, torch.device("cpu"), False).regularization(None, Estimate("influence")) == chosen
    assert not list((tmp_path / "kernels").rglob("matrix"))


def test_few_rows_of_a_store_that_cannot_be_written_have_a_choice(tmp_path, monkeypatch):
    found = scorer(tmp_path, 12, 5, 60)

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        for name in ("os.link", "pathlib.Path.replace", "pathlib.Path.mkdir"):
            patch.setattr(name, refused)
        chosen = found.regularization(None, Estimate("influence"))
    assert not (tmp_path / "kernels").exists()
    assert Scorer(found.store, torch.device("cpu"), False).regularization(None, Estimate("influence")) == chosen


def test_a_few_rows_are_enough_to_choose(tmp_path, monkeypatch):
    found, model_ids = learnable(tmp_path, 600, 200)
    monkeypatch.setattr("tracer.scoring.kernels.MAX_LEFT_OUT", 300)
    few = found.regularization(model_ids, Estimate("influence"))
    monkeypatch.undo()
    every = learnable(tmp_path / "all", 600, 200)[0].regularization(model_ids, Estimate("influence"))
    assert few.value != every.value
    assert few.value == pytest.approx(every.value, rel=0.5)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_saturated_model_has_scores_of_zero(tmp_path, estimator):
    model = torch.nn.Linear(5, 3)
    state = {"weight": torch.zeros(3, 5), "bias": torch.tensor([1e4, 0.0, 0.0])}
    x, y = torch.randn(20, 5), torch.zeros(20, dtype=torch.long)
    found = attribute(model, "image_classification", (x, y), (x[:4], y[:4]), [(state, 0.1)], save_dir=tmp_path)
    assert (np.asarray(found.tracer.finalize_scores("targets", estimator)) == 0).all()


@pytest.mark.parametrize("estimator", ["tracin", "cosine", "trak", "influence"])
@pytest.mark.parametrize("target", ["loss", "output"])
def test_top_is_the_head_of_the_sorted_scores(tmp_path, estimator, target):
    found = scorer(tmp_path, 60, 5, 12)
    estimate = Estimate(estimator, target, 2.0 if estimator in ESTIMATORS else "auto")
    expected = reference(found, estimate, 2.0)
    for kind, sign in (("proponents", -1), ("opponents", 1)):
        indices, scores = found.top("test", 4, kind, estimate, None)
        order = np.argsort(sign * expected, axis=0)[:4].T
        np.testing.assert_array_equal(indices, order)
        np.testing.assert_allclose(scores, np.take_along_axis(expected.T, order, 1), rtol=1e-4)


@pytest.mark.parametrize("estimator", ["tracin", "cosine", "trak", "influence"])
@pytest.mark.parametrize("memory_bytes", [1 << 12, 1 << 30])
def test_groups_are_sums_of_targets(tmp_path, estimator, memory_bytes):
    found = scorer(tmp_path, 60, 7, 12, memory_bytes=memory_bytes)
    groups = np.array([0, 2, -1, 0, 2, 2, 0])  # group 1 has no target
    options = {"regularization": 1.0} if estimator in ESTIMATORS else {}
    estimate = Estimate(estimator, groups=groups, **options)
    scores = found.scores("test", estimate, None)
    assert_close(scores, reference(found, estimate, 1.0, groups))
    assert not np.asarray(scores)[:, 1].any()


def test_groups_may_be_the_classes(tmp_path):
    found = scorer(tmp_path, 30, 9, 6)
    labels = found.store.targets("test", 0).column("label")
    estimate = Estimate(groups="label")
    assert_close(found.scores("test", estimate, None), reference(found, estimate, groups=np.array(labels)))


def test_groups_of_another_number_are_refused(tmp_path):
    with pytest.raises(InputError, match="groups has 2 values; expected one for each of 5 targets"):
        scorer(tmp_path, 30, 5, 6).scores("test", Estimate(groups=[0, 1]), None)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_self_influence_is_the_score_of_a_row_for_its_own_loss(tmp_path, estimator):
    found = scorer(tmp_path, 40, 5, 12)
    total, loss_grad = np.zeros(40), np.zeros(40)
    mean_loss_hess = np.mean([columns(found, model_id, "train")[2] for model_id in range(len(RATES))], axis=0)
    for model_id in range(len(RATES)):
        features, q, _, _ = columns(found, model_id, "train")
        w = np.ones(40) if estimator == "trak" else mean_loss_hess
        inverse = np.linalg.inv(features.T @ (w[:, None] * features) + 0.3 * np.eye(12))
        total += np.einsum("nk,kl,nl->n", features, inverse, features) / len(RATES)
        loss_grad += q / len(RATES)
    found_values = found.self_influence(None, Estimate(estimator, regularization=0.3))
    np.testing.assert_allclose(found_values, total * loss_grad**2, rtol=1e-9)


@pytest.mark.parametrize("shape", [(60, 5, 12), (12, 5, 60)])
def test_kernels_are_read_if_stored_and_computed_again_if_examples_change(tmp_path, monkeypatch, shape):
    found = scorer(tmp_path, *shape)
    estimate = Estimate("influence", regularization=1.0)
    first = np.array(found.scores("test", estimate, None))
    shutil.rmtree(found.store.path / "scores")
    with monkeypatch.context() as patched:
        if shape[0] > shape[2]:  # else there is nothing to read
            patched.setattr("tracer.scoring.kernels._WeightedPass.blocks", lambda *args: pytest.fail("computed again"))
        again = Scorer(found.store, torch.device("cpu"), False)
        np.testing.assert_array_equal(again.scores("test", estimate, None), first)
    found.store.invalidate_rows(np.array([3]))
    for model_id in range(len(RATES)):
        with found.store.checkpoint(model_id) as table:
            table.write(
                np.array([3]),
                np.full((1, shape[2]), 9.0, np.float32),
                fingerprint=np.zeros(1, np.uint64),
                **{name: np.ones(1, np.float32) for name in ("loss", "loss_grad", "loss_hess", "gradient_norm")},
            )
            table.set_attributes(finalized=True)
    assert_close(found.scores("test", estimate, None), reference(found, estimate, 1.0))


@pytest.mark.parametrize("shape", [(60, 5, 12), (12, 5, 60)])
def test_kernels_stay_in_memory_for_the_next_call(tmp_path, monkeypatch, shape):
    found = scorer(tmp_path, *shape)
    first = found.regularization(None, Estimate("influence"))
    monkeypatch.setattr("tracer.scoring.kernels._WeightedPass.blocks", lambda *args: pytest.fail("computed again"))
    monkeypatch.setattr("tracer.scoring.kernels.load_kernel", lambda *args: pytest.fail("read again"))
    assert found.regularization(None, Estimate("influence")) == first


@pytest.mark.parametrize("shape", [(60, 5, 12), (12, 5, 60)])
def test_changes_without_examples_are_computed_once_unless_an_example_changes(tmp_path, monkeypatch, shape):
    found, calls = scorer(tmp_path, *shape), []
    compute = scorer_module.leverages
    monkeypatch.setattr(scorer_module, "leverages", lambda *args: calls.append(1) or compute(*args))
    first = found.changes_without(None)
    np.testing.assert_array_equal(found.changes_without(None), first)
    assert len(calls) == len(RATES)
    with found.store.checkpoint(0) as table:
        table.set_attributes(finalized=False)
        fill(table, 7)
    assert not np.allclose(found.changes_without(None)[0], first[0])
    assert len(calls) == 2 * len(RATES)


def test_kernels_that_do_not_fit_memory_are_read_again(tmp_path):
    few, many = (scorer(tmp_path / str(size), 60, 5, 12, memory_bytes=size) for size in (1, 1 << 30))
    for estimator in ESTIMATORS:
        scores = [found.scores("test", Estimate(estimator), None) for found in (few, many)]
        np.testing.assert_allclose(*scores, rtol=1e-5, atol=1e-6 * np.abs(scores[1]).max())


def test_a_damaged_kernel_is_computed_again(tmp_path, caplog):
    found = scorer(tmp_path, 60, 5, 12)
    estimate = Estimate("trak", regularization=1.0)
    first = np.array(found.scores("test", estimate, None))
    shutil.rmtree(found.store.path / "scores")
    (chunk,) = (found.store.path / "kernels" / "0" / "plain").glob("*/matrix/c/0/0")
    chunk.write_bytes(b"\x07" * chunk.stat().st_size)
    found = Scorer(found.store, torch.device("cpu"), False)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(found.scores("test", estimate, None), first)
    assert "is damaged" in caplog.text


def test_a_loss_that_is_not_convex_is_refused_by_influence_alone(tmp_path):
    found = scorer(tmp_path, 10, 2, 4)
    with found.store.checkpoint(1) as table:
        table.set_attributes(finalized=False)
        values = {name: np.ones(1, np.float32) for name in ("loss", "loss_grad", "gradient_norm")}
        features = np.ones((1, 4), np.float32)
        table.write(np.array([6]), features, loss_hess=-values["loss"], fingerprint=np.zeros(1, np.uint64), **values)
        table.set_attributes(finalized=True)
    with pytest.raises(InputError, match=r"∂²L/∂f² of 1 training examples is negative, first \[6\]"):
        found.scores("test", Estimate("influence", regularization=1.0), None)
    assert np.isfinite(found.scores("test", Estimate("trak", regularization=1.0), None)).all()


def test_without_second_derivatives_the_empirical_fisher_takes_their_place(tmp_path):
    found = scorer(tmp_path, 20, 2, 6)
    for model_id in range(len(RATES)):
        with found.store.checkpoint(model_id) as table:
            names = ("loss", "loss_grad", "gradient_norm", "output_change")
            kept = {name: np.array(table.column(name)) for name in names}
            features = stored_features(table, 0, 20)
            table.set_attributes(finalized=False)
            zero = np.zeros(20, np.float32)
            table.write(np.arange(20), features, loss_hess=zero, fingerprint=np.zeros(20, np.uint64), **kept)
            table.set_attributes(finalized=True)
    chosen = found.regularization(None, Estimate("influence"))
    losses = [found.store.checkpoint(model_id).column("loss").mean() for model_id in range(len(RATES))]
    features, loss_grad, _, _ = columns(found, int(np.argmin(losses)), "train")
    fisher = np.mean([columns(found, model_id, "train")[1] ** 2 for model_id in range(len(RATES))], axis=0)
    assert chosen.rule == "trace"
    assert chosen.value == pytest.approx(2**0.5 * np.sum(fisher * np.square(features).sum(1)) / 20)
    expected = 0.0
    for model_id in range(len(RATES)):
        train, target = columns(found, model_id, "train")[0], columns(found, model_id, "targets")
        inverse = np.linalg.inv(train.T @ (fisher[:, None] * train) + chosen.value * np.eye(6))
        expected = expected + train @ inverse @ (np.sign(target[1])[:, None] * target[0]).T / len(RATES)
    loss_grads = np.mean([columns(found, model_id, "train")[1] for model_id in range(len(RATES))], axis=0)
    assert_close(found.scores("test", Estimate("influence"), None), expected * loss_grads[:, None])


def test_stores_without_features_have_no_kernels(tmp_path):
    found = scorer(tmp_path, 10, 2, 4)
    found.store.manifest.settings["storage"] = "none"
    with pytest.raises(CallOrderError, match="estimator='trak' needs stored features"):
        found._kernels(Estimate("trak"), Revisions(found.store, []))


def gradients_of_margins(run, state, rows) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of margins by a loop of autograd in float64, and the probability of the label."""
    model = copy.deepcopy(run.model).double().eval()
    model.load_state_dict(state)
    flat, probability = [], []
    for x, y in zip(*rows, strict=True):
        logits = model(x[None].double())[0]
        others = torch.cat([logits[:y], logits[y + 1 :]])
        grads = torch.autograd.grad(logits[y] - others.logsumexp(0), list(model.parameters()))
        flat.append(torch.cat([grad.flatten() for grad in grads]).numpy())
        probability.append(float(logits.detach().softmax(0)[y]))
    return np.stack(flat), np.array(probability)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_kernels_of_f_give_the_formula_of_autograds_gradients(run, tmp_path, estimator):
    options = {"projector": "none", "storage": "float32", "save_dir": tmp_path / "store"}
    made = attribute(run.model, "image_classification", run.train, run.targets, run.checkpoints, **options)
    found = replace(made, estimator=estimator, regularization=0.5)
    parts = [
        (gradients_of_margins(run, state, run.train), gradients_of_margins(run, state, run.targets)[0])
        for state, _ in run.checkpoints
    ]
    w = np.mean([p * (1 - p) for (_, p), _ in parts], axis=0) if estimator == "influence" else np.ones(23)
    whitened = [
        phi @ np.linalg.inv(phi.T @ (w[:, None] * phi) + 0.5 * np.eye(phi.shape[1])) @ target.T
        for (phi, _), target in parts
    ]
    expected = np.mean(whitened, axis=0) * np.mean([1 - p for (_, p), _ in parts], axis=0)[:, None]
    assert_close(found.scores, expected, 1e-4)
    np.testing.assert_array_equal(found.top(2).indices, np.argsort(-expected, axis=0)[:2].T)


def test_another_regularization_gives_other_scores_in_the_same_place(tmp_path):
    found = scorer(tmp_path, 60, 5, 12)
    for regularization in (0.1, 10.0, 0.1):
        estimate = Estimate("trak", regularization=regularization)
        assert_close(found.scores("test", estimate, None), reference(found, estimate, regularization))


def test_many_targets_are_preconditioned_in_a_file(tmp_path):
    features = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    rows = InMemoryTable(features, np.ones(300, np.float32), np.ones(300, np.float32), "float32")
    estimate = Estimate("trak", regularization=1.0)
    found = []
    for memory_bytes in (1 << 10, 1 << 30):
        preconditioned = PreconditionedTargets(
            rows, lambda block: 2 * block, estimate, None, torch.device("cpu"), memory_bytes
        )
        ((_, raw),) = preconditioned.raw_features(0, 300)
        found.append((isinstance(raw, np.memmap), raw * preconditioned.column("scale")[:, None]))
    assert [mapped for mapped, _ in found] == [True, False]
    for _, values in found:
        np.testing.assert_allclose(values, 2 * features, rtol=1e-6)
