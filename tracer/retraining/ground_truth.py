"""The ground truth of attribution: outputs of targets after retraining on subsets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
from torch import Tensor, nn

from tracer.data.batches import count_samples
from tracer.data.tasks import Task
from tracer.errors import InputError
from tracer.retraining.own_loop import OwnLoopTrainer, TrainFunction
from tracer.retraining.recipe import Recipe
from tracer.retraining.result_files import ResultFiles, settings_of
from tracer.retraining.subsets import make_runs
from tracer.retraining.training import Trainer, check_recipe, ordinary_mode, progress_bar
from tracer.store.arrays.store_path import local_path
from tracer.types import Batch, data_frame, html_table

_SHOWN = 5  # subsets in a notebook


@dataclass(frozen=True, repr=False)
class Retrained:
    """Outputs and losses of M targets for models trained on S subsets.

    Attributes:
        masks: ``[S, N]``, bool: the training examples of each subset.
        seeds: The seeds of each subset's models.
        outputs_by_seed: ``[S, seeds, M]``, float64: the task's f of each target: the margin for classification, the
            loss for a task that has only a loss.
        losses_by_seed: ``[S, seeds, M]``, float64: the loss of each target.
    """

    masks: np.ndarray
    seeds: tuple[int, ...]
    outputs_by_seed: np.ndarray
    losses_by_seed: np.ndarray

    def __repr__(self) -> str:
        subsets, seeds, targets = self.outputs_by_seed.shape
        return f"Retrained({subsets:,} subsets of {self.masks.shape[1]:,} examples, {seeds} seeds, {targets:,} targets)"

    def _repr_html_(self) -> str:
        lines = [
            (subset, int(self.masks[subset].sum()), f"{output.mean():.4g}", f"{loss.mean():.4g}")
            for subset, (output, loss) in enumerate(zip(self.outputs[:_SHOWN], self.losses[:_SHOWN], strict=True))
        ]
        return html_table(("subset", "examples", "mean output", "mean loss"), lines, repr(self))

    def to_pandas(self) -> Any:
        """Return a DataFrame with a line for each subset and target.

        Returns:
            The columns ``subset``, ``target``, ``examples`` (the number in the subset), ``output`` and ``loss``.

        Raises:
            MissingDependencyError: If pandas is not installed.
        """
        subsets, targets = self.outputs.shape
        return data_frame(
            {
                "subset": np.repeat(np.arange(subsets), targets),
                "target": np.tile(np.arange(targets), subsets),
                "examples": np.repeat(self.masks.sum(1), targets),
                "output": self.outputs.ravel(),
                "loss": self.losses.ravel(),
            }
        )

    @property
    def outputs(self) -> np.ndarray:
        """The task's f of each target, averaged over seeds: ``[S, M]``, float64."""
        return self.outputs_by_seed.mean(axis=1)

    @property
    def losses(self) -> np.ndarray:
        """The loss of each target, averaged over seeds: ``[S, M]``, float64."""
        return self.losses_by_seed.mean(axis=1)


class StackingOptions(TypedDict, total=False):
    """Further arguments of `retrain`."""

    stacked: bool | None
    models_at_once: int | None
    progress: bool | None


@dataclass(frozen=True)
class Stacking:
    """The values of `StackingOptions`, or their defaults."""

    stacked: bool | None = None
    models_at_once: int | None = None
    progress: bool | None = None


def make_trainer(
    make_model: Callable[[], nn.Module],
    task: str | Task | Callable[[nn.Module, Batch], Tensor],
    train: Batch,
    recipe: Recipe | None,
    train_fn: TrainFunction | None,
) -> Trainer:
    """Return what trains by a recipe, or by the user's function."""
    if (recipe is None) == (train_fn is None):
        given = "neither" if recipe is None else "both"
        raise InputError(f"expected recipe= or train_fn=, got {given}; pass one of them.")
    if train_fn is not None:
        return OwnLoopTrainer(make_model, task, train, train_fn)
    assert recipe is not None
    return Trainer(make_model, task, train, check_recipe(recipe))


def retrain(
    make_model: Callable[[], nn.Module],
    task: str | Task | Callable[[nn.Module, Batch], Tensor],
    train: Batch,
    targets: Batch,
    masks: Any,
    recipe: Recipe | None = None,
    *,
    train_fn: TrainFunction | None = None,
    seeds: Iterable[int] = (0, 1),
    save_dir: str | os.PathLike[str] | None = None,
    paired: bool = False,
    **options: Unpack[StackingOptions],
) -> Retrained:
    """Train models on subsets of the training set and evaluate each on all targets.

    This is the ground truth of the linear datamodeling score (Park et al. 2023, section 2): scores are good if their
    sums over subsets rank the subsets as ``outputs`` does. Each model has its own initial weights and order of
    examples; the mean over several seeds reduces that noise. Targets are evaluated in eval mode.

    With ``save_dir``, results are stored as they are computed, and stored models are not trained again, also after
    adding subsets or seeds. Results are identified by data, targets, recipe, task, masks, seeds, the model's printed
    structure and its initial weights. A change of code in its forward, in a task's function or in ``train_fn`` is not
    detected.

    Args:
        make_model: Builds an untrained model with torch's global generator, whose state is restored afterwards.
        task: As in `Tracer`; the loss of a step is the mean of the task's loss over the batch.
        train: All N training examples as one batch, for example ``(x, y)`` or ``(tokens,)``.
        targets: All M targets as one batch.
        masks: ``[S, N]``, bool: the training examples of each subset, as from `random_subsets`.
        recipe: The settings of each training run; or pass ``train_fn``.
        train_fn: A training loop of your own: a function ``(model, rows)`` that trains an untrained model, already
            built, on the training examples with the indices ``rows [n]``, in place, or returns another model. torch's
            global generator is seeded by seed and subset; draw orders and noise from it.
        seeds: The seeds of each subset. Default: 0 and 1.
        save_dir: A local folder for the results, which can hold results of other settings too. Default: not stored.
        paired: Start all subsets of a seed from the same weights and visit examples in the same order, so that they
            differ by their examples alone; for leaving out single examples.
        **options: ``stacked``: True: train several models at once with stacked parameters; False: one after another.
            Default: several if they can be stacked and steps are small enough to profit. ``models_at_once``: the
            largest number at once. Default: by size. ``progress``: show a progress bar. Default: on a terminal only.

    Returns:
        f and loss of each subset and target.

    Raises:
        InputError: If an argument has an invalid value, or models cannot be stacked and ``stacked=True``, or not one of
            ``recipe`` and ``train_fn`` is given.
        InputTypeError: If an argument has an invalid type.
        NonFiniteError: If a model diverged.
        StoreError: If a file in ``save_dir`` is damaged or cannot be written.

    >>> import torch
    >>> from tracer.retraining import random_subsets
    >>> x, y = torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8)
    >>> masks, recipe = random_subsets(6, 32), Recipe(learning_rate=1.0, batch_size=8, epochs=5)
    >>> truth = retrain(lambda: nn.Linear(4, 4), "image_classification", (x, y), (x[:3], y[:3]), masks, recipe)
    >>> truth.outputs.shape, truth.outputs_by_seed.shape
    ((6, 3), (6, 2, 3))
    """
    stacking = Stacking(**options)
    place = None if save_dir is None else local_path(save_dir)
    runs = make_runs(masks, count_samples(train), seeds, paired)
    with ordinary_mode():
        trainer = make_trainer(make_model, task, train, recipe, train_fn)
        rows = trainer.checked_rows(targets, "targets")
        files = None if place is None else ResultFiles(place, settings_of(trainer, rows, paired))
        found = {} if files is None else files.read(runs)
        with progress_bar("retrain", runs, trainer.recipe, stacking.progress, num_done=len(found)) as bar:
            for group in trainer.groups(runs, stacking.stacked, stacking.models_at_once, done=set(found)):
                models, _ = trainer.train(group, bar)
                outputs, losses = trainer.evaluate(models, group, rows)
                if files is not None:
                    files.write(group, outputs, losses)
                found.update({run.key: (outputs[model], losses[model]) for model, run in enumerate(group)})
    used = tuple(run.seed for run in runs if run.subset == 0)
    given = np.stack([run.mask for run in runs[:: len(used)]])
    of_runs = np.array([found[run.key] for run in runs]).reshape(len(given), len(used), 2, -1)  # [S, seeds, 2, M]
    return Retrained(given, used, of_runs[:, :, 0], of_runs[:, :, 1])
