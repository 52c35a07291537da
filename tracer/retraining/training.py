"""Training of the models of runs, in groups of several at once or one after another."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tracer._core.progress import tqdm
from tracer._core.text import listing
from tracer._core.validation import as_list, bar_disabled, check_count
from tracer.data.batches import count_samples
from tracer.data.named_tasks import make_task
from tracer.data.tasks import Task
from tracer.errors import InputError, InputTypeError, NonFiniteError
from tracer.retraining.model_factory import ModelFactory, seeded
from tracer.retraining.models import Examples, Models, SingleModel, StackedModels
from tracer.retraining.recipe import Recipe
from tracer.retraining.stacking import models_at_once as choose_at_once
from tracer.retraining.subsets import Run, RunKey, make_runs
from tracer.types import Batch


class EpochCheckpoint(NamedTuple):
    """The state of a model at the end of an epoch.

    Attributes:
        state: The model's state dict.
        learning_rate: The mean over the steps since the previous checkpoint, or since the start; the first step's rate
            for the untrained model. As ``estimator="tracin"`` takes it.
        optimizer_state: The optimizer's state dict with ``param_names``, as `torch.optim` has it for one model, with
            AdamW's ``exp_avg_sq`` and ``step``.
        learning_rate_sum: The sum over these steps, over 1 − momentum; 0 for the untrained model. As
            ``estimator="source"`` needs it.
    """

    state: dict[str, Tensor]
    learning_rate: float
    optimizer_state: dict[str, Any]
    learning_rate_sum: float


class TrainedModel(NamedTuple):
    """A model trained by `train_models`.

    Attributes:
        subset: The position of its subset in the masks; 0 without masks.
        seed: The seed.
        state: The final state dict, on the CPU.
        checkpoints: One for each of ``checkpoint_epochs``.
    """

    subset: int
    seed: int
    state: dict[str, Tensor]
    checkpoints: list[EpochCheckpoint]


def train_models(
    make_model: Callable[[], nn.Module],
    task: str | Task | Callable[[nn.Module, Batch], Tensor],
    train: Batch,
    recipe: Recipe,
    masks: Any = None,
    *,
    seeds: Iterable[int] = (0,),
    checkpoint_epochs: Iterable[int] | None = None,
    paired: bool = False,
    stacked: bool | None = None,
    models_at_once: int | None = None,
    progress: bool | None = None,
) -> list[TrainedModel]:
    """Train a model for each subset and seed, many at once if that saves time.

    Each model has its own initial weights, order of examples and dropout masks, which follow from its seed and the
    position of its subset. Weights and orders, and the results up to rounding, do not depend on the other models.

    Args:
        make_model: Builds an untrained model with torch's global generator, whose state is restored afterwards.
        task: As in `Tracer`; the loss of a step is the mean of the task's loss over the batch.
        train: All N training examples as one batch, for example ``(x, y)`` or ``(tokens,)``.
        recipe: The settings of each training run.
        masks: ``[S, N]``, bool: the training examples of each subset. Default: one model per seed on all examples.
        seeds: The seeds of each subset. Default: 0.
        checkpoint_epochs: The epochs after which to store a checkpoint: 1 is the first, 0 the untrained model.
        paired: As in `retrain`.
        stacked: As in `retrain`.
        models_at_once: As in `retrain`.
        progress: Show a progress bar. Default: on a terminal only.

    Returns:
        The models, those of a subset next to each other in the order of the seeds.

    Raises:
        InputError: If an argument has an invalid value, or models cannot be stacked and ``stacked=True``.
        InputTypeError: If an argument has an invalid type.
        NonFiniteError: If a model diverged.

    >>> x, y = torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8)
    >>> recipe = Recipe(learning_rate=1.0, batch_size=8, epochs=10)
    >>> found = train_models(lambda: nn.Linear(4, 4), "image_classification", (x, y), recipe, seeds=[0, 1])
    >>> [(model.subset, model.seed, sorted(model.state)) for model in found]
    [(0, 0, ['bias', 'weight']), (0, 1, ['bias', 'weight'])]
    """
    epochs = _check_epochs(checkpoint_epochs, check_recipe(recipe))
    runs = make_runs(masks, count_samples(train), seeds, paired)
    found: dict[RunKey, TrainedModel] = {}
    with ordinary_mode(), progress_bar("train", runs, recipe, progress) as bar:
        trainer = Trainer(make_model, task, train, recipe)
        for group in trainer.groups(runs, stacked, models_at_once):
            models, kept = trainer.train(group, bar, epochs)
            for model, run in enumerate(group):
                found[run.key] = TrainedModel(run.subset, run.seed, models.state(model), kept[model])
    return [found[run.key] for run in runs]


def check_recipe(recipe: Recipe) -> Recipe:
    """Return the recipe, or raise InputTypeError if it is none."""
    if not isinstance(recipe, Recipe):
        raise InputTypeError(f"recipe is a {type(recipe).__name__}; expected a Recipe, such as Recipe(epochs=20).")
    return recipe


def _check_epochs(epochs: Iterable[int] | None, recipe: Recipe) -> list[int]:
    """Return the epochs to store, ascending and from 0 to the last."""
    found = [] if epochs is None else as_list(epochs, "checkpoint_epochs")
    whole = all(isinstance(epoch, (int, np.integer)) and not isinstance(epoch, bool) for epoch in found)
    if not whole or found != sorted(set(found)) or (found and not 0 <= found[0] <= found[-1] <= recipe.epochs):
        raise InputError(f"checkpoint_epochs is {found}; expected rising ints from 0 to {recipe.epochs}.")
    return found


@contextmanager
def ordinary_mode() -> Iterator[None]:
    """Record gradients regardless of the caller's mode, without vmap's hints about operations run model by model."""
    with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # the user can do nothing about it
        yield


def progress_bar(label: str, runs: Sequence[Run], recipe: Recipe, progress: bool | None, num_done: int = 0) -> tqdm:
    """Return a progress bar over the epochs of all models."""
    epochs, disable = recipe.epochs, bar_disabled(progress)
    return tqdm(total=len(runs) * epochs, initial=num_done * epochs, desc=label, unit="epoch", disable=disable)


class Trainer:
    """Training of models of one architecture, task, data set and recipe; ``reference`` is an untrained model."""

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        task: str | Task | Callable[[nn.Module, Batch], Tensor],
        train: Batch,
        recipe: Recipe,
    ) -> None:
        self._build, self.task, self.recipe = ModelFactory(make_model), make_task(task), recipe
        everything = Run(0, 0, np.ones(count_samples(train), dtype=bool), paired=True)
        self.reference = self._build(everything)
        self._device = next(self.reference.parameters()).device
        self.data = self.checked_rows(train, "train")
        self._are_stacked = False

    def settings(self) -> dict[str, Any]:
        """Return what identifies the training, as JSON values."""
        return {"recipe": asdict(self.recipe)}

    def checked_rows(self, batch: Batch, name: str) -> Examples:
        """Return examples on the models' device, checked by the task, which cannot check them inside ``vmap``."""
        rows = Examples.of(batch, name, self._device)
        self.reference.eval()
        with torch.no_grad(), seeded(0):
            for some in rows.slices(self.recipe.batch_size):
                self.task.outputs(self.reference, some)
        return rows

    def groups(
        self, runs: Sequence[Run], stacked: bool | None, most: int | None, done: Collection[RunKey] = ()
    ) -> list[list[Run]]:
        """Divide runs into groups that train at once, with equal numbers of examples; runs in ``done`` are left out."""
        most = None if most is None else check_count(most, "models_at_once")
        if all(run.key in done for run in runs):
            return []
        first, last = self._build(runs[0]), self._build(runs[-1])  # ends, whose numbers of rows may differ
        size = choose_at_once((first, last), self.data, runs, self.task, self.recipe, stacked=stacked, most=most)
        self._are_stacked = size > 1
        of_size: dict[int, list[Run]] = {}
        for run in runs:
            of_size.setdefault(run.num_rows, []).append(run)
        groups = [same[start : start + size] for same in of_size.values() for start in range(0, len(same), size)]
        # Groups are those of all runs, so that results do not depend on what was done before.
        left = [[run for run in group if run.key not in done] for group in groups]
        return [group for group in left if group]

    def train(
        self, group: Sequence[Run], bar: tqdm, checkpoint_epochs: Sequence[int] = ()
    ) -> tuple[Models, list[list[EpochCheckpoint]]]:
        """Train the models of a group of runs; return them, and the checkpoints of each."""
        built = [self._build(run) for run in group]
        models: Models = (StackedModels if self._are_stacked else SingleModel)(built, self.task)
        optimizer = self.recipe.make_optimizer(models.trained.items())
        orders = [run.orders() for run in group]
        kept: list[list[EpochCheckpoint]] = [[] for _ in group]
        rates: list[float] = []
        models.train(True)
        with seeded(group[0].torch_seed("noise")):
            for epoch in range(self.recipe.epochs + 1):
                if epoch:
                    rows = torch.stack([next(order) for order in orders])
                    losses = self._epoch(models, optimizer, rows, epoch, rates)
                    _check_finite(models, losses, group, epoch)
                    bar.update(len(group))
                if epoch in checkpoint_epochs:
                    rate = math.fsum(rates) / len(rates) if rates else self.recipe.learning_rate
                    total = math.fsum(rates) / (1 - self.recipe.momentum)
                    for model, checkpoints in enumerate(kept):
                        saved = models.optimizer_state(optimizer, model)
                        checkpoints.append(EpochCheckpoint(models.state(model), rate, saved, total))
                    rates.clear()
        return models, kept

    def _epoch(
        self, models: Models, optimizer: torch.optim.Optimizer, rows: Tensor, epoch: int, rates: list[float]
    ) -> Tensor:
        """Visit each model's examples ``[K, n]`` once; return the sum of its batches' losses, ``[K]``."""
        batches = rows.split(self.recipe.batch_size, dim=1)
        total = torch.zeros(len(rows), device=self._device)
        for number, batch in enumerate(batches):
            step = (epoch - 1) * len(batches) + number
            rates.append(self.recipe.rate_at(step, self.recipe.epochs * len(batches)))
            optimizer.param_groups[0]["lr"] = rates[-1]
            objectives, losses = models.objectives(self.data, batch)
            parameters = list(models.trained.values())
            gradients = torch.autograd.grad(objectives.sum(), parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            total += losses
        return total

    def evaluate(self, models: Models, group: Sequence[Run], targets: Examples) -> tuple[np.ndarray, np.ndarray]:
        """Return f and L of all targets in eval mode, ``[K, M]`` each, float64, all finite."""
        models.train(False)
        with seeded(0):
            found = [torch.stack(models.outputs(batch)) for batch in targets.slices(self.recipe.batch_size)]
        outputs, losses = torch.cat(found, dim=2).double().cpu().numpy()
        for run, *values in zip(group, outputs, losses, strict=True):
            bad = np.flatnonzero(~np.isfinite(values).all(axis=0))
            if len(bad):
                raise NonFiniteError(
                    f"The model of (subset {run.subset}, seed {run.seed}) gives NaN or infinite outputs or losses for "
                    f"{len(bad)} targets, indices {bad[:5].tolist()}: look at these, or lower the recipe's "
                    f"learning_rate."
                )
        return outputs, losses


def _check_finite(models: Models, losses: Tensor, group: Sequence[Run], epoch: int) -> None:
    """Raise NonFiniteError if one of K models diverged; ``losses [K]`` are sums over the epoch."""
    fine = losses.isfinite()
    for value in models.trained.values():
        fine &= value.detach().reshape(len(group), -1).isfinite().all(1)
    bad = (~fine).nonzero().flatten().tolist()
    if bad:
        named = listing([f"(subset {group[model].subset}, seed {group[model].seed})" for model in bad], most=5)
        raise NonFiniteError(
            f"{len(bad)} of {len(group)} models diverged in epoch {epoch}: {named}; their losses or parameters are NaN "
            f"or infinite. Lower the recipe's learning_rate, or look for such values in the training examples."
        )
