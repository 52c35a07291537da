"""The effect of acting on proponents: removing them before training, or training on them once more.

The caller trains, through a function. For removals it receives masks of several trainings at once, so that models can
be trained together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tracer._core.validation import check_count, check_integer
from tracer.errors import InputError
from tracer.metrics.inputs import Array, numbers, proponent_indices
from tracer.metrics.values import Result


@dataclass(frozen=True, repr=False, eq=False)
class Brittleness(Result):
    """The number of top proponents that must be removed to flip a target's prediction.

    Attributes:
        counts: ``[C]``, int64, ascending: the numbers of proponents removed.
        share_flipped: ``[C]``, the share of targets whose prediction becomes wrong, among those that are right with all
            training examples.
        smallest: ``[M]``, the smallest count that flips the target; infinity if none does, NaN for targets that are
            wrong with all training examples.
        margins: ``[M, C]``, the margin after each removal; NaN for targets that are wrong with all training examples.
        initial: ``[M]``, the margin with all training examples.
    """

    counts: np.ndarray
    share_flipped: np.ndarray
    smallest: np.ndarray
    margins: np.ndarray
    initial: np.ndarray


def brittleness(
    proponents: Array,
    predict: Callable[[np.ndarray], Array],
    *,
    train_set_size: int,
    counts: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Brittleness:
    """Return how many top proponents must be removed, with retraining, to flip each target's prediction.

    The brittle predictions of Ilyas et al. (2022), *Datamodels*: a target's data support is the smallest set of
    training examples without which it is misclassified, and an attribution's ranking bounds its size from above. The
    better the ranking, the fewer examples. Compare with random examples of the target's class, since any removal flips
    some.

    All counts are tried for each target, because fewer examples sometimes flip what more do not. Training varies with
    the seed, so let ``predict`` average the margin over several.

    Args:
        proponents: ``[M, k]``, training examples of each target, strongest first, as in ``tracer.top(...).indices``.
        predict: A function of ``keep [R, N]``, bool, the training examples of R trainings. It returns the margins ``[R,
            M]`` of all targets after each: positive if the prediction is right. The first call has one mask of all
            examples; later calls serve the targets that this one gets right.
        train_set_size: N.
        counts: The numbers of proponents to remove, each from 1 to k. Default: 1, 2, 4, 8, ..., and k.
        batch_size: The number of trainings per call. Default: all.

    Returns:
        The smallest count of each target, and the share flipped at each count.

    Raises:
        InputError: If an index is out of range or repeated, a count is out of range, ``predict`` returns another shape
            or values that are not finite, or no target is right with all examples.
        InputTypeError: If indices or counts are not integers.

    >>> def predict(keep):  # two targets that need two of examples 0 to 2, and example 3
    ...     return np.stack([keep[:, :3].sum(1) - 1.5, keep[:, 3] - 0.5], axis=1)
    >>> found = brittleness([[0, 1, 2], [2, 3, 0]], predict, train_set_size=5)
    >>> found.counts.tolist(), found.share_flipped.tolist(), found.smallest.tolist()
    ([1, 2, 3], [0.0, 1.0, 1.0], [2.0, 2.0])
    """
    num_rows = check_count(train_set_size, "train_set_size")
    proponents = proponent_indices("proponents", proponents, num_rows)
    num_targets, k = proponents.shape
    counts = [*(1 << power for power in range((k - 1).bit_length())), k] if counts is None else counts
    counts = sorted({check_integer(count, "counts", 1, k) for count in counts})
    if not counts:
        raise InputError("counts must name at least one number of proponents to remove.")
    initial = _margins(predict, np.ones((1, num_rows), np.bool_), num_targets)[0]
    targets = np.flatnonzero(initial > 0)
    if not targets.size:
        raise InputError(
            f"None of {num_targets} targets has a positive margin with all rows: there is nothing to flip."
        )
    margins = np.full((num_targets, len(counts)), np.nan)
    removals = [(target, place) for target in targets for place in range(len(counts))]
    size = len(removals) if batch_size is None else check_count(batch_size, "batch_size")
    for start in range(0, len(removals), size):
        batch = removals[start : start + size]
        keep = np.ones((len(batch), num_rows), np.bool_)
        for mask, (target, place) in zip(keep, batch, strict=True):
            mask[proponents[target, : counts[place]]] = False
        for found, (target, place) in zip(_margins(predict, keep, num_targets), batch, strict=True):
            margins[target, place] = found[target]
    flipped = margins[targets] <= 0
    smallest = np.full(num_targets, np.nan)
    smallest[targets] = np.where(flipped.any(axis=1), np.asarray(counts)[flipped.argmax(axis=1)], np.inf)
    return Brittleness(np.asarray(counts, np.int64), flipped.mean(axis=0), smallest, margins, initial)


@dataclass(frozen=True, repr=False, eq=False)
class TailPatch(Result):
    """The effect of one more training step on proponents on the target's output.

    Attributes:
        mean: The mean of ``per_target``.
        per_target: ``[M]``, the mean change of the target's output over its steps.
        changes: ``[M, k]``, the change by a step on each proponent; ``[M, 1]`` for one step on all of them.
    """

    mean: float
    per_target: np.ndarray
    changes: np.ndarray


def tail_patch(
    proponents: Array, step: Callable[[np.ndarray, np.ndarray], Array], *, train_set_size: int, together: bool = False
) -> TailPatch:
    """Return how much one training step on a target's proponents raises its output.

    The tail-patch score of Chang et al. (2024), *Scalable Influence and Fact Tracing for Large Language Model
    Pretraining*: one step is taken from the last checkpoint on each proponent, and the increase in the target's
    probability is averaged. It measures training on the examples once more, not leaving them out, and needs no
    retraining. It favors methods that use gradients at the last checkpoint.

    Args:
        proponents: ``[M, k]``, training examples of each target, as in ``tracer.top(...).indices``.
        step: A function of ``rows [n]`` and ``targets [t]``, int64. It restores model and optimizer to the checkpoint,
            takes one training step on the examples, and returns the change of these targets' outputs, ``[t]``, after
            minus before: of a probability or log-probability, or of another output that increases with a better
            prediction.
        train_set_size: N.
        together: Take one step on all k proponents of a target instead of a step on each. Without it, an example that
            several targets share is stepped on once, for all of them.

    Returns:
        The mean change, that of each target, and that of each step.

    Raises:
        InputError: If an index is out of range or repeated, or ``step`` returns another shape or values that are not
            finite.
        InputTypeError: If indices are not integers, or ``step`` does not return numbers.

    >>> effect = np.array([0.5, -0.1, 0.2])  # of a step on each of three examples, on any target
    >>> def step(rows, targets):
    ...     return np.repeat(effect[rows].sum(), len(targets))
    >>> tail_patch([[0, 1], [2, 0]], step, train_set_size=3)
    TailPatch(mean=0.275, per_target=[0.2, 0.35], changes=<[2, 2] from -0.1 to 0.5>)
    """
    proponents = proponent_indices("proponents", proponents, check_count(train_set_size, "train_set_size"))
    changes = np.empty((len(proponents), 1 if together else proponents.shape[1]))
    if together:
        steps = [(rows, np.array([target]), np.array([0])) for target, rows in enumerate(proponents)]
    else:
        order = np.argsort(proponents, axis=None, kind="stable")
        rows, starts = np.unique(proponents.ravel()[order], return_index=True)
        uses = np.split(np.stack(np.unravel_index(order, proponents.shape)), starts[1:], axis=1)
        steps = [(np.array([row]), targets, places) for row, (targets, places) in zip(rows, uses, strict=True)]
    for rows, targets, places in steps:
        found = numbers("the changes that step returns", step(rows, targets), "[t]")
        if len(found) != len(targets):
            raise InputError(f"step must return a change for each of its {len(targets)} targets, got {len(found)}.")
        changes[targets, places] = found
    per_target = changes.mean(axis=1)
    return TailPatch(float(per_target.mean()), per_target, changes)


def _margins(predict: Callable[[np.ndarray], Array], keep: np.ndarray, num_targets: int) -> np.ndarray:
    """Call ``predict`` with masks ``[R, N]`` and check that it returns finite margins ``[R, M]``."""
    margins = numbers("the margins that predict returns", predict(keep), "[R, M]")
    if margins.shape != (len(keep), num_targets):
        raise InputError(
            f"predict must return margins [R, M] = [{len(keep)}, {num_targets}], one row for each mask and a column "
            f"for each target, got {list(margins.shape)}."
        )
    return margins
