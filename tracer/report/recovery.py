"""How many mislabelled rows a ranking finds when rows are checked from its top."""

from __future__ import annotations

import numpy as np

SHARES = (0.1, 0.2, 0.3)
"""The shares of checked rows that tables state."""


def ranking(scores: np.ndarray) -> np.ndarray:
    """Return row indices ``[N]``, int64, by descending score; equal scores keep their order.

    >>> ranking(np.array([1.0, 3.0, 3.0])).tolist()
    [1, 2, 0]
    """
    return np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")


def recovery_curve(scores: np.ndarray, mislabelled: np.ndarray) -> np.ndarray:
    """Return how many mislabelled rows are among the first n of the ranking, for n from 0 to N.

    Args:
        scores: ``[N]``, higher is checked earlier.
        mislabelled: ``[N]``, bool.

    Returns:
        ``[N + 1]``, int64, from 0 to the number of mislabelled rows.

    >>> recovery_curve(np.array([0.1, 0.9, 0.5]), np.array([False, True, False])).tolist()
    [0, 1, 1, 1]
    """
    return np.concatenate([[0], np.cumsum(mislabelled[ranking(scores)], dtype=np.int64)])


def rows_checked(num_rows: int, share: float) -> int:
    """Return how many rows a share is, rounded to the nearest row."""
    return round(share * num_rows)
