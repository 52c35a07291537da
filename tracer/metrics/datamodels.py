"""The linear datamodeling score: do scores predict the outputs of models trained on subsets of the training set?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer._core.validation import check_integer
from tracer.errors import InputError
from tracer.metrics.inputs import Array, flags, numbers, same_size
from tracer.metrics.ranks import rank_correlation, sorted_ties, subset_sums
from tracer.metrics.values import Result, mean_over_targets

# Layout of the bootstrap: subsets × resamples, [S, B], so that picking subsets in order copies whole rows.
_BLOCK = 1 << 18
"""Subsets × resamples that are computed at once: they fit into a core's cache."""


@dataclass(frozen=True, repr=False, eq=False)
class LDS(Result):
    """The linear datamodeling score of a matrix of scores.

    Attributes:
        mean: The mean of ``per_target`` over the targets for which it is defined.
        interval: The lower and upper end of the bootstrap interval of ``mean``; NaN without resamples.
        per_target: ``[M]``, Spearman's correlation; NaN for targets whose outputs are all equal.
        resampled: ``[num_resamples]``, the mean on each resample of the subsets; lower than ``mean`` on average.
    """

    mean: float
    interval: tuple[float, float]
    per_target: np.ndarray
    resampled: np.ndarray

    def difference(self, other: LDS, confidence: float = 0.95) -> tuple[float, float]:
        """Return the interval of ``self.mean - other.mean`` for two methods on the same subsets and targets.

        Both are computed on the same resamples, so common effects of the subsets cancel, and the interval is narrower
        than the two intervals suggest. If it does not contain 0, the methods differ.

        Args:
            other: The result of a call with the same masks, outputs, number of resamples and seed.
            confidence: As in `lds`.

        Returns:
            The lower and upper end.

        Raises:
            InputError: If the numbers of resamples differ or are 0, or ``confidence`` is not between 0 and 1.
        """
        if len(self.resampled) != len(other.resampled) or len(self.resampled) == 0:
            raise InputError(
                f"A difference needs equally many resamples of both, of the same seed; got {len(self.resampled)} and "
                f"{len(other.resampled)}."
            )
        return _interval(self.mean - other.mean, self.resampled - other.resampled, confidence, 2)


def lds(
    scores: Array, masks: Array, outputs: Array, *, num_resamples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> LDS:
    """Return the linear datamodeling score (LDS) of Park et al. (2023), *TRAK*, definition 2.3.

    The model is retrained on random subsets of the training set, usually halves. The predicted output on a subset is
    the sum of its examples' scores, as in the linear datamodels of Ilyas et al. (2022). The score of a target is
    Spearman's correlation of predicted and true outputs over subsets, with average ranks for ties; ``mean`` is its mean
    over targets.

    The interval is a basic bootstrap over subsets (Davison & Hinkley 1997, section 5.2): subsets are drawn with
    replacement, the same ones for all targets, and quantiles of the deviations from ``mean`` are subtracted from
    ``mean``. Repeated subsets are ties, which lower rank correlations; the percentile bootstrap would not correct that.
    The interval covers the choice of subsets, not that of targets or of the training run that was scored.

    If the predictions of a target are all equal, up to rounding, it counts as 0. If its outputs are all equal, it is
    NaN and left out of the mean. The same holds within a resample.

    Args:
        scores: ``[N, M]``, finite; positive if the example raises the output.
        masks: ``[S, N]``, True or 1 for examples in the subset.
        outputs: ``[S, M]``, the output of each target after training on each subset: the margin, or another quantity
            that increases as positive scores promise (for example minus the loss). Average over several trainings on
            one subset.
        num_resamples: The number of resamples for the interval. Default: 1000; 0 for none.
        confidence: The confidence level of the interval. Default: 0.95.
        seed: The seed of the resampling, at least 0.

    Returns:
        The mean, its interval, and the value of each target.

    Raises:
        InputError: If shapes do not agree, values are NaN, infinite or not 0 or 1, or all outputs are constant.
        InputTypeError: If an array does not hold numbers, or a count is not an integer.

    >>> masks = [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    >>> lds([[3.0, 1.0], [2.0, 1.0], [1.0, 1.0]], masks, [[9.0, 1.0], [8.0, 2.0], [7.0, 3.0]], num_resamples=0)
    LDS(mean=0.5, interval=(nan, nan), per_target=[1, 0], resampled=[])
    """
    scores, masks = numbers("scores", scores, "[N, M]"), flags("masks", masks, "[S, N]")
    outputs = numbers("outputs", outputs, "[S, M]")
    same_size("scores [N, M]", len(scores), "masks [S, N]", masks.shape[1], "N")
    same_size("masks [S, N]", len(masks), "outputs [S, M]", len(outputs), "S")
    same_size("scores [N, M]", scores.shape[1], "outputs [S, M]", outputs.shape[1], "M")
    if len(masks) < 2:
        raise InputError("masks [S, N] must have at least 2 subsets: a correlation is over subsets.")
    num_resamples = check_integer(num_resamples, "num_resamples", 0)
    seed = check_integer(seed, "seed", 0)
    predicted, constant = subset_sums(masks, scores)
    predicted[:, constant] = 0  # rounding would rank them
    per_target = np.where(constant, 0, rank_correlation(predicted, outputs))
    per_target[np.ptp(outputs, axis=0) == 0] = np.nan
    mean = mean_over_targets("LDS", per_target, "outputs are the same for all subsets")
    resampled = _resampled_means(predicted, outputs, num_resamples, seed)
    return LDS(mean, _interval(mean, resampled, confidence, 1), per_target, resampled)


def _interval(estimate: float, resampled: np.ndarray, confidence: float, limit: float) -> tuple[float, float]:
    """Return the basic bootstrap interval, clipped to ``[-limit, limit]``; NaN if no resample is defined."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, got {confidence}.")
    defined = resampled[~np.isnan(resampled)]
    if not defined.size:
        return float("nan"), float("nan")
    ends = 2 * estimate - np.quantile(defined, [(1 + confidence) / 2, (1 - confidence) / 2])
    low, high = np.clip(ends, -limit, limit).tolist()
    return low, high


def _resampled_means(predicted: np.ndarray, outputs: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Return the mean over targets of the rank correlation on each resample: ``[num_resamples]``, NaN if undefined."""
    num_subsets, num_targets = outputs.shape
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    step = max(1, _BLOCK // num_subsets)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        drawn = generator.integers(num_subsets, size=(size, num_subsets)) + np.arange(size)[:, None] * num_subsets
        times = np.bincount(drawn.ravel(), minlength=size * num_subsets).reshape(size, num_subsets)
        times = np.ascontiguousarray(times.T, dtype=np.float64)  # [S, B]
        total, defined = np.zeros(size), np.zeros(size)
        for target in range(num_targets):
            found = _resampled_correlations(times, predicted[:, target], outputs[:, target])
            total += np.nan_to_num(found)
            defined += ~np.isnan(found)
        means[start : start + size] = np.divide(total, defined, out=np.full(size, np.nan), where=defined > 0)
    return means


def _resampled_correlations(times: np.ndarray, predicted: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """Return one target's rank correlation on resamples ``[B]``: 0 if predictions are constant, NaN if outputs are."""
    x, y = _centred_ranks(times, predicted), _centred_ranks(times, outputs)
    weighted = times * x
    product, x_square = (weighted * y).sum(axis=0), (weighted * x).sum(axis=0)
    y_square = (times * y * y).sum(axis=0)
    found = np.divide(product, np.sqrt(x_square * y_square), out=np.zeros_like(product), where=x_square * y_square > 0)
    return np.where(y_square > 0, found, np.nan)


def _centred_ranks(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return twice the rank of each subset within each resample, minus the mean: ``[S, B]``, whole numbers."""
    # A value's copies and its equals share the mean of the places that they occupy. Counts summed in ascending order
    # give that mean, so nothing is sorted again for each resample.
    order, first, last = (column[:, 0] for column in sorted_ties(values[:, None]))
    chosen = times[order]
    through = np.cumsum(chosen, axis=0)
    before = through - chosen
    if (first != last).any():
        before, through = before[first], through[last]
    ranks = np.empty_like(times)
    ranks[order] = before + through - len(times)
    return ranks
