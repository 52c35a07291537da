"""A finished store, and a run whose data, model or task are others by now: never the old scores without a word."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import Run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tracer import MismatchError, Task, Tracer, attribute, loss_outputs

STORAGES = ("float16", "none")


def trace(run: Run, save_dir, storage="float16", **changes):
    given = {"model": run.model, "task": "image_classification", "train": run.train, "targets": run.targets, **changes}
    options = {"projector": "none", "storage": storage, "batch_size": 5}
    return attribute(**given, checkpoints=run.checkpoints, save_dir=save_dir, **options)


def other_label(y, index):
    y = y.clone()
    y[index] = (y[index] + 1) % 3
    return y


def scaled_loss(factor):
    def loss(model, batch):
        return factor * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    return loss


def other_activation(model):
    model = copy.deepcopy(model)
    places = [
        (each, name)
        for each in model.modules()
        for name, child in each.named_children()
        if not list(child.parameters())
    ]
    for module, name in places:
        if isinstance(getattr(module, name), nn.ReLU | nn.Tanh):
            setattr(module, name, nn.Softplus())
    return model


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("role", ["train", "targets"])
def test_a_changed_label_is_an_error(run, tmp_path, storage, role):
    trace(run, tmp_path, storage)
    x, y = getattr(run, role)
    with pytest.raises(MismatchError, match="1 rows hold other data .*: 3"):
        trace(run, tmp_path, storage, **{role: (x, other_label(y, 3))})


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("form", [TensorDataset, lambda x, y: DataLoader(TensorDataset(x, y), 4)])
def test_another_order_is_an_error_whatever_the_form_of_the_data(run, tmp_path, storage, form):
    trace(run, tmp_path, storage, train=form(*run.train))
    with pytest.raises(MismatchError, match="other data"):
        trace(run, tmp_path, storage, train=form(run.x.flip(0), run.y.flip(0)))


@pytest.mark.parametrize("storage", STORAGES)
def test_another_activation_is_an_error(run, tmp_path, storage):
    trace(run, tmp_path, storage)
    with pytest.raises(MismatchError, match="model and task .* computed again, has"):
        trace(run, tmp_path, storage, model=other_activation(run.model))


@pytest.mark.parametrize("storage", STORAGES)
def test_a_constant_of_the_loss_is_seen_although_its_function_has_the_same_name(run, tmp_path, storage):
    trace(run, tmp_path, storage, task=scaled_loss(1.0))
    with pytest.raises(MismatchError, match="model and task .* computed again, has"):
        trace(run, tmp_path, storage, task=scaled_loss(1.1))


def test_a_step_by_step_run_sees_another_task_too(run, tmp_path):
    class Scaled(Task):
        name = "scaled"

        def __init__(self, factor):
            self.factor = factor

        def outputs(self, model, batch):
            return loss_outputs(scaled_loss(self.factor)(model, batch))

    for factor in (1.0, 2.0):
        with Tracer(run.model, Scaled(factor), len(run.x), tmp_path, 64) as tracing:
            tracing.load_checkpoint(run.checkpoints[0][0], 0, 0.1)
            if factor == 1.0:
                tracing.featurize(run.train, inds=range(len(run.x)))
            else:
                with pytest.raises(MismatchError, match="computed again"):
                    tracing.featurize(run.train, inds=range(len(run.x)))


@pytest.mark.parametrize("storage", STORAGES)
def test_an_unchanged_run_in_other_batches_has_the_stored_scores(run, tmp_path, storage):
    first = trace(run, tmp_path, storage)
    scores = np.array(first.scores)
    data = DataLoader(TensorDataset(*run.train), 7)
    torch.testing.assert_close(np.array(trace(run, tmp_path, storage, train=data).scores), scores)
