"""Tasks: a scalar output of a model for each example, and the loss as a function of it.

A task defines the output f and the loss L of an example, with the derivatives ``Q = dL/df`` and ``w = d²L/df²``; the
gradient of the loss is then ``Q * (gradient of f)``. A task that has only a loss uses ``f = L, Q = 1, w = 0``.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tracer._core.validation import check_choice
from tracer.data.model_inputs import (
    LABEL_KEYS,
    as_mapping,
    attended_labels,
    bind_inputs,
    check_classes,
    check_label_range,
    check_probabilities,
    flatten_scalars,
    is_transformed,
    label_key,
    logits_of,
    shapes_message,
    split_labels,
    upcast_half,
)
from tracer.errors import BatchError, InputTypeError
from tracer.types import Batch, SampleOutputs


class Task(ABC):
    """The outputs and losses of a model on a batch; subclass it for a task of your own, for example a hinge loss.

    `outputs` must treat each example alone (no batch statistics). If gradients fall back to ``torch.func.vmap``, it is
    called with batches of one example whose values cannot be inspected.

    >>> class Hinge(Task):
    ...     name = "hinge"
    ...     def outputs(self, model, batch):
    ...         x, sign = batch
    ...         return loss_outputs(torch.relu(1 - sign * model(x).squeeze(-1)))
    """

    name: str = "custom"

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Run the model on a batch of ``B`` examples.

        Args:
            model: The model in eval mode, with the weights of a checkpoint.
            batch: The batch, on the model's device.

        Returns:
            f, L, Q and w of each example, ``[B]`` each; f differentiable with respect to the model's parameters.
        """

    def settings(self) -> dict[str, Any]:
        """Return everything that the numbers depend on, as plain JSON values: the store records and compares it."""
        if type(self).__module__ == __name__:
            return {"name": self.name}
        return {"name": self.name, "class": f"{type(self).__module__}.{type(self).__qualname__}"}


class TaskModule(nn.Module):
    """A task on a model as a module of the model's parameters, ``model.…``, for ``torch.func.functional_call``."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch) -> Any:
        """Return the task's outputs."""
        return self.task.outputs(self.model, batch)


def check_per_sample(name: str, value: Tensor, size: int, samples: str) -> None:
    """Raise `BatchError` unless a task returned one number for each sample of a batch."""
    if value.shape != (size,):
        raise BatchError(
            f"The task gave {name} of shape {tuple(value.shape)} for a batch of {size} {samples}; expected ({size},). "
            f"A task returns one number a sample (losses of torch take reduction='none')."
        )


def loss_outputs(loss: Float[Tensor, " B"], baseline: Float[Tensor, " B"] | None = None) -> SampleOutputs:
    """Return the outputs of a task that has only a loss: ``f = L, Q = 1, w = 0``.

    Args:
        loss: The loss of each example, ``[B]``, differentiable.
        baseline: The loss of a model that has learned nothing, ``[B]``; None if that is not known.

    Returns:
        The outputs, with f the loss itself.
    """
    detached = loss.detach()
    return SampleOutputs(loss, detached, torch.ones_like(detached), torch.zeros_like(detached), baseline=baseline)


class Classification(Task):
    """Cross-entropy over classes; f is the margin ``logit_y - logsumexp(other logits)`` (Park et al. 2023, eq. 9).

    Then ``L = softplus(-f)``, ``Q = -(1 - p_y)`` and ``w = p_y (1 - p_y)``. Batches are ``(*inputs, labels)`` or
    mappings with a key of `LABEL_KEYS`; the model returns the logits ``[B, C]`` or an object with ``logits``.
    """

    def __init__(self, name: str = "image_classification") -> None:
        self.name = name

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return margins and cross-entropies; see `Task.outputs`."""
        args, kwargs, labels = split_labels(model, batch, self.name)
        logits = upcast_half(logits_of(model(*args, **kwargs)))
        check_classes(logits, labels, self.name)
        is_label = labels.unsqueeze(1) == torch.arange(logits.shape[1], device=logits.device)
        chosen = torch.where(is_label, logits, 0.0).sum(1)
        others = logits.masked_fill(is_label, -torch.inf).logsumexp(1)
        # The gradient of L vanishes for fitted examples, that of the margin does not: float16 features keep precision.
        margin = chosen - others
        detached = margin.detach()
        wrong = torch.sigmoid(-detached)  # 1 - p_y without the cancellation that 1 - softmax has for p_y near 1
        baseline = torch.full_like(detached, -math.log(max(logits.shape[1] - 1, 1)))
        loss_hess = wrong * torch.sigmoid(detached)
        return SampleOutputs(margin, F.softplus(-detached), -wrong, loss_hess, labels, baseline)


class BinaryClassification(Task):
    """Logistic loss on one logit for each example, with float labels in [0, 1] (also soft labels).

    f is the logit, ``L = BCEWithLogits(f, y)``, ``Q = sigmoid(f) - y`` and ``w = sigmoid(f)(1 - sigmoid(f))``.
    """

    name = "binary_classification"

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return logits and logistic losses; see `Task.outputs`."""
        args, kwargs, labels = split_labels(model, batch, self.name)
        logit = upcast_half(logits_of(model(*args, **kwargs)))
        logit, labels = flatten_scalars(logit, labels, self.name)
        check_probabilities(labels)
        detached = logit.detach()
        labels = labels.to(detached.dtype)
        loss = F.binary_cross_entropy_with_logits(detached, labels, reduction="none")
        probability = torch.sigmoid(detached)
        loss_hess = probability * torch.sigmoid(-detached)
        loss_grad, baseline = probability - labels, torch.zeros_like(detached)
        return SampleOutputs(logit, loss, loss_grad, loss_hess, labels.round().long(), baseline)


class Regression(Task):
    """Squared error as in `torch.nn.MSELoss`: the mean over an example's outputs, without a factor of one half.

    With one output for each example, f is the prediction, ``L = (f - y)²``, ``Q = 2 (f - y)`` and ``w = 2``; with
    several, ``f = L``.
    """

    name = "regression"

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return predictions and squared errors; see `Task.outputs`."""
        args, kwargs, targets = split_labels(model, batch, self.name)
        predicted = upcast_half(logits_of(model(*args, **kwargs)))
        if predicted.numel() != predicted.shape[0]:
            if predicted.shape != targets.shape:
                raise BatchError(shapes_message(self.name, predicted, targets))
            targets = targets.to(predicted.dtype)
            loss = (predicted - targets).square().flatten(1).mean(1)
            return loss_outputs(loss, targets.square().flatten(1).mean(1))
        predicted, targets = flatten_scalars(predicted, targets, self.name)
        residual = predicted.detach() - targets.to(predicted.dtype)
        loss_hess, baseline = torch.full_like(residual, 2.0), torch.zeros_like(residual)
        return SampleOutputs(predicted, residual.square(), 2 * residual, loss_hess, baseline=baseline)


class LanguageModeling(Task):
    """Next-token cross-entropy of a causal language model, the mean over the predicted tokens of each sequence.

    ``f = L``. A mapping has ``input_ids`` and, as from Hugging Face collators, ``labels`` of the same shape, which are
    shifted here (-100: not predicted; without labels all attended tokens are predicted). A tensor or ``(tokens,)`` is
    its own label in the same way. A pair ``(tokens, next_tokens)`` is used position by position, without a shift.

    Args:
        reduction: ``"mean"`` or ``"sum"`` over the predicted tokens of a sequence.
    """

    name = "language_modeling"

    def __init__(self, reduction: str = "mean") -> None:
        check_choice("reduction", reduction, ("mean", "sum"))
        self.reduction = reduction

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return sequence losses; see `Task.outputs`."""
        args, kwargs, labels, shifted = self._split(model, batch)
        logits = upcast_half(logits_of(model(*args, **kwargs)))
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
        count = predicted.sum(1)
        uniform = torch.full_like(count, math.log(logits.shape[-1]))
        if self.reduction == "mean":
            return loss_outputs(loss / count, uniform)
        return loss_outputs(loss, uniform * count)

    def settings(self) -> dict[str, Any]:
        """Return the name and the reduction."""
        return {"name": self.name, "reduction": self.reduction}

    def _split(self, model: nn.Module, batch: Batch) -> tuple[tuple, dict, Tensor, bool]:
        batch = as_mapping(batch)
        if isinstance(batch, Mapping):
            kwargs = {key: value for key, value in batch.items() if key not in LABEL_KEYS}
            labels = batch.get(label_key(batch))
            if labels is None:
                labels = batch.get("input_ids")
                mask = batch.get("attention_mask")
                if labels is None:
                    raise BatchError(f"language_modeling needs 'input_ids' or 'labels'; the batch has {sorted(batch)}.")
                labels = labels if mask is None else attended_labels(labels, mask)
            args, kwargs = bind_inputs(model, kwargs)
            return args, kwargs, labels, True
        items = batch if isinstance(batch, (tuple, list)) else (batch,)
        if len(items) not in (1, 2) or not all(isinstance(item, Tensor) for item in items):
            raise BatchError(
                "language_modeling expects tokens, (tokens,), (tokens, next_tokens) or a mapping with 'input_ids'; "
                f"got {type(batch).__name__} of {len(items)}."
            )
        return (items[0],), {}, items[-1], len(items) == 1

    def _check(self, logits: Tensor, labels: Tensor) -> None:
        if is_transformed(labels):
            return
        empty = (labels == -100).all(1).nonzero().flatten()
        if len(empty):
            raise BatchError(
                f"Examples {empty[:5].tolist()} of the batch have no token to predict (one token, or all labels -100), "
                f"so their loss is undefined; leave them out."
            )
        check_label_range(labels[labels != -100], logits.shape[-1], self.name)


class LossTask(Task):
    """A task defined by a function ``(model, batch) -> loss of each example [B]``; ``f = L``."""

    name = "callable"

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.function = function

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return the losses of the function; see `Task.outputs`."""
        loss = self.function(model, batch)
        if isinstance(loss, SampleOutputs):
            return loss
        if not isinstance(loss, Tensor) or loss.ndim != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise BatchError(
                f"The task {self._label()} must return the loss of each example as a tensor [B]; got {got}. Losses of "
                f"torch take reduction='none'."
            )
        return loss_outputs(loss)

    def settings(self) -> dict[str, Any]:
        """Return the function's qualified name, and the arguments that `functools.partial` bound to it."""
        settings: dict[str, Any] = {"name": self.name, "function": self._label()}
        if isinstance(self.function, functools.partial):
            settings["args"] = [repr(value) for value in self.function.args]
            settings["keywords"] = {key: repr(value) for key, value in sorted(self.function.keywords.items())}
        return settings

    def _label(self) -> str:
        function = self.function.func if isinstance(self.function, functools.partial) else self.function
        owner = function if hasattr(function, "__qualname__") else type(function)
        return f"{owner.__module__}.{owner.__qualname__}"


_TASKS: dict[str, Callable[[], Task]] = {
    "image_classification": lambda: Classification("image_classification"),
    "text_classification": lambda: Classification("text_classification"),
    "binary_classification": BinaryClassification,
    "regression": Regression,
    "language_modeling": LanguageModeling,
}

TASK_NAMES = tuple(_TASKS)
"""The names that ``task=`` accepts."""


class LowerPrecision(Task):
    """A task whose forwards run under ``torch.autocast``; sums over positions and projections stay float32."""

    def __init__(self, task: Task, dtype: torch.dtype, device: torch.device) -> None:
        self.task, self.dtype, self.device = task, dtype, device
        self.name = task.name

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return the outputs of the wrapped task; see `Task.outputs`."""
        # autocast caches casts by parameter object, and the same objects hold other values at the next checkpoint.
        with torch.autocast(self.device.type, self.dtype, cache_enabled=False):
            return self.task.outputs(model, batch)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the wrapped task and the dtype."""
        return self.task.settings() | {"autocast": str(self.dtype).removeprefix("torch.")}


def make_task(task: str | Task | Callable[[nn.Module, Batch], Tensor]) -> Task:
    """Return the task of a name in `TASK_NAMES` or of a function; a `Task` is returned unchanged.

    Raises:
        InputError: The name is unknown.
        InputTypeError: The task is not a name, a function or a `Task`.

    >>> make_task("regression").name
    'regression'
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, str):
        check_choice("task", task, _TASKS)
        return _TASKS[task]()
    if isinstance(task, type) or not callable(task):
        raise InputTypeError(
            f"task is {task!r}; expected a name ({', '.join(_TASKS)}), a function (model, batch) -> loss [B], or an "
            f"instance of tracer.Task."
        )
    return LossTask(task)
