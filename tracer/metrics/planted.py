"""Examples that one knows to matter, among the proponents of targets: shortcuts, poison, sources, copies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer.errors import InputError
from tracer.metrics.inputs import Array, flags, numbers, proponent_indices, same_size
from tracer.metrics.values import Result


@dataclass(frozen=True, repr=False, eq=False)
class PlantedDetection(Result):
    """How well scores find planted examples among each target's proponents.

    Attributes:
        mean: The mean of ``per_target``.
        per_target: ``[M]``, the area under the precision-recall curve (AUPRC) of each target: 1 if all planted examples
            come first.
        chance: The mean over targets of the share of planted examples, the area of scores without information.
    """

    mean: float
    per_target: np.ndarray
    chance: float


def planted_detection(scores: Array, is_planted: Array) -> PlantedDetection:
    """Return how well scores find planted examples: those of a shortcut, of poison, of one source, or copies.

    The area is average precision: the sum over cutoffs of the precision times the gain in recall, with one cutoff for
    examples of equal score (Davis & Goadrich 2006). Unlike the area under the ROC curve it is small if a few planted
    examples come after many others.

    Args:
        scores: ``[N, M]``, finite; proponents are positive.
        is_planted: ``[N]``, True or 1 for planted examples; or ``[N, M]`` for planted examples of each target.

    Returns:
        The area of each target, and its mean.

    Raises:
        InputError: If shapes do not agree, a score is NaN or infinite, or a target has no planted example or only such.
        InputTypeError: If the arrays do not hold numbers.

    >>> planted_detection([[0.9, 0.2], [0.5, 0.3], [0.1, 0.8]], [True, False, False])
    PlantedDetection(mean=0.6667, per_target=[1, 0.3333], chance=0.3333)
    """
    scores = numbers("scores", scores, "[N, M]")
    shape = "[N, M]" if np.ndim(is_planted) == 2 else "[N]"
    planted = flags("is_planted", is_planted, shape)
    same_size("scores [N, M]", len(scores), f"is_planted {shape}", len(planted), "N")
    if planted.ndim == 2:
        same_size("scores [N, M]", scores.shape[1], "is_planted [N, M]", planted.shape[1], "M")
    planted = np.broadcast_to(planted.reshape(len(planted), -1), scores.shape)
    counts = planted.sum(axis=0)
    if (counts == 0).any() or (counts == len(planted)).any():
        target = int(((counts == 0) | (counts == len(planted))).argmax())
        raise InputError(
            f"is_planted must have both kinds of examples for each target; target {target} has {counts[target]} "
            f"planted ones of {len(planted)}."
        )
    per_target = np.array([_area(*each) for each in zip(scores.T, planted.T, strict=True)])
    return PlantedDetection(float(per_target.mean()), per_target, float((counts / len(planted)).mean()))


def _area(scores: np.ndarray, planted: np.ndarray) -> float:
    """Return the average precision of one target."""
    order = np.argsort(scores, kind="stable")[::-1]
    ends = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # the last one of equal scores
    found = np.cumsum(planted[order])[ends]
    return float((found / (ends + 1)) @ np.diff(found, prepend=0)) / int(planted.sum())


@dataclass(frozen=True, repr=False, eq=False)
class TopCardinality(Result):
    """How many different examples fill the top places of all targets.

    Attributes:
        cardinality: The number of different examples among the ``M * k`` places.
        share: It over the largest possible number, ``min(M * k, train_set_size)``.
        most_common: The share of targets that have the most frequent example among their top k.
    """

    cardinality: int
    share: float
    most_common: float


def top_cardinality(indices: Array, train_set_size: int) -> TopCardinality:
    """Return how many different examples are among the top proponents of targets.

    If a few examples fill the lists of all targets, the lists say more about these examples (large gradients, outliers)
    than about the targets (Barshan et al. 2020).

    Args:
        indices: ``[M, k]``, training examples of each target, as in ``top(...).indices``.
        train_set_size: The number of training examples ``N``.

    Returns:
        The number of different examples, and how often the most frequent one occurs.

    Raises:
        InputError: If an index is out of range.
        InputTypeError: If the indices are not integers.

    >>> top_cardinality([[0, 1], [0, 2], [0, 1]], train_set_size=10)
    TopCardinality(cardinality=3, share=0.5, most_common=1)
    """
    checked = proponent_indices("indices", indices, train_set_size)
    different, times = np.unique(checked, return_counts=True)
    largest = min(checked.size, train_set_size)
    return TopCardinality(len(different), len(different) / largest, float(times.max() / len(checked)))
