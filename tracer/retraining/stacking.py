"""The number of models to train at once: whether stacking them is possible, exact and faster."""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tracer.data.tasks import Task
from tracer.errors import InputError
from tracer.gradients.fallback import can_vmap
from tracer.gradients.selfcheck import tolerance
from tracer.retraining.model_factory import seeded
from tracer.retraining.models import Examples, Models, SingleModel, StackedModels
from tracer.retraining.recipe import Recipe
from tracer.retraining.subsets import Run

logger = logging.getLogger("tracer.retraining")

_FEWEST = 8
_STEP_FLOPS = {"cpu": 1e7, "cuda": 1e9}
"""Stacking saves the cost of launching operations, about 1e7 floating point operations per step on a CPU. On one
core an MLP 64-64-10 (1.3e6 operations) trains 4 times as fast in a stack, a small conv net (3e7) equally fast, and
a ResNet-9 of width 8 (2e9) half as fast, as stacked convolutions are grouped. The figure for CUDA is an estimate."""
_MOST, _MOST_VALUES = 64, 1 << 24
"""More models at once are hardly faster; with more parameters, a step's data no longer fits into the caches."""
_NOISE = 1e-2  # of the largest gradient: below it a gradient may be zero but for rounding


def models_at_once(
    pair: tuple[nn.Module, nn.Module],
    data: Examples,
    runs: Sequence[Run],
    task: Task,
    recipe: Recipe,
    *,
    stacked: bool | None,
    most: int | None,
) -> int:
    """Return how many models to train at once, judged by the untrained models of the first run and the last."""
    if stacked is False or most == 1:
        return 1
    num_values = sum(parameter.numel() for parameter in pair[0].parameters())
    at_once = most or min(_MOST, max(1, _MOST_VALUES // num_values))
    reason = _not_worth(pair[0], data, runs, task, recipe, at_once) if stacked is None else None
    if reason:
        logger.info("models are trained one after another: %s", reason)
        return 1
    reason = why_not_stacked(pair, (runs[0], runs[-1]), data, task, recipe)
    if reason and stacked:
        raise InputError(f"stacked=True, but the models cannot be stacked: {reason}. Pass stacked=None or False.")
    if reason:
        logger.warning("models are trained one after another, since they cannot be stacked: %s", reason)
    return 1 if reason else at_once


def _not_worth(
    model: nn.Module, data: Examples, runs: Sequence[Run], task: Task, recipe: Recipe, at_once: int
) -> str | None:
    """Return why stacking saves no time, or None if it does."""
    together = min(at_once, Counter(run.num_rows for run in runs).most_common(1)[0][1])
    if together < _FEWEST:
        return f"{together} at once would save little"
    with FlopCounterMode(display=False) as counter:
        _step(SingleModel([copy.deepcopy(model)], task), data, first_batches(runs[:1], recipe), 0)
    flops, bound = counter.get_total_flops(), _STEP_FLOPS["cuda" if _device(model).type == "cuda" else "cpu"]
    return f"a step takes {flops:.1g} operations, above {bound:.0e}" if flops > bound else None


def why_not_stacked(
    pair: tuple[nn.Module, nn.Module], runs: tuple[Run, Run], data: Examples, task: Task, recipe: Recipe
) -> str | None:
    """Return how losses, gradients or buffers of two models differ in a stack, or what prevents stacking, or None."""
    if not can_vmap(data.batch, data.num_rows):
        return "the training examples hold lists, which vmap cannot split"
    rows, device = first_batches(runs, recipe), _device(pair[0])

    def alone(model: int, seed: int = 0, train: bool = True) -> _Found:
        return _step(SingleModel([copy.deepcopy(pair[model])], task), data, rows[model : model + 1], seed, train)

    def together(train: bool) -> _Found:
        return _step(StackedModels(copy.deepcopy(pair), task), data, rows, 0, train)

    expected = [alone(model) for model in range(2)]
    # Models that draw random numbers, for example by dropout, are compared in eval mode.
    is_random = _difference(expected[:1], alone(0, seed=1), device) is not None
    if is_random:
        expected = [alone(model, train=False) for model in range(2)]
    try:
        found = together(train=True)
        if is_random:
            found = together(train=False)
    except Exception as error:  # vmap raises many kinds, and so may a model
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return _difference(expected, found, device)


def first_batches(runs: Sequence[Run], recipe: Recipe) -> Tensor:
    """Return the first batch of each run, cut to the size of the smallest: ``[K, B]``, int64."""
    size = min(recipe.batch_size, min(run.num_rows for run in runs))
    return torch.stack([next(run.orders())[:size] for run in runs])


_Found = dict[tuple[str, str], Tensor]
"""Tensors ``[K, ...]`` by kind and name."""


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _step(models: Models, data: Examples, rows: Tensor, seed: int, train: bool = True) -> _Found:
    """Return losses, gradients and buffers after one forward and backward."""
    models.train(train)
    with seeded(seed):
        objectives, losses = models.objectives(data, rows)
        gradients = torch.autograd.grad(objectives.sum(), list(models.trained.values()), allow_unused=True)
    found = {("gradient", name): one for name, one in zip(models.trained, gradients, strict=True) if one is not None}
    found |= {("buffer", name): value for name, value in models.fixed().items()}
    if isinstance(models, SingleModel):
        found = {key: value.unsqueeze(0) for key, value in found.items()}
    return {("loss", "of the batch"): losses, **found}


def _difference(expected: Sequence[_Found], found: _Found, device: torch.device) -> str | None:
    """Return where a step of K models differs from a step of each alone, or None."""
    for model, values in enumerate(expected):
        norms = {key: float(value.double().norm()) for key, value in values.items()}
        for (kind, name), value in values.items():
            if (kind, name) not in found:
                return f"the {kind} {name} is missing in a stack"
            largest = max(norm for (other, _), norm in norms.items() if other == kind)
            bound = tolerance(value.dtype, device) * max(norms[kind, name], _NOISE * largest)
            difference = float((found[kind, name][model].double() - value[0].double()).norm())
            if not difference <= bound:
                return f"the {kind} {name} differs by {difference:.2g} from that of a model alone, at {bound:.0e} most"
    return None
