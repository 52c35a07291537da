"""How many labels are likely wrong: an estimate from influence, with an interval that says what it does not know."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer.report.summaries import ClassSummary

Z = 1.959964
"""Of a two-sided interval of 95 %."""

MIN_CLASSES = 10
"""With fewer classes there is no estimate: the rates are those of ten, and with few classes they are others.

With two classes a row harms one whenever it helps the other, so harm over help does not tell a wrong label from a right
row near the boundary. On three and five classes of digits the rates leave their ranges (docs/report.md).
"""


@dataclass(frozen=True)
class Calibration:
    """How often rows are contradicted, as measured on digits with known flips (benchmarks/health.py).

    Attributes:
        false_positive: The share of rightly labelled rows that are contradicted.
        false_positive_range: Its 5 % and 95 % quantiles over runs.
        detected: The share of wrongly labelled rows that are contradicted.
        detected_range: Its 5 % and 95 % quantiles over runs.
    """

    false_positive: float
    false_positive_range: tuple[float, float]
    detected: float
    detected_range: tuple[float, float]


CALIBRATION = Calibration(0.015, (0.0005, 0.044), 0.71, (0.53, 0.925))


@dataclass(frozen=True)
class WrongLabels:
    """An estimate of the share of wrong labels.

    Attributes:
        share: The estimate, from 0 to 1.
        low: The lower end of its interval.
        high: The upper end.
        contradicted: The share of contradicted rows that it comes from.
        error: The standard error of that share: from rows (binomial) and from targets (jackknife).
        num_contradicted: How many rows are contradicted.
    """

    share: float
    low: float
    high: float
    contradicted: float
    error: float
    num_contradicted: int


def estimate_wrong_labels(classes: ClassSummary, calibration: Calibration = CALIBRATION) -> WrongLabels:
    """Estimate the share of wrong labels from the share of contradicted rows.

    With f the share of contradicted rows, α that of right rows among which it happens and β that of wrong ones, the
    share of wrong labels is ``(f - α) / (β - α)`` (Rogan & Gladen 1978, eq. 1), cut to [0, 1]. The interval goes over
    f ± 1.96 standard errors and over the ranges of α and β that were measured, so it holds the method's own error as
    far as that carries over from the data of the calibration.

    Args:
        classes: What scores say by class.
        calibration: α and β and their ranges.

    Returns:
        The estimate.

    >>> from tracer.report.summaries import summarize_scores
    >>> scores = np.kron(2 * np.eye(2) - 1, np.ones((10, 4)))  # all rows help their own class
    >>> labels = np.repeat([0, 1], 10), np.repeat([0, 1], 4)
    >>> found = estimate_wrong_labels(summarize_scores(scores, *labels).classes)
    >>> found.share, found.low, round(found.high, 2)
    (0.0, 0.0, 0.0)
    """
    wrong = classes.contradicted
    num_rows, share = len(wrong), float(wrong.mean())
    variance = share * (1 - share) / num_rows
    folds = classes.fold_shares
    if len(folds):
        variance += (len(folds) - 1) / len(folds) * float(np.square(folds - folds.mean()).sum())
    error = variance**0.5
    low_rate, high_rate = calibration.false_positive_range
    least, most = calibration.detected_range
    return WrongLabels(
        share=_corrected(share, calibration.false_positive, calibration.detected),
        low=_corrected(share - Z * error, high_rate, most),
        high=_corrected(share + Z * error, low_rate, least),
        contradicted=share,
        error=error,
        num_contradicted=int(wrong.sum()),
    )


def enough_classes(classes: ClassSummary) -> bool:
    """Tell whether as many classes have training rows and targets as the estimate was calibrated for."""
    return count_classes(classes) >= MIN_CLASSES


def count_classes(classes: ClassSummary) -> int:
    """Return how many classes have training rows and targets."""
    return int(np.count_nonzero((classes.train_counts > 0) & (classes.target_counts > 0)))


def _corrected(share: float, false_positive: float, detected: float) -> float:
    """Return ``(f - α) / (β - α)``, cut to [0, 1]."""
    return min(1.0, max(0.0, (share - false_positive) / (detected - false_positive)))
