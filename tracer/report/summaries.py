"""Summaries of a score matrix by training example, target and class, and the examples that targets contradict.

Layout: N training examples, M targets, C classes; scores ``[N, M]``, positive for proponents. Scores are read in blocks
of training examples, so the whole matrix is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64

from tracer.errors import InputError, NonFiniteError
from tracer.types import TopK

SPREAD_FACTOR = 1.25
"""The distance of the threshold from the median, in units of the distance from the 10 % quantile to the median."""

TOP_PER_CLASS = 10  # the number of examples that help a class most, and of those that harm it most, in a summary
NUM_FOLDS = 10  # folds of the targets that the jackknife leaves out in turn
_BLOCK_BYTES = 64 << 20
_HISTOGRAM_SCORES = 20_000_000
_DECADES, _BINS_A_DECADE = 6, 5


@dataclass(frozen=True)
class ClassSummary:
    """Scores by the classes of training examples and of targets; k is `TOP_PER_CLASS` or N."""

    influence: Float64[np.ndarray, "C C"]  # mean score of training class on target class, NaN if one is empty
    train_counts: Int64[np.ndarray, " C"]
    target_counts: Int64[np.ndarray, " C"]
    ratio: Float32[np.ndarray, " N"]  # harm over help, infinite without help
    harmed: Int64[np.ndarray, " N"]  # the class that the example harms most
    contradicted: Bool[np.ndarray, " N"]  # ratio is above contradiction_threshold
    fold_shares: Float64[np.ndarray, " F"]  # share of contradicted examples without each fold of the targets
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

    The *help* and *harm* of an example are the largest and the negated smallest of its mean scores on the targets of
    each class. Each target's scores are first divided by their root mean square, so that targets with large gradients
    do not dominate. An example with a correct label helps one class much and harms the other classes a little. An
    example of class b with the label a harms class b, to whose targets it is similar, about as much as it helps a.

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
            by_class.add(start, block, rms)
    classes = None if by_class is None else by_class.result()
    return ScoreSummary(train_mean, train_mean_abs, total / num_train, rms, edges, counts, train_step, classes)


def contradiction_threshold(ratio: np.ndarray) -> float:
    """Return the harm over help above which an example is contradicted: the median plus 1.25 times the lower spread.

    >>> round(contradiction_threshold(np.array([0.1, 0.2, 0.2, 0.4, 5.0])), 3)
    0.336
    """
    # The lower half consists of correct labels as long as most labels are correct, so wrong labels hardly move the
    # threshold, and it adapts to the model, the estimator and the number of classes.
    logs = np.log(np.clip(ratio, 1e-3, 1e3, dtype=np.float64))
    low, middle = np.quantile(logs, (0.1, 0.5))
    return float(np.exp(middle + SPREAD_FACTOR * (middle - low)))


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
    """Sums of scores by class and fold, from blocks of training examples, in the order of the examples."""

    def __init__(self, train: np.ndarray, target: np.ndarray, num_classes: int) -> None:
        self._train = train
        self._train_counts = np.bincount(train, minlength=num_classes)
        self._target_counts = np.bincount(target, minlength=num_classes)
        self._present = np.flatnonzero(self._target_counts)
        order = np.argsort(target, kind="stable")
        place = np.arange(len(target)) - np.searchsorted(target[order], target[order])  # within the class
        most = int(self._target_counts[self._present].min())
        # every class must have targets outside each fold
        self._num_folds = min(NUM_FOLDS, most) if most > 1 else 0
        pairs = target[order] * NUM_FOLDS + place % max(1, self._num_folds)
        self._order = order[np.argsort(pairs, kind="stable")]  # by class, then by fold
        self._cells, self._starts, self._sizes = np.unique(np.sort(pairs), return_index=True, return_counts=True)
        self._sums = np.zeros((num_classes, num_classes))
        self._ratio = np.zeros(len(train), dtype=np.float32)
        self._harmed = np.zeros(len(train), dtype=np.int64)
        self._fold_ratios = np.zeros((self._num_folds, len(train)), dtype=np.float32)
        none = (0, len(self._present))
        self._ends = [TopK(np.zeros(none, dtype=np.int64), np.zeros(none))] * 2  # greatest and least

    def add(self, start: int, block: np.ndarray, rms: np.ndarray) -> None:
        """Add the scores ``[n, M]`` of the training examples from ``start`` on."""
        rows = slice(start, start + len(block))
        plain = np.add.reduceat(block[:, self._order], self._starts, axis=1)  # [n, cells]
        np.add.at(self._sums, (self._train[rows][:, None], self._cells // NUM_FOLDS), plain)
        scaled = np.divide(block, rms, out=np.zeros_like(block), where=rms > 0)
        cells = np.add.reduceat(scaled[:, self._order], self._starts, axis=1)
        means = self._class_means(cells)
        self._ratio[rows] = _harm_over_help(means)
        self._harmed[rows] = self._present[means.argmin(axis=1)]
        for fold in range(self._num_folds):
            self._fold_ratios[fold, rows] = _harm_over_help(self._class_means(cells, self._cells % NUM_FOLDS != fold))
        self._add_ends(start, self._class_means(plain))

    def _add_ends(self, start: int, means: np.ndarray) -> None:
        """Merge mean scores ``[n, classes with targets]`` into the greatest and the least of each class."""
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

    def _class_means(self, cells: np.ndarray, chosen: np.ndarray | EllipsisType = ...) -> np.ndarray:
        """Return the mean of all or the chosen cells by class, ``[n, classes with targets]``."""
        classes = self._cells[chosen] // NUM_FOLDS
        starts = np.searchsorted(classes, self._present)
        sizes = np.add.reduceat(self._sizes[chosen], starts)
        return np.add.reduceat(cells[:, chosen], starts, axis=1) / sizes

    def result(self) -> ClassSummary:
        """Return the summary of all blocks."""
        pairs = self._train_counts[:, None] * self._target_counts[None, :]
        influence = np.divide(self._sums, pairs, out=np.full_like(self._sums, np.nan), where=pairs > 0)
        above = [ratio > contradiction_threshold(ratio) for ratio in self._fold_ratios]
        return ClassSummary(
            influence=influence,
            train_counts=self._train_counts,
            target_counts=self._target_counts,
            ratio=self._ratio,
            harmed=self._harmed,
            contradicted=self._ratio > contradiction_threshold(self._ratio),
            fold_shares=np.array([float(each.mean()) for each in above]),
            helpful=self._end(0),
            harmful=self._end(1),
        )


def _harm_over_help(means: np.ndarray) -> np.ndarray:
    """Return the negated least over the greatest mean ``[n]``: 0 without harm, else infinite without help."""
    harm, help_ = np.maximum(-means.min(axis=1), 0.0), np.maximum(means.max(axis=1), 0.0)
    without = np.where(harm > 0, np.inf, 0.0)
    return np.divide(harm, help_, out=without, where=help_ > 0)
