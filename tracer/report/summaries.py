"""Summaries of a score matrix, read block by block: per row, per target, per class, and which rows are contradicted.

Layout: N train rows, M targets, C classes; scores ``[N, M]``, positive for proponents. Arrays in, arrays out. Only
blocks of rows are held, never the whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracer.errors import InputError, NonFiniteError
from tracer.types import TopK

SPREAD_FACTOR = 1.25
"""How far above the median a row's harm over help must be, in units of the distance from the 10 % quantile to it."""

TOP_PER_CLASS = 10
"""How many of the rows that help a class most, and of those that harm it most, are kept."""

NUM_FOLDS = 10
"""Parts of the targets that are left out in turn, for the jackknife."""

_BLOCK_BYTES = 64 << 20
_HISTOGRAM_SCORES = 20_000_000
_DECADES, _BINS_A_DECADE = 6, 5


@dataclass(frozen=True)
class ClassSummary:
    """What scores say by class: labels of train rows on one side, labels of targets on the other.

    Attributes:
        influence: ``[C, C]``, the mean score of train rows of class a (first) on targets of class b; NaN where a class
            has no row or no target.
        train_counts: ``[C]``, int64, train rows of each class.
        target_counts: ``[C]``, int64, targets of each class.
        ratio: ``[N]``, float32, harm over help, see `summarize_scores`; infinite where a row helps no class.
        harmed: ``[N]``, int64, the class that the row harms most.
        contradicted: ``[N]``, bool, where ``ratio`` is above `contradiction_threshold`.
        fold_shares: ``[F]``, the share of contradicted rows with a part of the targets left out; empty where there are
            too few targets to leave any out.
        helpful: The rows of greatest mean score on the targets of each class, ``[C, k]``, strongest first; rows of -1
            for classes without targets.
        harmful: The rows of least mean score, likewise.
    """

    influence: np.ndarray
    train_counts: np.ndarray
    target_counts: np.ndarray
    ratio: np.ndarray
    harmed: np.ndarray
    contradicted: np.ndarray
    fold_shares: np.ndarray
    helpful: TopK
    harmful: TopK


@dataclass(frozen=True)
class ScoreSummary:
    """What is to be known of a score matrix without looking at it again.

    Attributes:
        row_mean: ``[N]``, float64, the mean score of each train row over targets.
        row_mean_abs: ``[N]``, float64, the mean of its absolute scores.
        target_mean: ``[M]``, float64, the mean score of each target over train rows.
        target_rms: ``[M]``, float64, the root of its mean squared score.
        edges: ``[B + 1]``, float64, bins of the scores: even in the logarithm on both sides of a bin around zero.
        counts: ``[B]``, int64, how many scores are in each.
        row_step: Every how many rows' scores are counted in the bins.
        classes: What scores say by class; None where labels are not known.
    """

    row_mean: np.ndarray
    row_mean_abs: np.ndarray
    target_mean: np.ndarray
    target_rms: np.ndarray
    edges: np.ndarray
    counts: np.ndarray
    row_step: int
    classes: ClassSummary | None


def summarize_scores(
    scores: Any,
    train_labels: np.ndarray | None = None,
    target_labels: np.ndarray | None = None,
    num_classes: int | None = None,
) -> ScoreSummary:
    """Summarize scores in two passes over blocks of rows.

    A row's *help* and *harm* are the largest and the negated smallest of its mean scores on the targets of each class,
    each target's scores first divided by their root mean square, so that targets with large gradients do not outweigh
    the others. A row that carries the label of its content helps one class much and harms the others a little. A row
    of content b with label a harms class b, to whose targets it is similar, about as much as it helps a.

    Args:
        scores: ``[N, M]``, finite, anything that gives rows as a numpy array when it is sliced.
        train_labels: ``[N]``, integers from 0 to C - 1, or None.
        target_labels: ``[M]``, likewise; both or none.
        num_classes: C; None: as many as labels have.

    Returns:
        The summary; ``classes`` is None without labels.

    Raises:
        InputError: The shapes do not fit each other, or labels are no class indices.
        NonFiniteError: Scores are NaN or infinite.

    >>> found = summarize_scores(np.array([[2.0, -1.0], [0.0, 1.0]]), np.array([0, 1]), np.array([0, 1]))
    >>> found.row_mean.tolist(), found.target_mean.tolist()
    ([0.5, 0.5], [1.0, 0.0])
    >>> found.classes.influence.tolist()
    [[2.0, -1.0], [0.0, 1.0]]
    """
    num_rows, num_targets = (int(size) for size in scores.shape) if len(scores.shape) == 2 else (0, 0)
    if not num_rows or not num_targets:
        raise InputError(f"scores have shape {list(scores.shape)}; expected [train rows, targets], at least one each.")
    row_mean, row_mean_abs = np.zeros(num_rows), np.zeros(num_rows)
    total, squares, largest = np.zeros(num_targets), np.zeros(num_targets), 0.0
    for start, block in _blocks(scores):
        if not np.isfinite(block).all():
            bad = start + np.flatnonzero(~np.isfinite(block).all(axis=1))
            raise NonFiniteError(f"The scores of train rows {bad[:5].tolist()} are NaN or infinite; leave them out.")
        rows = slice(start, start + len(block))
        row_mean[rows], row_mean_abs[rows] = block.mean(axis=1), np.abs(block).mean(axis=1)
        total += block.sum(axis=0)
        squares += np.square(block).sum(axis=0)
        largest = max(largest, float(np.abs(block).max()))
    rms = np.sqrt(squares / num_rows)
    by_class = None
    if train_labels is not None and target_labels is not None:
        train, target = _labels(train_labels, num_rows, "train"), _labels(target_labels, num_targets, "target")
        by_class = _ClassSums(train, target, max(1 + int(max(train.max(), target.max())), num_classes or 0))
    edges, row_step = _edges(largest), max(1, num_rows * num_targets // _HISTOGRAM_SCORES)
    counts = np.zeros(len(edges) - 1, dtype=np.int64)
    for start, block in _blocks(scores):
        counts += np.histogram(block[-start % row_step :: row_step], edges)[0]
        if by_class is not None:
            by_class.add(start, block, rms)
    classes = None if by_class is None else by_class.result()
    return ScoreSummary(row_mean, row_mean_abs, total / num_rows, rms, edges, counts, row_step, classes)


def contradiction_threshold(ratio: np.ndarray) -> float:
    """Return above which harm over help a row is contradicted: the median, plus a multiple of the lower spread.

    In logarithms, with m the median and l the 10 % quantile, it is ``m + 1.25 (m - l)``. The lower half is that of
    rightly labelled rows as long as most rows are, so wrong labels hardly move the threshold, and it follows what is
    usual for the model, the estimator and the number of classes.

    Args:
        ratio: ``[N]``, harm over help.

    Returns:
        The threshold.

    >>> round(contradiction_threshold(np.array([0.1, 0.2, 0.2, 0.4, 5.0])), 3)
    0.336
    """
    logs = np.log(np.clip(ratio, 1e-3, 1e3, dtype=np.float64))
    low, middle = np.quantile(logs, (0.1, 0.5))
    return float(np.exp(middle + SPREAD_FACTOR * (middle - low)))


def _blocks(scores: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and the scores of blocks of rows, float64."""
    num_rows, num_targets = scores.shape
    step = max(1, _BLOCK_BYTES // (8 * num_targets))
    for start in range(0, num_rows, step):
        yield start, np.asarray(scores[start : start + step], dtype=np.float64)


def _edges(largest: float) -> np.ndarray:
    """Return symmetric bin edges, even in the logarithm but for the middle bin; the outermost lie at the largest."""
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
            "from 0 on."
        )
    return array.astype(np.int64)


class _ClassSums:
    """Adds up scores by class while blocks of rows pass.

    Args:
        train: ``[N]``, class indices.
        target: ``[M]``, class indices.
        num_classes: C.
    """

    def __init__(self, train: np.ndarray, target: np.ndarray, num_classes: int) -> None:
        self._train, self._num_classes = train, num_classes
        self._train_counts = np.bincount(train, minlength=num_classes)
        self._target_counts = np.bincount(target, minlength=num_classes)
        self._present = np.flatnonzero(self._target_counts)
        order = np.argsort(target, kind="stable")
        place = np.arange(len(target)) - np.searchsorted(target[order], target[order])  # within the class
        most = int(self._target_counts[self._present].min())
        self._num_folds = min(NUM_FOLDS, most) if most > 1 else 0  # without a fold every class must keep targets
        fold = place % max(1, self._num_folds)
        self._order = order[np.lexsort((fold, target[order]))]  # by class, then by fold
        pairs = np.sort(target[order] * NUM_FOLDS + fold)
        self._cells, self._starts, self._sizes = np.unique(pairs, return_index=True, return_counts=True)
        self._sums = np.zeros((self._num_classes, self._num_classes))
        self._ratio = np.zeros(len(train), dtype=np.float32)
        self._harmed = np.zeros(len(train), dtype=np.int64)
        self._fold_ratios = np.zeros((self._num_folds, len(train)), dtype=np.float32)
        self._num_top = min(TOP_PER_CLASS, len(train))
        none = (0, len(self._present))
        self._ends = [TopK(np.zeros(none, dtype=np.int64), np.zeros(none)) for _ in range(2)]

    def add(self, start: int, block: np.ndarray, rms: np.ndarray) -> None:
        """Add the scores ``[n, M]`` of rows from ``start`` on."""
        rows = slice(start, start + len(block))
        plain = np.add.reduceat(block[:, self._order], self._starts, axis=1)  # [n, cells]
        np.add.at(self._sums, (self._train[rows][:, None], self._cells // NUM_FOLDS), plain)
        scaled = np.divide(block, rms, out=np.zeros_like(block), where=rms > 0)
        cells = np.add.reduceat(scaled[:, self._order], self._starts, axis=1)
        means = self._class_means(cells, np.ones(len(self._cells), dtype=bool))
        self._ratio[rows] = _harm_over_help(means)
        self._harmed[rows] = self._present[means.argmin(axis=1)]
        for fold in range(self._num_folds):
            kept = self._class_means(cells, self._cells % NUM_FOLDS != fold)
            self._fold_ratios[fold, rows] = _harm_over_help(kept)
        self._add_ends(start, self._class_means(plain, np.ones(len(self._cells), dtype=bool)))

    def _add_ends(self, start: int, means: np.ndarray) -> None:
        """Keep the rows of greatest and of least mean score ``[n, classes that have targets]`` on each class."""
        indices = np.arange(start, start + len(means))[:, None].repeat(means.shape[1], axis=1)
        for place, sign in enumerate((-1.0, 1.0)):
            known = self._ends[place]
            rows = np.concatenate([known.indices, indices])
            values = np.concatenate([known.scores, means])
            best = np.argsort(sign * values, axis=0, kind="stable")[: self._num_top]
            self._ends[place] = TopK(np.take_along_axis(rows, best, 0), np.take_along_axis(values, best, 0))

    def _end(self, place: int) -> TopK:
        """Return one end for all classes, ``[C, k]``."""
        rows = np.full((self._num_classes, self._num_top), -1, dtype=np.int64)
        values = np.zeros(rows.shape)
        rows[self._present], values[self._present] = self._ends[place].indices.T, self._ends[place].scores.T
        return TopK(rows, values)

    def _class_means(self, cells: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Return the mean of the kept cells by class, ``[n, classes that have targets]``."""
        classes = self._cells[kept] // NUM_FOLDS
        starts = np.searchsorted(classes, self._present)
        sizes = np.add.reduceat(self._sizes[kept], starts)
        return np.add.reduceat(cells[:, kept], starts, axis=1) / sizes

    def result(self) -> ClassSummary:
        """Return what was added up."""
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
    """Return the negated least over the greatest mean ``[n]``: 0 where nothing is harmed, infinite without help."""
    harm, help_ = np.maximum(-means.min(axis=1), 0.0), np.maximum(means.max(axis=1), 0.0)
    without = np.where(harm > 0, np.inf, 0.0)
    return np.divide(harm, help_, out=without, where=help_ > 0)
