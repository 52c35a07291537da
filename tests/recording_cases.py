"""A small training loop that is recorded."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn

from tracer import CheckpointRecorder

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))


Y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """No test here pulls the plug, and a busy disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def backward(model, step=0):
    rows = torch.arange(step * 6, step * 6 + 6) % len(X)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(X[rows]), Y[rows])
    loss.backward()
    return loss.detach()


def record(directory, steps=10, model=None, make=None, first=0, **options):
    """Train a few steps, recorded; and the state after each step, as a plain copy, and the rates of the steps."""
    model = mlp() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if make is None else make(model)
    states, rates = {}, {}
    with CheckpointRecorder(model, optimizer, directory, **{"every": 3, **options}) as recorder:
        for step in range(first + 1, first + steps + 1):
            optimizer.param_groups[0]["lr"] = 0.1 / step
            loss = backward(model, step)
            optimizer.step()
            recorder.step(loss=loss, epoch=step / 4)
            states[step], rates[step] = copy.deepcopy(model.state_dict()), 0.1 / step
    return model, states, rates


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
