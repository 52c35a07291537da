"""What the runs behind the pitfalls share: ground truth, scores of kept checkpoints, and a training loop of one's own.

``N`` training rows, ``M`` targets, ``C`` checkpoints. Scores are ``[N, M]``, float64, positive for a proponent.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import torch
import torch.nn.functional as F
from models import mlp
from quality_methods import Rows
from torch import Tensor, nn

from tracer import Attribution, attribute
from tracer.metrics import LDS, lds, spearman
from tracer.retraining import EpochCheckpoint, Recipe, random_subsets, retrain, train_models
from tracer.training.tracin_ideal import IdealRecorder

TASK = "image_classification"
RUN_SEED = 1000
"""Of the network that is attributed; those of subsets count from 0."""


@dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
        num_train: N.
        num_targets: M.
        num_subsets: Random halves of the training rows that networks are trained on, for the LDS.
        seeds: Of each subset's networks, whose outputs are averaged.
    """

    num_train: int = 300
    num_targets: int = 100
    num_subsets: int = 100
    seeds: tuple[int, ...] = (0, 1)


def network() -> nn.Module:
    """Return the network of most runs: 64-32-10, 2,410 parameters."""
    return mlp(64, 32, 10)


@dataclass(frozen=True)
class Study:
    """A network's training, with its checkpoints and what networks trained on halves of the rows say of the targets.

    Attributes:
        masks: ``[S, N]``, the halves.
        outputs: ``[S, M]``, margins of the targets, averaged over seeds.
        checkpoints: Of the run on all rows.
        agreement: Rank correlation over halves of two seeds, averaged over targets: how much of the outputs is the
            rows' doing; NaN with one seed.
    """

    masks: np.ndarray
    outputs: np.ndarray
    checkpoints: list[EpochCheckpoint]
    agreement: float

    def grade(self, scores: np.ndarray) -> LDS:
        """Return the linear datamodeling score of scores."""
        return lds(scores, self.masks, self.outputs)


def study(
    settings: Settings,
    make_model: Callable[[], nn.Module],
    train: Rows,
    targets: Rows,
    recipe: Recipe,
    epochs: Collection[int],
) -> Study:
    """Train networks on random halves of the rows and one on all rows.

    Args:
        settings: How much.
        make_model: Builds the network.
        train: The training rows.
        targets: The targets.
        recipe: How networks are trained.
        epochs: After which epochs of the run on all rows weights are kept.

    Returns:
        Truth and checkpoints.
    """
    masks = random_subsets(settings.num_subsets, len(train[1]))
    truth = retrain(make_model, TASK, train, targets, masks, recipe, seeds=settings.seeds, progress=False)
    (run,) = train_models(
        make_model, TASK, train, recipe, seeds=[RUN_SEED], checkpoint_epochs=sorted(epochs), progress=False
    )
    by_seed = truth.outputs_by_seed
    agreement = float("nan") if by_seed.shape[1] < 2 else float(spearman(by_seed[:, 0], by_seed[:, 1]).mean())
    return Study(truth.masks, truth.outputs, run.checkpoints, agreement)


@dataclass(frozen=True)
class Stored:
    """Gradients of rows and targets at checkpoints, which scores are made from.

    Attributes:
        found: What `tracer.attribute` returned.
    """

    found: Attribution

    def scores(self, estimator: str = "tracin", model_ids: list[int] | None = None, **options: Any) -> np.ndarray:
        """Return scores; see `tracer.Tracer.finalize_scores`."""
        values = self.found.tracer.finalize_scores(self.found.exp_name, estimator, model_ids, **options)
        return np.array(values, np.float64)

    def ridge(self, model_ids: list[int] | None = None) -> float:
        """Return the regularization that ``influence`` takes by itself."""
        return self.found.tracer.regularization("influence", model_ids).value


@contextmanager
def scores_of(
    model: nn.Module, train: Rows, targets: Rows, checkpoints: Sequence[Any], **options: Any
) -> Iterator[Stored]:
    """Featurize rows at checkpoints, exactly, into a store in memory.

    Args:
        model: The network; its weights do not matter.
        train: The training rows.
        targets: The targets.
        checkpoints: As `tracer.attribute` takes them, each with its weight.
        **options: As `tracer.attribute` takes them.

    Yields:
        What was stored, to be used inside the block.
    """
    exact = {"projector": "none", "storage": "float32", "batch_size": 512, "progress": False}
    place = f"memory://pitfalls-{uuid.uuid4().hex}"
    try:
        yield Stored(attribute(model, TASK, train, targets, checkpoints, save_dir=place, **{**exact, **options}))
    finally:
        fsspec.filesystem("memory").rm(place, recursive=True)


@dataclass(frozen=True)
class RecordedRun:
    """A training run with batches of one row, in which TracInIdeal is exact.

    Attributes:
        ideal: ``[N, M]``, how much the steps of a row lowered each target's loss.
        rates: ``[E, N]``, the learning rate of each step.
        rate_after: By epoch that weights are kept of: the rate of the step behind it.
        states: The model's state dict after these epochs.
        optimizer_states: The optimizer's.
    """

    ideal: np.ndarray
    rates: np.ndarray
    rate_after: dict[int, float]
    states: dict[int, dict[str, Tensor]]
    optimizer_states: dict[int, dict[str, Any]]


def recorded_run(
    train: Rows,
    targets: Rows,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    rate_at: Callable[[int, int], float],
    num_epochs: int,
    epochs: Collection[int],
) -> RecordedRun:
    """Train `network` with batches of one row, and record what each step does to the targets' losses.

    Args:
        train: The training rows.
        targets: The targets.
        make_optimizer: Of the network's parameters.
        rate_at: The learning rate of a step, of its number and the number of all steps.
        num_epochs: E.
        epochs: After which epochs weights are kept.

    Returns:
        The run.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = network()
    optimizer, num_rows = make_optimizer(model), len(train[1])
    num_steps = num_epochs * num_rows
    recorder = IdealRecorder(model, TASK, targets, num_rows, batch_size=512)
    rates: list[float] = []
    rate_after, states, optimizer_states = {}, {}, {}
    for epoch in range(num_epochs + 1):
        for row in torch.randperm(num_rows, generator=generator).split(1) if epoch else ():
            rates.append(rate_at(len(rates), num_steps))
            optimizer.param_groups[0]["lr"] = rates[-1]
            with recorder.step(row):
                optimizer.zero_grad()
                F.cross_entropy(model(train[0][row]), train[1][row]).backward()
                optimizer.step()
        if epoch in epochs:
            rate_after[epoch] = rate_at(len(rates), num_steps)
            states[epoch] = copy.deepcopy(model.state_dict())
            optimizer_states[epoch] = copy.deepcopy(optimizer.state_dict())
    every_rate = np.array(rates).reshape(num_epochs, num_rows)
    return RecordedRun(recorder.influence(), every_rate, rate_after, states, optimizer_states)


def row_gradients(model: nn.Module, rows: Rows) -> Tensor:
    """Return the gradient of each row's loss as all of them pass the model at once, ``[B, parameters]``.

    The model's mode decides: in training mode BatchNorm takes its statistics from these rows, and a row's gradient
    includes what it did to them; the sum over rows is the gradient that a step of training uses. Buffers are left as
    they were.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses = F.cross_entropy(model(rows[0]), rows[1], reduction="none")
    parameters = list(model.parameters())
    found = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return torch.stack([torch.cat([part.flatten() for part in parts]) for parts in found])


def mean_loss(model: nn.Module, rows: Rows) -> float:
    """Return the mean loss of rows in the model's mode."""
    with torch.no_grad():
        return F.cross_entropy(model(rows[0]), rows[1]).item()


def pearson(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return Pearson's correlation over rows, averaged over targets, of ``[N, M]`` each."""
    pairs = zip(scores.T, truth.T, strict=True)
    return float(np.mean([np.corrcoef(one, other)[0, 1] for one, other in pairs]))


def rank_correlation(scores: np.ndarray, truth: np.ndarray) -> float:
    """Return Spearman's correlation over rows, averaged over targets, of ``[N, M]`` each."""
    return float(spearman(scores, truth).mean())


def size(scores: np.ndarray) -> float:
    """Return the root mean square of scores."""
    return float(np.sqrt(np.mean(np.square(scores))))
