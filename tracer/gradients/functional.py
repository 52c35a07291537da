"""The general way: per-sample gradients of any parameters by ``torch.func``, or sample by sample.

It costs a second forward and backward, so it is used only for parameters that no layer rule owns. Where ``vmap``
cannot follow a model (data-dependent control flow, operations without a batching rule), each sample is run alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracer.data.batches import is_per_sample, leaves, map_leaves, select_samples
from tracer.data.tasks import Task
from tracer.types import Batch


class _TaskModule(nn.Module):
    """A task's f as a module of the model's parameters, for ``torch.func.functional_call``."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model = model
        self.task = task

    def forward(self, batch: Batch) -> Tensor:
        return self.task.outputs(self.model, batch).output


def can_vmap(batch: Batch, batch_size: int) -> bool:
    """Tell whether all per-row leaves of a batch are tensors, which vmap can split."""
    return all(isinstance(leaf, Tensor) or not is_per_sample(leaf, batch_size) for _, leaf in leaves(batch))


def vmap_gradients(
    model: nn.Module, task: Task, batch: Batch, batch_size: int, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute per-sample gradients by ``vmap(grad)``: every sample is run as a batch of one.

    Args:
        model: The model, inside `isolated`.
        task: The task.
        batch: A batch of ``B`` samples.
        batch_size: ``B``.
        names: The parameters' names.

    Returns:
        f of each sample ``[B]`` and, for each name, the gradient of f ``[B, *shape]``.
    """
    parameters = dict(model.named_parameters())
    subset = {f"model.{name}": parameters[name].detach() for name in names}
    module = _TaskModule(model, task)
    rows = [leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor) and is_per_sample(leaf, batch_size)]

    def f_of_one(subset: dict[str, Tensor], *one_row: Tensor) -> tuple[Tensor, Tensor]:
        remaining = iter(one_row)

        def fill(leaf: Any) -> Any:
            per_row = isinstance(leaf, Tensor) and is_per_sample(leaf, batch_size)
            return next(remaining).unsqueeze(0) if per_row else leaf

        output = torch.func.functional_call(module, subset, (map_leaves(batch, fill),))
        return output.sum(), output.detach().sum()

    per_sample = torch.func.vmap(
        torch.func.grad(f_of_one, has_aux=True), in_dims=(None, *(0 for _ in rows)), randomness="error"
    )
    # grad() ignores no_grad; without it the other parameters would build a second graph.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # the user can do nothing about it
        gradients, output = per_sample(subset, *rows)
    return output.detach(), {name: gradients[f"model.{name}"].detach() for name in names}


def loop_gradients(
    model: nn.Module, task: Task, batch: Batch, batch_size: int, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute per-sample gradients by autograd, one sample after another; arguments as `vmap_gradients`.

    Args:
        model: The model, inside `isolated`.
        task: The task.
        batch: A batch of ``B`` samples.
        batch_size: ``B``.
        names: The parameters' names.

    Returns:
        f of each sample ``[B]`` and, for each name, the gradient of f ``[B, *shape]``.
    """
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in names]
    gradients = {name: wanted[i].new_zeros((batch_size, *wanted[i].shape)) for i, name in enumerate(names)}
    outputs = []
    for row in range(batch_size):
        output = task.outputs(model, select_samples(batch, torch.tensor([row]), batch_size)).output
        outputs.append(output.detach().reshape(()))
        if not output.requires_grad:
            continue
        for name, grad in zip(names, torch.autograd.grad(output.sum(), wanted, allow_unused=True), strict=True):
            if grad is not None:
                gradients[name][row] = grad.to_dense() if grad.is_sparse else grad
    return torch.stack(outputs), gradients
