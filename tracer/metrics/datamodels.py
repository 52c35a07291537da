"""The linear datamodeling score: do scores predict the outputs of models trained on subsets of the train rows?

Layout of the bootstrap: subsets × resamples, ``[S, B]``, so that picking subsets in order copies whole rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer.errors import InputError
from tracer.metrics.inputs import Array, flags, numbers, same_size, whole_number
from tracer.metrics.ranks import rank_correlation, sorted_ties, subset_sums
from tracer.metrics.results import Result, mean_over_targets

_BLOCK = 1 << 18
"""Subsets × resamples at once: what a core's cache holds."""


@dataclass(frozen=True, repr=False, eq=False)
class LDS(Result):
    """The linear datamodeling score of a matrix of scores.

    Attributes:
        mean: The mean of ``per_target`` over the targets where it is defined.
        interval: Lower and upper end of the bootstrap interval of ``mean``; NaN without resamples.
        per_target: ``[M]``, Spearman's correlation; NaN for targets whose outputs are all the same.
        resampled: ``[num_resamples]``, the mean on each resample of the subsets; lower than ``mean`` on average.
    """

    mean: float
    interval: tuple[float, float]
    per_target: np.ndarray
    resampled: np.ndarray

    def difference(self, other: LDS, confidence: float = 0.95) -> tuple[float, float]:
        """Return the interval of ``self.mean - other.mean``, of two methods on the same subsets and targets.

        Both are computed on the same resamples, so what the subsets do to both alike cancels: the interval is narrower
        than the two intervals side by side suggest. If it does not contain 0, the methods differ.

        Args:
            other: From a call with the same masks, outputs, number of resamples and seed.
            confidence: As for `lds`.

        Returns:
            Lower and upper end.

        Raises:
            InputError: The numbers of resamples differ or are 0, or ``confidence`` is not between 0 and 1.
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
    """Return the linear datamodeling score (LDS).

    Park et al. (2023), *TRAK*, definition 2.3: the model is trained anew on random subsets of the train rows, usually
    halves. The predicted output on a subset is the sum of its rows' scores; the score of a target is Spearman's
    correlation over subsets of predicted and true outputs, with average ranks for ties. ``mean`` is the mean over
    targets. The form of predictions is that of the linear datamodels of Ilyas et al. (2022).

    The interval is a basic bootstrap over subsets (Davison & Hinkley 1997, section 5.2): subsets are drawn anew with
    replacement, the same ones for all targets, and the mean is computed again, ranks included; the quantiles of its
    deviations from ``mean`` are taken off ``mean``. Repeated subsets are ties and lower rank correlations, by more than
    the interval's width where the LDS is high, which this corrects and the quantiles themselves (percentile bootstrap)
    would not. The interval says what other subsets would have given on these targets; other targets and another
    training of the model that was scored are not in it. The paper's code comes without intervals; that of Zheng et al.
    (2024, D-TRAK) resamples subsets as well.

    A target whose predictions are all the same, up to rounding, counts as 0: nothing is predicted. A target whose
    outputs are all the same has no correlation: NaN, left out of the mean. The same holds within a resample.

    Args:
        scores: ``[N, M]``, finite; positive where the row raises the output.
        masks: ``[S, N]``, True or 1 where the subset has the row.
        outputs: ``[S, M]``, the output of each target after training on each subset: the margin or another quantity
            that rises with what positive scores promise (minus the loss, not the loss). Of several trainings on one
            subset give the mean.
        num_resamples: How many resamples the interval is from; 0 for none.
        confidence: How sure the interval is to be, such as 0.95.
        seed: Seed of the resampling, at least 0.

    Returns:
        Mean, interval and the values of each target.

    Raises:
        InputError: Shapes do not agree, values are NaN, infinite or not 0 or 1, or all outputs are constant.
        InputTypeError: An array does not hold numbers, or a count is not an integer.

    >>> masks = [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    >>> lds([[3.0, 1.0], [2.0, 1.0], [1.0, 1.0]], masks, [[9.0, 1.0], [8.0, 2.0], [7.0, 3.0]], num_resamples=0)
    LDS(mean=0.5, interval=(nan, nan), per_target=[1, 0], resampled=[])
    """
    scores, masks, outputs = _checked(scores, masks, outputs)
    num_resamples = whole_number("num_resamples", num_resamples, 0)
    seed = whole_number("seed", seed, 0)
    predicted, constant = subset_sums(masks, scores)
    predicted[:, constant] = 0  # rounding would rank them
    per_target = np.where(constant, 0, rank_correlation(predicted, outputs))
    per_target[np.ptp(outputs, axis=0) == 0] = np.nan
    mean = mean_over_targets("LDS", per_target, "outputs are the same for all subsets")
    resampled = _resampled_means(predicted, outputs, num_resamples, seed)
    return LDS(mean, _interval(mean, resampled, confidence, 1), per_target, resampled)


def _checked(scores: Array, masks: Array, outputs: Array) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the three arrays of `lds`, the masks as booleans, checked to be finite and to agree in shape."""
    scores, masks = numbers("scores", scores, "[N, M]"), flags("masks", masks, "[S, N]")
    outputs = numbers("outputs", outputs, "[S, M]")
    same_size("scores [N, M]", len(scores), "masks [S, N]", masks.shape[1], "N")
    same_size("masks [S, N]", len(masks), "outputs [S, M]", len(outputs), "S")
    same_size("scores [N, M]", scores.shape[1], "outputs [S, M]", outputs.shape[1], "M")
    if len(masks) < 2:
        raise InputError("masks [S, N] must have at least 2 subsets: a correlation is over subsets.")
    return scores, masks, outputs


def _interval(estimate: float, resampled: np.ndarray, confidence: float, limit: float) -> tuple[float, float]:
    """Return the basic bootstrap interval of an estimate.

    Args:
        estimate: The value on all subsets.
        resampled: ``[num_resamples]``, the value on each resample; NaN where it is not defined.
        confidence: How sure the interval is to be.
        limit: The largest absolute value that there can be.

    Returns:
        Lower and upper end; NaN where no resample is defined.

    Raises:
        InputError: ``confidence`` is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence must be between 0 and 1, got {confidence}.")
    defined = resampled[~np.isnan(resampled)]
    if not defined.size:
        return float("nan"), float("nan")
    ends = 2 * estimate - np.quantile(defined, [(1 + confidence) / 2, (1 - confidence) / 2])
    low, high = np.clip(ends, -limit, limit).tolist()
    return low, high


def _resampled_means(predicted: np.ndarray, outputs: np.ndarray, num_resamples: int, seed: int) -> np.ndarray:
    """Return the mean over targets of the rank correlation on each resample of the subsets.

    Args:
        predicted: ``[S, M]``.
        outputs: ``[S, M]``.
        num_resamples: How many resamples.
        seed: Seed of the draws, which depend on it and on S alone.

    Returns:
        ``[num_resamples]``; NaN where no target is defined.
    """
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
    """Return the rank correlation of one target on each resample.

    Args:
        times: ``[S, B]``, float64, how often each resample has each subset.
        predicted: ``[S]``.
        outputs: ``[S]``.

    Returns:
        ``[B]``; 0 where a resample's predictions are constant, NaN where its outputs are.
    """
    x, y = _centred_ranks(times, predicted), _centred_ranks(times, outputs)
    weighted = times * x
    product, x_square = (weighted * y).sum(axis=0), (weighted * x).sum(axis=0)
    y_square = (times * y * y).sum(axis=0)
    found = np.divide(product, np.sqrt(x_square * y_square), out=np.zeros_like(product), where=x_square * y_square > 0)
    return np.where(y_square > 0, found, np.nan)


def _centred_ranks(times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return twice the rank of each subset within each resample, minus the mean.

    A value's copies and its equals share the mean of the places that they take up, which counts summed up in ascending
    order tell: nothing is sorted again for a resample.

    Args:
        times: ``[S, B]``, float64, how often each resample has each subset.
        values: ``[S]``.

    Returns:
        ``[S, B]``, float64, whole numbers.
    """
    order, first, last = (column[:, 0] for column in sorted_ties(values[:, None]))
    chosen = times[order]
    through = np.cumsum(chosen, axis=0)
    before = through - chosen
    if (first != last).any():
        before, through = before[first], through[last]
    ranks = np.empty_like(times)
    ranks[order] = before + through - len(times)
    return ranks
