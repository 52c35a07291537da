"""Tasks by name: classification and regression here, those of tokens in `tracer.data.token_tasks`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracer._core.validation import check_choice
from tracer.data.criteria import CriterionTask, is_criterion
from tracer.data.model_inputs import (
    check_classes,
    check_logits,
    check_probabilities,
    flatten_scalars,
    logits_of,
    shapes_message,
    split_labels,
    upcast_half,
)
from tracer.data.model_outputs import ModelOutputTask, is_model_output
from tracer.data.sampled_labels import LabelDraws, is_label
from tracer.data.tasks import LossTask, Task, loss_outputs
from tracer.data.token_tasks import LanguageModeling, QuestionAnswering, TokenTask
from tracer.errors import BatchError, InputTypeError
from tracer.types import Batch, SampleOutputs


class Classification(Task):
    """Cross-entropy over classes; f is the margin ``logit_y - logsumexp(other logits)`` (Park et al. 2023, eq. 9).

    Then ``L = softplus(-f)``, ``Q = -(1 - p_y)`` and ``w = p_y (1 - p_y)``. Batches are ``(*inputs, labels)`` or
    mappings with a key of `LABEL_KEYS`; the model returns the logits ``[B, C]`` or an object with ``logits``.

    Args:
        name: The task's name.
        from_probabilities: The model returns probabilities instead of logits, as for `torch.nn.NLLLoss` of their
            logarithm.
    """

    hidden_labels = "others"

    def __init__(self, name: str = "image_classification", from_probabilities: bool = False) -> None:
        self.name, self.from_probabilities = name, from_probabilities

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return margins and cross-entropies; see `Task.outputs`."""
        logits, labels = self._logits(model, batch)
        given = is_label(logits, labels)
        chosen = torch.where(given, logits, 0.0).sum(1)
        others = logits.masked_fill(given, -torch.inf).logsumexp(1)
        # The gradient of L vanishes for fitted examples, that of the margin does not: float16 features keep precision.
        margin = chosen - others
        detached = margin.detach()
        wrong = torch.sigmoid(-detached)  # 1 - p_y without the cancellation that 1 - softmax has for p_y near 1
        baseline = torch.full_like(detached, -math.log(max(logits.shape[1] - 1, 1)))
        loss_hess = wrong * torch.sigmoid(detached)
        rival = logits.detach().masked_fill(given, -torch.inf).max(1)
        share = (rival.values - others.detach()).exp()
        return SampleOutputs(margin, F.softplus(-detached), -wrong, loss_hess, labels, baseline, rival.indices, share)

    def sampled_outputs(self, model: nn.Module, batch: Batch, draws: LabelDraws) -> SampleOutputs:
        """Return cross-entropies of drawn classes; see `Task.sampled_outputs`."""
        logits, labels = self._logits(model, batch)
        drawn = draws.classes(logits, torch.zeros_like(labels))
        return loss_outputs(F.cross_entropy(logits, drawn, reduction="none"))

    def hidden_outputs(self, model: nn.Module, batch: Batch, draws: LabelDraws) -> SampleOutputs:
        """Return cross-entropies of drawn classes other than the labels; see `Task.hidden_outputs`."""
        logits, labels = self._logits(model, batch)
        drawn, probability = draws.others(logits, labels)
        return loss_outputs(F.cross_entropy(logits, drawn, reduction="none") * probability.sqrt())

    def num_hidden(self, model: nn.Module, batch: Batch) -> int:
        """Return the number of other classes, 0 for two classes, whose margin shows everything."""
        classes = self._logits(model, batch)[0].shape[1]
        return classes - 1 if classes > 2 else 0

    def _logits(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits ``[B, C]`` and the labels."""
        args, kwargs, labels = split_labels(model, batch, self.name)
        logits = upcast_half(logits_of(model(*args, **kwargs)))
        check_classes(logits, labels, self.name)
        if self.from_probabilities:
            check_probabilities(logits, "outputs", self.name)
            return logits.clamp_min(torch.finfo(logits.dtype).tiny).log(), labels
        check_logits(logits, self.name)
        return logits, labels

    def settings(self) -> dict[str, Any]:
        """Return the name, and whether the model returns probabilities."""
        return {"name": self.name} | ({"from_probabilities": True} if self.from_probabilities else {})


class BinaryClassification(Task):
    """Logistic loss on one logit for each example, with float labels in [0, 1] (also soft labels).

    f is the logit, ``L = BCEWithLogits(f, y)``, ``Q = sigmoid(f) - y`` and ``w = sigmoid(f)(1 - sigmoid(f))``.

    Args:
        from_probabilities: The model returns a probability instead of a logit, as for `torch.nn.BCELoss`.
    """

    name = "binary_classification"

    def __init__(self, from_probabilities: bool = False) -> None:
        self.from_probabilities = from_probabilities

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return logits and logistic losses; see `Task.outputs`."""
        logit, labels = self._logit(model, batch)
        detached = logit.detach()
        labels = labels.to(detached.dtype)
        loss = F.binary_cross_entropy_with_logits(detached, labels, reduction="none")
        probability = torch.sigmoid(detached)
        loss_hess = probability * torch.sigmoid(-detached)
        loss_grad, baseline = probability - labels, torch.zeros_like(detached)
        classes = labels.round().long()
        share = torch.ones_like(detached)
        return SampleOutputs(logit, loss, loss_grad, loss_hess, classes, baseline, 1 - classes, share)

    def sampled_outputs(self, model: nn.Module, batch: Batch, draws: LabelDraws) -> SampleOutputs:
        """Return logistic losses of drawn labels; see `Task.sampled_outputs`."""
        logit, labels = self._logit(model, batch)
        positive = draws.uniform(torch.zeros_like(labels, dtype=torch.int64)) < torch.sigmoid(logit.detach())
        return loss_outputs(F.binary_cross_entropy_with_logits(logit, positive.to(logit.dtype), reduction="none"))

    def _logit(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits ``[B]`` and the labels."""
        args, kwargs, labels = split_labels(model, batch, self.name)
        logit = upcast_half(logits_of(model(*args, **kwargs)))
        logit, labels = flatten_scalars(logit, labels, self.name)
        check_probabilities(labels, "labels", self.name)
        if self.from_probabilities:
            check_probabilities(logit, "outputs", self.name)
            return torch.logit(logit, eps=torch.finfo(logit.dtype).eps), labels
        check_logits(logit, self.name)
        return logit, labels

    settings = Classification.settings


class Regression(Task):
    """Squared error as in `torch.nn.MSELoss`: the mean over an example's outputs, without a factor of one half.

    With one output for each example, f is the prediction, ``L = (f - y)²``, ``Q = 2 (f - y)`` and ``w = 2``; with
    several, ``f = L``.
    """

    name, hidden_labels = "regression", "all"

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return predictions and squared errors; see `Task.outputs`."""
        args, kwargs, targets = split_labels(model, batch, self.name)
        predicted = upcast_half(logits_of(model(*args, **kwargs)))
        if predicted.ndim == 0 or predicted.numel() != predicted.shape[0]:
            if predicted.shape != targets.shape:
                raise BatchError(shapes_message(self.name, predicted, targets))
            targets = targets.to(predicted.dtype)
            loss = (predicted - targets).square().flatten(1).mean(1)
            return loss_outputs(loss, targets.square().flatten(1).mean(1))
        predicted, targets = flatten_scalars(predicted, targets, self.name)
        residual = predicted.detach() - targets.to(predicted.dtype)
        loss_hess, baseline = torch.full_like(residual, 2.0), torch.zeros_like(residual)
        return SampleOutputs(predicted, residual.square(), 2 * residual, loss_hess, baseline=baseline)

    def sampled_outputs(self, model: nn.Module, batch: Batch, draws: LabelDraws) -> SampleOutputs:
        """Return squared errors of normally distributed targets; see `Task.sampled_outputs`."""
        predicted = self._predicted(model, batch)
        count = predicted.shape[1]
        noise = draws.normal(torch.arange(count, device=predicted.device).expand(predicted.shape))
        # With a variance of count / 2 the second moment of gradients is that of the mean's Gauss-Newton matrix.
        drawn = predicted.detach() + noise.to(predicted.dtype) * math.sqrt(count / 2)
        return loss_outputs((predicted - drawn).square().mean(1))

    def num_hidden(self, model: nn.Module, batch: Batch) -> int:
        """Return the number of outputs, 0 for one, which is f."""
        count = self._predicted(model, batch).shape[1]
        return count if count > 1 else 0

    def _predicted(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the predictions, ``[B, m]``."""
        args, kwargs, _ = split_labels(model, batch, self.name)
        predicted = upcast_half(logits_of(model(*args, **kwargs)))
        return predicted.reshape(predicted.shape[0], -1)


_TASKS: dict[str, Callable[[], Task]] = {
    "classification": lambda: Classification("classification"),
    "image_classification": lambda: Classification("image_classification"),
    "text_classification": lambda: Classification("text_classification"),
    "binary_classification": BinaryClassification,
    "regression": Regression,
    "language_modeling": LanguageModeling,
    "masked_language_modeling": lambda: TokenTask("masked_language_modeling"),
    "seq2seq": lambda: TokenTask("seq2seq"),
    "token_classification": lambda: TokenTask("token_classification"),
    "question_answering": QuestionAnswering,
}

TASK_NAMES = tuple(_TASKS)
"""The names that ``task=`` accepts."""


def make_task(task: str | Task | Callable[[Any, Any], Tensor], argument: str = "task") -> Task:
    """Return the task of a name in `TASK_NAMES`, of a function, a loss or of TRAK's kind; a `Task` stays unchanged.

    Args:
        task: The task.
        argument: The argument's name, for messages.

    Raises:
        InputError: The name is unknown.
        InputTypeError: The task is not a name, a function of two arguments, or a `Task`.

    >>> make_task("regression").name
    'regression'
    """
    if isinstance(task, Task):
        return task
    if isinstance(task, str):
        check_choice(argument, task, _TASKS)
        return _TASKS[task]()
    if is_model_output(task):
        return ModelOutputTask(task)
    if isinstance(task, type) or not callable(task):
        raise InputTypeError(
            f"{argument} is {task!r}; expected a name ({', '.join(_TASKS)}), a function (model, batch) -> loss [B], a "
            f"loss of (outputs, labels), or an instance of tracer.Task."
        )
    return CriterionTask(task) if is_criterion(task) else LossTask(task)
