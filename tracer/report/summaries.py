"""Summaries of a score matrix by training example, target and class.

Layout: N training examples, M targets, C classes; scores ``[N, M]``, positive for proponents. Scores are read in blocks
of training examples, so the whole matrix is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from tracer.errors import InputError, NonFiniteError
from tracer.types import TopK

TOP_PER_CLASS = 10  # the number of examples that help a class most, and of those that harm it most, in a summary
_BLOCK_BYTES = 64 << 20
_HISTOGRAM_SCORES = 20_000_000
_DECADES, _BINS_A_DECADE = 6, 5


@dataclass(frozen=True)
class ClassSummary:
    """Scores by the classes of training examples and of targets; k is `TOP_PER_CLASS` or N."""

    influence: Float64[np.ndarray, "C C"]  # mean score of training class on target class, NaN if one is empty
    train_counts: Int64[np.ndarray, " C"]
    target_counts: Int64[np.ndarray, " C"]
    helpful: TopK  # [C, k], greatest mean score on the targets of each class; index -1 without targets
    harmful: TopK  # [C, k], least mean score


@dataclass(frozen=True)
class ScoreSummary:
    """Everything that a report needs of a score matrix."""

    train_mean: Float64[np.ndarray, " N"]  # over targets
    train_mean_abs: Float64[np.ndarray, " N"]
    target_mean: Float64[np.ndarray, " M"]  # over training examples
    target_rms: Float64[np.ndarray, " M"]
    edges: Float64[np.ndarray, " E"]  # E = B + 1, even in the logarithm on both sides of a bin around zero
    counts: Int64[np.ndarray, " B"]
    train_step: int  # counts are of every train_step-th training example
    classes: ClassSummary | None


def summarize_scores(
    scores: Any,
    train_labels: np.ndarray | None = None,
    target_labels: np.ndarray | None = None,
    num_classes: int | None = None,
) -> ScoreSummary:
    """Return a summary of scores ``[N, M]`` and of class indices, in two passes over blocks of training examples.

    Raises:
        InputError: If shapes do not fit each other, or labels are not class indices.
        NonFiniteError: If scores are NaN or infinite.

    >>> found = summarize_scores(np.array([[2.0, -1.0], [0.0, 1.0]]), np.array([0, 1]), np.array([0, 1]))
    >>> found.train_mean.tolist(), found.target_mean.tolist()
    ([0.5, 0.5], [1.0, 0.0])
    >>> found.classes.influence.tolist()
    [[2.0, -1.0], [0.0, 1.0]]
    """
    num_train, num_targets = (int(size) for size in scores.shape) if len(scores.shape) == 2 else (0, 0)
    if not num_train or not num_targets:
        raise InputError(f"scores have shape {list(scores.shape)}; expected [N, M], at least one each.")
    train_mean, train_mean_abs = np.zeros(num_train), np.zeros(num_train)
    total, squares, largest = np.zeros(num_targets), np.zeros(num_targets), 0.0
    for start, block in matrix_blocks(scores, _BLOCK_BYTES // 8, np.float64):
        if not np.isfinite(block).all():
            bad = start + np.flatnonzero(~np.isfinite(block).all(axis=1))
            raise NonFiniteError(
                f"scores are NaN or infinite for training examples {bad[:5].tolist()}; leave these examples out."
            )
        rows = slice(start, start + len(block))
        train_mean[rows], train_mean_abs[rows] = block.mean(axis=1), np.abs(block).mean(axis=1)
        total += block.sum(axis=0)
        squares += np.square(block).sum(axis=0)
        largest = max(largest, float(np.abs(block).max()))
    rms = np.sqrt(squares / num_train)
    by_class = None
    if train_labels is not None and target_labels is not None:
        train, target = _labels(train_labels, num_train, "train"), _labels(target_labels, num_targets, "target")
        by_class = _ClassSums(train, target, max(1 + int(max(train.max(), target.max())), num_classes or 0))
    edges, train_step = _edges(largest), max(1, num_train * num_targets // _HISTOGRAM_SCORES)
    counts = np.zeros(len(edges) - 1, dtype=np.int64)
    for start, block in matrix_blocks(scores, _BLOCK_BYTES // 8, np.float64):
        counts += np.histogram(block[-start % train_step :: train_step], edges)[0]
        if by_class is not None:
            by_class.add(start, block)
    classes = None if by_class is None else by_class.result()
    return ScoreSummary(train_mean, train_mean_abs, total / num_train, rms, edges, counts, train_step, classes)


def matrix_blocks(matrix: Any, block_scores: int, dtype: Any = None) -> Iterator[tuple[int, np.ndarray]]:
    """Yield blocks of about so many scores of anything that returns rows if it is sliced, each with its first row."""
    step = max(1, block_scores // int(matrix.shape[1]))
    for start in range(0, matrix.shape[0], step):
        yield start, np.asarray(matrix[start : start + step], dtype)


def _edges(largest: float) -> np.ndarray:
    """Return symmetric bin edges up to ``largest``, even in the logarithm except for the middle bin."""
    if largest == 0.0:
        return np.array([-1.0, 1.0])
    side = largest * 10.0 ** np.linspace(-_DECADES, 0, _DECADES * _BINS_A_DECADE + 1)
    side[-1] = largest
    return np.concatenate([-side[::-1], side])


def _labels(labels: Any, size: int, role: str) -> np.ndarray:
    """Check class indices and return them as int64."""
    array = np.asarray(labels)
    if array.shape != (size,) or array.dtype.kind not in "iu" or array.min() < 0:
        raise InputError(
            f"{role}_labels have shape {list(array.shape)} and dtype {array.dtype}; expected [{size}] class indices "
            "of 0 or more."
        )
    return array.astype(np.int64)


class _ClassSums:
    """Sums of scores by class, from blocks of training examples, in the order of the examples."""

    def __init__(self, train: np.ndarray, target: np.ndarray, num_classes: int) -> None:
        self._train = train
        self._train_counts = np.bincount(train, minlength=num_classes)
        self._target_counts = np.bincount(target, minlength=num_classes)
        self._present = np.flatnonzero(self._target_counts)
        self._order = np.argsort(target, kind="stable")
        self._starts = np.searchsorted(target[self._order], self._present)
        self._sums = np.zeros((num_classes, num_classes))
        none = (0, len(self._present))
        self._ends = [TopK(np.zeros(none, dtype=np.int64), np.zeros(none))] * 2  # greatest and least

    def add(self, start: int, block: np.ndarray) -> None:
        """Add the scores ``[n, M]`` of the training examples from ``start`` on."""
        sums = np.add.reduceat(block[:, self._order], self._starts, axis=1)  # [n, classes with targets]
        np.add.at(self._sums, (self._train[start : start + len(block), None], self._present), sums)
        means = sums / self._target_counts[self._present]
        indices = np.arange(start, start + len(means))[:, None].repeat(means.shape[1], axis=1)
        for place, sign in enumerate((-1.0, 1.0)):
            known = self._ends[place]
            rows = np.concatenate([known.indices, indices])
            values = np.concatenate([known.scores, means])
            best = np.argsort(sign * values, axis=0, kind="stable")[:TOP_PER_CLASS]
            self._ends[place] = TopK(np.take_along_axis(rows, best, 0), np.take_along_axis(values, best, 0))

    def _end(self, place: int) -> TopK:
        """Return the greatest (0) or least (1) mean scores of all classes, ``[C, k]``."""
        indices, values = self._ends[place]
        found = TopK(np.full((len(self._sums), len(indices)), -1), np.zeros((len(self._sums), len(indices))))
        found.indices[self._present], found.scores[self._present] = indices.T, values.T
        return found

    def result(self) -> ClassSummary:
        """Return the summary of all blocks."""
        pairs = self._train_counts[:, None] * self._target_counts[None, :]
        influence = np.divide(self._sums, pairs, out=np.full_like(self._sums, np.nan), where=pairs > 0)
        return ClassSummary(influence, self._train_counts, self._target_counts, self._end(0), self._end(1))
