"""Leave-one-out and leave-k-out: do scores predict the effect of leaving examples out and training again?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracer.errors import InputError
from tracer.metrics.inputs import Array, as_array, checked_indices, numbers, same_size
from tracer.metrics.ranks import equal_but_for_rounding, pearson, rank_correlation, subset_sums
from tracer.metrics.values import Result, mean_over_targets


@dataclass(frozen=True, repr=False, eq=False)
class RemovalCorrelation(Result):
    """Correlations of predicted and true changes over removals.

    Attributes:
        pearson: The mean of ``pearson_per_target`` over the targets for which it is defined.
        spearman: The mean of ``spearman_per_target`` over the same targets.
        pearson_per_target: ``[M]``; NaN for targets that all removals change equally.
        spearman_per_target: ``[M]``; NaN for the same targets.
    """

    pearson: float
    spearman: float
    pearson_per_target: np.ndarray
    spearman_per_target: np.ndarray


def removal_correlation(scores: Array, removed: Array | Sequence[Array], changes: Array) -> RemovalCorrelation:
    """Return how well scores predict the effect of leaving examples out and training again.

    For each target, the correlation over removals of the summed scores of the removed examples with the true change:
    the comparisons of Koh & Liang (2017), section 4.1. Unless the model is convex, a single example changes an output
    by less than another seed does: average over several trainings, or remove more examples at once.

    Pearson's correlation tests whether changes are proportional to scores, Spearman's whether they have the same order.
    If the predicted changes of a target are all equal, up to rounding, it counts as 0. If its true changes are all
    equal, it is NaN and left out of the means.

    Args:
        scores: ``[N, M]``, finite; positive if the example raises the output.
        removed: The examples of each of R removals: ``[R]`` integers, one example each; ``[R, k]`` integers or a list
            of R lists of integers, several each; or ``[R, N]`` booleans, True for examples left out.
        changes: ``[R, M]``, the output with all examples minus the output without the removed ones, so positive if they
            raised the output. For a loss: the loss without them minus the loss with them.

    Returns:
        Both correlations, of each target and their means.

    Raises:
        InputError: If shapes do not agree, an index is out of range or repeated within a removal, values are NaN or
            infinite, or all changes are constant.
        InputTypeError: If an array does not hold numbers, or ``removed`` holds neither integers nor booleans.

    >>> removal_correlation([[3.0], [1.0], [-2.0]], removed=[0, 1, 2], changes=[[0.3], [0.2], [0.0]])
    RemovalCorrelation(pearson=0.9972, spearman=1, pearson_per_target=[0.9972], spearman_per_target=[1])
    """
    scores, changes = numbers("scores", scores, "[N, M]"), numbers("changes", changes, "[R, M]")
    same_size("scores [N, M]", scores.shape[1], "changes [R, M]", changes.shape[1], "M")
    predicted, constant = _predicted_changes(removed, scores)
    same_size("removed [R]", len(predicted), "changes [R, M]", len(changes), "R")
    if len(changes) < 2:
        raise InputError("changes [R, M] must have at least 2 removals: a correlation is over removals.")
    found = [correlation(predicted, changes) for correlation in (pearson, rank_correlation)]
    per_target = np.where(np.ptp(changes, axis=0) == 0, np.nan, np.where(constant, 0, found))
    means = [mean_over_targets("The correlation", found, "all removals change them alike") for found in per_target]
    return RemovalCorrelation(means[0], means[1], per_target[0], per_target[1])


def _predicted_changes(removed: Array | Sequence[Array], scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return summed scores of removals ``[R, M]``, and the targets whose sums are equal but for rounding ``[M]``."""
    groups = _groups(removed)
    if all(group.dtype == np.bool_ for group in groups):
        for index, group in enumerate(groups):
            same_size(f"removed[{index}] [N]", len(group), "scores [N, M]", len(scores), "N")
            if not group.any():
                raise InputError(f"removed[{index}] leaves no row out; True means that the row is left out.")
        return subset_sums(np.stack(groups), scores)
    sums, magnitudes = np.empty((2, len(groups), scores.shape[1]))
    for index, group in enumerate(groups):
        rows = checked_indices(f"removed[{index}]", group, "[k]", len(scores))
        if len(np.unique(rows)) < len(rows):
            raise InputError(f"removed[{index}] names a row twice. Masks of 0 and 1 must be booleans.")
        chosen = scores[rows].astype(np.float64)
        sums[index], magnitudes[index] = chosen.sum(axis=0), np.abs(chosen).sum(axis=0)
    return sums, equal_but_for_rounding(sums, magnitudes, max(map(len, groups)))


def _groups(removed: Array | Sequence[Array]) -> list[np.ndarray]:
    """Return an array for each removal: indices of its examples, or a mask over all examples."""
    if isinstance(removed, Sequence) and not all(isinstance(row, int | np.integer) for row in removed):
        return [as_array(f"removed[{index}]", rows, "[k]") for index, rows in enumerate(removed)]
    dimensions = np.ndim(removed)  # type: ignore[arg-type]  # torch tensors have dimensions, too
    array = as_array("removed", removed, "[R, k]" if dimensions == 2 else "[R]")  # type: ignore[arg-type]
    if array.dtype == np.bool_ and array.ndim == 1:
        raise InputError(f"removed must be masks [R, N], one for each removal, got one of shape {list(array.shape)}.")
    return list(array if array.ndim == 2 else array[:, None])
