"""Models that Adam has trained for a few steps, checkpoints that hold its state, and their scores by a slow loop."""

from __future__ import annotations

import copy

import torch
from conftest import small_net
from oracles import oracle_gradients
from tied_model import Tied
from torch import nn


class Odd(nn.Module):
    """Tied weights, a layer called twice, a raw parameter, positions without rows, groups, and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 6), nn.Embedding(5, 6)
        self.twice, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
        self.conv = nn.Conv1d(6, 6, 3, padding=1, groups=2)
        self.gain = nn.Parameter(torch.rand(6))
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x):
        h = self.tokens(x) + self.positions(torch.arange(x.shape[1]))
        h = self.twice(torch.tanh(self.twice(h)))
        h = self.norm(h) * self.gain
        return self.head(h + self.conv(h.transpose(1, 2)).transpose(1, 2))


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labels(count, num_classes, seed):
    return torch.randint(0, num_classes, (count,), generator=torch.Generator().manual_seed(seed))


def classify(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def predict_next(model, batch):
    return nn.functional.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)


def mlp():
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    return model, (normal(9, 6, seed=1), labels(9, 4, 2)), (normal(4, 6, seed=3), labels(4, 4, 4)), classify


def conv():
    data = [(normal(size, 2, 6, 6, seed=size), labels(size, 3, size)) for size in (9, 4)]
    return small_net(), *data, classify


def tied():
    data = [(labels(size, 7, size), labels(size, 7, size + 1)) for size in (9, 4)]
    return Tied(), *data, classify


def odd():
    tokens = torch.randint(0, 7, (13, 6), generator=torch.Generator().manual_seed(5))
    return Odd(), (tokens[:9, :-1], tokens[:9, 1:]), (tokens[9:, :-1], tokens[9:, 1:]), predict_next


def frozen():
    model, train, targets, loss = mlp()
    model[0].weight.requires_grad_(False)
    return model, train, targets, loss


MODELS = {"mlp": mlp, "conv": conv, "tied": tied, "odd": odd, "frozen": frozen}


class AdamRun:
    """A model, rows, targets, and checkpoints with a learning rate and Γ of each, of a run with Adam or a relative.

    Γ is taken from the optimizer in memory, parameter by parameter.
    """

    def __init__(self, kind, optimizer=torch.optim.AdamW, num_checkpoints=2, double=False, **options):
        torch.manual_seed(0)
        self.model, self.train, self.targets, self.loss = MODELS[kind]()
        if double:
            self.model = self.model.double()
            self.train, self.targets = (
                tuple(c.double() if c.is_floating_point() else c for c in rows) for rows in (self.train, self.targets)
            )
        model = copy.deepcopy(self.model)
        adam = optimizer([p for p in model.parameters() if p.requires_grad], **{"lr": 0.01, "eps": 1e-3, **options})
        self.checkpoints, self.gammas = [], []
        for rate in (0.01, 0.003, 0.001)[:num_checkpoints]:
            for _ in range(3):
                adam.zero_grad()
                self.loss(model, self.train).mean().backward()
                adam.step()
            self.checkpoints.append(({"model": copy.deepcopy(model.state_dict()), "adam": dict_of(adam)}, rate))
            self.gammas.append({n: gamma(adam, p) for n, p in model.named_parameters() if p in adam.state})

    def rows(self, checkpoint, batch):
        """``Γ^{1/2}`` times the gradient of each row's loss, in float64: ``[n, parameters]``."""
        model = copy.deepcopy(self.model).double()
        whole, _ = self.checkpoints[checkpoint]
        model.load_state_dict({name: value.double() for name, value in whole["model"].items()})
        batch = tuple(column.double() if column.is_floating_point() else column for column in batch)
        gradients = oracle_gradients(model, self.loss, batch, len(batch[0]))
        scaled = [value * self.gammas[checkpoint][name].sqrt() for name, value in gradients.items()]
        return torch.cat([value.flatten(1) for value in scaled], 1)

    def scores(self, cosine=False):
        total = torch.zeros(len(self.train[0]), len(self.targets[0]), dtype=torch.float64)
        for number, (_, rate) in enumerate(self.checkpoints):
            train, targets = self.rows(number, self.train), self.rows(number, self.targets)
            if cosine:
                train, targets = nn.functional.normalize(train), nn.functional.normalize(targets)
            total += rate * train @ targets.T
        return total.numpy()


def dict_of(optimizer):
    """A state dict of its own, which later steps do not change."""
    return copy.deepcopy(optimizer.state_dict())


def gamma(adam, parameter):
    """``1 / (sqrt(v̂) + eps)`` of a parameter, from the optimizer in memory, in float64."""
    group = next(g for g in adam.param_groups if any(p is parameter for p in g["params"]))
    state = adam.state[parameter]
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double()
    return 1 / ((second / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"])
