"""Ranks with ties, correlations by column, and sums of scores over subsets of training examples."""

from __future__ import annotations

import numpy as np

from tracer.errors import InputError
from tracer.metrics.inputs import Array, numbers

_BLOCK = 1 << 22
"""The number of float64 values that are converted and ranked at once."""


def spearman(x: Array, y: Array) -> np.ndarray:
    """Return Spearman's rank correlation of each column of two arrays.

    Spearman (1904): Pearson's correlation of the ranks, with average ranks for ties.

    Args:
        x: ``[S, M]``, finite.
        y: ``[S, M]``, finite.

    Returns:
        ``[M]``, float64, from -1 to 1; NaN if a column of either is constant.

    Raises:
        InputError: If the shapes differ, S is below 2, or a value is NaN or infinite.

    >>> spearman([[1, 1], [2, 2], [9, 2]], [[0.1, 5], [0.2, 4], [0.3, 3]]).round(3).tolist()
    [1.0, -0.866]
    """
    x, y = numbers("x", x, "[S, M]"), numbers("y", y, "[S, M]")
    if x.shape != y.shape or len(x) < 2:
        raise InputError(f"x and y must be [S, M] alike with S of at least 2, got {list(x.shape)} and {list(y.shape)}.")
    return rank_correlation(x, y)


def rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return `spearman` of checked arrays ``[S, M]``."""
    columns = max(1, _BLOCK // len(x))
    parts = [slice(first, first + columns) for first in range(0, x.shape[1], columns)]
    return np.concatenate([pearson(average_ranks(x[:, part]), average_ranks(y[:, part])) for part in parts])


def pearson(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Pearson's correlation of each column of two arrays ``[S, M]``: ``[M]``, NaN if a column is constant.

    >>> pearson(np.array([[1.0], [2.0], [3.0]]), np.array([[0.0], [0.0], [1e-200]])).round(3).tolist()
    [0.866]
    """
    x, y = _centred(x), _centred(y)
    undefined = ~(x.any(axis=0) & y.any(axis=0))
    with np.errstate(invalid="ignore"):
        found = (x * y).sum(axis=0) / np.sqrt(np.square(x).sum(axis=0) * np.square(y).sum(axis=0))
    return np.where(undefined, np.nan, np.clip(found, -1, 1))


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Return the rank of each value in its column ``[S, M]``, from 1 to S; equal values share their mean rank.

    >>> average_ranks(np.array([[5], [1], [5], [7]])).ravel().tolist()
    [2.5, 1.0, 2.5, 4.0]
    """
    order, first, last = sorted_ties(values)
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, axis=0)
    return ranks


def sorted_ties(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each column's ascending order, and the first and last place of the value at each place: ``[S, M]``."""
    order = np.argsort(values, axis=0, kind="stable")
    ordered = np.take_along_axis(values, order, axis=0)
    differs = ordered[1:] != ordered[:-1]
    edge = np.ones((1, values.shape[1]), np.bool_)
    places = np.arange(len(values))[:, None]
    first = np.maximum.accumulate(np.where(np.concatenate([edge, differs]), places, 0), axis=0)
    ends = np.where(np.concatenate([differs, edge]), places, len(values) - 1)
    return order, first, np.minimum.accumulate(ends[::-1], axis=0)[::-1]


def subset_sums(masks: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sums of scores over subsets ``[S, M]``, and the targets whose sums are equal but for rounding ``[M]``."""
    num_subsets, num_rows = masks.shape
    sums = np.zeros((num_subsets, scores.shape[1]))
    magnitudes = np.zeros_like(sums)
    rows = max(1, _BLOCK // max(num_subsets, scores.shape[1]))
    for first in range(0, num_rows, rows):
        chosen = masks[:, first : first + rows].astype(np.float64)
        block = scores[first : first + rows].astype(np.float64)
        sums += chosen @ block
        magnitudes += chosen @ np.abs(block)
    return sums, equal_but_for_rounding(sums, magnitudes, num_rows)


def equal_but_for_rounding(sums: np.ndarray, magnitudes: np.ndarray, num_terms: int) -> np.ndarray:
    """Return the targets whose ``sums [S, M]`` are equal up to the rounding of adding ``num_terms`` values: ``[M]``."""
    if not np.isfinite(magnitudes).all():
        raise InputError("scores [N, M] are so large that sums of them overflow float64: divide all by one number.")
    return np.ptp(sums, axis=0) <= num_terms * np.finfo(np.float64).eps * magnitudes.max(axis=0)


def _centred(values: np.ndarray) -> np.ndarray:
    """Return columns with mean zero in units of their largest value; zeros if all values are equal."""
    values = values.astype(np.float64)
    largest = np.abs(values).max(axis=0)
    values = values / np.where(largest > 0, largest, 1)  # squares neither overflow nor vanish
    values = values - values[:1]  # equal values become exactly zero
    return values - values.mean(axis=0)
