"""Curvature in feature space: kernels that whiten gradients before they are compared, and how far to regularize them.

Layout: train features ``Phi [N, k]``, row weights ``w [N]``, kernel ``K = Phiᵀ diag(w) Phi [k, k]``, rows to solve
for ``[m, k]``; everything in float64.

With ``w = 1`` the kernel is that of TRAK (Park et al. 2023, section 3). With the loss's second derivative in f as ``w``
it is the Gauss-Newton matrix of the sum of the losses, in the place of the Hessian that influence functions divide by
(Koh & Liang 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SHARE_LEFT = 0.5**0.5
"""Scores are to predict models trained on less: on all rows but one up to half of them, and this lies between."""

LEAST_REST = 0.2
"""How much of a row's prediction must come from other rows, on average, for these to be asked without it."""

_LEAST_DIVISOR = 1e-4

LAMBDAS = torch.logspace(-6, 4, 101, dtype=torch.float64)
"""What is tried as λ, in units of the mean of ``w ‖φ‖²``."""


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
        values, vectors = self.spectrum()
        return rows @ vectors * _inverse(values, regularization) @ vectors.T

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Return M's eigenvalues ``[r]``, 0 or more and ascending, and its eigenvectors, the columns of ``[r, r]``."""
        if self._spectrum is None:
            values, vectors = torch.linalg.eigh(self.matrix)
            self._spectrum = values.clamp_(min=0), vectors
        return self._spectrum

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
    """Sums over the train rows of a checkpoint, beside its kernel.

    Attributes:
        num_rows: N.
        trace: ``Σ w ‖φ‖²``, the kernel's.
        pull: ``Φᵀ (w · gain − Q)``, ``[k]``. A row's gain is its f minus the f of a model that has learnt nothing.
    """

    num_rows: int
    trace: float
    pull: Tensor


def left_out(kernel: Kernel, pull: Tensor, rows: Tensor, weights: Tensor, own: Tensor, lambdas: Tensor) -> Tensor:
    """Predict what a network has learnt about each row from the other rows, for each λ.

    The network is seen as a linear model in its features that began with nothing. One Newton step from its outputs f
    aims at the working response ``f − Q/w`` of each row, ``y = gain − Q/w`` more than at the beginning. Gradient flow
    on the weighted squares goes there at a rate of its own in each direction u of curvature s; with learning rates
    that sum up to τ, and the mean of N losses, it has come by ``1 − exp(−s/λ)``, ``λ = N/τ`` (Ali et al. 2019). Hence
    the weights ``θ = F pull`` with ``F = (1 − exp(−K/λ)) / K``, and ``p = φᵀθ`` for a row. Without the row itself it is
    ``(p − h (w gain − Q)) / (1 − w h)`` with ``h = φᵀ F φ``, the leave-one-out formula of linear smoothers (Craven &
    Wahba 1979), which is exact for the ridge ``F = (K + λI)⁻¹``. It breaks down where rows are predicted by hardly
    anything but themselves, so a λ for which ``1 − w h`` is less than `LEAST_REST` on average has no predictions.

    Args:
        kernel: ``K = Φᵀ diag(w) Φ``.
        pull: ``Φᵀ (w · gain − Q)``, ``[k]``.
        rows: φ of some of the kernel's rows, ``[m, k]``.
        weights: w, ``[m]``.
        own: ``w · gain − Q`` of each row, ``[m]``.
        lambdas: ``[G]``, all positive.

    Returns:
        ``[m, G]``, float64, in units of f; NaN for a λ under which rows predict but themselves.
    """
    values, vectors = kernel.spectrum()
    seen, along = kernel.coordinates(rows) @ vectors, kernel.coordinates(pull) @ vectors
    values = values.clamp(min=max(1e-30 * float(values.max()), torch.finfo(values.dtype).tiny)).unsqueeze(1)
    filters = -torch.expm1(-values / lambdas) / values  # [r, G]
    leverage = seen.square() @ filters
    predicted = seen @ (along.unsqueeze(1) * filters) - leverage * own.unsqueeze(1)
    rest = 1 - weights.unsqueeze(1) * leverage
    found = predicted / rest.clamp(min=_LEAST_DIVISOR)
    return torch.where(rest.mean(0) < LEAST_REST, torch.nan, found)


@dataclass(frozen=True)
class Regularization:
    """A regularization and where it comes from.

    Attributes:
        value: λ, in the kernel's units: those of ``Σ w ‖φ‖²``.
        rule: ``"given"``, ``"held-out"`` or ``"trace"``; see `choose_regularization`.
    """

    value: float
    rule: str


def choose_regularization(
    unit: float, predictions: Tensor, output_changes: Tensor, share: float = SHARE_LEFT
) -> Regularization:
    """Choose λ, without training anything again.

    - ``held-out``: where the predictions of rows that were left out, averaged over checkpoints as scores are, have the
      highest correlation with what was learnt. Averages over more checkpoints have less noise, and get a smaller λ. A
      model that is trained on a share of the rows for as many epochs has that share of the kernel and the same λ,
      which is λ over the share for the whole kernel.
    - ``trace``: where that is not known, or the correlation could be one of noise (below two standard errors,
      ``2 / √m``), or no λ within `LAMBDAS` is better than both ends, the mean of ``w ‖φ‖²`` over the share.

    Args:
        unit: The mean of ``w ‖φ‖²``.
        predictions: ``[m, G]``, as `left_out` gives them, for each of `LAMBDAS` times the unit.
        output_changes: What was learnt of each row, ``[m]``, in units of f.
        share: Of the rows, of the models that scores are to predict.

    Returns:
        λ.
    """
    predictions, output_changes = predictions - predictions.mean(0), output_changes - output_changes.mean()
    lengths = predictions.norm(dim=0) * output_changes.norm()
    found = torch.where(lengths > 0, output_changes @ predictions / lengths, torch.nan).cpu()
    best = int(found.nan_to_num(nan=-1.0).argmax())
    inside = 0 < best < len(LAMBDAS) - 1 and bool(found[best - 1 : best + 2].isfinite().all())
    if not inside or found[best] <= 2 / math.sqrt(len(output_changes)):
        return Regularization(unit / share, "trace")
    before, here, after = found[best - 1 : best + 2]
    bend = 2 * here - before - after
    place = 0.5 * float((after - before) / bend) if bend > 0 else 0.0  # of the parabola's top, in steps
    step = math.log(float(LAMBDAS[1] / LAMBDAS[0]))
    return Regularization(unit * float(LAMBDAS[best]) * math.exp(place * step) / share, "held-out")
