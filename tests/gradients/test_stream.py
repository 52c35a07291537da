"""Gradients come during the backward, each once, and are freed; graphs of any shape are passed whole."""

from __future__ import annotations

import weakref

import pytest
import torch
from oracles import BuildingSink, assert_gradients_match, selected_names
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tracer.data.named_tasks import make_task
from tracer.gradients import GradientEngine, isolated
from tracer.gradients.per_sample import OuterGradient


def batch(rows=6, dim=8, classes=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, dim, generator=generator).to(dtype), torch.randint(
        0, classes, (rows,), generator=generator
    )


def test_output_gradients_are_freed_as_the_backward_goes_on():
    model = nn.Sequential(*[layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.Tanh())], nn.Linear(8, 3))
    engine = GradientEngine(model, make_task("image_classification"), selected_names(model))
    living, most = [], []

    class Watcher(BuildingSink):
        def take(self, start, stop, gradients):
            super().take(start, stop, gradients)
            for gradient in gradients.values():
                if isinstance(gradient, OuterGradient):
                    living.extend((weakref.ref(gradient), weakref.ref(gradient.left)))
            most.append(sum(reference() is not None for reference in living))

    data = batch(dtype=torch.float32)
    with isolated(model, engine.names, engine.device):
        for _ in range(2):  # with the check and without
            engine.compute(data, 6, Watcher(engine, 6))
    assert len(most) == 2 * 13
    assert max(most) <= 2, "only the layer at hand"


class Branches(nn.Module):
    """Layers on branches that join, that split, that lead nowhere, and one within another."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(8, 6), nn.Linear(8, 6)
        self.deep = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.wide = nn.Linear(8, 12)
        self.unused = nn.Linear(8, 4)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        self.unused(x)
        one, other = torch.tanh(self.wide(x)).split(6, dim=1)
        left, right = self.left(x), self.deep(torch.relu_(self.right(x)))
        return self.head(left * one + right) + self.head(other)


def test_branches_joins_and_layers_that_lead_nowhere():
    engine = assert_gradients_match(Branches(), "image_classification", batch(), 6)
    assert not engine.fallback


class Recurrent(nn.Module):
    """A cell called once a step: its gradients wait for each other, all others do not."""

    def __init__(self):
        super().__init__()
        self.cell, self.step, self.head = nn.Linear(4, 4), nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        h = x.new_zeros(len(x), 4)
        for part in x.view(len(x), 4, 2).unbind(1):
            h = torch.tanh(self.cell(h) + self.step(part))
        return self.head(h)


def test_gradients_of_repeated_calls_come_once_and_whole():
    engine = assert_gradients_match(Recurrent(), "image_classification", batch(), 6)
    assert not engine.fallback


class Checkpointed(nn.Module):
    """A part of the forward runs again during the backward."""

    def __init__(self):
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = torch.utils.checkpoint.checkpoint(
            lambda h: torch.tanh(self.inner(h)), torch.tanh(self.first(x)), use_reentrant=False
        )
        return self.head(h)


def test_activation_checkpointing():
    assert_gradients_match(Checkpointed(), "image_classification", batch(), 6)


def test_an_error_of_the_sink_reaches_the_caller_and_leaves_no_hooks():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    engine = GradientEngine(model, make_task("image_classification"), selected_names(model))

    class Full(BuildingSink):
        def take(self, start, stop, gradients):
            raise MemoryError("full")

    data = batch(dtype=torch.float32)
    with isolated(model, engine.names, engine.device):
        with pytest.raises(MemoryError, match="full"):
            engine.compute(data, 6, Full(engine, 6))
        assert not any(layer._forward_hooks for layer in model)
        good = BuildingSink(engine, 6)
        engine.compute(data, 6, good)
    assert all(len(rows) == 6 for rows in good.came.values())


class LargeTensors(TorchDispatchMode):
    """Counts the living tensors of a model's largest parameter's size, and the most at a time, without the model's."""

    def __init__(self, model):
        super().__init__()
        self.own = {each.data_ptr() for each in model.parameters()}
        self.numel = max(each.numel() for each in model.parameters())
        self.living, self.most = set(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for value in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(value, torch.Tensor) and not value.is_sparse:
                storage = value.untyped_storage()
                key = storage.data_ptr()
                if storage.nbytes() >= self.numel * value.element_size() and key not in self.living | self.own:
                    self.living.add(key)
                    weakref.finalize(storage, self.living.discard, key)
        self.most = max(self.most, len(self.living))
        return found


class Nothing:
    """A sink that stores nothing."""

    def begin(self):
        pass

    def take(self, start, stop, gradients):
        pass


@pytest.mark.parametrize(("rows", "sets"), [(1, 1), (2, 2)])
def test_checks_hold_few_sets_of_gradients(rows, sets):
    layers, width = 12, 64
    model = nn.Sequential(*[each for _ in range(layers) for each in (nn.Linear(width, width), nn.Tanh())])
    model.append(nn.Linear(width, 3))
    engine = GradientEngine(model, make_task("image_classification"), selected_names(model))
    data = batch(rows, width, dtype=torch.float32)
    counted = LargeTensors(model)
    with isolated(model, engine.names, engine.device), counted:
        plain = nn.functional.cross_entropy(model(data[0]), data[1])
        kept = torch.autograd.grad(plain, list(model.parameters()))
        assert layers <= counted.most <= layers + 2, "a plain pass holds one"
        del kept, plain
        counted.most = len(counted.living)
        for _ in range(3):  # checked and audited, and audited
            engine.compute(data, rows, Nothing())
            assert engine.audited is not None
    assert sets * layers <= counted.most <= sets * layers + 6
