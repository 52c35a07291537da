"""Retraining by the user's own training loop, one model after another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from tqdm import tqdm

from tracer.data.tasks import Task
from tracer.errors import InputError, InputTypeError, NonFiniteError
from tracer.retraining.model_factory import seeded
from tracer.retraining.models import Models, SingleModel
from tracer.retraining.recipe import Recipe
from tracer.retraining.subsets import Run, RunKey
from tracer.retraining.training import EpochCheckpoint, Trainer
from tracer.types import Batch

TrainFunction = Callable[[nn.Module, Int64[Tensor, " n"]], nn.Module | None]
"""Trains a model on the training examples of these indices, in place, or returns another one."""


class OwnLoopTrainer(Trainer):
    """A `Trainer` that calls the user's function in place of a recipe's steps.

    Args:
        make_model: Builds an untrained model.
        task: The task, for evaluation only.
        train: All training examples.
        function: The user's training loop.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        task: str | Task | Callable[[nn.Module, Batch], Tensor],
        train: Batch,
        function: TrainFunction,
    ) -> None:
        if not callable(function):
            raise InputTypeError(
                f"train_fn is a {type(function).__name__}; expected a function (model, rows) that trains the model on "
                f"the training examples with these indices."
            )
        super().__init__(make_model, task, train, Recipe(epochs=1))
        self._function = function

    def settings(self) -> dict[str, Any]:
        """Return what identifies the training: the function's name."""
        function = self._function.func if isinstance(self._function, functools.partial) else self._function
        owner = function if hasattr(function, "__qualname__") else type(function)
        return {"train_fn": f"{owner.__module__}.{owner.__qualname__}"}

    def groups(
        self, runs: Sequence[Run], stacked: bool | None, most: int | None, done: Collection[RunKey] = ()
    ) -> list[list[Run]]:
        """Return each run that is not done as a group of its own."""
        if stacked:
            raise InputError("stacked=True is for a recipe; a train_fn trains one model at a time.")
        return [[run] for run in runs if run.key not in done]

    def train(
        self, group: Sequence[Run], bar: tqdm, checkpoint_epochs: Sequence[int] = ()
    ) -> tuple[Models, list[list[EpochCheckpoint]]]:
        """Train the model of a run with random numbers that follow from its seed and subset."""
        (run,) = group
        model = self._build(run)
        with seeded(run.torch_seed("noise")):
            returned = self._function(model, torch.from_numpy(run.mask.nonzero()[0]))
        found = model if returned is None else returned
        if not isinstance(found, nn.Module):
            raise InputTypeError(f"train_fn returned a {type(found).__name__}; expected None or the trained model.")
        if not all(bool(value.isfinite().all()) for value in found.parameters()):
            raise NonFiniteError(
                f"train_fn gave (subset {run.subset}, seed {run.seed}) parameters that are not finite."
            )
        bar.update()
        return SingleModel([found], self.task), [[]]
