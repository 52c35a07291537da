"""Do scores predict what leaving rows out and training again does? Leave one out, and leave k out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tracer.errors import InputError
from tracer.metrics.inputs import Array, as_array, numbers, row_indices, same_size
from tracer.metrics.ranks import equal_but_for_rounding, pearson, rank_correlation, subset_sums
from tracer.metrics.results import Result, mean_over_targets


@dataclass(frozen=True, repr=False, eq=False)
class RemovalCorrelation(Result):
    """Correlations of predicted and true changes over removals.

    Attributes:
        pearson: The mean of ``pearson_per_target`` over the targets where it is defined.
        spearman: The mean of ``spearman_per_target`` over the same targets.
        pearson_per_target: ``[M]``; NaN for targets that no removal changes differently from another.
        spearman_per_target: ``[M]``, likewise.
    """

    pearson: float
    spearman: float
    pearson_per_target: np.ndarray
    spearman_per_target: np.ndarray


def removal_correlation(scores: Array, removed: Array | Sequence[Array], changes: Array) -> RemovalCorrelation:
    """Return how well scores predict the effect of leaving rows out and training again.

    For each target the correlation, over removals, of the sum of the removed rows' scores with the true change: the
    leave-one-out and leave-k-out comparisons of Koh & Liang (2017), section 4.1, there with a scatter plot and
    Pearson's correlation. Single rows change an output by less than another seed of the training does, unless the
    model is convex: take the mean over several trainings, or remove more rows at once.

    Pearson's correlation asks for changes in proportion to scores, whatever the positive factor; Spearman's for their
    order. A target whose predicted changes are all the same, up to rounding, counts as 0. One whose true changes are
    all the same has no correlation: NaN, left out of the means.

    Args:
        scores: ``[N, M]``, finite; positive where the row raises the output.
        removed: The rows of each of R removals: ``[R]`` integers, one row each; ``[R, k]`` integers or a list of R
            lists of integers, several rows each; or ``[R, N]`` booleans, True where the row is left out.
        changes: ``[R, M]``, the output with all rows minus the output without the removed rows. Positive: the rows
            raised the output. For a loss take minus the loss as the output: the loss without them minus the loss with.

    Returns:
        Both correlations, of each target and their means.

    Raises:
        InputError: Shapes do not agree, an index is out of range or twice in a removal, values are NaN or infinite, or
            all changes are constant.
        InputTypeError: An array does not hold numbers, or ``removed`` neither integers nor booleans.

    >>> removal_correlation([[3.0], [1.0], [-2.0]], removed=[0, 1, 2], changes=[[0.3], [0.2], [0.0]])
    RemovalCorrelation(pearson=0.9972, spearman=1, pearson_per_target=[0.9972], spearman_per_target=[1])
    """
    scores, changes = numbers("scores", scores, "[N, M]"), numbers("changes", changes, "[R, M]")
    same_size("scores [N, M]", scores.shape[1], "changes [R, M]", changes.shape[1], "M")
    predicted, constant = _predicted_changes(removed, scores)
    same_size("removed [R]", len(predicted), "changes [R, M]", len(changes), "R")
    if len(changes) < 2:
        raise InputError("changes [R, M] must have at least 2 removals: a correlation is over removals.")
    unchanged = np.ptp(changes, axis=0) == 0
    per_target = []
    for correlation in (pearson, rank_correlation):
        found = np.where(constant, 0, correlation(predicted, changes))
        found[unchanged] = np.nan
        per_target.append(found)
    means = [mean_over_targets("The correlation", found, "all removals change them alike") for found in per_target]
    return RemovalCorrelation(means[0], means[1], per_target[0], per_target[1])


def _predicted_changes(removed: Array | Sequence[Array], scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum of the scores of the rows of each removal.

    Args:
        removed: See `removal_correlation`.
        scores: ``[N, M]``.

    Returns:
        ``[R, M]``, float64: the sums; ``[M]``, bool: targets whose sums are all equal but for rounding.

    Raises:
        InputError: An index is out of range or twice in a removal, or a removal is empty.
        InputTypeError: There are neither integers nor booleans.
    """
    groups = _groups(removed)
    if all(group.dtype == np.bool_ for group in groups):
        for index, group in enumerate(groups):
            same_size(f"removed[{index}] [N]", len(group), "scores [N, M]", len(scores), "N")
            if not group.any():
                raise InputError(f"removed[{index}] leaves no row out; True means that the row is left out.")
        return subset_sums(np.stack(groups), scores)
    sums, magnitudes = np.empty((2, len(groups), scores.shape[1]))
    for index, group in enumerate(groups):
        rows = row_indices(f"removed[{index}]", group, "[k]", len(scores))
        if len(np.unique(rows)) < len(rows):
            raise InputError(f"removed[{index}] names a row twice. Masks of 0 and 1 must be booleans.")
        chosen = scores[rows].astype(np.float64)
        sums[index], magnitudes[index] = chosen.sum(axis=0), np.abs(chosen).sum(axis=0)
    return sums, equal_but_for_rounding(sums, magnitudes, max(map(len, groups)))


def _groups(removed: Array | Sequence[Array]) -> list[np.ndarray]:
    """Return an array for each removal: the indices of its rows, or a mask of all rows."""
    if isinstance(removed, Sequence) and not all(isinstance(row, int | np.integer) for row in removed):
        return [as_array(f"removed[{index}]", rows, "[k]") for index, rows in enumerate(removed)]
    dimensions = np.ndim(removed)  # type: ignore[arg-type]  # torch tensors have dimensions, too
    array = as_array("removed", removed, "[R, k]" if dimensions == 2 else "[R]")  # type: ignore[arg-type]
    if array.dtype == np.bool_ and array.ndim == 1:
        raise InputError(f"removed must be masks [R, N], one for each removal, got one of shape {list(array.shape)}.")
    return list(array if array.ndim == 2 else array[:, None])
