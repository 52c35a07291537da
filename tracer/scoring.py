"""Scores from features: weighted dot products and running top-k selection, on plain arrays.

Layout: train features ``[n, k]``, target features ``[m, k]``, scores ``[n, m]`` (train by target); a positive score
means a proponent: training on the row lowered the target's loss.

- ``tracin``: ``sum_c lr_c Q_c(z) Q_c(z') <phi_c(z), phi_c(z')>`` (TracInCP; Pruthi et al. 2020, section 3.3);
- ``cosine``: the same with every loss gradient divided by its exact norm, which leaves the signs of Q and divides by
  the norms of the output gradients; a zero gradient has cosine zero with everything.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tracer.errors import InputError, nearest_name
from tracer.types import TopK

ESTIMATORS = ("cosine", "tracin")
"""The names that ``estimator=`` takes."""


def check_estimator(estimator: str) -> None:
    """Check the name of an estimator.

    Args:
        estimator: The name.

    Raises:
        InputError: It is not known; the nearest name is suggested.
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"estimator={estimator!r} is not known; {nearest_name(estimator, ESTIMATORS)}.")


def row_weights(estimator: str, slope: np.ndarray, gradient_norm: np.ndarray) -> np.ndarray:
    """Return the factor by which each row's features enter a dot product.

    Args:
        estimator: ``"tracin"`` or ``"cosine"``.
        slope: Q of each row, ``[N]``.
        gradient_norm: The exact norm of the gradient of f, ``[N]``.

    Returns:
        ``[N]``, float64: Q for tracin; the sign of Q over the norm for cosine, zero where the norm is.

    Raises:
        InputError: The estimator is not known.

    >>> row_weights("cosine", np.array([-0.5, 2.0]), np.array([4.0, 0.0])).tolist()
    [-0.25, 0.0]
    """
    check_estimator(estimator)
    slope, gradient_norm = np.asarray(slope, np.float64), np.asarray(gradient_norm, np.float64)
    if estimator == "tracin":
        return slope
    return np.divide(np.sign(slope), gradient_norm, out=np.zeros_like(slope), where=gradient_norm > 0)


def add_dot_products(scores: Tensor, train: Tensor, target: Tensor) -> None:
    """Add ``train @ targetᵀ`` to a tile of scores in place.

    Args:
        scores: ``[n, m]``, float32.
        train: ``[n, k]``, float32.
        target: ``[m, k]``, float32.
    """
    torch.addmm(scores, train, target.T, out=scores)


class RunningTopK:
    """The k largest scores of each target over train rows that come tile by tile.

    Args:
        num_targets: The number of targets ``M``.
        k: How many rows to keep for each target.
        largest: Keep the largest scores (proponents), else the smallest (opponents).

    >>> running = RunningTopK(1, 2)
    >>> running.update(0, torch.tensor([[1.0], [3.0]]))
    >>> running.update(2, torch.tensor([[2.0]]))
    >>> running.result().indices.tolist()
    [[1, 2]]
    """

    def __init__(self, num_targets: int, k: int, largest: bool = True) -> None:
        self.k = k
        self.sign = 1.0 if largest else -1.0
        self.values = torch.empty(num_targets, 0)
        self.indices = torch.empty(num_targets, 0, dtype=torch.int64)

    def update(self, start: int, scores: Tensor) -> None:
        """Take in a tile of consecutive train rows.

        Args:
            start: The index of the tile's first row.
            scores: ``[n, M]``, float32, of rows ``start`` to ``start + n``.
        """
        mine = (self.sign * scores.T).cpu()
        best = min(self.k, mine.shape[1])
        values, positions = torch.topk(mine, best, dim=1)
        values = torch.cat([self.values, values], dim=1)
        indices = torch.cat([self.indices, positions + start], dim=1)
        kept = min(self.k, values.shape[1])
        self.values, chosen = torch.topk(values, kept, dim=1)
        self.indices = indices.gather(1, chosen)

    def result(self) -> TopK:
        """Return the rows, strongest first; rows of equal score in the order of their index."""
        indices, values = self.indices.numpy(), self.values.numpy()
        order = np.lexsort((indices, -values), axis=1)
        indices = np.take_along_axis(indices, order, axis=1)
        return TopK(indices, np.float32(self.sign) * np.take_along_axis(values, order, axis=1))


def self_influence(slope: np.ndarray, gradient_norm: np.ndarray) -> np.ndarray:
    """Return each row's influence on itself at one checkpoint, ``Q² ‖gradient of f‖²``, without projection error.

    Args:
        slope: Q of each row, ``[N]``.
        gradient_norm: The exact norm of the gradient of f, ``[N]``.

    Returns:
        ``[N]``, float64.
    """
    return np.square(np.asarray(slope, np.float64) * np.asarray(gradient_norm, np.float64))
