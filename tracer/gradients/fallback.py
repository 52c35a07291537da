"""The fallback: per-sample gradients of any parameters by ``torch.func``, or sample by sample.

It costs a second forward and backward, so it is used only for parameters that no layer rule covers. If ``vmap`` cannot
follow a model (data-dependent control flow, operations without a batching rule), each sample is run alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tracer.data.batches import is_per_sample, leaves, map_leaves, select_samples
from tracer.data.tasks import Task, TaskModule
from tracer.errors import GradientError, TracerError
from tracer.gradients.per_sample import DenseGradient, PerSampleGradient
from tracer.types import Batch

logger = logging.getLogger("tracer.gradients")

FALLBACK_BYTES = 256 << 20
"""The bytes of per-sample gradients that are built at once."""


class Fallback:
    """Gradients of parameters that no layer rule covers, a few samples at a time.

    Args:
        model: The model, inside `isolated` when gradients are computed.
        task: The task.
        check_alone: Compares f of samples within their batch and alone, ``[b]`` each, and raises if they differ; it is
            given the batch, its size and the first of the samples too.

    Attributes:
        looped: Whether each sample is run alone by autograd, since ``vmap`` failed.
    """

    def __init__(self, model: nn.Module, task: Task, check_alone: Callable[..., None]) -> None:
        self._model, self._task, self._check_alone = model, task, check_alone
        self.looped = False

    def blocks(
        self, batch: Batch, batch_size: int, names: Sequence[str], outputs: Tensor
    ) -> Iterator[tuple[int, int, dict[str, PerSampleGradient]]]:
        """Yield the named gradients of samples ``start`` to ``stop``, whose f in their batch is in ``outputs [B]``."""
        if not names:
            return
        parameters = dict(self._model.named_parameters())
        row_bytes = sum(parameters[name].numel() * parameters[name].element_size() for name in names)
        step = max(1, min(batch_size, FALLBACK_BYTES // max(1, row_bytes)))
        for start in range(0, batch_size, step):
            stop = min(start + step, batch_size)
            block = batch
            if stop - start < batch_size:
                block = select_samples(batch, torch.arange(start, stop), batch_size)
            alone, gradients = self._compute(block, stop - start, names)
            self._check_alone(outputs[start:stop], alone, batch, batch_size, start)
            yield start, stop, {name: DenseGradient(value) for name, value in gradients.items()}

    def _compute(self, batch: Batch, batch_size: int, names: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.looped and can_vmap(batch, batch_size):
            try:
                return vmap_gradients(self._model, self._task, batch, batch_size, names)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
                reason = str(error).strip().partition("\n")[0]
                logger.info("torch.func.vmap cannot run the model (%s); running sample by sample", reason)
        self.looped = True
        try:
            return loop_gradients(self._model, self._task, batch, batch_size, names)
        except (torch.OutOfMemoryError, TracerError):
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise GradientError(
                f"The gradients of {', '.join(names[:4])} need each sample to be run alone, and that fails: {error}"
            ) from error


def has_batch_norm(model: nn.Module) -> bool:
    """Return whether a model has BatchNorm layers."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def can_vmap(batch: Batch, batch_size: int) -> bool:
    """Return whether all per-sample leaves of a batch are tensors, which vmap can split."""
    return all(isinstance(leaf, Tensor) or not is_per_sample(leaf, batch_size) for _, leaf in leaves(batch))


def vmap_gradients(
    model: nn.Module, task: Task, batch: Batch, batch_size: int, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute f ``[B]`` and its gradients ``[B, *shape]`` by ``vmap(grad)``: every sample is run as a batch of one."""
    parameters = dict(model.named_parameters())
    subset = {name: parameters[name].detach() for name in names}
    module, homes = TaskModule(model, task), _homes(model, names)
    rows = [leaf for _, leaf in leaves(batch) if isinstance(leaf, Tensor) and is_per_sample(leaf, batch_size)]

    def f_of_one(subset: dict[str, Tensor], *one_row: Tensor) -> tuple[Tensor, Tensor]:
        remaining = iter(one_row)

        def fill(leaf: Any) -> Any:
            per_row = isinstance(leaf, Tensor) and is_per_sample(leaf, batch_size)
            return next(remaining).unsqueeze(0) if per_row else leaf

        values = {f"model.{home}": subset[name] for home, name in homes.items()}
        output = torch.func.functional_call(module, values, (map_leaves(batch, fill),), tie_weights=False).output
        return output.sum(), output.detach().sum()

    per_sample = torch.func.vmap(
        torch.func.grad(f_of_one, has_aux=True), in_dims=(None, *(0 for _ in rows)), randomness="error"
    )
    # grad() ignores no_grad; without it the other parameters would build a second graph.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # the user can do nothing about it
        gradients, output = per_sample(subset, *rows)
    return output.detach(), {name: gradients[name].detach() for name in names}


def _homes(model: nn.Module, names: Sequence[str]) -> dict[str, str]:
    """Return every place that holds one of some parameters, with the parameter's name."""
    # torch 2.13: functional_call finds tied weights itself, but in a module that has two names it swaps them twice, and
    # what it then puts back is not the parameter.
    parameters = dict(model.named_parameters())
    wanted = {id(parameters[name]): name for name in names}
    return {
        f"{path}.{local}".lstrip("."): wanted[id(parameter)]
        for path, module in model.named_modules()
        for local, parameter in module._parameters.items()
        if id(parameter) in wanted
    }


def loop_gradients(
    model: nn.Module, task: Task, batch: Batch, batch_size: int, names: Sequence[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute f ``[B]`` and its gradients ``[B, *shape]`` by autograd, one sample after another."""
    parameters = dict(model.named_parameters())
    wanted = [parameters[name] for name in names]
    gradients = {name: wanted[i].new_zeros((batch_size, *wanted[i].shape)) for i, name in enumerate(names)}
    outputs = []
    copies = 2 if has_batch_norm(model) else 1  # see `GradientEngine.compute`
    for row in range(batch_size):
        output = task.outputs(model, select_samples(batch, torch.full((copies,), row), batch_size)).output
        outputs.append(output.detach().reshape(-1)[0])
        output = output / copies
        if not output.requires_grad:
            continue
        for name, grad in zip(names, torch.autograd.grad(output.sum(), wanted, allow_unused=True), strict=True):
            if grad is not None:
                gradients[name][row] = grad.to_dense() if grad.is_sparse else grad
    return torch.stack(outputs), gradients
