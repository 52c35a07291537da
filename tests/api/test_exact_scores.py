"""Exact scores without stored gradients: equal to slow loops, for odd models, in any blocks, resumed after errors."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from adam_cases import Odd
from torch import nn
from tracer_cases import loss_gradients, oracle_scores

from tracer import CallOrderError, IncompleteError, InputError, MismatchError, NonFiniteError, Tracer, attribute
from tracer.gradients.inner_products import TargetGradients
from tracer.store import RowTable
from tracer.store.arrays.store_path import store_path
from tracer.store.revisions import Revisions


def direct(run, path, **options):
    options = {"projector": "none", "batch_size": 4, **options}
    task = options.pop("task", "image_classification")
    return attribute(run.model, task, run.train, run.targets, run.checkpoints, save_dir=path, **options)


def blocks(found):
    store = found.tracer.store
    return store.results.cosines("targets", Revisions(store, [0], "targets"))


@pytest.mark.parametrize("estimator", ["tracin", "cosine"])
@pytest.mark.parametrize("memory_bytes", [1 << 30, 1])
def test_scores_equal_a_float64_loop_of_autograd(run, tmp_path, estimator, memory_bytes):
    found = direct(run, tmp_path / "store", estimator=estimator, memory_bytes=memory_bytes, batch_size=2)
    expected = oracle_scores(run, cosine=estimator == "cosine")
    assert np.abs(found.scores - expected).max() <= 1e-5 * np.abs(expected).max()
    assert [first for first, _ in blocks(found)] == ([0] if memory_bytes > 1 else [0, 2, 4])


@pytest.mark.parametrize("memory_bytes", [1 << 30, 1])
def test_groups_are_sums_of_targets(run, tmp_path, memory_bytes):
    tracing, groups = direct(run, tmp_path, memory_bytes=memory_bytes, batch_size=2).tracer, np.array([2, -1, 0, 2, 2])
    for estimator in ("tracin", "cosine"):
        expected = oracle_scores(run, cosine=estimator == "cosine")
        summed = np.stack([expected[:, groups == group].sum(1) for group in range(3)], 1)  # none has group 1
        scores = tracing.finalize_scores("targets", estimator, groups=groups)
        assert np.abs(scores - summed).max() <= 1e-5 * np.abs(expected).max()
        top = tracing.top("targets", 4, estimator=estimator, groups=groups)
        np.testing.assert_allclose(top.scores[0], -np.sort(-summed[:, 0])[:4], rtol=1e-4)
        labels = tracing.finalize_scores("targets", estimator, groups="label")
        classes = [expected[:, run.target_y.numpy() == label].sum(1) for label in range(labels.shape[1])]
        assert np.abs(labels - np.stack(classes, 1)).max() <= 1e-5 * np.abs(expected).max()


def test_everything_else_is_there_too(run, tmp_path):
    found, stored = direct(run, tmp_path / "a"), direct(run, tmp_path / "b", storage="float32")
    np.testing.assert_allclose(found.self_influence(), stored.self_influence(), rtol=1e-5)
    for kind in ("proponents", "opponents"):
        one, other = found.top(3, kind), stored.top(3, kind)
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_allclose(one.scores, other.scores, rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(found.scores, direct(run, tmp_path / "a").scores)
    assert (found.report(tmp_path / "report")).exists()


def test_no_gradients_are_stored(run, tmp_path):
    direct(run, tmp_path / "store")
    features = [path for path in (tmp_path / "store").rglob("*") if path.name == "features"]
    assert not features
    table = RowTable(store_path(tmp_path / "store" / "checkpoints" / "0"))
    assert (table.dim, table.storage, table.num_done) == (0, "none", len(run.x))
    with pytest.raises(CallOrderError, match="needs stored features and this store has storage=.none."):
        table.raw_features(0, 1)


@pytest.mark.parametrize("memory_bytes", [1 << 30, 1])
def test_odd_models(tmp_path, memory_bytes):
    torch.manual_seed(0)
    model, x = Odd(), torch.randint(0, 7, (9, 6))
    train, targets = (x[:, :-1], x[:, 1:]), (x[:3, :-1], x[:3, 1:])
    options = {"projector": "none", "batch_size": 4, "memory_bytes": memory_bytes}
    states = [(model.state_dict(), 0.5)]
    found = attribute(model, "language_modeling", train, targets, states, save_dir=tmp_path / "a", **options)
    stored = attribute(
        copy.deepcopy(model).double(),
        "language_modeling",
        train,
        targets,
        [({name: value.double() for name, value in model.state_dict().items()}, 0.5)],
        save_dir=tmp_path / "b",
        projector="none",
        storage="float32",
    )
    assert np.abs(found.scores - stored.scores).max() <= 1e-5 * np.abs(stored.scores).max()
    np.testing.assert_allclose(found.scores.diagonal(), found.self_influence()[:3], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-19, 1e-14, 1e14, 1e16])
def test_tiny_and_huge_gradients(run, tmp_path, scale):
    model = nn.Linear(72, 1)
    found = attribute(
        model,
        lambda model, batch: scale * model(batch[0].flatten(1)).squeeze(1),
        run.train,
        run.targets,
        [(model.state_dict(), 1.0)],
        save_dir=tmp_path / "store",
        projector="none",
        estimator="cosine",
    )
    ones = torch.ones(len(run.x), 1), torch.ones(5, 1)
    x, z = (torch.cat([v.flatten(1), one], 1).double() for v, one in zip((run.x, run.target_x), ones, strict=True))
    expected = nn.functional.normalize(x) @ nn.functional.normalize(z).T
    np.testing.assert_allclose(found.scores, expected.numpy(), atol=1e-6)


def test_uneven_batches_and_loaders(run, tmp_path):
    expected = direct(run, tmp_path / "a").scores
    cuts = [0, 1, 9, 10, 22, 23]
    batches = [(run.x[a:b], run.y[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]
    options = {"projector": "none", "save_dir": tmp_path / "b", "memory_bytes": 1}
    targets = [(run.target_x[:3], run.target_y[:3]), (run.target_x[3:], run.target_y[3:])]
    found = attribute(run.model, "image_classification", batches, targets, run.checkpoints, **options)
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-6)


def test_a_second_set_of_targets_uses_what_is_known_of_train_rows(run, tmp_path):
    first = np.array(direct(run, tmp_path / "store").scores)
    other = direct(run, tmp_path / "store", exp_name="again")
    np.testing.assert_array_equal(first, other.scores)
    np.testing.assert_array_equal(first, direct(run, tmp_path / "store").scores)


class Stops(Exception):
    """What the test stops a run with."""


def test_a_run_that_was_stopped_goes_on(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tracer.api.exact_scores.TILE_ROWS", 8)
    expected = np.array(direct(run, tmp_path / "a", memory_bytes=1).scores)
    calls, multiply = [], TargetGradients.add_products
    stop_at = 25

    def counted(self, *args):
        calls.append(1)
        if len(calls) == stop_at:
            raise Stops
        return multiply(self, *args)

    monkeypatch.setattr(TargetGradients, "add_products", counted)
    stops = 0
    while True:
        try:
            found = direct(run, tmp_path / "b", memory_bytes=1)
            break
        except Stops:
            stops += 1
            calls.clear()
    assert stops >= 3
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5, atol=1e-7)
    calls.clear()
    direct(run, tmp_path / "b", memory_bytes=1)
    assert not calls, "nothing is computed twice"


def test_other_memory_goes_on_with_the_blocks_that_are_there(run, tmp_path):
    one = direct(run, tmp_path / "store", memory_bytes=1)
    again = direct(run, tmp_path / "store")
    assert len(blocks(again)) == 2  # batches of 4 targets, of 5
    np.testing.assert_array_equal(one.scores, again.scores)


def test_wrong_use_is_refused(run, tmp_path):
    with pytest.raises(InputError, match="expected projector='none' with storage='none', got projector='sketch'"):
        Tracer(run.model, "image_classification", 23, tmp_path / "a", storage="none")
    options = {"projector": "none", "storage": "none"}
    tracing = Tracer(run.model, "image_classification", 23, tmp_path / "b", **options)
    state, rate = run.checkpoints[0]
    with pytest.raises(CallOrderError, match="no checkpoint 0"):
        tracing.score_exactly(state, 0, run.train, run.targets, "test")
    tracing.load_checkpoint(state, 0, rate)
    with pytest.raises(InputError, match="expected train_set_size=23"):
        tracing.score_exactly(state, 0, run.targets, run.targets, "test")
    with pytest.raises(MismatchError, match="other weights"):
        tracing.score_exactly(run.checkpoints[1][0], 0, run.train, run.targets, "test")
    for start in range(0, 23, 8):
        tracing.featurize((run.x[start : start + 8], run.y[start : start + 8]), num_samples=min(8, 23 - start))
    tracing.finalize_features()
    tracing.start_scoring_checkpoint(state, 0, 5, "test")
    tracing.score(run.targets, num_samples=5)
    with pytest.raises(IncompleteError, match="score_exactly"):
        tracing.finalize_scores("test")
    expected = (loss_gradients(run.model, state, *run.train).square().sum(1) * rate).numpy()
    np.testing.assert_allclose(tracing.self_influence(), expected, rtol=1e-5)
    tracing.score_exactly(state, 0, run.train, run.targets, "test")
    assert tracing.finalize_scores("test").shape == (23, 5)
    shuffled = run.x.flip(0), run.y.flip(0)
    with pytest.raises(MismatchError, match="hold other data"):
        tracing.score_exactly(state, 0, shuffled, run.targets, "more")
    stored = Tracer(run.model, "image_classification", 23, tmp_path / "c")
    with pytest.raises(CallOrderError, match="score_exactly is for storage='none'"):
        stored.score_exactly(state, 0, run.train, run.targets, "test")


def test_targets_of_another_order_at_another_checkpoint_are_refused(run, tmp_path):
    tracing = Tracer(run.model, "image_classification", 23, tmp_path / "b", projector="none", storage="none")
    for model_id, (state, rate) in enumerate(run.checkpoints[:2]):
        tracing.load_checkpoint(state, model_id, rate)
        targets = tuple(column.flip(0) for column in run.targets) if model_id else run.targets
        if model_id:
            with pytest.raises(MismatchError, match="hold other data"):
                tracing.score_exactly(state, model_id, run.train, targets, "test")
        else:
            tracing.score_exactly(state, model_id, run.train, targets, "test")


@pytest.mark.parametrize("left", ["no marks", "no array"])
def test_a_block_that_a_crash_left_half_made_is_computed_again(run, tmp_path, left):
    expected = np.array(direct(run, tmp_path / "store", memory_bytes=1).scores)
    block = Path(blocks(direct(run, tmp_path / "store"))[-1][1].path)
    shutil.rmtree(block / "done" if left == "no marks" else block / "scores")
    shutil.rmtree(tmp_path / "store" / "scores")
    np.testing.assert_allclose(direct(run, tmp_path / "store").scores, expected, rtol=1e-5, atol=1e-7)


def test_inference_mode_does_not_matter(run, tmp_path):
    expected = np.array(direct(run, tmp_path / "a").scores)
    with torch.inference_mode():
        np.testing.assert_array_equal(direct(run, tmp_path / "b").scores, expected)


def test_rows_that_are_not_finite_are_named(run, tmp_path):
    run.x[7, 0, 0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"rows 7 is"):
        direct(run, tmp_path / "store")


def test_targets_that_lost_their_marks_are_stored_again(run, tmp_path):
    expected = np.array(direct(run, tmp_path / "store").scores)
    (tmp_path / "store" / "targets" / "targets" / "1" / "done" / "c" / "0").unlink()
    with pytest.raises(IncompleteError, match="targets 'targets' are missing at checkpoint 1"):
        Tracer.open(tmp_path / "store").finalize_scores("targets")
    np.testing.assert_array_equal(direct(run, tmp_path / "store").scores, expected)
