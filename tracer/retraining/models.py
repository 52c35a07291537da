"""Models in training behind one interface: a single ordinary one, or K at once with stacked parameters.

Tensor layout: K models first, then the B examples of each one's batch. A single model is K = 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from tracer.data.batches import count_samples, is_per_sample, leaves, map_leaves, select_samples, to_device
from tracer.data.tasks import Task, TaskModule
from tracer.errors import BatchError, InputError
from tracer.types import Batch


@dataclass(frozen=True)
class Examples:
    """All training examples, or all targets, as one batch in memory."""

    batch: Batch
    num_rows: int

    @classmethod
    def of(cls, batch: Batch, name: str, device: torch.device) -> Examples:
        """Return a batch on a device, whose tensors all have the same number of examples, at least one."""
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

    def take(self, rows: Int64[Tensor, " B"]) -> Batch:
        """Return the batch of some examples."""
        return select_samples(self.batch, rows, self.num_rows)

    def slices(self, size: int) -> Iterator[Batch]:
        """Yield all examples in batches of up to ``size``."""
        for rows in torch.arange(self.num_rows).split(size):
            yield self.take(rows)


class _Objective(TaskModule):
    """The objective, f and L of a task, as a module of the model's parameters."""

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        found = super().forward(batch)
        # L is a function of f alone, so the gradient of the mean of Q f, with Q detached, is that of the mean of L.
        return (found.loss_grad.detach() * found.output).mean(), found.output, found.loss.detach()


class Models(ABC):
    """K models of a task in training, which differ in their values; ``trained`` are the leaf tensors to optimize.

    ``model`` is the module whose forward is run.
    """

    trained: dict[str, Tensor]

    def __init__(self, model: nn.Module, task: Task) -> None:
        self._model, self._objective = model, _Objective(model, task)

    def train(self, mode: bool) -> None:
        """Set training mode, or eval mode."""
        self._model.train(mode)

    @abstractmethod
    def fixed(self) -> dict[str, Tensor]:
        """Return the other parameters, and the buffers, which a forward may change, by name."""

    @abstractmethod
    def objectives(self, data: Examples, rows: Int64[Tensor, "K B"]) -> tuple[Tensor, Tensor]:
        """Return ``[K]``, with the gradients of the models' mean losses over their own examples, and these losses."""

    @abstractmethod
    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return f and L of each model for a batch of B examples, ``[K, B]`` each, without gradients."""

    @abstractmethod
    def module(self, model: int) -> nn.Module:
        """Return one model, until another is asked for or training goes on."""

    @abstractmethod
    def state(self, model: int) -> dict[str, Tensor]:
        """Return a copy of one model's state dict, on the CPU."""

    def optimizer_state(self, optimizer: torch.optim.Optimizer, model: int) -> dict[str, Any]:
        """Return a copy of the optimizer's state dict as for one model alone, on the CPU."""
        state = optimizer.state_dict()
        entries = {
            number: {
                key: self._of(value, model) if isinstance(value, Tensor) else value for key, value in entry.items()
            }
            for number, entry in state["state"].items()
        }
        return {**state, "state": entries}

    @abstractmethod
    def _of(self, value: Tensor, model: int) -> Tensor:
        """Return a copy of one model's part of a tensor, on the CPU."""


class SingleModel(Models):
    """One model in ordinary training, trained in place."""

    def __init__(self, models: Sequence[nn.Module], task: Task) -> None:
        (model,) = models
        super().__init__(model, task)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def fixed(self) -> dict[str, Tensor]:
        return {name: value for name, value in _values(self._model).items() if name not in self.trained}

    def objectives(self, data: Examples, rows: Int64[Tensor, "K B"]) -> tuple[Tensor, Tensor]:
        objective, _, loss = self._objective(data.take(rows[0]))
        return objective.unsqueeze(0), loss.mean().unsqueeze(0)

    @torch.no_grad()
    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        _, output, loss = self._objective(batch)
        return output.unsqueeze(0), loss.unsqueeze(0)

    def module(self, model: int) -> nn.Module:
        return self._model

    def state(self, model: int) -> dict[str, Tensor]:
        named = self._model.state_dict().items()
        return {key: self._of(value, model) for key, value in named if isinstance(value, Tensor)}

    def _of(self, value: Tensor, model: int) -> Tensor:
        return value.detach().to("cpu", copy=True)


class StackedModels(Models):
    """K models of one architecture with copies of their values stacked, run by ``torch.func.vmap``."""

    def __init__(self, models: Sequence[nn.Module], task: Task) -> None:
        super().__init__(models[0], task)
        named = [_values(model) for model in models]
        descriptions = [{name: (tuple(v.shape), v.dtype) for name, v in values.items()} for values in named]
        if any(found != descriptions[0] for found in descriptions):
            raise InputError(
                "make_model built models whose parameters or buffers differ in name, shape or dtype; expected the same "
                "architecture at each call."
            )
        stacked = {name: torch.stack([values[name].detach() for values in named]) for name in named[0]}
        self.trained = {
            name: stacked[name].requires_grad_() for name, p in models[0].named_parameters() if p.requires_grad
        }
        self._fixed = {name: value for name, value in stacked.items() if name not in self.trained}
        names = {id(value): name for name, value in named[0].items()}
        # Read now: functional_call does not restore a module that has two names in the template.
        keys = models[0].state_dict(keep_vars=True).items()
        self._keys = {key: names[id(value)] for key, value in keys if id(value) in names}

    def fixed(self) -> dict[str, Tensor]:
        return self._fixed

    def objectives(self, data: Examples, rows: Int64[Tensor, "K B"]) -> tuple[Tensor, Tensor]:
        n = data.num_rows
        own = [leaf[rows.to(leaf.device)] for _, leaf in leaves(data.batch) if is_per_sample(leaf, n)]  # [K, B, ...]

        def run(trained: Mapping[str, Tensor], fixed: Mapping[str, Tensor], *columns: Tensor) -> tuple[Tensor, Tensor]:
            remaining = iter(columns)
            batch = map_leaves(data.batch, lambda leaf: next(remaining) if is_per_sample(leaf, n) else leaf)
            objective, _, loss = self._call(trained, fixed, batch)
            return objective, loss.mean()

        # The models are independent, so one backward of the sum of their objectives gives the gradients of all. Buffers
        # that a forward changes in place, for example running statistics, change in the stack.
        return _vmapped(run)(self.trained, self._fixed, *own)

    @torch.no_grad()
    def outputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        def run(trained: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            _, output, loss = self._call(trained, fixed, batch)
            return output, loss

        return _vmapped(run)(self.trained, self._fixed)

    def module(self, model: int) -> nn.Module:
        self._model.load_state_dict(self.state(model), strict=False)  # the stacked values are no part of it
        return self._model

    def state(self, model: int) -> dict[str, Tensor]:
        values = {**self.trained, **self._fixed}
        return {key: self._of(values[name], model) for key, name in self._keys.items()}

    def _of(self, value: Tensor, model: int) -> Tensor:
        own = value[model] if value.ndim else value  # what has no dimension is a count of steps, which all models share
        return own.detach().to("cpu", copy=True)

    def _call(self, trained: Mapping[str, Tensor], fixed: Mapping[str, Tensor], batch: Batch) -> Any:
        values = {f"model.{name}": value for name, value in {**trained, **fixed}.items()}
        return torch.func.functional_call(self._objective, values, (batch,))


def _vmapped(function: Callable) -> Callable:
    # Models draw their own dropout masks.
    return torch.func.vmap(function, randomness="different")


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
