"""Slow, obvious oracles in float64, and the harness in which every fast path meets them."""

from __future__ import annotations

import copy

import torch
from torch import nn

from tracer.data.batches import select_samples
from tracer.data.named_tasks import make_task
from tracer.gradients import GradientEngine, isolated


def selected_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def oracle_gradients(model: nn.Module, task, batch, num_rows: int, names=None) -> dict[str, torch.Tensor]:
    """Per-sample gradients of f by a loop of autograd over single samples; zeros where f does not depend."""
    task = make_task(task)
    names = selected_names(model) if names is None else names
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in names]
    rows = {name: [] for name in names}
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for row in range(num_rows):
        output = task.outputs(model, select_samples(batch, torch.tensor([row]), num_rows)).output
        grads = torch.autograd.grad(output.sum(), wanted, allow_unused=True)
        for name, parameter, grad in zip(names, wanted, grads, strict=True):
            rows[name].append(torch.zeros_like(parameter) if grad is None else grad.to_dense())
    for module, mode in modes:
        module.training = mode
    return {name: torch.stack(found) for name, found in rows.items()}


class BuildingSink:
    """Builds all gradients, each parameter of a sample once."""

    def __init__(self, engine: GradientEngine, num_rows: int) -> None:
        self.shapes = {name: parameter.shape for name, parameter in engine.model.named_parameters()}
        self.names, self.num_rows = engine.names, num_rows
        self.dtype = next(engine.model.parameters()).dtype
        self.begin()

    def begin(self) -> None:
        self.found = {name: torch.zeros(self.num_rows, *self.shapes[name], dtype=self.dtype) for name in self.names}
        self.came: dict[str, set[int]] = {name: set() for name in self.names}

    def take(self, start: int, stop: int, gradients) -> None:
        for name, gradient in gradients.items():
            rows = set(range(start, stop))
            assert not rows & self.came[name], f"{name} came twice for a sample"
            self.came[name] |= rows
            self.found[name][start:stop] = gradient.dense(0, stop - start).reshape(stop - start, *gradient.shape)


def engine_gradients(engine: GradientEngine, batch, num_rows: int) -> dict[str, torch.Tensor]:
    """Per-sample gradients by the engine, built and put together."""
    sink = BuildingSink(engine, num_rows)
    with isolated(engine.model, engine.names, engine.device):
        engine.compute(batch, num_rows, sink)
    return sink.found


def assert_gradients_match(
    model: nn.Module, task, batch, num_rows: int, *, method="auto", names=None, general=(), rtol=1e-9
) -> GradientEngine:
    """Check the engine against the oracle in float64, and which parameters used the fallback.

    `batch` must be in float64 already. `general` is the expected set of parameters that the fallback computes, or None.
    """
    model = copy.deepcopy(model).double()
    names = selected_names(model) if names is None else names
    engine = GradientEngine(model, make_task(task), names, method)
    found = engine_gradients(engine, batch, num_rows)
    expected = oracle_gradients(model, task, batch, num_rows, names)
    assert any(float(value.abs().max()) > 0 for value in expected.values()), "the oracle's gradients are all zero"
    for name in names:
        scale = max(float(expected[name].abs().max()), 1e-3)
        difference = float((found[name] - expected[name]).abs().max())
        assert difference <= rtol * scale, f"{name}: differs by {difference:.2e} at scale {scale:.2e}"
    if general is not None:
        assert set(engine.fallback) == set(general), engine.fallback
    return engine
