"""Label health: the likely share of wrong labels, and how many known wrong labels a ranking finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tracer.report.summaries import ClassSummary

Z = 1.959964  # half the width of a two-sided 95 % interval, in standard errors
MIN_CLASSES = 10
"""With fewer classes there is no estimate, because the rates were measured with ten.

With two classes an example harms one whenever it helps the other, so harm over help does not tell a wrong label from a
correct example near the boundary. On three and five classes of digits the rates leave their ranges (docs/report.md).
"""

CHECKED_SHARES = (0.1, 0.2, 0.3)  # the shares of checked training examples that tables list


@dataclass(frozen=True)
class Calibration:
    """Shares of contradicted examples on digits with known flips (benchmarks/health.py); ranges are 5 % to 95 %."""

    false_positive: float  # among correct labels
    false_positive_range: tuple[float, float]
    detected: float  # among wrong labels
    detected_range: tuple[float, float]


CALIBRATION = Calibration(0.015, (0.0005, 0.044), 0.71, (0.53, 0.925))


@dataclass(frozen=True)
class WrongLabels:
    """An estimate of the share of wrong labels, with the share of contradicted examples that it corrects."""

    share: float
    low: float
    high: float
    contradicted: float
    error: float  # the standard error of contradicted, over examples (binomial) and targets (jackknife)
    num_contradicted: int


def estimate_wrong_labels(classes: ClassSummary, calibration: Calibration = CALIBRATION) -> WrongLabels:
    """Return an estimate of the share of wrong labels from the share of contradicted examples.

    With f the share of contradicted examples, α the rate among correct labels and β the rate among wrong ones, the
    share of wrong labels is ``(f - α) / (β - α)`` (Rogan & Gladen 1978, eq. 1), clipped to [0, 1]. The interval covers
    f ± 1.96 standard errors and the measured ranges of α and β, so it includes the error of the method if the data
    resemble those of the calibration.

    >>> from tracer.report.summaries import summarize_scores
    >>> scores = np.kron(2 * np.eye(2) - 1, np.ones((10, 4)))  # every example helps its own class
    >>> labels = np.repeat([0, 1], 10), np.repeat([0, 1], 4)
    >>> found = estimate_wrong_labels(summarize_scores(scores, *labels).classes)
    >>> found.share, found.low, round(found.high, 2)
    (0.0, 0.0, 0.0)
    """
    wrong = classes.contradicted
    num_train, observed = len(wrong), float(wrong.mean())
    variance = observed * (1 - observed) / num_train
    folds = classes.fold_shares
    if len(folds):
        variance += (len(folds) - 1) / len(folds) * float(np.square(folds - folds.mean()).sum())
    error = variance**0.5
    # both ends take the rates that move them outwards: many false positives for the low end, few for the high one
    low_rate, high_rate = calibration.false_positive_range
    least, most = calibration.detected_range
    share, low, high = (
        min(1.0, max(0.0, (contradicted - rate) / (detected - rate)))
        for contradicted, rate, detected in (
            (observed, calibration.false_positive, calibration.detected),
            (observed - Z * error, high_rate, most),
            (observed + Z * error, low_rate, least),
        )
    )
    return WrongLabels(share, low, high, observed, error, int(wrong.sum()))


def enough_classes(classes: ClassSummary) -> bool:
    """Return whether there are as many classes as the estimate was calibrated for."""
    return count_classes(classes) >= MIN_CLASSES


def count_classes(classes: ClassSummary) -> int:
    """Return the number of classes that have both training examples and targets."""
    return int(np.count_nonzero((classes.train_counts > 0) & (classes.target_counts > 0)))


def descending(scores: np.ndarray) -> np.ndarray:
    """Return the indices ``[N]``, int64, by descending score; equal scores stay in order.

    >>> descending(np.array([1.0, 3.0, 3.0])).tolist()
    [1, 2, 0]
    """
    return np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")


def recovery_curve(scores: np.ndarray, mislabelled: np.ndarray) -> np.ndarray:
    """Return the number of mislabelled examples among the first n by descending score, ``[N + 1]``, int64."""
    return np.concatenate([[0], np.cumsum(mislabelled[descending(scores)], dtype=np.int64)])


def checked_counts(num_train: int) -> list[int]:
    """Return `CHECKED_SHARES` of the training examples as numbers, rounded."""
    return [round(share * num_train) for share in CHECKED_SHARES]


def recovered(scores: np.ndarray, mislabelled: np.ndarray) -> list[int]:
    """Return the number of mislabelled examples among each of `CHECKED_SHARES` of the highest scores.

    >>> recovered(np.array([0.1, 0.9, 0.5, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0]), np.arange(10) < 3)
    [1, 2, 2]
    """
    return recovery_curve(scores, mislabelled)[checked_counts(len(scores))].tolist()


def recovery_table(rankings: Mapping[str, np.ndarray], mislabelled: np.ndarray) -> list[list[str]]:
    """Return the name of each ranking, then of chance, and the mislabelled examples found in `CHECKED_SHARES`."""
    total, num_train = int(mislabelled.sum()), len(mislabelled)
    found: dict[str, list] = {name: recovered(scores, mislabelled) for name, scores in rankings.items()}
    found["chance (expected)"] = [total * count / num_train for count in checked_counts(num_train)]
    return [[name, *(f"{count:.0f} ({count / total:.0%})" for count in counts)] for name, counts in found.items()]
