"""The whole path: checkpoints in, scores out, equal to slow loops in float64."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from tracer_cases import build, featurize, loss_gradients, oracle_scores, score

import tracer
from tracer import Tracer, attribute


@pytest.fixture
def exact(run, tmp_path):
    tracing = build(run, tmp_path / "store")
    featurize(tracing, run)
    score(tracing, run)
    return tracing


@pytest.mark.parametrize("estimator", ["tracin", "cosine"])
def test_exact_scores_equal_a_float64_loop_of_autograd(run, exact, estimator):
    scores = exact.finalize_scores("test", estimator)
    expected = oracle_scores(run, cosine=estimator == "cosine")
    assert scores.shape == (23, 5)
    assert np.abs(scores - expected).max() <= 1e-5 * np.abs(expected).max()


def test_exact_scores_equal_captum(run, exact):
    influence = pytest.importorskip("captum.influence")
    rates = {f"checkpoint-{i}": rate for i, (_, rate) in enumerate(run.checkpoints)}
    states = {f"checkpoint-{i}": state for i, (state, _) in enumerate(run.checkpoints)}

    def load(model, path):
        model.load_state_dict(states[path])
        model.eval()
        return rates[path]

    model = copy.deepcopy(run.model).eval()
    captum = influence.TracInCP(
        model,
        torch.utils.data.TensorDataset(*run.train),
        list(states),
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=1,
        sample_wise_grads_per_batch=False,
    )
    expected = captum.influence((run.target_x, run.target_y), show_progress=False).T.numpy()
    scores = exact.finalize_scores("test")
    assert np.abs(scores - expected).max() <= 1e-5 * np.abs(expected).max()


def test_self_influence_is_the_diagonal_of_exact_scores(run, exact):
    expected = np.zeros(len(run.x))
    for state, learning_rate in run.checkpoints:
        expected += learning_rate * loss_gradients(run.model, state, *run.train).square().sum(1).numpy()
    np.testing.assert_allclose(exact.self_influence(), expected, rtol=1e-5)


def test_self_influence_has_no_projection_error(run, exact, tmp_path):
    tracing = build(run, tmp_path / "sketched", projector="sketch", proj_dim=16, storage="float16")
    featurize(tracing, run)
    np.testing.assert_allclose(tracing.self_influence(), exact.self_influence(), rtol=1e-5)


@pytest.mark.parametrize("kind", ["proponents", "opponents"])
def test_top_agrees_with_all_scores(exact, kind):
    scores = np.asarray(exact.finalize_scores("test"))
    signed = scores if kind == "proponents" else -scores
    found = exact.top("test", 4, kind)
    order = np.argsort(-signed, axis=0, kind="stable")[:4].T
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(found.scores, np.take_along_axis(scores.T, order, 1), rtol=1e-6)


def test_proponents_lower_the_loss_of_their_target(run, exact):
    """The sign: one step on a proponent lowers the target's loss, one on an opponent raises it."""
    state, _ = run.checkpoints[-1]
    scores = exact.finalize_scores("test", model_ids=[2])
    for row in (int(scores[:, 0].argmax()), int(scores[:, 0].argmin())):
        model = copy.deepcopy(run.model).double().eval()
        model.load_state_dict(state)

        def loss(index, x, y, model=model):
            return nn.functional.cross_entropy(model(x[index : index + 1].double()), y[index : index + 1])

        before = loss(0, *run.targets)
        gradients = torch.autograd.grad(loss(row, *run.train), list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 1e-5 * gradient
        change = float((before - loss(0, *run.targets)).detach())
        assert np.sign(change) == np.sign(scores[row, 0])
        np.testing.assert_allclose(change, 1e-5 * scores[row, 0] / 0.1, rtol=1e-2)


def test_sketched_scores_are_near_the_exact_ones(run, exact, tmp_path):
    expected = np.asarray(exact.finalize_scores("test"))
    own = exact.self_influence()
    for storage in ("float32", "float16"):
        tracing = build(run, tmp_path / storage, projector="sketch", proj_dim=1024, storage=storage)
        featurize(tracing, run)
        score(tracing, run)
        scores = np.asarray(tracing.finalize_scores("test"))
        scale = np.sqrt(own[:, None] * np.maximum(expected.max(), 1e-9))
        assert np.abs(scores - expected).max() <= 0.2 * scale.max()
        assert np.corrcoef(scores.ravel(), expected.ravel())[0, 1] > 0.99


def test_learning_rate_can_be_corrected_later(run, exact):
    first = np.array(exact.finalize_scores("test"))
    for model_id, (state, learning_rate) in enumerate(run.checkpoints):
        exact.load_checkpoint(state, model_id, learning_rate=2 * learning_rate)
    np.testing.assert_allclose(exact.finalize_scores("test"), 2 * first, rtol=1e-6)
    np.testing.assert_array_equal(exact.remaining(0), [])


def test_checkpoint_without_learning_rate_keeps_the_stored_one(run, exact):
    first = np.array(exact.finalize_scores("test"))
    for model_id, (state, _) in enumerate(run.checkpoints):
        exact.load_checkpoint(state, model_id)
    np.testing.assert_array_equal(exact.finalize_scores("test"), first)


def test_checkpoints_without_learning_rates_weigh_the_same(run, tmp_path, exact):
    tracing = build(run, tmp_path / "equal")
    featurize(tracing, run, checkpoints=[(state, None) for state, _ in run.checkpoints])
    score(tracing, run)
    for model_id, (state, _) in enumerate(run.checkpoints):
        exact.load_checkpoint(state, model_id, learning_rate=1.0)
    np.testing.assert_allclose(tracing.finalize_scores("test"), exact.finalize_scores("test"), rtol=1e-6)
    tracing.load_checkpoint(run.checkpoints[0][0], 0, learning_rate=0.5)
    with pytest.raises(tracer.InputError, match=r"Checkpoints \[1, 2\] have no learning rate"):
        tracing.finalize_scores("test")


def test_scores_of_chosen_checkpoints_add_up(exact):
    parts = [np.array(exact.finalize_scores("test", model_ids=[i])) for i in range(3)]
    np.testing.assert_allclose(sum(parts), exact.finalize_scores("test"), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("order", ["any order", "another batch size"])
def test_rows_may_come_in_any_order_and_batch_size(run, exact, tmp_path, order):
    tracing = build(run, tmp_path / "other")
    rows = torch.randperm(len(run.x)) if order == "any order" else torch.arange(len(run.x))
    for model_id, (state, learning_rate) in enumerate(run.checkpoints):
        tracing.load_checkpoint(state, model_id, learning_rate)
        for part in rows.split(5 if order == "any order" else 22):
            tracing.featurize((run.x[part], run.y[part]), inds=part)
    tracing.finalize_features()
    score(tracing, run)
    expected = np.asarray(exact.finalize_scores("test"))
    np.testing.assert_allclose(tracing.finalize_scores("test"), expected, atol=1e-5 * np.abs(expected).max())


def test_resumes_with_another_batch_size(run, exact, tmp_path):
    path = tmp_path / "resumed"
    with build(run, path) as tracing:
        state, learning_rate = run.checkpoints[0]
        tracing.load_checkpoint(state, 0, learning_rate)
        tracing.featurize((run.x[:9], run.y[:9]), num_samples=9)
        assert tracing.remaining(0).tolist() == list(range(9, 23))
        assert tracing.remaining(7).tolist() == list(range(23))
    tracing = build(run, path)
    assert tracing.remaining(0).tolist() == list(range(9, 23))
    featurize(tracing, run, batch_size=6)
    score(tracing, run)
    expected = np.asarray(exact.finalize_scores("test"))
    np.testing.assert_allclose(tracing.finalize_scores("test"), expected, atol=1e-5 * np.abs(expected).max())


def test_rows_that_are_there_are_not_computed_again(run, tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(len(batch[0]))
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    tracing = build(run, tmp_path / "counted", task=loss)
    tracing.load_checkpoint(run.checkpoints[0][0], 0, 0.1)
    tracing.featurize((run.x[:8], run.y[:8]), inds=range(8))
    calls.clear()
    tracing.featurize((run.x[:8], run.y[:8]), inds=range(8))
    assert calls == []
    tracing.featurize((run.x[4:12], run.y[4:12]), inds=range(4, 12))
    assert set(calls) == {4, 2, 1}  # half of them, and one alone, are audited


def test_last_batch_of_one_row(run, exact, tmp_path):
    tracing = build(run, tmp_path / "uneven")
    featurize(tracing, run, batch_size=22)
    np.testing.assert_allclose(tracing.self_influence(), exact.self_influence(), rtol=1e-5)


def test_params_select_the_last_layer(run, tmp_path):
    tracing = build(run, tmp_path / "last", params="6.*")
    featurize(tracing, run)
    names = [name for name, _ in run.model.named_parameters()]
    assert names[-2:] == ["6.weight", "6.bias"]
    expected = np.zeros(len(run.x))
    for state, learning_rate in run.checkpoints:
        expected += learning_rate * loss_gradients(run.model, state, *run.train)[:, -51:].square().sum(1).numpy()
    np.testing.assert_allclose(tracing.self_influence(), expected, rtol=1e-5)


def test_params_of_the_last_layer_save_the_work_for_the_rest(run, tmp_path):
    grads = []

    def loss(model, batch):
        hidden = model[:6](batch[0])
        grads.append(hidden.requires_grad)
        return nn.functional.cross_entropy(model[6](hidden), batch[1], reduction="none")

    tracing = build(run, tmp_path / "saved", params=["6.weight", "6.bias"], task=loss)
    tracing.load_checkpoint(run.checkpoints[0][0], 0, 0.1)
    tracing.featurize(run.train, num_samples=23)
    assert not any(grads)


@pytest.mark.parametrize("gradients", ["capture", "functional"])
def test_methods_of_computing_gradients_agree(run, exact, tmp_path, gradients):
    tracing = build(run, tmp_path / gradients, gradients=gradients)
    featurize(tracing, run)
    np.testing.assert_allclose(tracing.self_influence(), exact.self_influence(), rtol=1e-4)


@pytest.mark.parametrize("container", [list, dict, OrderedDict, "dataclass", "numpy"])
def test_containers_of_batches(run, exact, tmp_path, container):
    @dataclasses.dataclass
    class Sample:
        x: torch.Tensor
        y: torch.Tensor

    def loss(model, batch):
        x, y = (batch.x, batch.y) if isinstance(batch, Sample) else (batch["x"], batch["y"])
        return nn.functional.cross_entropy(model(x), y, reduction="none")

    batch, task = list(run.train), "image_classification"
    if container == "numpy":
        batch = (run.x.numpy(), run.y.numpy())
    elif container == "dataclass":
        batch, task = Sample(*run.train), loss
    elif container is not list:
        batch, task = container(x=run.x, y=run.y), loss if container is dict else "image_classification"
    tracing = build(run, tmp_path / "container", task=task)
    tracing.load_checkpoint(run.checkpoints[0][0], 0, 0.3)
    tracing.featurize(batch, num_samples=23)
    tracing.finalize_features()
    np.testing.assert_allclose(tracing.self_influence(), exact.self_influence([0]), rtol=1e-5)


def test_model_is_left_as_found(run, tmp_path):
    run.model.train()
    run.model[6].bias.requires_grad_(False)
    before = copy.deepcopy(run.model.state_dict())
    pointers = [value.data_ptr() for value in run.model.parameters()]
    state = torch.get_rng_state()
    tracing = build(run, tmp_path / "found")
    featurize(tracing, run)
    score(tracing, run)
    assert run.model.training
    assert run.model[1].training
    assert not run.model[6].bias.requires_grad
    assert run.model[0].weight.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert [value.data_ptr() for value in run.model.parameters()] == pointers
    attribute(
        run.model, "image_classification", run.train, run.targets, run.checkpoints, save_dir=tmp_path / "x", proj_dim=8
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_training_on_does_not_change_a_loaded_checkpoint(run, exact, tmp_path):
    tracing = build(run, tmp_path / "live")
    run.model.load_state_dict(run.checkpoints[0][0])
    tracing.load_checkpoint(run.model.state_dict(), 0, 0.3)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)
    tracing.featurize(run.train, num_samples=23)
    tracing.finalize_features()
    np.testing.assert_allclose(tracing.self_influence(), exact.self_influence([0]), rtol=1e-5)


def test_checkpoints_from_files(run, exact, tmp_path):
    from safetensors.torch import save_file

    paths = [tmp_path / "0.pt", tmp_path / "1.safetensors", str(tmp_path / "2.pth")]
    for path, (state, _) in zip(paths, run.checkpoints, strict=True):
        save_file(state, path) if str(path).endswith("safetensors") else torch.save(state, path)
    tracing = build(run, tmp_path / "files")
    featurize(tracing, run, checkpoints=[(path, rate) for path, (_, rate) in zip(paths, run.checkpoints, strict=True)])
    np.testing.assert_allclose(tracing.self_influence(), exact.self_influence(), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_tiny_and_huge_gradients_survive_float16(tmp_path, scale):
    torch.manual_seed(0)
    model = nn.Linear(6, 1, bias=False)
    x = torch.randn(5, 6)

    def loss(model, batch):
        return model(batch[0]).squeeze(1) * scale

    tracing = Tracer(model, loss, 5, tmp_path / "store", projector="none")
    tracing.load_checkpoint(model.state_dict(), 0, 1.0)
    tracing.featurize((x,), num_samples=5)
    tracing.finalize_features()
    tracing.start_scoring_checkpoint(model.state_dict(), 0, 5, "same")
    tracing.score((x,), num_samples=5)
    expected = (scale * x.double()) @ (scale * x.double()).T
    np.testing.assert_allclose(tracing.finalize_scores("same"), expected, atol=2e-3 * float(expected.max()))
    np.testing.assert_allclose(tracing.self_influence(), expected.diagonal(), rtol=1e-5)


@pytest.mark.parametrize("memory_bytes", [1, 1 << 12, 1 << 16])
def test_scores_are_the_same_for_any_memory(run, exact, memory_bytes):
    expected = np.array(exact.finalize_scores("test"))
    top = exact.top("test", 3)
    small = build(run, exact.store.path, memory_bytes=memory_bytes)
    shutil.rmtree(exact.store.path / "scores")
    shutil.rmtree(exact.store.path / "top")
    np.testing.assert_allclose(small.finalize_scores("test"), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(small.top("test", 3).indices, top.indices)


def test_finished_scores_are_not_computed_again(exact, monkeypatch):
    expected = np.array(exact.finalize_scores("test"))
    monkeypatch.setattr(
        "tracer.scoring.streaming.TileScorer.score", lambda *args, **options: pytest.fail("computed again")
    )
    np.testing.assert_array_equal(exact.finalize_scores("test"), expected)


def test_scores_of_removed_targets_are_not_kept(run, exact):
    first = np.array(exact.finalize_scores("test"))
    shutil.rmtree(exact.store.path / "targets" / "test")
    run.target_x = run.target_x.flip(0)
    run.target_y = run.target_y.flip(0)
    score(exact, run)
    np.testing.assert_allclose(exact.finalize_scores("test"), first[:, ::-1], rtol=1e-3, atol=1e-5)


def test_several_sets_of_targets(run, exact):
    first = np.array(exact.finalize_scores("test"))
    for model_id, (state, _) in enumerate(run.checkpoints):
        exact.start_scoring_checkpoint(state, model_id, 2, "train-rows")
        exact.score((run.x[:2], run.y[:2]), num_samples=2)
    np.testing.assert_allclose(np.diag(exact.finalize_scores("train-rows")[:2]), exact.self_influence()[:2], rtol=1e-5)
    np.testing.assert_array_equal(exact.finalize_scores("test"), first)


def test_one_call_gives_the_same_and_resumes(run, exact, tmp_path):
    calls = []

    def loss(model, batch):
        calls.append(len(batch[0]))
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    options = {"save_dir": tmp_path / "once", "projector": "none", "storage": "float32", "batch_size": 7}
    found = attribute(run.model, loss, run.train, run.targets, run.checkpoints, **options)
    expected = np.asarray(exact.finalize_scores("test"))
    np.testing.assert_allclose(found.scores, expected, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_array_equal(found.by("scores").top(2).indices, exact.top("test", 2).indices)
    np.testing.assert_array_equal(found.top(2).indices, exact.top("test", 2, estimator="cosine").indices)
    np.testing.assert_allclose(found.self_influence(), exact.self_influence(), rtol=1e-5)
    found.tracer.close()
    calls.clear()
    again = attribute(run.model, loss, run.train, run.targets, run.checkpoints, **options)
    np.testing.assert_array_equal(again.scores, found.scores)
    assert max(calls) <= 4  # no batch of 7: a few stored examples, to compare them


@pytest.mark.parametrize("source", ["dataset", "loader", "batches"])
def test_one_call_takes_data_sets_loaders_and_batches(run, exact, tmp_path, source):
    def data(x, y):
        dataset = torch.utils.data.TensorDataset(x, y)
        if source == "dataset":
            return dataset
        loader = torch.utils.data.DataLoader(dataset, batch_size=6)
        return loader if source == "loader" else list(loader)

    found = attribute(
        run.model,
        "image_classification",
        data(*run.train),
        data(*run.targets),
        run.checkpoints,
        save_dir=tmp_path / "once",
        projector="none",
        storage="float32",
    )
    expected = np.asarray(exact.finalize_scores("test"))
    np.testing.assert_allclose(found.scores, expected, atol=1e-5 * np.abs(expected).max())


def test_silent_without_a_terminal_and_bars_when_asked(run, tmp_path, capsys):
    options = {"projector": "none", "storage": "float32"}
    attribute(
        run.model, "image_classification", run.train, run.targets, run.checkpoints, save_dir=tmp_path / "a", **options
    )
    assert capsys.readouterr() == ("", "")
    found = attribute(
        run.model,
        "image_classification",
        run.train,
        run.targets,
        run.checkpoints,
        save_dir=tmp_path / "b",
        progress=True,
        **options,
    )
    assert found.scores.shape == (23, 5)
    err = capsys.readouterr().err
    assert "featurize 1/3" in err
    assert "23/23" in err
    assert "scores" in err


def test_inference_mode_does_not_matter(run, exact, tmp_path):
    tracing = build(run, tmp_path / "store")
    with torch.inference_mode():
        featurize(tracing, run)
    score(tracing, run)
    np.testing.assert_array_equal(tracing.finalize_scores("test"), exact.finalize_scores("test"))


def test_library_configures_no_logging(run, tmp_path):
    import logging

    featurize(build(run, tmp_path / "quiet"), run)
    assert logging.getLogger("tracer").handlers == []
    assert logging.getLogger("tracer").level == logging.NOTSET


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
def test_devices(run, tmp_path, device):
    tracing = build(run, tmp_path / "device", device=device)
    assert tracing.device == torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_scores(run, exact, tmp_path):
    tracing = build(run, tmp_path / "cuda", device="cuda:0")
    featurize(tracing, run)
    score(tracing, run)
    expected = np.asarray(exact.finalize_scores("test"))
    np.testing.assert_allclose(tracing.finalize_scores("test"), expected, atol=1e-2 * np.abs(expected).max())
    assert next(run.model.parameters()).device.type == "cpu"
