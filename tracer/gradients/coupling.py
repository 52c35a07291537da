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
    calls: list[Calls] = []
    for each in (batch, alone):
        try:
            with torch.no_grad(), _recorded(model) as record:
                task.outputs(model, each)
        except (RuntimeError, ValueError, TypeError, IndexError, TracerError):
            return "Look for batch statistics, padding without a mask, or losses over pairs."
        calls.append(record)
    together, single = calls
    if [name for name, _ in together] == [name for name, _ in single]:
        for (name, value), (_, other) in zip(together, single, strict=True):
            if value.ndim and other.ndim and len(value) > row and value[row].shape == other[0].shape:
                scale = value[row].double().abs().amax() if value[row].numel() else torch.zeros(())
                if (value[row].double() - other[0].double()).abs().gt(0.05 * scale.clamp(min=1e-12)).any():
                    return f"The output of {name} is the first that differs: look there for statistics of the batch."
        return (
            "The model gives the sample the same outputs, so it is the task's loss that depends on the other samples "
            "(a mean or a count over the batch, or pairs)."
        )
    return "Look for batch statistics, padding without a mask, or losses over pairs."


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
