"""The error for samples that influence each other, with the cause as far as it can be found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tracer._core.sharding import is_sharded
from tracer.data.batches import leaves
from tracer.data.tasks import Task
from tracer.errors import GradientError, TracerError
from tracer.gradients.isolation import seed_generators
from tracer.gradients.selfcheck import REPEATED, same_values
from tracer.types import Batch

Calls = list[tuple[str, Tensor]]

STATEFUL = (
    "Two forwards of one batch give different outputs: the model draws random numbers in eval mode or keeps state "
    "between calls. Its gradients would depend on batch sizes and order; make its eval mode a function of the batch."
)
"""The error for a model whose outputs for one batch change."""

_NOISE, _MOST_NOISE = 64.0, 1e-4
_LEAST_SHARE, _MOST_SHARE = 1e-6, 0.1


def check_quantization(model: nn.Module) -> None:
    """Raise `GradientError` for layers that round their inputs in a way that follows from the largest of a batch.

    The difference that this makes is often below what rounding explains elsewhere, so no comparison would find it.

    Args:
        model: The model.

    Raises:
        GradientError: If it has such layers.
    """
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized.dynamic"):
            raise GradientError(
                f"{name or 'the model'} ({type(module).__name__}) is quantized dynamically: it rounds its inputs to "
                f"steps that follow from the largest value of the whole batch, so the samples of a batch influence "
                f"each other. Pass batches of one sample (batch_size=1), or a model that is not quantized or has fixed "
                f"ranges."
            )
        threshold = getattr(getattr(module, "state", None), "threshold", 0.0)
        if threshold > 0.0 and any(kind.__module__.startswith("bitsandbytes") for kind in type(module).__mro__):
            raise GradientError(
                f"{name or 'the model'} ({type(module).__name__}) does not round the columns of its inputs in which "
                f"any sample of the batch exceeds {threshold}, so the samples of a batch influence each other. Build "
                f"the model with llm_int8_threshold=0.0, or pass batches of one sample (batch_size=1)."
            )


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
    if not _repeats(model, task, batch):
        return GradientError(STATEFUL)
    if _is_constant(model, task, batch):
        return GradientError(
            "f depends on the model's parameters by rounding errors only, so its gradients are noise. Look for a task "
            "that sums what is normalized (softmax probabilities, squares of unit vectors) and so is constant."
        )
    return GradientError(
        f"A sample run alone gives another result than within its batch (sample {row}: {found}): the samples of a "
        f"batch influence each other. {_cause(model, task, batch, alone, row)} Tracer needs samples that do not."
    )


def _repeats(model: nn.Module, task: Task, batch: Batch) -> bool:
    """Return whether two forwards of a batch with other random numbers give one f, if they run."""
    found = []
    device = next(model.parameters()).device
    for seed in (0, 1):
        seed_generators(device, seed)
        try:
            with torch.no_grad():
                found.append(task.outputs(model, batch).output)
        except (RuntimeError, ValueError, TypeError, IndexError, TracerError):
            return True
    return same_values(found[0], found[1], found[0].dtype, REPEATED)


def _is_constant(model: nn.Module, task: Task, batch: Batch) -> bool:
    """Return whether no change of parameters in proportion to them changes f by more than its rounding."""
    parameters = [each for each in model.parameters() if each.requires_grad and not is_sharded(each)]
    try:
        outputs = task.outputs(model, batch).output
        gradients = torch.autograd.grad(outputs.sum(), parameters, allow_unused=True)
    except (RuntimeError, ValueError, TypeError, IndexError, TracerError):
        return False
    found = [(each, gradient) for each, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    change = sum(float((each.detach() * gradient.to_dense()).abs().sum()) for each, gradient in found)
    return change < min(_NOISE * torch.finfo(outputs.dtype).eps, _MOST_NOISE) * float(outputs.detach().abs().sum())


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
    sizes = len(outputs), len(output)
    for (name, value), (_, other) in zip(together, single, strict=True):
        if _differs(value, other, sizes):
            return f"The output of {name} is the first that differs: look there for statistics of the batch."
    if _differs(outputs[[row]], output[:1], (1, 1)):
        return (
            "The model gives the sample the same outputs, so it is the task's loss that depends on the other samples "
            "(a mean or a count over the batch, or pairs)."
        )
    return (
        "Outputs are the same, and only gradients differ: look for layers whose backward depends on which samples "
        "share a batch (scale_grad_by_freq, autograd functions of your own)."
    )


def _differs(value: Tensor, other: Tensor, sizes: tuple[int, int]) -> bool:
    """Return whether no part of a module's output in a batch is that of the sample alone; models may sort samples."""
    if not other.is_floating_point() or not other.numel() or not value.ndim or not other.ndim:
        return False
    if len(value) % sizes[0] or len(other) % sizes[1]:
        return False
    values, own = value.unflatten(0, (sizes[0], -1)), other.unflatten(0, (sizes[1], -1))[0]
    if values.shape[1:] != own.shape:
        return value.shape[1:] == sizes[:1] and other.shape[1:] == sizes[1:]  # pairs
    distances = (values.double() - own.double()).flatten(1).abs().amax(1)
    scale = torch.maximum(values.double().flatten(1).abs().amax(1), own.double().abs().amax())
    share = min(max(_LEAST_SHARE, _NOISE * torch.finfo(other.dtype).eps), _MOST_SHARE)
    return bool((distances > share * scale).all())


@contextmanager
def _recorded(model: nn.Module) -> Iterator[Calls]:
    """Record the first tensor of each module's output, in the order in which modules return."""
    record: Calls = []

    def hook(name: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: tuple, output: object) -> None:
            tensor = next((leaf for _, leaf in leaves(output) if isinstance(leaf, Tensor)), None)
            if tensor is not None and not tensor.is_nested and tensor.layout == torch.strided:
                record.append((f"{name or 'the model'} ({type(module).__name__})", tensor.detach()))

        return keep

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()
