"""Code written for TRAK's package: its calls in its order, its keywords, its model output objects."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from tracer_cases import build, featurize, score

from tracer import InputError, InputTypeError, TRAKer, attribute


class ModelOutput:
    """TRAK's interface, written as its documentation does: one example at a time, with functional weights."""

    def __init__(self, temperature=1.0):
        self.temperature = temperature

    @staticmethod
    def get_output(model, weights, buffers, x, label):
        logits = torch.func.functional_call(model, (weights, buffers), x.unsqueeze(0))
        row = torch.arange(1)
        others = logits.clone()
        others[row, label.unsqueeze(0)] = torch.tensor(-torch.inf, dtype=logits.dtype)
        return (logits[row, label.unsqueeze(0)] - others.logsumexp(-1)).sum()

    def get_out_to_loss_grad(self, model, weights, buffers, batch):
        logits = torch.func.functional_call(model, (weights, buffers), batch[0])
        share = (logits / self.temperature).softmax(-1)[torch.arange(len(logits)), batch[1]]
        return (1 - share).clone().detach().unsqueeze(-1)


def trak_scores(run, traker):
    """The loop of TRAK's README, and its positional arguments."""
    for model_id, (checkpoint, _) in enumerate(run.checkpoints):
        traker.load_checkpoint(checkpoint, model_id=model_id)
        for rows in torch.arange(len(run.x)).split(8):
            traker.featurize(batch=[run.x[rows], run.y[rows]], num_samples=len(rows))
    traker.finalize_features()
    for model_id, (checkpoint, _) in enumerate(run.checkpoints):
        traker.start_scoring_checkpoint("test", checkpoint, model_id, len(run.target_x))
        traker.score([run.target_x, run.target_y], np.arange(len(run.target_x)))
    return traker.finalize_scores(exp_name="test")


@pytest.fixture
def expected(run, tmp_path):
    tracing = build(run, tmp_path / "expected", projector="sketch", storage="float16", proj_dim=512)
    featurize(tracing, run)
    score(tracing, run)
    return tracing


def test_scores_are_trak_of_the_same_features(run, expected, tmp_path):
    store = tmp_path / "store"
    arguments = run.model, "image_classification", len(run.x), store, True, "cpu", None, None, None, None, 512
    wanted = np.asarray(expected.finalize_scores("test", estimator="trak"))
    np.testing.assert_array_equal(np.asarray(trak_scores(run, TRAKer(*arguments))), wanted)


def test_a_model_output_object_has_the_gradients_of_the_named_task(run, tmp_path):
    given = run.model, run.train, run.targets, run.checkpoints
    options = {"projector": "none", "storage": "float32", "estimator": "trak", "regularization": 3.0}

    def scores_of(task, name):
        model, *rest = given
        return np.asarray(attribute(model, task, *rest, save_dir=tmp_path / name, **options).scores)

    wanted = scores_of("image_classification", "name")
    np.testing.assert_allclose(scores_of(ModelOutput, "class"), wanted, atol=2e-4 * np.abs(wanted).max())
    assert np.abs(scores_of(ModelOutput(temperature=5.0), "warm") - wanted).max() > 0.01 * np.abs(wanted).max()


@pytest.mark.parametrize("projector", ["none", "rademacher"])
def test_lambda_reg_is_in_units_of_traks_kernel(run, expected, tmp_path, projector):
    options = {"projector": projector, "proj_dim": 64, "use_half_precision": False}
    found = trak_scores(
        run, TRAKer(run.model, "image_classification", len(run.x), tmp_path / "a", lambda_reg=0.5, **options)
    )
    traker = TRAKer(run.model, "image_classification", len(run.x), tmp_path / "a", **options)
    num_parameters = sum(parameter.numel() for parameter in run.model.parameters())
    regularization = 0.5 * num_parameters / (1 if projector == "none" else 64)
    wanted = traker.tracer.finalize_scores("test", "trak", regularization=regularization)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))
    assert not np.allclose(np.asarray(found), np.asarray(traker.finalize_scores("test")))


def test_keywords_are_taken(run, tmp_path):
    with_names = [name for name, _ in run.model.named_parameters()][:2]
    traker = TRAKer(
        model=run.model, task="image_classification", train_set_size=23, save_dir=tmp_path / "store",
        load_from_save_dir=False, device="cpu", proj_dim=32, logging_level=logging.WARNING, use_half_precision=False,
        proj_max_batch_size=8, projector_seed=7, grad_wrt=with_names, lambda_reg=0.1,
    )  # fmt: skip
    settings = traker.tracer.store.manifest.settings
    assert list(settings["params"]) == with_names
    assert settings["storage"] == "float32"
    assert settings["projector"]["seed"] == 7
    assert settings["feature_dim"] == 32
    assert trak_scores(run, traker).shape == (23, 5)


class CudaProjector:
    pass


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"gradient_computer": object}, "Leave gradient_computer out"),
        ({"saver": object}, "save_dir may also be a URL"),
        ({"score_computer": object}, "lambda_reg is the regularization"),
        ({"projector": CudaProjector()}, "projector='fast_jl' for the same"),
        ({"projector": ModelOutput}, "register_projector"),
        ({"task": "clip"}, "trak.modelout_functions.CLIPModelOutput"),
    ],
)
def test_what_has_no_counterpart_is_refused_with_advice(run, tmp_path, given, advice):
    with pytest.raises(InputError, match=advice.replace("(", r"\(")):
        TRAKer(**{"model": run.model, "task": "image_classification", "train_set_size": 23} | given)


def test_a_class_that_needs_arguments_is_refused(run, tmp_path):
    class Needs(ModelOutput):
        def __init__(self, temperature):
            self.temperature = temperature

    with pytest.raises(InputTypeError, match="pass an instance"):
        TRAKer(run.model, Needs, 23, tmp_path)


def test_checkpoints_without_targets_are_skipped_on_request(run, tmp_path):
    traker = TRAKer(run.model, "image_classification", len(run.x), tmp_path / "store", proj_dim=64)
    trak_scores(run, traker)
    checkpoint = {name: value + 1 for name, value in run.checkpoints[0][0].items()}
    traker.load_checkpoint(checkpoint, model_id=9)
    traker.featurize((run.x, run.y), num_samples=len(run.x))
    traker.finalize_features(model_ids=[9], del_grads=True)
    ids = range(len(run.checkpoints))
    with_skip = traker.finalize_scores("test", allow_skip=True)
    np.testing.assert_array_equal(np.asarray(with_skip), np.asarray(traker.finalize_scores("test", model_ids=ids)))


def test_finalize_scores_says_once_that_it_gives_tracin(run, tmp_path, caplog):
    tracing = build(run, tmp_path / "store")
    featurize(tracing, run, checkpoints=[(state, None) for state, _ in run.checkpoints])
    score(tracing, run)
    tracing.finalize_scores("test", estimator="tracin")
    assert "gives TracIn" not in caplog.text
    for _ in range(2):
        tracing.finalize_scores("test")
    assert caplog.text.count("gives TracIn") == 1


def test_finalize_scores_says_nothing_to_who_passed_learning_rates(run, expected, caplog):
    expected.finalize_scores("test")
    assert "gives TracIn" not in caplog.text
