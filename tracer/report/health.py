"""How many known wrong labels a ranking finds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

CHECKED_SHARES = (0.1, 0.2, 0.3)  # the shares of checked training examples that tables list


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
