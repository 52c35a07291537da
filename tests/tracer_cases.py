"""A tracer over the conv net of `conftest.Run`, and the scores that autograd gives for it."""

from __future__ import annotations

import copy

import torch
from oracles import oracle_gradients
from torch import nn

from tracer import Tracer


def build(run, path, **options):
    settings = {"projector": "none", "storage": "float32", "task": "image_classification", **options}
    task = settings.pop("task")
    return Tracer(run.model, task, len(run.x), path, **settings)


def featurize(tracing, run, batch_size=8, checkpoints=None):
    for model_id, (state, learning_rate) in enumerate(checkpoints or run.checkpoints):
        tracing.load_checkpoint(state, model_id=model_id, learning_rate=learning_rate)
        for start in range(0, len(run.x), batch_size):
            batch = run.x[start : start + batch_size], run.y[start : start + batch_size]
            tracing.featurize(batch, num_samples=len(batch[0]))
    tracing.finalize_features()


def score(tracing, run, exp_name="test"):
    for model_id, (state, _) in enumerate(run.checkpoints):
        tracing.start_scoring_checkpoint(state, model_id, len(run.target_x), exp_name)
        for row in range(0, len(run.target_x), 2):
            rows = torch.arange(row, min(row + 2, len(run.target_x)))
            tracing.score((run.target_x[rows], run.target_y[rows]), inds=rows)


def loss_gradients(model, state, x, y):
    """Gradients of the cross-entropy of each row, in float64, ``[n, parameters]``."""
    model = copy.deepcopy(model).double()
    model.load_state_dict({name: value.double() for name, value in state.items()})

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    gradients = oracle_gradients(model, loss, (x.double(), y), len(x))
    return torch.cat([value.flatten(1) for value in gradients.values()], 1)


def oracle_scores(run, cosine=False):
    total = torch.zeros(len(run.x), len(run.target_x), dtype=torch.float64)
    for state, learning_rate in run.checkpoints:
        train = loss_gradients(run.model, state, *run.train)
        target = loss_gradients(run.model, state, *run.targets)
        if cosine:
            train, target = nn.functional.normalize(train), nn.functional.normalize(target)
        total += learning_rate * train @ target.T
    return total.numpy()
