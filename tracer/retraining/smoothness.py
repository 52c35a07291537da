"""Whether training is smooth enough for derivatives: does a small reweighting of examples do what they predict?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracer._core.random_streams import Stream
from tracer._core.validation import check_count, check_seed
from tracer.data.batches import count_samples
from tracer.data.named_tasks import make_task
from tracer.data.tasks import Task
from tracer.errors import InputError
from tracer.retraining.ground_truth import retrain
from tracer.retraining.recipe import Recipe
from tracer.types import Batch, SampleOutputs

logger = logging.getLogger("tracer.retraining")

SMOOTH = 0.9
"""The symmetry below which a warning says that training is not smooth."""


@dataclass(frozen=True)
class Smoothness:
    """Whether small changes of the training examples' weights have effects that a derivative can predict.

    Attributes:
        change: The relative change of weights.
        symmetry: The cosine, over reweightings and targets, of the outputs' changes with those after the opposite
            reweighting, negated. It is 1 if effects are proportional to the change of weights. If kinks and large
            learning rates amplify any difference to something else, it is about −1/2: both changes are from the same
            outputs.
        prediction: The cosine of the effects with those that scores predict; None without scores.
    """

    change: float
    symmetry: float
    prediction: float | None = None


class _Weighted(Task):
    """A task whose batches are ``(batch, weights)``, and whose losses are times the weights."""

    def __init__(self, task: Task) -> None:
        self.task, self.name = task, task.name

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return the outputs of the wrapped task, with weighted losses; see `Task.outputs`."""
        found = self.task.outputs(model, batch[0])
        values = {name: getattr(found, name) * batch[1] for name in ("loss", "loss_grad", "loss_hess")}
        return replace(found, **values)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the wrapped task."""
        return self.task.settings() | {"weighted": True}


def check_smoothness(
    make_model: Callable[[], nn.Module],
    task: str | Task | Callable[[nn.Module, Batch], Tensor],
    train: Batch,
    targets: Batch,
    recipe: Recipe,
    scores: Any = None,
    *,
    change: float = 0.01,
    num_directions: int = 4,
    seeds: Iterable[int] = (0,),
    progress: bool | None = None,
) -> Smoothness:
    """Train again with slightly other weights of the examples, and tell whether derivatives predict what happens.

    A derivative presupposes that twice the change of weights has twice the effect. Networks with ReLUs often have
    larger and erratic effects of small changes than of large ones in proportion; ``source`` and ``influence`` predict
    the large ones, since their Gauss-Newton kernels leave kinks out. Each of a few reweightings makes random halves of
    the examples heavier and lighter by ``change``, and the opposite one the reverse; initial weights and order of
    examples stay. The result is logged, as a warning if training is not smooth.

    Args:
        make_model: As in `retrain`.
        task: As in `retrain`.
        train: All N training examples as one batch.
        targets: All M targets as one batch.
        recipe: The settings of the training run, whose strength counts: see `Recipe.at_strength`.
        scores: ``[N, M]``, scores of this run; outputs must rise with positive ones, as in `tracer.metrics.lds`.
            Default: none.
        change: The relative change of weights, above 0 and below 1. Default: 0.01.
        num_directions: The number of reweightings. Each takes two trainings for each seed. Default: 4.
        seeds: The seeds of the training runs, over which effects are averaged. Default: 0.
        progress: Show progress bars. Default: on a terminal only.

    Returns:
        The symmetry of the effects and, with scores, how well they predict these.

    Raises:
        InputError: If ``change`` or the shape of ``scores`` is invalid, or no output changes.
        NonFiniteError: If a model diverged.

    >>> x, y = torch.eye(4).repeat(8, 1), torch.arange(4).repeat(8)
    >>> recipe = Recipe(learning_rate=1.0, batch_size=8, epochs=5)
    >>> found = check_smoothness(lambda: nn.Linear(4, 4), "image_classification", (x, y), (x[:3], y[:3]), recipe)
    >>> found.symmetry > 0.99
    True
    """
    num_rows, num_targets = count_samples(train), count_samples(targets)
    seeds = [check_seed(seed) for seed in seeds]
    if not 0 < change < 1:
        raise InputError(f"change is {change}; expected a number above 0 and below 1.")
    given = None if scores is None else np.asarray(scores, np.float64)
    if given is not None and given.shape != (num_rows, num_targets):
        raise InputError(f"scores is of shape {list(given.shape)}; expected [{num_rows}, {num_targets}].")
    weighted, everything = _Weighted(make_task(task)), np.ones((1, num_rows), bool)

    def outputs(weights: np.ndarray) -> np.ndarray:
        columns = (train, torch.from_numpy(weights).float()), (targets, torch.ones(num_targets))
        options: dict[str, Any] = {"seeds": seeds, "paired": True, "progress": progress}
        return retrain(make_model, weighted, *columns, everything, recipe, **options).outputs[0]

    before, effects, expected = outputs(np.ones(num_rows)), [], []
    for number in range(check_count(num_directions, "num_directions")):
        order = Stream(0, 1, "smoothness", "rows", number).permutation(num_rows)
        direction = np.where(order < num_rows // 2, -1.0, 1.0)
        effects.append([sign * (outputs(1 + sign * change * direction) - before) for sign in (1, -1)])
        if given is not None:
            expected.append(change * direction @ given)
    forward, backward = np.array(effects).swapaxes(0, 1).reshape(2, -1)
    if not forward.any() and not backward.any():
        raise InputError("no output changed at all; expected a recipe that trains, with a larger change.")
    prediction = None if given is None else _cosine(forward + backward, np.array(expected).ravel())
    found = Smoothness(float(change), _cosine(forward, backward), prediction)
    _report(found)
    return found


def _cosine(left: np.ndarray, right: np.ndarray) -> float:
    lengths = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / lengths if lengths else 0.0


def _report(found: Smoothness) -> None:
    """Log what was found, as a warning if training is not smooth."""
    text = f"weights changed by {found.change:.2%}: effects have symmetry {found.symmetry:.3f}"
    if found.prediction is not None:
        text += f", and scores predict them with cosine {found.prediction:.3f}"
    if found.symmetry >= SMOOTH:
        logger.info("%s", text)
        return
    logger.warning(
        "%s; below %g kinks and large steps decide what so small a change does, and no derivative of one run predicts "
        "it. Try a larger change=, average scores over several runs, or lower rates, as by recipe.at_strength(0.5).",
        text,
        SMOOTH,
    )
