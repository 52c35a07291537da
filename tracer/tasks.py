"""Tasks: what a model outputs for a sample, and what its loss is.

A task gives each sample a scalar output f and the loss L as a function of f, with slope ``Q = dL/df`` and curvature
``w = d²L/df²``; the gradient of the loss is then ``Q * (gradient of f)``. Gradients are taken of f, which stays well
scaled where the gradient of the loss vanishes. A task that has only a loss uses ``f = L, Q = 1, w = 0``.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracer.errors import BatchError, InputError, InputTypeError, nearest_name
from tracer.types import Batch, SampleOutputs

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Where a mapping holds its labels; the first one that is there counts."""


class Task(ABC):
    """What a batch means to a model; subclass it for a task of your own.

    `outputs` must treat every sample alone (no batch statistics) and, where gradients fall back to
    ``torch.func.vmap``, is called with batches of one sample whose values cannot be inspected.

    >>> class Hinge(Task):
    ...     name = "hinge"
    ...     def outputs(self, model, batch):
    ...         x, sign = batch
    ...         return loss_outputs(torch.relu(1 - sign * model(x).squeeze(-1)))
    """

    name: str

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Run the model on a batch of ``B`` samples.

        Args:
            model: The model, in eval mode, with the weights of a checkpoint.
            batch: The batch, on the model's device.

        Returns:
            f, L, Q and w of each sample, ``[B]`` each; f differentiable in the model's parameters.
        """

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers, as plain JSON values: the store records it and compares it."""
        return {"name": self.name}


def loss_outputs(loss: Tensor) -> SampleOutputs:
    """Return the outputs of a task that has only a loss: ``f = L, Q = 1, w = 0``.

    Args:
        loss: The loss of each sample, ``[B]``, differentiable.

    Returns:
        The outputs, with f the loss itself.
    """
    detached = loss.detach()
    return SampleOutputs(loss, detached, torch.ones_like(detached), torch.zeros_like(detached))


class Classification(Task):
    """Cross-entropy over classes; f is the margin ``logit_y - logsumexp(other logits)`` (Park et al. 2023, eq. 9).

    Then ``L = softplus(-f)``, ``Q = -(1 - p_y)`` and ``w = p_y (1 - p_y)``. Batches are ``(*inputs, labels)`` or
    mappings with a key of `LABEL_KEYS`; the model's output is the logits ``[B, C]``, or has them as ``logits``.
    """

    def __init__(self, name: str = "image_classification") -> None:
        self.name = name

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return margins and cross-entropies; see `Task.outputs`."""
        args, kwargs, labels = split_labels(model, batch, self.name)
        logits = promote(logits_of(model(*args, **kwargs)))
        _check_classes(logits, labels, self.name)
        is_label = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
        chosen = torch.where(is_label, logits, 0.0).sum(1)
        others = logits.masked_fill(is_label, -torch.inf).logsumexp(1)
        margin = chosen - others
        detached = margin.detach()
        wrong = torch.sigmoid(-detached)
        return SampleOutputs(margin, F.softplus(-detached), -wrong, wrong * torch.sigmoid(detached))


class BinaryClassification(Task):
    """Logistic loss on one logit a sample, with float labels in [0, 1] (soft labels too).

    f is the logit, ``L = BCEWithLogits(f, y)``, ``Q = sigmoid(f) - y`` and ``w = sigmoid(f)(1 - sigmoid(f))``.
    """

    name = "binary_classification"

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return logits and logistic losses; see `Task.outputs`."""
        args, kwargs, labels = split_labels(model, batch, self.name)
        logit = promote(logits_of(model(*args, **kwargs)))
        logit, labels = _one_number_a_row(logit, labels, self.name)
        _check_range(labels)
        detached = logit.detach()
        labels = labels.to(detached.dtype)
        loss = F.binary_cross_entropy_with_logits(detached, labels, reduction="none")
        probability = torch.sigmoid(detached)
        return SampleOutputs(logit, loss, probability - labels, probability * torch.sigmoid(-detached))


class Regression(Task):
    """Squared error, as `torch.nn.MSELoss`: the mean over a sample's outputs, no factor of one half.

    With one output a sample f is the prediction, ``L = (f - y)²``, ``Q = 2 (f - y)`` and ``w = 2``; with several,
    ``f = L``.
    """

    name = "regression"

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return predictions and squared errors; see `Task.outputs`."""
        args, kwargs, targets = split_labels(model, batch, self.name)
        predicted = promote(logits_of(model(*args, **kwargs)))
        if predicted.numel() != predicted.shape[0]:
            if predicted.shape != targets.shape:
                raise BatchError(_shapes(self.name, predicted, targets))
            return loss_outputs((predicted - targets.to(predicted.dtype)).square().flatten(1).mean(1))
        predicted, targets = _one_number_a_row(predicted, targets, self.name)
        residual = predicted.detach() - targets.to(predicted.dtype)
        return SampleOutputs(predicted, residual.square(), 2 * residual, torch.full_like(residual, 2.0))


class LanguageModeling(Task):
    """Next-token cross-entropy of a causal language model, the mean over the predicted tokens of each sequence.

    ``f = L``. A mapping has ``input_ids`` and, as Hugging Face collators make them, ``labels`` of the same shape that
    are shifted here (-100: not predicted; without labels all attended tokens are). A tensor or ``(tokens,)`` is its
    own label likewise. A pair ``(tokens, next_tokens)`` is taken as it is, position by position.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over the predicted tokens of a sequence.
    """

    name = "language_modeling"

    def __init__(self, reduction: str = "mean") -> None:
        if reduction not in ("mean", "sum"):
            raise InputError(f"reduction={reduction!r} is not known; {nearest_name(reduction, ('mean', 'sum'))}.")
        self.reduction = reduction

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return sequence losses; see `Task.outputs`."""
        args, kwargs, labels, shifted = self._split(model, batch)
        logits = promote(logits_of(model(*args, **kwargs)))
        if logits.ndim != 3 or logits.shape[:2] != labels.shape:
            raise BatchError(
                f"language_modeling expects logits [B, T, vocabulary] for labels [B, T]; the model gave "
                f"{tuple(logits.shape)} for labels {tuple(labels.shape)}."
            )
        if shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        self._check(logits, labels)
        predicted = (labels != -100).to(logits.dtype)
        loss = F.cross_entropy(logits.transpose(1, 2), labels.long(), reduction="none", ignore_index=-100).sum(1)
        return loss_outputs(loss / predicted.sum(1) if self.reduction == "mean" else loss)

    def settings(self) -> dict[str, Any]:
        """Return the name and the reduction."""
        return {"name": self.name, "reduction": self.reduction}

    def _split(self, model: nn.Module, batch: Batch) -> tuple[tuple, dict, Tensor, bool]:
        if isinstance(batch, Mapping):
            kwargs = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
            labels = next((batch[key] for key in LABEL_KEYS if key in batch), None)
            if labels is None:
                labels = batch.get("input_ids")
                mask = batch.get("attention_mask")
                if labels is None:
                    raise BatchError(f"language_modeling needs 'input_ids' or 'labels'; the batch has {sorted(batch)}.")
                labels = labels if mask is None else _attended_labels(labels, mask)
            args, kwargs = _bind(model, kwargs)
            return args, kwargs, labels, True
        items = batch if isinstance(batch, (tuple, list)) else (batch,)
        if len(items) not in (1, 2) or not all(isinstance(item, Tensor) for item in items):
            raise BatchError(
                "language_modeling expects tokens, (tokens,), (tokens, next_tokens) or a mapping with 'input_ids'; "
                f"got {type(batch).__name__} of {len(items)}."
            )
        return (items[0],), {}, items[-1], len(items) == 1

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if _is_transformed(labels):
            return
        empty = (labels == -100).all(1).nonzero().flatten()
        if len(empty):
            raise BatchError(
                f"Rows {empty[:5].tolist()} of the batch have no token to predict (one token, or all labels -100): "
                f"their loss is undefined. Leave such rows out."
            )
        _check_label_range(labels[labels != -100], logits.shape[-1], self.name)


class LossTask(Task):
    """A task given by a function ``(model, batch) -> loss of each sample [B]``; ``f = L``.

    Args:
        function: The function; it must not reduce over the batch.
    """

    name = "callable"

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.function = function

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return the losses that the function gives; see `Task.outputs`."""
        loss = self.function(model, batch)
        if isinstance(loss, SampleOutputs):
            return loss
        if not isinstance(loss, Tensor) or loss.ndim != 1:
            came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise BatchError(
                f"The task {self._label()} must return the loss of each sample as a tensor [B]; it returned {came}. "
                f"Losses of torch take reduction='none'."
            )
        return loss_outputs(loss)

    def settings(self) -> dict[str, Any]:
        """Return the function's qualified name."""
        return {"name": self.name, "function": self._label()}

    def _label(self) -> str:
        owner = self.function if hasattr(self.function, "__qualname__") else type(self.function)
        return f"{owner.__module__}.{owner.__qualname__}"


_TASKS: dict[str, Callable[[], Task]] = {
    "image_classification": lambda: Classification("image_classification"),
    "text_classification": lambda: Classification("text_classification"),
    "binary_classification": BinaryClassification,
    "regression": Regression,
    "language_modeling": LanguageModeling,
}

TASK_NAMES = tuple(_TASKS)
"""The names that ``task=`` takes."""


def make_task(task: str | Task | Callable[[nn.Module, Batch], Tensor]) -> Task:
    """Return the task for a name, a function or a `Task`.

    Args:
        task: A name of `TASK_NAMES`, a function ``(model, batch) -> loss [B]``, or a `Task`.

    Returns:
        The task.

    Raises:
        InputError: The name is not known.
        InputTypeError: It is none of the three.

    >>> make_task("regression").name
    'regression'
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, str):
        if task not in _TASKS:
            raise InputError(f"task={task!r} is not known; {nearest_name(task, _TASKS)}.")
        return _TASKS[task]()
    if isinstance(task, type) or not callable(task):
        raise InputTypeError(
            f"task is {task!r}; expected a name ({', '.join(_TASKS)}), a function (model, batch) -> loss [B], or an "
            f"instance of tracer.Task."
        )
    return LossTask(task)


def split_labels(model: nn.Module, batch: Batch, name: str) -> tuple[tuple, dict[str, Any], Tensor]:
    """Split a batch into the model's arguments and the labels.

    Args:
        model: The model, whose forward tells whether a mapping's keys are its arguments.
        batch: ``(*inputs, labels)``, ``(mapping, labels)``, or a mapping with a key of `LABEL_KEYS`.
        name: The task's name, for messages.

    Returns:
        Positional arguments, keyword arguments, labels.

    Raises:
        BatchError: There are no labels.
    """
    if isinstance(batch, Mapping):
        key = next((key for key in LABEL_KEYS if key in batch), None)
        if key is None:
            raise BatchError(f"{name} needs labels under one of {LABEL_KEYS}; the batch has {sorted(map(str, batch))}.")
        args, kwargs = _bind(model, {k: value for k, value in batch.items() if k != key})
        return args, kwargs, _as_labels(batch[key], name)
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        *inputs, labels = batch
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return (), dict(inputs[0]), _as_labels(labels, name)
        return tuple(inputs), {}, _as_labels(labels, name)
    raise BatchError(
        f"{name} expects a batch (inputs, labels) or a mapping with labels; got {type(batch).__name__}. For other "
        f"batches pass task=a function (model, batch) -> loss [B]."
    )


def _bind(model: nn.Module, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pass a mapping's only input by position when the model's forward has another name for it."""
    if len(kwargs) != 1:
        return (), kwargs
    parameters = inspect.signature(model.forward).parameters
    key, value = next(iter(kwargs.items()))
    takes = key in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return ((), kwargs) if takes else ((value,), {})


def logits_of(output: Any) -> Tensor:
    """Return the tensor that a model's output stands for: itself, its ``logits``, or the first of a tuple.

    Args:
        output: What the model returned.

    Returns:
        The tensor.

    Raises:
        BatchError: There is no tensor to be found.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise BatchError(
            f"The model returned {type(output).__name__} without a tensor 'logits'; expected a tensor, an object with "
            f"logits, or a tuple that begins with them. For other outputs pass task=a function (model, batch) -> loss."
        )
    return found


def promote(values: Tensor) -> Tensor:
    """Return half-precision values as float32, so that losses are taken in float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _as_labels(labels: Any, name: str) -> Tensor:
    if not isinstance(labels, Tensor):
        raise BatchError(f"{name} expects labels as a tensor [B]; got {type(labels).__name__}.")
    return labels


def _is_transformed(values: Tensor) -> bool:
    """Tell whether values cannot be inspected, being inside a torch.func transform."""
    return torch.func.debug_unwrap(values, recurse=False) is not values


def _attended_labels(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return tokens as labels, without padding and without tokens that only padding could predict (left padding)."""
    attended = mask != 0
    before = torch.cat([attended[:, :1], attended[:, :-1]], dim=1)
    return tokens.masked_fill(~(attended & before), -100)


def _shapes(name: str, output: Tensor, labels: Tensor) -> str:
    return f"{name}: the model's output has shape {tuple(output.shape)} and the labels {tuple(labels.shape)}."


def _check_classes(logits: Tensor, labels: Tensor, name: str) -> None:
    if logits.ndim != 2 or labels.ndim != 1 or logits.shape[0] != labels.shape[0]:
        raise BatchError(
            _shapes(name, logits, labels) + " Expected logits [B, num_classes] and labels [B]. For one output a pixel "
            "or token pass task=a function (model, batch) -> loss [B]."
        )
    if logits.shape[1] < 2:
        raise BatchError(f"{name} needs two logits a sample at least; for one use task='binary_classification'.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise BatchError(
            f"{name} expects class indices as integers; the labels are {labels.dtype}. For float labels of two "
            f"classes use task='binary_classification'; for soft labels a function (model, batch) -> loss [B]."
        )
    if not _is_transformed(labels):
        _check_label_range(labels, logits.shape[1], name)


def _check_label_range(labels: Tensor, num_classes: int, name: str) -> None:
    bad = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(bad):
        raise BatchError(
            f"{name}: label {int(labels[bad[0]])} at position {int(bad[0])} of the batch is outside 0..."
            f"{num_classes - 1} ({len(bad)} such labels); the model has {num_classes} classes."
        )


def _one_number_a_row(output: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    rows = output.shape[0] if output.ndim else 0
    if rows == 0 or output.numel() != rows or labels.numel() != rows:
        raise BatchError(_shapes(name, output, labels) + " Expected one number a sample: [B] or [B, 1].")
    return output.reshape(rows), labels.reshape(rows)


def _check_range(labels: Tensor) -> None:
    if not _is_transformed(labels) and not bool(((labels >= 0) & (labels <= 1)).all()):
        low, high = float(labels.min()), float(labels.max())
        raise BatchError(f"binary_classification expects labels in [0, 1]; got {low} to {high}.")
