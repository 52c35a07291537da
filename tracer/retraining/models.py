"""Models in training behind one interface: a single ordinary one, or K at once with stacked parameters.

Tensor layout: K models first, then the B examples of each one's batch. A single model is K = 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tracer.data.batches import count_samples, is_per_sample, leaves, map_leaves, select_samples, to_device
from tracer.data.tasks import Task
from tracer.errors import BatchError, InputError
from tracer.types import Batch


@dataclass(frozen=True)
class Examples:
    """All training examples, or all targets, as one batch in memory.

    Attributes:
        batch: The batch.
        num_rows: The number of examples.
    """

    batch: Batch
    num_rows: int

    @classmethod
    def of(cls, batch: Batch, name: str, device: torch.device) -> Examples:
        """Return a checked batch on a device.

        Raises:
            BatchError: If its tensors have different numbers of examples, or none.
        """
        num_rows = count_samples(batch)
        for path, leaf in leaves(batch, name):
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] not in (1, num_rows):
                raise BatchError(
                    f"{path} has {leaf.shape[0]} examples (shape {tuple(leaf.shape)}), the first tensor has "
                    f"{num_rows}; expected one batch of all examples, such as (inputs, labels), with one entry per "
                    f"example in each tensor."
                )
        if not num_rows:
            raise BatchError(f"{name} holds no examples; expected at least one.")
        return cls(to_device(batch, device), num_rows)

    def take(self, rows: Tensor) -> Batch:
        """Return the batch of some examples, ``[B]``, int64."""
        return select_samples(self.batch, rows, self.num_rows)

    def slices(self, size: int) -> Iterator[Batch]:
        """Yield all examples in batches of up to ``size``."""
        for rows in torch.arange(self.num_rows).split(size):
            yield self.take(rows)


class Models(Protocol):
    """K models in training.

    Attributes:
        trained: The parameters that require a gradient by name, leaf tensors that an optimizer moves.
        fixed: The other parameters, and buffers, which a forward may change.
    """

    trained: dict[str, Tensor]

    @property
    def fixed(self) -> dict[str, Tensor]:
        """The other parameters and the buffers by name."""

    def train(self, mode: bool) -> None:
        """Set training mode, or eval mode."""

    def objectives(self, data: Examples, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Run each model on its own examples ``rows [K, B]``, int64.

        Returns:
            ``[K]``, differentiable, with the gradient of each model's mean loss; and ``[K]``, the mean losses.
        """

    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return f and L of each model for a batch of B examples, ``[K, B]`` each, without gradients."""

    def state(self, model: int) -> dict[str, Tensor]:
        """Return a copy of one model's state dict, on the CPU."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer, model: int) -> dict[str, Any]:
        """Return a copy of the optimizer's state dict as for one model alone, on the CPU."""


class _Objective(nn.Module):
    """A task's numbers as a module of the model's parameters, for ``torch.func.functional_call``."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        found = self.task.outputs(self.model, batch)
        # L is a function of f alone, so the gradient of the mean of Q f, with Q detached, is that of the mean of L.
        return (found.loss_grad.detach() * found.output).mean(), found.output, found.loss.detach()


class SingleModel:
    """One model in ordinary training, trained in place; see `Models`."""

    def __init__(self, models: Sequence[nn.Module], task: Task) -> None:
        (self._model,) = models
        self._objective = _Objective(self._model, task)
        self.trained: dict[str, Tensor] = {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    @property
    def fixed(self) -> dict[str, Tensor]:
        """The other parameters and the buffers by name, with their current values."""
        named = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        return {name: value for name, value in named.items() if name not in self.trained}

    def train(self, mode: bool) -> None:
        """Set training mode, or eval mode."""
        self._model.train(mode)

    def objectives(self, data: Examples, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Run the model on its examples; see `Models.objectives`."""
        objective, _, loss = self._objective(data.take(rows[0]))
        return objective.unsqueeze(0), loss.mean().unsqueeze(0)

    @torch.no_grad()
    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run the model on a batch; see `Models.outputs`."""
        _, output, loss = self._objective(batch)
        return output.unsqueeze(0), loss.unsqueeze(0)

    def state(self, model: int) -> dict[str, Tensor]:
        """Return the model's state dict; see `Models.state`."""
        return {key: _copied(value) for key, value in self._model.state_dict().items() if isinstance(value, Tensor)}

    def optimizer_state(self, optimizer: torch.optim.Optimizer, model: int) -> dict[str, Any]:
        """Return the optimizer's state dict; see `Models.optimizer_state`."""
        return _map_state(optimizer.state_dict(), _copied)


class StackedModels:
    """K models of one architecture with stacked parameters and buffers, run by ``torch.func.vmap``; see `Models`.

    Args:
        models: The K models. Their values are copied; the first is used to run the values of all.
        task: The task.

    Raises:
        InputError: If their parameters or buffers differ in name, shape or dtype.
    """

    def __init__(self, models: Sequence[nn.Module], task: Task) -> None:
        self._objective, self._template = _Objective(models[0], task), models[0]
        flags = {name: p.requires_grad for name, p in models[0].named_parameters()}
        named = [{**dict(model.named_parameters()), **dict(model.named_buffers())} for model in models]
        descriptions = [{name: (tuple(v.shape), v.dtype) for name, v in values.items()} for values in named]
        if any(found != descriptions[0] for found in descriptions):
            raise InputError(
                "make_model built models whose parameters or buffers differ in name, shape or dtype; expected the same "
                "architecture at each call."
            )
        stacked = {name: torch.stack([values[name].detach() for values in named]) for name in named[0]}
        self.trained = {name: stacked[name].requires_grad_() for name, flag in flags.items() if flag}
        self.fixed = {name: value for name, value in stacked.items() if name not in self.trained}
        names = {id(value): name for name, value in named[0].items()}
        # Read now: functional_call does not restore a module that has two names in the template.
        keys = models[0].state_dict(keep_vars=True).items()
        self._keys = {key: names[id(value)] for key, value in keys if id(value) in names}

    def train(self, mode: bool) -> None:
        """Set training mode, or eval mode."""
        self._template.train(mode)

    def objectives(self, data: Examples, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Run each model on its own examples; see `Models.objectives`."""
        n = data.num_rows
        own = [leaf[rows.to(leaf.device)] for _, leaf in leaves(data.batch) if is_per_sample(leaf, n)]  # [K, B, ...]

        def run(trained: Mapping[str, Tensor], fixed: Mapping[str, Tensor], *columns: Tensor) -> tuple[Tensor, Tensor]:
            remaining = iter(columns)
            batch = map_leaves(data.batch, lambda leaf: next(remaining) if is_per_sample(leaf, n) else leaf)
            objective, _, loss = self._call(trained, fixed, batch)
            return objective, loss.mean()

        # The models are independent, so one backward of the sum of their objectives gives the gradients of all. Buffers
        # that a forward changes in place, for example running statistics, change in the stack.
        return _vmapped(run)(self.trained, self.fixed, *own)

    @torch.no_grad()
    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Run all models on one batch; see `Models.outputs`."""

        def run(trained: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            _, output, loss = self._call(trained, fixed, batch)
            return output, loss

        return _vmapped(run)(self.trained, self.fixed)

    def state(self, model: int) -> dict[str, Tensor]:
        """Return one model's state dict; see `Models.state`."""
        values = {**self.trained, **self.fixed}
        return {key: _copied(values[name][model]) for key, name in self._keys.items()}

    def optimizer_state(self, optimizer: torch.optim.Optimizer, model: int) -> dict[str, Any]:
        """Return the optimizer's state dict of one model; see `Models.optimizer_state`."""
        # What has no dimension is a count of steps, which all models share.
        return _map_state(optimizer.state_dict(), lambda value: _copied(value[model] if value.ndim else value))

    def _call(self, trained: Mapping[str, Tensor], fixed: Mapping[str, Tensor], batch: Batch) -> Any:
        values = {f"model.{name}": value for name, value in {**trained, **fixed}.items()}
        return torch.func.functional_call(self._objective, values, (batch,))


def _vmapped(function: Callable) -> Callable:
    # Models draw their own dropout masks.
    return torch.func.vmap(function, randomness="different")


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """Silence torch's hint that an operation has no batching rule and runs model by model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # the user can do nothing about it
        yield


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def _map_state(state: dict[str, Any], function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """Return an optimizer's state dict with each tensor of its parameters' states replaced."""
    entries = {
        number: {key: function(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for number, entry in state["state"].items()
    }
    return {**state, "state": entries}
