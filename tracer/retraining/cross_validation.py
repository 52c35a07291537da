"""Cross-validation: what models that have not seen an example predict of its label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Unpack

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from tracer._core.validation import check_count, check_seed
from tracer.data.batches import count_samples
from tracer.data.fingerprints import fingerprint_samples
from tracer.data.tasks import Task
from tracer.errors import InputError
from tracer.report.label_noise import MIN_HELD_OUT, LabelEvidence, WrongLabels, out_of_sample_health
from tracer.retraining.ground_truth import Stacking, StackingOptions, make_trainer
from tracer.retraining.model_factory import seeded
from tracer.retraining.models import Examples
from tracer.retraining.own_loop import TrainFunction
from tracer.retraining.recipe import Recipe
from tracer.retraining.subsets import make_runs
from tracer.retraining.training import ordinary_mode, progress_bar
from tracer.types import Batch


@dataclass(frozen=True)
class CrossValidated:
    """Predictions of N training examples and of targets by the models of the folds.

    Attributes:
        fold: ``[N]``, int64: the fold of each training example, whose model was trained without it.
        train: The evidence on the training examples' labels.
        held_out: That on targets that are no training examples: of the first fold's model, then the second's, ...;
            None if there are none.
    """

    fold: Int64[np.ndarray, " N"]
    train: LabelEvidence
    held_out: LabelEvidence | None

    def label_health(self) -> WrongLabels | str:
        """Return the estimated share of wrong labels among the training examples, or why there is no estimate.

        It holds for weak models too, since nothing that a model learned from a label has to be undone; the estimate of
        `tracer.Attribution.label_health`, from the checkpoints of one run, asks for better ones.

        Returns:
            As `tracer.Attribution.label_health`; pass it to `tracer.Attribution.report` as ``health``.
        """
        num_models = 1 + int(self.fold.max())
        enough = self.held_out is not None and len(self.held_out.label) >= MIN_HELD_OUT * num_models
        return out_of_sample_health("models", self.train, self.held_out if enough else None, num_models)


def cross_validate(
    make_model: Callable[[], nn.Module],
    task: str | Task | Callable[[nn.Module, Batch], Tensor],
    train: Batch,
    targets: Batch | None = None,
    recipe: Recipe | None = None,
    *,
    train_fn: TrainFunction | None = None,
    folds: int = 5,
    seed: int = 0,
    **options: Unpack[StackingOptions],
) -> CrossValidated:
    """Train a model without each fold of the training examples, and predict the fold's labels and those of targets.

    It costs ``folds`` trainings, each on ``1 - 1 / folds`` of the examples, and gives the most reliable estimate of
    wrong labels.

    Args:
        make_model: As in `retrain`.
        task: A classification task, as in `Tracer`.
        train: All N training examples as one batch, for example ``(x, y)``.
        targets: Other examples of the same classes with labels that are right, as one batch; they tell how often models
            are wrong where labels are right. Default: none, which widens the interval.
        recipe: The settings of each training run; or pass ``train_fn``.
        train_fn: As in `retrain`.
        folds: The number of folds, at least 2. Default: 5.
        seed: Of the folds, weights and orders. Default: 0.
        **options: As in `retrain`.

    Returns:
        The predictions.

    Raises:
        InputError: If an argument has an invalid value, the task has no classes, or there are fewer examples than
            folds.
        InputTypeError: If an argument has an invalid type.
        NonFiniteError: If a model diverged.

    >>> x, y = torch.eye(4).repeat(50, 1), torch.arange(4).repeat(50)
    >>> y[:20] = (y[:20] + 1) % 4  # a tenth of the labels is wrong
    >>> recipe = Recipe(learning_rate=1.0, batch_size=8, epochs=5)
    >>> found = cross_validate(lambda: nn.Linear(4, 4), "classification", (x, y), None, recipe, folds=4)
    >>> health = found.label_health()
    >>> round(health.share, 1), health.suspects.nonzero()[0].tolist() == list(range(20))
    (0.1, True)
    """
    num_rows, stacking = count_samples(train), Stacking(**options)
    if check_count(folds, "folds") < 2 or folds > num_rows:
        raise InputError(f"folds is {folds}; expected at least 2, and at most the number of training examples.")
    fold = np.random.default_rng(check_seed(seed)).permutation(num_rows) % folds
    runs = make_runs(fold != np.arange(folds)[:, None], num_rows, [seed], paired=False)
    own: dict[int, LabelEvidence] = {}
    others: dict[int, LabelEvidence] = {}
    with ordinary_mode():
        trainer = make_trainer(make_model, task, train, recipe, train_fn)
        unseen = None if targets is None else _unseen(trainer.checked_rows(targets, "targets"), trainer.data)
        with progress_bar("cross-validate", runs, trainer.recipe, stacking.progress) as bar:
            for group in trainer.groups(runs, stacking.stacked, stacking.models_at_once):
                models, _ = trainer.train(group, bar)
                models.train(False)
                for place, run in enumerate(group):
                    model, size = models.module(place), trainer.recipe.batch_size
                    left_out = torch.from_numpy((fold == run.subset).nonzero()[0])
                    own[run.subset] = _evidence(model, trainer.task, trainer.data, left_out, size)
                    if unseen is not None:
                        others[run.subset] = _evidence(model, trainer.task, *unseen, size)
    order = np.argsort(np.argsort(fold, kind="stable"))  # from fold after fold to the examples' own order
    found = LabelEvidence.joined([own[number] for number in range(folds)]).select(order)
    return CrossValidated(fold, found, LabelEvidence.joined([others[n] for n in range(folds)]) if others else None)


def _unseen(targets: Examples, train: Examples) -> tuple[Examples, Tensor] | None:
    """Return the targets, and which of them are no training examples; None if all are."""
    known = fingerprint_samples(train.batch, train.num_rows)
    new = ~np.isin(fingerprint_samples(targets.batch, targets.num_rows), known)
    return (targets, torch.from_numpy(new.nonzero()[0])) if new.any() else None


def _evidence(model: nn.Module, task: Task, data: Examples, rows: Tensor, size: int) -> LabelEvidence:
    """Return what a model predicts of the labels of some examples."""
    found = []
    with torch.no_grad(), seeded(0):
        for some in rows.split(size):
            outputs = task.outputs(model, data.take(some))
            if outputs.label is None or outputs.rival is None or outputs.rival_share is None:
                raise InputError(
                    f"task is {task.name!r}, which has no classes; expected a classification task, whose labels can be "
                    f"wrong."
                )
            values = outputs.label, outputs.loss, outputs.rival, outputs.rival_share
            found.append(LabelEvidence.of_losses(*(value.double().cpu().numpy() for value in values)))
    return LabelEvidence.joined(found)
