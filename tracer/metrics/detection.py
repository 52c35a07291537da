"""Detection of mislabelled examples that are checked in the order of a ranking."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer._core.validation import check_integer
from tracer.errors import InputError
from tracer.metrics.inputs import Array, flags, numbers, same_size
from tracer.metrics.ranks import average_ranks
from tracer.metrics.values import Result


@dataclass(frozen=True, repr=False, eq=False)
class MislabelDetection(Result):
    """The result of checking examples by descending score.

    Attributes:
        auc: The area under ``curve`` over the share of checked examples, by trapezoids. If a share p is mislabelled it
            is ``p / 2 + (1 - p) * roc_auc``: 0.5 for a random order, ``1 - p / 2`` for the best one.
        roc_auc: The probability that a mislabelled example is ranked above a correct one; ties count half.
        num_mislabelled: The number of mislabelled examples.
        curve: ``[N + 1]``, the share of mislabelled examples among the first n, for n from 0 to N.
    """

    auc: float
    roc_auc: float
    num_mislabelled: int
    curve: np.ndarray

    def precision_at(self, k: int) -> float:
        """Return the share of mislabelled examples among the first k.

        Args:
            k: The number of examples checked, from 1 to N.

        Returns:
            The share, from 0 to 1.

        Raises:
            InputError: If k is out of bounds.
            InputTypeError: If k is not an integer.
        """
        k = check_integer(k, "k", 1, len(self.curve) - 1)
        return float(self.curve[k]) * self.num_mislabelled / k

    def recall_at(self, share: float) -> float:
        """Return the share of the mislabelled examples that is found by checking a share of all examples.

        Args:
            share: From 0 to 1, rounded to the nearest example.

        Returns:
            The share, from 0 to 1.

        Raises:
            InputError: If ``share`` is out of bounds.
        """
        if not 0 <= share <= 1:
            raise InputError(f"share must be from 0 to 1, got {share}.")
        return float(self.curve[round(share * (len(self.curve) - 1))])


def mislabel_detection(scores: Array, is_mislabelled: Array) -> MislabelDetection:
    """Return how well scores, for example self-influence, find mislabelled examples.

    The curve is that of Pruthi et al. (2020), *TracIn*, section 4: examples are checked by descending score. Examples
    of equal score are in random order, and the result is the expectation over it. So the order of the arrays does not
    matter, and constant scores have an area of 0.5.

    Args:
        scores: ``[N]``, finite; higher is more suspicious.
        is_mislabelled: ``[N]``, True or 1 for examples whose label is wrong.

    Returns:
        The curve, its area, and precision and recall at any cutoff.

    Raises:
        InputError: If shapes do not agree, a score is NaN or infinite, or all or no examples are mislabelled.
        InputTypeError: If the arrays do not hold numbers.

    >>> found = mislabel_detection([0.9, 0.1, 0.5, 0.5], [True, False, True, False])
    >>> found
    MislabelDetection(auc=0.6875, roc_auc=0.875, num_mislabelled=2, curve=<[5] from 0 to 1>)
    >>> found.curve.tolist(), found.precision_at(1), found.recall_at(0.5)
    ([0.0, 0.5, 0.75, 1.0, 1.0], 1.0, 0.75)
    """
    scores, wrong = numbers("scores", scores, "[N]"), flags("is_mislabelled", is_mislabelled, "[N]")
    same_size("scores [N]", len(scores), "is_mislabelled [N]", len(wrong), "N")
    num_rows, num_wrong = len(scores), int(wrong.sum())
    if num_wrong in (0, num_rows):
        raise InputError(f"is_mislabelled [N] must have both kinds of rows, got {num_wrong} of {num_rows} mislabelled.")
    order = np.argsort(scores, kind="stable")[::-1]
    ends = np.append(np.flatnonzero(np.diff(scores[order])) + 1, num_rows)  # where equal scores end
    checked, found = np.append(0, ends), np.append(0, np.cumsum(wrong[order])[ends - 1])
    curve = np.interp(np.arange(num_rows + 1), checked, found / num_wrong)  # a random order finds at an even pace
    places = average_ranks(scores[:, None])[wrong, 0]
    above = places.sum() - num_wrong * (num_wrong + 1) / 2  # right rows below, over all mislabelled ones
    return MislabelDetection(
        auc=float((curve[1:] + curve[:-1]).mean() / 2),
        roc_auc=float(above / (num_wrong * (num_rows - num_wrong))),
        num_mislabelled=num_wrong,
        curve=curve,
    )
