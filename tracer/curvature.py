"""Curvature in feature space: kernels that whiten gradients before they are compared, and how far to regularize them.

Layout: train features ``Phi [N, k]``, row weights ``w [N]``, kernel ``K = Phiᵀ diag(w) Phi [k, k]``, rows to solve
for ``[m, k]``; everything in float64.

With ``w = 1`` the kernel is that of TRAK (Park et al. 2023, section 3). With the loss's second derivative in f as ``w``
it is the Gauss-Newton matrix of the sum of the losses, in the place of the Hessian that influence functions divide by
(Koh & Liang 2017).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SUBSET_SHARE = 0.5
"""Scores are to predict models trained on this share of the rows, as the linear datamodeling score asks."""

_LANCZOS_STEPS = 128
_PER_DECADE, _DECADES, _LEAST_DEPTH = 50, (-6, 4), 1e-6


class Kernel:
    """A symmetric positive semi-definite matrix ``K [k, k]``, as a matrix ``M [r, r]`` in a basis ``B [k, r]``.

    ``K = B M Bᵀ``. With fewer train rows than features, B spans them: r is the number of rows. What is orthogonal to
    all train rows is not in it. It has no inner product with any of them, neither before a solution nor behind it; a
    solution would divide it by λ, and it would drown the rest in the rounding errors of a float32 product.

    Args:
        matrix: M, ``[r, r]``, float64.
        basis: B, with orthonormal columns; None: the identity.

    >>> kernel = Kernel(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
    >>> kernel.solve(torch.ones(1, 2, dtype=torch.float64), 1.0).round(decimals=6).tolist()
    [[0.5, 0.25]]
    """

    def __init__(self, matrix: Tensor, basis: Tensor | None = None) -> None:
        self.matrix, self.basis = matrix, basis
        self._factor: tuple[float, Tensor] | None = None
        self._spectrum: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of_rows(cls, features: Tensor, weights: Tensor) -> Kernel:
        """Return ``Phiᵀ diag(w) Phi`` of fewer rows than features, in the basis that they span.

        Args:
            features: Phi, ``[n, k]``, float64.
            weights: w, ``[n]``, float64, 0 or more.

        Returns:
            The kernel.
        """
        basis = torch.linalg.qr(features.T).Q  # of all rows, those of weight zero too
        rows = (features @ basis).mul_(weights.sqrt().unsqueeze(1))
        return cls(rows.T @ rows, basis)

    def coordinates(self, rows: Tensor) -> Tensor:
        """Return rows ``[..., k]`` in the basis: ``[..., r]``."""
        return rows if self.basis is None else rows @ self.basis

    def solve(self, rows: Tensor, regularization: float) -> Tensor:
        """Return ``B (M + λI)⁻¹ Bᵀ`` times each row: ``(K + λI)⁻¹`` as far as train rows see it.

        Args:
            rows: ``[m, k]``, float64.
            regularization: λ, 0 or more, in the kernel's own units; with 0 it is the pseudo-inverse.

        Returns:
            ``[m, k]``, float64.
        """
        found = self._solve(self.coordinates(rows), regularization)
        return found if self.basis is None else found @ self.basis.T

    def _solve(self, rows: Tensor, regularization: float) -> Tensor:
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
        """Return the Cholesky factor of ``M + λI``, or None where rounding makes it indefinite."""
        if self._factor is None or self._factor[0] != regularization:
            shifted = self.matrix.clone()
            shifted.diagonal().add_(regularization)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if int(failed):
                return None
            self._factor = regularization, factor
        return self._factor[1]


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
        gain: ``Φᵀ (w · gain)``, ``[k]``, with the gain of each row: f minus the f of a model that has learnt nothing.
        step: ``Φᵀ (−Q)``, ``[k]``: the direction in which the sum of the losses falls.
        squared_gain: ``Σ w gain²``; 0 where gains are not known.
    """

    num_rows: int
    trace: float
    gain: Tensor
    step: Tensor
    squared_gain: float


def misfit(kernel: Kernel, moments: Moments, regularizations: Tensor) -> Tensor:
    """Return how badly training that is stopped early explains what a checkpoint has learnt, for each λ.

    The network is seen as a linear model in its features that began with nothing. One Newton step from its outputs f
    aims at the working response ``f − Q/w`` of each row, ``y = gain − Q/w`` more than at the beginning. Gradient flow
    on the weighted squares goes there at a rate of its own in each direction u of curvature s; with learning rates
    that sum up to τ, and the mean of N losses, it has come by ``1 − exp(−s/λ)``, ``λ = N/τ`` (Ali et al. 2019). That
    predicts ``H_λ y``. The misfit is ``Σ w (gain − H_λ y)²``.

    Args:
        kernel: ``K = Φᵀ diag(w) Φ``.
        moments: Of the same rows.
        regularizations: ``[G]``, float64, all positive.

    Returns:
        ``[G]``, float64.
    """
    gain, step = kernel.coordinates(moments.gain), kernel.coordinates(moments.step)  # sums over train rows, all seen
    basis, tridiagonal, length = _lanczos(kernel.matrix, gain + step)
    values, vectors = torch.linalg.eigh(tridiagonal)
    values = values.clamp(min=torch.finfo(values.dtype).tiny)
    # H y = A x with A = diag(√w) Φ and x = h(K) (gain + step), h(s) = (1 − exp(−s/λ)) / s, within the basis; the misfit
    # is  Σ w gain² − 2 gain·x + xᵀ K x
    coordinates = length * vectors[0] * (-torch.expm1(-values / regularizations.unsqueeze(1)) / values)  # [G, steps]
    seen = vectors.T @ (basis @ gain)
    return moments.squared_gain - 2 * coordinates @ seen + coordinates.square() @ values


def _lanczos(matrix: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a Krylov basis of a vector, a matrix within it, and the vector's length (Golub & Meurant 2010).

    Args:
        matrix: ``[r, r]``, symmetric.
        start: ``[r]``.

    Returns:
        Orthonormal rows ``[n, r]`` that begin with the vector's direction, the tridiagonal matrix ``[n, n]``, and the
        length ``[]``.
    """
    length = start.norm()
    most = min(_LANCZOS_STEPS, len(start))
    basis, tridiagonal = start.new_zeros(most, len(start)), start.new_zeros(most, most)
    basis[0] = start / length.clamp(min=torch.finfo(start.dtype).tiny)
    for step in range(most):
        new, known = matrix @ basis[step], basis[: step + 1]
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


def choose_regularization(kernel: Kernel, moments: Moments, share: float = SUBSET_SHARE) -> Regularization:
    """Choose λ for a model's kernel, without training anything again.

    - ``training``: training that is stopped early is regularized as by ridge regression with ``λ = N/τ``, which is
      taken to be where `misfit` is least. A model that is trained on a share of the rows for as many epochs has that
      share of the kernel and the same ``N/τ``, which is λ over the share for the whole kernel.
    - ``trace``: where gains or curvatures are not known, or the misfit has no minimum since training has learnt all
      that the features can say, the mean of ``w ‖φ‖²`` over the share.

    Args:
        kernel: Of the checkpoint that was trained longest, weighted with its own curvatures.
        moments: Of the same rows.
        share: Of the rows, of the models that scores are to predict.

    Returns:
        λ; at least the smallest positive number where the kernel is zero.
    """
    unit = max(moments.trace / moments.num_rows, torch.finfo(torch.float64).tiny)
    if moments.squared_gain <= 0:
        return Regularization(unit / share, "trace")
    low, high = _DECADES
    grid = unit * torch.logspace(low, high, _PER_DECADE * (high - low) + 1, dtype=torch.float64)
    found = misfit(kernel, moments, grid.to(moments.gain.device)).cpu()
    if found[0] - found.min() <= _LEAST_DEPTH * moments.squared_gain:
        return Regularization(unit / share, "trace")
    return Regularization(float(grid[found.argmin()]) / share, "training")
