"""Small training loops whose gradients are collected, and the slow loop that they are compared with."""

from __future__ import annotations

import torch
from torch import nn

from tracer.api.collecting import GradientCollector

N = 24
X = torch.randn(N, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))
EXACT = {"projector": "none", "storage": "float32"}


def mlp(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


def batches(steps, size=6, seed=0):
    """Return the rows of each step; some come twice in a batch."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, N, (size,), generator=generator) for _ in range(steps)]


def flat(model, names=None):
    chosen = [value for name, value in model.named_parameters() if names is None or name in names]
    return torch.cat([value.detach().reshape(-1) for value in chosen])


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def mean_loss(model, rows):
    return nn.functional.cross_entropy(model(X[rows]), Y[rows])


def train(collector, model, optimizer, steps, loss=mean_loss, schedule=None):
    """Train on the rows of each step, collected; ``schedule`` gives the rate of a step."""
    for number, rows in enumerate(steps):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = schedule(number)
        optimizer.zero_grad()
        with collector.batch((X[rows], Y[rows]), rows):
            loss(model, rows).backward()
        optimizer.step()
        collector.step()


def collected(tmp_path, model, optimizer, steps, loss=mean_loss, schedule=None, **options):
    """Train with a collector, and return it after its end."""
    options = {"every": 3, **EXACT, **options}
    with GradientCollector(model, optimizer, tmp_path, "classification", N, **options) as collector:
        train(collector, model, optimizer, steps, loss, schedule)
    return collector


def looped(model, optimizer, steps, loss_of_row, schedule=None, scale=None, after=None):
    """Train by hand, and return the sum over steps of rate times the gradient of each row's part, ``[N, P]``."""
    total = torch.zeros(N, flat(model).numel(), dtype=torch.float64)
    for number, rows in enumerate(steps):
        if schedule is not None:
            optimizer.param_groups[0]["lr"] = schedule(number)
        rates = {id(one): group["lr"] for group in optimizer.param_groups for one in group["params"]}
        shares = []
        for row in rows.tolist():
            grads = torch.autograd.grad(loss_of_row(model, row, rows), list(model.parameters()))
            shares.append(grads)
        optimizer.zero_grad()
        for value, grads in zip(model.parameters(), zip(*shares, strict=True), strict=True):
            value.grad = torch.stack(grads).sum(0)
        if after is not None:
            after(model)
        optimizer.step()
        for row, grads in zip(rows.tolist(), shares, strict=True):
            scaled = [
                rates[id(value)] * grad * (1 if scale is None else scale(optimizer, value))
                for value, grad in zip(model.parameters(), grads, strict=True)
            ]
            total[row] += N * torch.cat([each.reshape(-1) for each in scaled])
    return total


def row_part(model, row, rows):
    return nn.functional.cross_entropy(model(X[row][None]), Y[row][None]) / len(rows)


def features(collector):
    """Return the features of each segment times its rate, ``[segments, N, P]``."""
    from tracer.store import Store

    store, found = Store.open_existing(collector.store), []
    for model_id in store.catalog.checkpoint_ids():
        table = store.checkpoint(model_id)
        rows = torch.cat([torch.tensor(view.copy()) for _, view in table.raw_features(0, table.num_rows)])
        found.append(rows.double() * table.attributes["learning_rate"])
    return torch.stack(found)
