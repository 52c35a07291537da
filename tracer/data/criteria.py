"""Tasks defined by a loss of outputs and labels, such as `torch.nn.CrossEntropyLoss`."""

from __future__ import annotations

import copy
import functools
import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tracer.data.batches import leaves
from tracer.data.model_inputs import LABEL_KEYS, check_logits, is_transformed, logits_of, split_labels, upcast_half
from tracer.data.tasks import Task, function_label, loss_outputs
from tracer.errors import BatchError, InputTypeError, TracerError
from tracer.types import Batch, SampleOutputs

_MODEL_NAMES = {"model", "m", "net", "network", "module"}
_OUTPUT_NAMES = {
    "input",
    "output",
    "outputs",
    "logits",
    "pred",
    "preds",
    "prediction",
    "predictions",
    "y_pred",
    "y_hat",
}
_TARGET_NAMES = {*LABEL_KEYS, "y_true", "truth"}
_SUMS = {"sum": "sum", "batchmean": "sum", "mean": "mean"}
_TAKE_LOGITS = ("CrossEntropyLoss", "BCEWithLogitsLoss", "cross_entropy", "binary_cross_entropy_with_logits")


class CriterionTask(Task):
    """A task defined by a loss ``(outputs, labels) -> loss``; ``f = L``.

    A loss of torch is taken example by example, whatever its ``reduction``: the mean, or sum, over an example's own
    elements. Batches are as for the tasks with a name: ``(inputs, labels)``, or a mapping with labels.

    Args:
        criterion: A module or function of the model's outputs and the labels.

    Raises:
        InputTypeError: The function does not take two arguments.
    """

    name = "criterion"

    def __init__(self, criterion: Callable[..., Tensor]) -> None:
        self._given = criterion
        self.reduction = _reduction(criterion)
        self._loss: Callable[..., Tensor] = criterion
        if isinstance(criterion, nn.Module):  # a copy: it may move to another device
            self._loss = copy.deepcopy(criterion)
            if self.reduction is not None:
                self._loss.reduction = "none"  # type: ignore[assignment]
        elif self.reduction is not None:
            self._loss = functools.partial(criterion, reduction="none")

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return the losses; see `Task.outputs`."""
        args, kwargs, labels = split_labels(model, batch, self._label)
        output = upcast_half(logits_of(model(*args, **kwargs)))
        if self._label.rpartition(".")[2] in _TAKE_LOGITS:
            check_logits(output, self._label)
        if output.ndim and labels.shape != output.shape and labels.numel() == output.numel() == len(output):
            labels = labels.reshape(output.shape)  # losses would compare [B, 1] with [B] in all pairs
        if isinstance(self._loss, nn.Module):
            self._loss.to(labels.device)
        try:
            loss = self._loss(output, labels)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if isinstance(error, (TracerError, torch.OutOfMemoryError)) or _is_inside_transform(batch):
                raise
            raise BatchError(
                f"The loss {self._label} failed with {type(error).__name__}: {error}. It is called as (outputs, "
                f"labels), with outputs {output.dtype} of shape {tuple(output.shape)} and labels {labels.dtype} of "
                f"shape {tuple(labels.shape)}. For other arguments pass a function (model, batch) -> loss [B]."
            ) from error
        return loss_outputs(self._per_example(loss, len(output)))

    def _per_example(self, loss: Any, size: int) -> Tensor:
        """Return the loss of each example, ``[B]``, or raise `BatchError`."""
        if isinstance(loss, Tensor) and loss.ndim and len(loss) == size:
            if loss.numel() == size:
                return loss.reshape(size)
            if self.reduction in _SUMS and not self._weighs_elements:
                return loss.flatten(1).sum(1) if _SUMS[self.reduction] == "sum" else loss.flatten(1).mean(1)
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise BatchError(
            f"The loss {self._label} gave {got} for {size} examples; expected one number for each, [{size}]. A mean "
            f"over the batch cannot be divided among examples: pass reduction='none'. If an example has several "
            f"elements, pass a function of outputs and labels that reduces them, such as lambda outputs, labels: "
            f"loss(outputs, labels).flatten(1).mean(1)."
        )

    @property
    def _weighs_elements(self) -> bool:
        """Whether the loss leaves out or weighs elements, so that a mean of them is none of equal shares."""
        if isinstance(self._given, nn.Module):
            return getattr(self._given, "weight", None) is not None or hasattr(self._given, "ignore_index")
        return "ignore_index" in inspect.signature(self._given).parameters

    @property
    def _label(self) -> str:
        return function_label(self._given)

    def settings(self) -> dict[str, Any]:
        """Return the loss's qualified name, its reduction and its other settings."""
        settings: dict[str, Any] = {"name": self.name, "function": self._label}
        if self.reduction is not None:
            settings["reduction"] = _SUMS.get(self.reduction, self.reduction)
        if isinstance(self._given, nn.Module):
            values = {name: value for name, value in vars(self._given).items() if not name.startswith("_")}
            plain = {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str))}
            settings |= {name: plain[name] for name in sorted(plain) if name not in ("training", "reduction")}
            settings |= {name: _digest(value) for name, value in sorted(self._given.state_dict().items())}
        elif isinstance(self._given, functools.partial):
            settings["args"] = [repr(value) for value in self._given.args]
            settings["keywords"] = {
                key: _digest(value) if isinstance(value, Tensor) else repr(value)
                for key, value in sorted(self._given.keywords.items())
                if key != "reduction"
            }
        return settings


def is_criterion(function: Callable[..., Any]) -> bool:
    """Return whether a function is a loss of outputs and labels, by the names of its arguments.

    Raises:
        InputTypeError: The function does not take two arguments.

    >>> is_criterion(nn.MSELoss()), is_criterion(lambda model, batch: model(batch[0]))
    (True, False)
    """
    try:
        signature = inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):  # some functions in C have none
        return False
    names = list(signature.parameters)[:2]
    try:
        signature.bind(None, None)
    except TypeError:
        raise InputTypeError(
            f"task is {function!r}, which takes {signature}; expected a task's name, a function (model, batch) -> loss "
            f"of each example [B], a loss of (outputs, labels), or an instance of tracer.Task. Bind further arguments "
            f"by functools.partial, or wrap it: lambda model, batch: loss(model(batch[0]), batch[1], ...)."
        ) from None
    if not names:
        return False
    return names[0] in _OUTPUT_NAMES or (names[0] not in _MODEL_NAMES and bool({*names[1:]} & _TARGET_NAMES))


def _reduction(criterion: Callable[..., Any]) -> str | None:
    """Return the reduction of a loss that has one."""
    if isinstance(criterion, nn.Module):
        found = getattr(criterion, "reduction", None)
        return found if isinstance(found, str) else None
    try:
        parameter = inspect.signature(criterion).parameters.get("reduction")
    except (TypeError, ValueError):
        return None
    return parameter.default if parameter is not None and isinstance(parameter.default, str) else None


def _is_inside_transform(batch: Batch) -> bool:
    return any(isinstance(leaf, Tensor) and is_transformed(leaf) for _, leaf in leaves(batch))


def _digest(values: Tensor) -> str:
    return hashlib.sha256(values.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]
