"""Tasks: the outputs and losses of a model on a batch; and tasks defined by a function."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tracer.data.batches import leaves
from tracer.data.model_inputs import is_transformed
from tracer.errors import BatchError, TracerError
from tracer.types import Batch, SampleOutputs

if TYPE_CHECKING:
    from tracer.data.sampled_labels import LabelDraws


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

    hidden_labels: str | None = None
    """Whose curvature f does not show, see `hidden_outputs`: that of all labels, or of the others than the given one.

    ``"all"``, ``"others"``, or None if f shows all of it, or nothing else is known.
    """

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Run the model on a batch of ``B`` examples.

        Args:
            model: The model in eval mode, with the weights of a checkpoint.
            batch: The batch, on the model's device.

        Returns:
            f, L, Q and w of each example, ``[B]`` each; f differentiable with respect to the model's parameters.
        """

    def sampled_outputs(self, model: nn.Module, batch: Batch, draws: LabelDraws) -> SampleOutputs:
        """Run the model, and return losses of labels that are drawn from its predictions, for the Fisher information.

        The expected second moment of their gradients is the Gauss-Newton matrix of the loss (Martens 2020). Unless a
        task defines this, it is that of L as a function of f alone, ``w ∇f ∇fᵀ``, or, for a task without w, that of
        the batch's own labels (the empirical Fisher information), which predicts less.

        Args:
            model: The model in eval mode, with the weights of a checkpoint.
            batch: The batch, on the model's device.
            draws: Draws classes and normal numbers for each example.

        Returns:
            Outputs with ``f = L``, differentiable.
        """
        outputs = self.outputs(model, batch)
        hess, grad = outputs.loss_hess, outputs.loss_grad
        return loss_outputs(outputs.output * torch.where(hess != 0, hess.abs().sqrt(), grad))

    def hidden_outputs(self, model: nn.Module, batch: Batch, draws: LabelDraws) -> SampleOutputs:
        """Run the model, and return losses of labels that are drawn for the curvature that f does not show.

        The Gauss-Newton matrix of the loss is ``w |Q| ∇f ∇fᵀ + |Q| E[∇L ∇Lᵀ]`` if `hidden_labels` is ``"others"``,
        with L the loss of a label drawn from those other than the given one; and ``E[∇L ∇Lᵀ]`` if it is ``"all"``.

        Args:
            model: The model in eval mode, with the weights of a checkpoint.
            batch: The batch, on the model's device.
            draws: Draws labels, or lists them.

        Returns:
            Outputs with ``f = L``, differentiable; those of listed labels times the root of their probability.
        """
        return self.sampled_outputs(model, batch, draws)

    def num_hidden(self, model: nn.Module, batch: Batch) -> int | None:
        """Return how many labels an example's `hidden_outputs` list; None if they cannot be listed, 0 for none."""
        return 0 if self.hidden_labels is None else None

    def settings(self) -> dict[str, Any]:
        """Return everything that the numbers depend on, as plain JSON values: the store records and compares it."""
        if type(self).__module__.startswith(f"{__package__}."):
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


class LossTask(Task):
    """A task defined by a function ``(model, batch) -> loss of each example [B]``; ``f = L``."""

    name = "callable"

    def __init__(self, function: Callable[[nn.Module, Batch], Tensor]) -> None:
        self.function = function

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return the losses of the function; see `Task.outputs`."""
        try:
            loss = self.function(model, batch)
        except (TypeError, AttributeError, KeyError, IndexError) as error:
            if isinstance(error, TracerError) or any(
                isinstance(leaf, Tensor) and is_transformed(leaf) for _, leaf in leaves(batch)
            ):
                raise
            raise BatchError(
                f"The task {self._label()} failed with {type(error).__name__}: {error}. It is called as (model, "
                f"batch), with the model in eval mode and a batch of type {type(batch).__name__}. For a model that "
                f"returns losses in training mode only, call model.train() inside the function: modes are restored. "
                f"Then there may be no dropout and no batch statistics."
            ) from error
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
        return function_label(self.function)


def function_label(function: Callable[..., Any]) -> str:
    """Return the qualified name of a function, or of the class of a callable object.

    >>> function_label(functools.partial(torch.nn.functional.cross_entropy, reduction="none"))
    'torch.nn.functional.cross_entropy'
    """
    function = function.func if isinstance(function, functools.partial) else function
    owner = function if hasattr(function, "__qualname__") else type(function)
    return f"{owner.__module__}.{owner.__qualname__}"


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
