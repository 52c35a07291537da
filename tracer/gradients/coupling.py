"""The error for samples that influence each other, with the cause as far as it can be found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tracer.data.batches import leaves
from tracer.data.tasks import Task
from tracer.errors import GradientError, TracerError
from tracer.types import Batch

Calls = list[tuple[str, Tensor]]


def coupling_error(
    model: nn.Module, task: Task, batch: Batch, alone: Batch, row: int, found: str, padding: bool = False
) -> GradientError:
    """Return the error for a sample that run alone has other results than within its batch.

    Args:
        model: The model.
        task: The task.
        batch: The batch.
        alone: The sample as a batch of its own.
        row: Its position in the batch.
        found: The difference.
        padding: Whether it only differs without its padding.
    """
    if padding:
        return GradientError(
            f"The padding of sample {row} of a batch changes its results ({found} without it): they depend on the "
            f"longest sample that shares the batch, and so scores would depend on batch_size. Mask the padding (an "
            f"attention mask, lengths, labels of -100), or pass batches of one length or of one sample."
        )
    return GradientError(
        f"A sample run alone gives another result than within its batch (sample {row}: {found}): the samples of a "
        f"batch influence each other. {_cause(model, task, batch, alone, row)} Tracer needs samples that do not."
    )


def _cause(model: nn.Module, task: Task, batch: Batch, alone: Batch, row: int) -> str:
    unknown = "Look for batch statistics, padding without a mask, or losses over pairs."
    runs: list[tuple[Calls, Tensor]] = []
    for each in (batch, alone):
        try:
            with torch.no_grad(), _recorded(model) as record:
                runs.append((record, task.outputs(model, each).output))
        except (RuntimeError, ValueError, TypeError, IndexError, TracerError):
            return unknown
    (together, outputs), (single, output) = runs
    if [name for name, _ in together] != [name for name, _ in single]:
        return unknown
    for (name, value), (_, other) in zip(together, single, strict=True):
        if value.ndim and other.ndim and len(value) > row and _differ(value[row], other[0]):
            return f"The output of {name} is the first that differs: look there for statistics of the batch."
    if _differ(outputs[row], output.reshape(-1)[0]):
        return (
            "The model gives the sample the same outputs, so it is the task's loss that depends on the other samples "
            "(a mean or a count over the batch, or pairs)."
        )
    return (
        "Outputs are the same, and only gradients differ: look for layers whose backward depends on which samples "
        "share a batch (scale_grad_by_freq, autograd functions of your own)."
    )


def _differ(value: Tensor, other: Tensor) -> bool:
    if value.shape != other.shape or not value.numel():
        return False
    value, other = value.double(), other.double()
    return bool((value - other).abs().amax() > 0.01 * torch.maximum(value.abs(), other.abs()).amax())


@contextmanager
def _recorded(model: nn.Module) -> Iterator[Calls]:
    """Record the first tensor of each module's output, in the order in which modules return."""
    record: Calls = []

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, output: object) -> None:
            tensor = next((leaf for _, leaf in leaves(output) if isinstance(leaf, Tensor)), None)
            if tensor is not None:
                record.append((f"{name or 'the model'} ({type(module).__name__})", tensor.detach()))

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
