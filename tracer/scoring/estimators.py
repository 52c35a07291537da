"""Scores from features: what an estimator is, weighted dot products, and running top-k selection, on plain arrays.

Layout: train features ``[n, k]``, target features ``[m, k]``, scores ``[n, m]`` (train by target); a positive score
means a proponent: training on the row lowered the target's loss. With C checkpoints:

- ``tracin``: ``sum_c lr_c Q_c(z) Q_c(z') <phi_c(z), phi_c(z')>`` (TracInCP; Pruthi et al. 2020, section 3.3);
- ``cosine``: the same with every loss gradient divided by its exact norm, which leaves the signs of Q and divides by
  the norms of the output gradients; a zero gradient has cosine zero with everything;
- ``trak``: ``mean_c[phi_c(z')ᵀ (Phi_cᵀ Phi_c + λI)⁻¹ phi_c(z)] · mean_c[-Q_c(z)]`` (Park et al. 2023, section 3);
- ``influence``: the same with the Gauss-Newton kernel ``Phi_cᵀ diag(mean_c w_c) Phi_c``: a Newton step of the whole
  training loss (Koh & Liang 2017, eq. 2, for a model that is linear in its features).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracer.errors import InputError, InputTypeError, NonFiniteError, nearest_name
from tracer.types import TopK

ESTIMATORS = ("cosine", "influence", "tracin", "trak")
"""The names that ``estimator=`` takes."""

KERNELS = {"trak": "plain", "influence": "loss_hess"}
"""By which weighting of train rows an estimator's kernel is made: 1, or the loss's curvature."""

TARGETS = ("loss", "output")
"""What ``target=`` takes."""

_TILE_SCORES, _WAITING = 1 << 20, 1 << 14
"""How many scores are looked at at once, and how many may wait to be sorted."""


def check_estimator(estimator: str) -> None:
    """Check the name of an estimator.

    Args:
        estimator: The name.

    Raises:
        InputError: It is not known; the nearest name is suggested.
    """
    if estimator not in ESTIMATORS:
        raise InputError(f"estimator={estimator!r} is not known; {nearest_name(estimator, ESTIMATORS)}.")


@dataclass(frozen=True)
class Estimate:
    """What scores are to say.

    Attributes:
        estimator: ``"tracin"``, ``"cosine"``, ``"trak"`` or ``"influence"``.
        target: Of what on the target's side: ``"loss"``, or ``"output"``: f, in the direction in which the loss falls,
            which has the same sign and does not vanish where a target is fitted. None: the loss for ``tracin`` and
            ``cosine`` (which are the same for both but for the size), the output for ``trak`` and ``influence``.
        regularization: λ of the kernel, in its units, or ``"auto"``; for ``trak`` and ``influence``.
        soft_threshold: Scores are moved towards zero by this much and end there (Park et al. 2023, section 3.2).
        groups: The group of each target, ``[M]``, integers from 0 on, -1 for none: scores are those of the sums over
            each group. Or ``"label"``: groups are the targets' classes.

    Raises:
        InputError: A value is not known or out of range.
        InputTypeError: A value is of a type that cannot be used.
    """

    estimator: str = "tracin"
    target: str | None = None
    regularization: float | str = "auto"
    soft_threshold: float = 0.0
    groups: Any = None

    def __post_init__(self) -> None:
        """Check and complete what came.

        Raises:
            InputError: A value is not known or out of range.
            InputTypeError: A value is of a type that cannot be used.
        """
        check_estimator(self.estimator)
        if self.target not in (None, *TARGETS):
            raise InputError(f"target={self.target!r} is not known; {nearest_name(self.target, TARGETS)}.")
        if self.target is None:
            object.__setattr__(self, "target", "output" if self.kernel else "loss")
        if self.regularization != "auto":
            object.__setattr__(self, "regularization", _number("regularization", self.regularization, " or 'auto'"))
            if self.kernel is None:
                raise InputError(
                    f"regularization={self.regularization} came with estimator={self.estimator!r}, which has no kernel "
                    f"to regularize; pass estimator='trak' or 'influence', or leave it out."
                )
        object.__setattr__(self, "soft_threshold", _number("soft_threshold", self.soft_threshold))
        object.__setattr__(self, "groups", _checked_groups(self.groups))

    @property
    def kernel(self) -> str | None:
        """The weighting of train rows in the estimator's kernel, a value of `KERNELS`; None without a kernel."""
        return KERNELS.get(self.estimator)

    @property
    def derives(self) -> bool:
        """Whether target rows are changed before they are multiplied: solved for, or summed up."""
        return self.kernel is not None or self.groups is not None

    @property
    def name(self) -> str:
        """The name under which results are kept: variants that are asked for side by side do not replace each other."""
        usual = self.estimator == "cosine" or (self.target == "output") == (self.kernel is not None)
        return self.estimator + ("" if usual else f"-{self.target}") + ("" if self.groups is None else "-groups")

    def train_weights(self, loss_grad: np.ndarray, gradient_norm: np.ndarray) -> np.ndarray:
        """Return the factor by which each train row's features enter a dot product.

        Args:
            loss_grad: Q of each row, ``[N]``; for estimators with a kernel its mean over checkpoints.
            gradient_norm: The exact norm of the gradient of f, ``[N]``.

        Returns:
            ``[N]``, float64: Q; for cosine the sign of Q over the norm, zero where the norm is.

        >>> Estimate("cosine").train_weights(np.array([-0.5, 2.0]), np.array([4.0, 0.0])).tolist()
        [-0.25, 0.0]
        """
        loss_grad, gradient_norm = np.asarray(loss_grad, np.float64), np.asarray(gradient_norm, np.float64)
        if self.estimator != "cosine":
            return loss_grad
        return np.divide(np.sign(loss_grad), gradient_norm, out=np.zeros_like(loss_grad), where=gradient_norm > 0)

    def target_weights(self, loss_grad: np.ndarray, gradient_norm: np.ndarray) -> np.ndarray:
        """Return the factor by which each target row's features enter a dot product.

        Args:
            loss_grad: Q of each row, ``[M]``.
            gradient_norm: The exact norm of the gradient of f, ``[M]``.

        Returns:
            ``[M]``, float64: as for train rows, and for outputs the sign of Q alone. A slope that has come to zero
            keeps its sign, as floating point has it.

        >>> Estimate("trak").target_weights(np.array([-0.0, 2.0]), np.ones(2)).tolist()
        [-1.0, 1.0]
        """
        if self.estimator == "cosine" or self.target == "loss":
            return self.train_weights(loss_grad, gradient_norm)
        return np.copysign(1.0, np.asarray(loss_grad, np.float64))


def _number(name: str, value: Any, more: str = "") -> float:
    if isinstance(value, (bool, str)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise InputTypeError(f"{name} is {value!r}; expected a number of 0 or more{more}.")
    if not 0 <= value < np.inf:
        raise InputError(f"{name} is {value}; expected a finite number of 0 or more{more}.")
    return float(value)


def _checked_groups(groups: Any) -> Any:
    if groups is None or (isinstance(groups, str) and groups == "label"):
        return groups
    found = np.asarray(groups)
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise InputTypeError(
            f"groups is {groups!r}; expected the group of each target, integers from 0 on (-1: none), or 'label'."
        )
    if not len(found) or found.min() < -1 or found.max() < 0:
        raise InputError(f"groups={groups!r}; expected integers from 0 on, or -1 for targets of no group.")
    return found.astype(np.int64)


class RunningTopK:
    """The k largest scores of each target over train rows that come tile by tile; equal ones by row index.

    Only scores beyond the k-th found so far are looked at, so a tile costs little more than one comparison.

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
        self.num_targets, self.k, self.largest = num_targets, k, largest
        self._held = TopK(np.zeros((num_targets, 0), np.int64), np.zeros((num_targets, 0), np.float32))
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._limit: Tensor | None = None

    def update(self, rows: int | np.ndarray, scores: Tensor) -> None:
        """Take in a tile of train rows that have not come before.

        Args:
            rows: The index of the tile's first row, of consecutive ones; or each row's, ``[n]``, ascending.
            scores: ``[n, M]``, float32, of these rows.

        Raises:
            NonFiniteError: A score is NaN: its parts are infinite and cancel.
        """
        rows = np.arange(rows, rows + len(scores)) if isinstance(rows, int) else rows
        step = max(1, _TILE_SCORES // self.num_targets)
        for first in range(0, len(rows), step):
            self._take(rows[first : first + step], scores[first : first + step])

    def add(self, found: TopK) -> None:
        """Take in a selection over other train rows.

        Args:
            found: Indices and scores, ``[M, n]`` each, with the k strongest of its rows at least.
        """
        indices, scores = found
        columns = np.arange(self.num_targets).repeat(indices.shape[1])
        self._waiting.append((columns, indices.reshape(-1), scores.reshape(-1)))
        self._merge()

    def result(self) -> TopK:
        """Return the rows, strongest first; rows of equal score in the order of their index."""
        self._merge()
        return TopK(self._held.indices.copy(), self._held.scores.copy())

    def _take(self, rows: np.ndarray, scores: Tensor) -> None:
        if not bool(torch.isfinite(scores.sum())) and bool(scores.isnan().any()):
            raise NonFiniteError(
                f"Scores of train rows {rows[0]} to {rows[-1]} are NaN: gradients are so large that their products "
                f"are beyond float32. Use estimator='cosine', or leave these rows out by rows=."
            )
        if self._limit is not None:
            limit = self._limit.to(scores.device)
            mask = scores > limit if self.largest else scores < limit
        elif len(rows) > self.k:  # of some of a tile's own only the strongest, and all that reach the last of them
            some = scores[: max(4 * self.k, 512)]
            limit = some.topk(self.k, dim=0, largest=self.largest).values[-1]
            mask = scores >= limit if self.largest else scores <= limit
        else:
            mask = torch.ones_like(scores, dtype=torch.bool)
        if mask.device.type == "cpu":  # numpy finds few among many much faster
            positions, columns = np.divmod(np.flatnonzero(mask.numpy()), self.num_targets)
            values = scores.numpy()[positions, columns]
        else:
            at = mask.nonzero()
            values = scores[at[:, 0], at[:, 1]].cpu().numpy()
            positions, columns = at.cpu().numpy().T
        self._waiting.append((columns, rows[positions], values))
        waiting = sum(len(part[0]) for part in self._waiting)
        if self._limit is None or waiting > max(_WAITING, self.num_targets * self.k):
            self._merge()

    def _merge(self) -> None:
        """Let what waits into the selection."""
        if not self._waiting:
            return
        held = np.arange(self.num_targets).repeat(self._held.indices.shape[1])
        parts = [(held, self._held.indices.reshape(-1), self._held.scores.reshape(-1)), *self._waiting]
        self._waiting = []
        columns, rows, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.lexsort((rows, -values if self.largest else values, columns))
        first = np.searchsorted(columns[order], np.arange(self.num_targets))
        kept = min(self.k, len(order) - int(first[-1]))  # of every target as many rows have come
        order = order[first[:, None] + np.arange(kept)]
        self._held = TopK(rows[order].astype(np.int64), values[order].astype(np.float32))
        if kept == self.k:
            self._limit = torch.from_numpy(self._held.scores[:, -1].copy())


def self_influence(loss_grad: np.ndarray, gradient_norm: np.ndarray) -> np.ndarray:
    """Return each row's influence on itself at one checkpoint, ``Q² ‖gradient of f‖²``, without projection error.

    Args:
        loss_grad: Q of each row, ``[N]``.
        gradient_norm: The exact norm of the gradient of f, ``[N]``.

    Returns:
        ``[N]``, float64.
    """
    return np.square(np.asarray(loss_grad, np.float64) * np.asarray(gradient_norm, np.float64))
