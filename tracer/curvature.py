"""Curvature in feature space: kernels that whiten gradients before they are compared, and how far to regularize them.

Layout: train features ``Phi [N, k]``, row weights ``w [N]``, kernel ``K = Phiᵀ diag(w) Phi [k, k]``, rows to solve
for ``[m, k]``; everything in float64.

With ``w = 1`` the kernel is that of TRAK (Park et al. 2023, section 3). With the loss's second derivative in f as ``w``
it is the Gauss-Newton matrix of the sum of the losses, in the place of the Hessian that influence functions divide by
(Koh & Liang 2017).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SUBSET_SHARE = 0.5
"""Scores are to predict models trained on this share of the rows, as the linear datamodeling score asks."""

_LANCZOS_STEPS = 128
_PER_DECADE, _DECADES = 50, (-6, 4)


class Kernel(ABC):
    """A symmetric positive semi-definite matrix ``K [k, k]``, held in one form or another."""

    @abstractmethod
    def apply(self, vector: Tensor) -> Tensor:
        """Return ``K x`` of a vector ``[k]``."""

    @abstractmethod
    def solve(self, rows: Tensor, regularization: float) -> Tensor:
        """Return ``(K + λI)⁻¹`` times each row.

        Args:
            rows: ``[m, k]``, float64.
            regularization: λ, 0 or more, in the kernel's own units; with 0 it is the pseudo-inverse.

        Returns:
            ``[m, k]``, float64.
        """

    def seen(self, rows: Tensor) -> Tensor:
        """Return the part of rows that has an inner product with some train row.

        Where there are fewer train rows than features, most of a row is orthogonal to all of them. A solution is
        divided by λ there, and would drown the rest in the rounding errors of a float32 product.

        Args:
            rows: ``[m, k]``, float64.

        Returns:
            ``[m, k]``, float64: with the same inner products with train rows, before a solution and behind it.
        """
        return rows


class DenseKernel(Kernel):
    """A kernel as the matrix itself: for more rows than features.

    Args:
        matrix: ``[k, k]``, float64, symmetric.

    >>> kernel = DenseKernel(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
    >>> kernel.solve(torch.ones(1, 2, dtype=torch.float64), 1.0).round(decimals=6).tolist()
    [[0.5, 0.25]]
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._factor: tuple[float, Tensor] | None = None
        self._spectrum: tuple[Tensor, Tensor] | None = None

    def apply(self, vector: Tensor) -> Tensor:
        """Return ``K x`` of a vector ``[k]``."""
        return self.matrix @ vector

    def solve(self, rows: Tensor, regularization: float) -> Tensor:
        """Return ``(K + λI)⁻¹`` times each row; see `Kernel.solve`."""
        if regularization > 0:
            factor = self._cholesky(regularization)
            if factor is not None:
                return torch.cholesky_solve(rows.T, factor).T
        if self._spectrum is None:
            values, vectors = torch.linalg.eigh(self.matrix)
            self._spectrum = values.clamp_(min=0), vectors
        values, vectors = self._spectrum
        return rows @ vectors * _inverse(values, regularization) @ vectors.T

    def _cholesky(self, regularization: float) -> Tensor | None:
        """Return the Cholesky factor of ``K + λI``, or None where rounding makes it indefinite."""
        if self._factor is None or self._factor[0] != regularization:
            shifted = self.matrix.clone()
            shifted.diagonal().add_(regularization)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if int(failed):
                return None
            self._factor = regularization, factor
        return self._factor[1]


class RowKernel(Kernel):
    """A kernel as its weighted rows ``A = diag(√w) Phi``, ``K = AᵀA``: for fewer rows than features.

    What is inverted is ``A Aᵀ [n, n]``: ``(AᵀA + λI)⁻¹ x = (x − Aᵀ (A Aᵀ + λI)⁻¹ A x) / λ``.

    Args:
        features: Phi, ``[n, k]``, float64.
        weights: w, ``[n]``, float64.
    """

    def __init__(self, features: Tensor, weights: Tensor) -> None:
        self.rows = features * weights.sqrt().unsqueeze(1)
        self._inner = DenseKernel(self.rows @ self.rows.T)
        self._features = features
        self._basis: Tensor | None = None

    def apply(self, vector: Tensor) -> Tensor:
        """Return ``K x`` of a vector ``[k]``."""
        return (self.rows @ vector) @ self.rows

    def solve(self, rows: Tensor, regularization: float) -> Tensor:
        """Return ``(K + λI)⁻¹`` times each row; see `Kernel.solve`."""
        seen = rows @ self.rows.T
        if regularization > 0:
            return (rows - self._inner.solve(seen, regularization) @ self.rows) / regularization
        return self._inner.solve(self._inner.solve(seen, 0.0), 0.0) @ self.rows

    def seen(self, rows: Tensor) -> Tensor:
        """Return the part of rows that has an inner product with some train row; see `Kernel.seen`."""
        if self._basis is None:
            self._basis = torch.linalg.qr(self._features.T).Q  # of all rows, those of weight zero too
        return rows @ self._basis @ self._basis.T


def _inverse(values: Tensor, regularization: float) -> Tensor:
    """Return ``1 / (s + λ)`` of eigenvalues; with λ = 0, zero for those that are rounding errors."""
    if regularization > 0:
        return 1 / (values + regularization)
    cutoff = torch.finfo(values.dtype).eps * len(values) * values.max()
    return torch.where(values > cutoff, 1 / values, 0.0)


@dataclass(frozen=True)
class Moments:
    """Sums over the train rows of a checkpoint, beside its kernel, from which its regularization is chosen.

    Attributes:
        num_rows: N.
        trace: ``Σ w ‖φ‖²``, the kernel's.
        plain_trace: ``Σ ‖φ‖²``.
        gain: ``Φᵀ (w · gain)``, ``[k]``, with the gain of each row: f minus the f of a model that has learnt nothing.
        step: ``Φᵀ (−Q)``, ``[k]``: the direction in which the sum of the losses falls.
        squared_gain: ``Σ w gain²``; 0 where gains are not known.
    """

    num_rows: int
    trace: float
    plain_trace: float
    gain: Tensor
    step: Tensor
    squared_gain: float


def misfit(kernel: Kernel, moments: Moments, regularizations: Tensor) -> Tensor:
    """Return how badly ridge regression explains what a checkpoint has learnt, for each λ.

    The network is seen as a linear model in its features. One Newton step from its outputs f aims at the working
    response ``f − Q/w`` of each row; ridge regression of what that adds to a model that has learnt nothing,
    ``y = gain − Q/w`` with weights w, predicts ``H_λ y``. The misfit is ``Σ w (gain − H_λ y)²``: where it is least, the
    regularized linear model is the network that training has found.

    Args:
        kernel: ``K = Φᵀ diag(w) Φ``.
        moments: Of the same rows.
        regularizations: ``[G]``, float64, all positive.

    Returns:
        ``[G]``, float64.
    """
    gain, start = moments.gain, moments.gain + moments.step
    basis, tridiagonal, length = _lanczos(kernel, start)
    values, vectors = torch.linalg.eigh(tridiagonal)
    # x(λ) = (K + λI)⁻¹ start within the basis; the misfit is  Σ w gain² − 2 gain·x + xᵀ K x
    coordinates = length * vectors[0] / (values + regularizations.unsqueeze(1))  # [G, steps]
    seen = vectors.T @ (basis @ gain)
    return moments.squared_gain - 2 * coordinates @ seen + coordinates.square() @ values


def _lanczos(kernel: Kernel, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a Krylov basis of a vector, the kernel within it, and the vector's length (Golub & Meurant 2010).

    Args:
        kernel: The kernel.
        start: ``[k]``.

    Returns:
        Orthonormal rows ``[n, k]`` that begin with the vector's direction, the tridiagonal matrix ``[n, n]``, and the
        length ``[]``.
    """
    length = start.norm()
    most = min(_LANCZOS_STEPS, len(start))
    basis, tridiagonal = start.new_zeros(most, len(start)), start.new_zeros(most, most)
    basis[0] = start / length.clamp(min=torch.finfo(start.dtype).tiny)
    for step in range(most):
        new, known = kernel.apply(basis[step]), basis[: step + 1]
        tridiagonal[step, step] = basis[step] @ new
        for _ in range(2):  # once is not enough in floating point
            new = new - (known @ new) @ known
        size = new.norm()
        if step + 1 == most or size <= 1e-12 * tridiagonal[0, 0].abs():
            break
        tridiagonal[step, step + 1] = tridiagonal[step + 1, step] = size
        basis[step + 1] = new / size
    return basis[: step + 1], tridiagonal[: step + 1, : step + 1], length


@dataclass(frozen=True)
class Regularization:
    """A regularization and where it comes from.

    Attributes:
        value: λ, in the kernel's units: those of ``Σ w ‖φ‖²``.
        rule: ``"given"``, ``"training"`` or ``"trace"``; see `choose_regularization`.
    """

    value: float
    rule: str


def choose_regularization(
    parts: Sequence[tuple[Callable[[], Kernel], Moments]], share: float = SUBSET_SHARE
) -> Regularization:
    """Choose one λ for the kernels of several checkpoints, without training anything again.

    - ``training``: the λ at which ridge regression in the features is the network that training has found, least
      summed `misfit` over checkpoints, over ``share``. Training that is stopped early is regularized: gradient descent
      of learning rates that sum up to τ leaves directions of curvature below ``N/τ`` unlearnt, as ridge regression with
      about that λ does (Ali et al. 2019). A model that is trained on a share of the rows for as many epochs
      has that share of the kernel and the same ``N/τ``, which is λ over the share for the whole kernel.
    - ``trace``: where gains or curvatures are not known, the mean of ``w ‖φ‖²`` over the share.

    Args:
        parts: Of each checkpoint what gives its kernel, so that one is held at a time, and the moments.
        share: Of the rows, of the models that scores are to predict.

    Returns:
        λ; at least the smallest positive number where kernels are zero.
    """
    sizes = torch.tensor([moments.trace / moments.num_rows for _, moments in parts], dtype=torch.float64)
    tiny = torch.finfo(torch.float64).tiny
    unit = float(sizes.clamp(min=tiny).log().mean().exp())
    if any(moments.squared_gain <= 0 for _, moments in parts):
        return Regularization(unit / share, "trace")
    low, high = _DECADES
    grid = unit * torch.logspace(low, high, _PER_DECADE * (high - low) + 1, dtype=torch.float64)
    total = torch.zeros_like(grid)
    for kernel, moments in parts:
        total += misfit(kernel(), moments, grid.to(moments.gain.device)).cpu()
    return Regularization(float(grid[total.argmin()]) / share, "training")
