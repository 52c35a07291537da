"""Kernels in feature space, by which gradients are preconditioned, and the choice of their regularization λ.

Layout: train features ``Φ [N, k]``, weights of training examples ``w [N]``, kernel ``K = Φᵀ diag(w) Φ [k, k]``;
everything in float64.

With ``w = 1`` the kernel is that of TRAK (Park et al. 2023, section 3). With the loss's second derivative in f as ``w``
it is the Gauss-Newton matrix of the sum of the losses, in place of the Hessian by which influence functions divide
(Koh & Liang 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

TRAINED_SHARE = 0.5**0.5
"""The share of training examples on which the models to predict are trained: between all but one and half of them."""

MIN_MEAN_DIVISOR = 0.2
"""The least mean of ``1 − w h``: how much of a prediction must come from other examples to be asked without its own."""

_MIN_DIVISOR = 1e-4

OPTIMUM_COSINE = 0.97
"""From which cosine on the summed loss gradient is taken for a multiple of the weights."""

LAMBDAS = torch.logspace(-6, 4, 101, dtype=torch.float64)
"""The candidates for λ, in units of the mean of ``w ‖φ‖²``."""


class Kernel:
    """A symmetric positive semi-definite matrix ``K [k, k] = B M Bᵀ``, with M ``[r, r]`` in a basis B ``[k, r]``.

    Args:
        matrix: M.
        basis: B, with orthonormal columns. None: the identity.

    >>> kernel = Kernel(torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64)))
    >>> kernel.solve(torch.ones(1, 2, dtype=torch.float64), 1.0).round(decimals=6).tolist()
    [[0.5, 0.25]]
    """

    def __init__(self, matrix: Float64[Tensor, "r r"], basis: Float64[Tensor, "k r"] | None = None) -> None:
        self.matrix, self.basis = matrix, basis
        self._factor: tuple[float, Tensor] | None = None
        self._spectrum: tuple[Tensor, Tensor] | None = None

    def coordinates(self, features: Float64[Tensor, "*n k"]) -> Float64[Tensor, "*n r"]:
        """Return features in the basis."""
        return features if self.basis is None else features @ self.basis

    def solve(self, features: Float64[Tensor, "m k"], regularization: float) -> Float64[Tensor, "m k"]:
        """Return ``(K + λI)⁻¹ φ`` without what no training example sees; with the pseudo-inverse if λ is 0."""
        factor = self._cholesky(regularization) if regularization > 0 else None
        if factor is None:
            return self.filtered(features, partial(_inverse, regularization=regularization))
        found = torch.cholesky_solve(self.coordinates(features).T, factor).T
        return found if self.basis is None else found @ self.basis.T

    def filtered(
        self, features: Float64[Tensor, "m k"], function: Callable[[Tensor], Tensor]
    ) -> Float64[Tensor, "m k"]:
        """Return ``B f(M) Bᵀ φ`` for a function f of M's eigenvalues ``[r]``."""
        values, vectors = self.spectrum()
        found = self.coordinates(features) @ vectors * function(values) @ vectors.T
        return found if self.basis is None else found @ self.basis.T

    def seen(
        self,
        vector: Float64[Tensor, " k"],
        features: Float64[Tensor, "m k"],
        rows: Int64[np.ndarray, " m"],
    ) -> Seen:
        """Return a vector and the features of the training examples at ``rows`` in eigenvectors of K."""
        values, vectors = self.spectrum()
        found, along = self.coordinates(features) @ vectors, self.coordinates(vector) @ vectors
        nothing = torch.zeros(len(found), dtype=found.dtype, device=found.device)
        return Seen(values, found, along, nothing, nothing)

    @property
    def in_basis(self) -> Kernel:
        """This kernel, with its matrix and basis."""
        return self

    def spectrum(self) -> tuple[Float64[Tensor, " r"], Float64[Tensor, "r r"]]:
        """Return M's eigenvalues, 0 or more and ascending, and its eigenvectors as columns."""
        if self._spectrum is None:
            values, vectors = torch.linalg.eigh(self.matrix)
            self._spectrum = values.clamp_(min=0), vectors
        return self._spectrum

    def _cholesky(self, regularization: float) -> Float64[Tensor, "r r"] | None:
        """Return the Cholesky factor of ``M + λI``, or None if rounding makes it indefinite."""
        if self._factor is None or self._factor[0] != regularization:
            shifted = self.matrix.clone()
            shifted.diagonal().add_(regularization)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if int(failed):
                return None
            self._factor = regularization, factor
        return self._factor[1]


@dataclass(frozen=True)
class Seen:
    """Training examples φ and a vector v in r eigenvectors U of a kernel, outside of which the kernel is zero.

    Attributes:
        values: Eigenvalues, 0 or more, ``[r]``.
        coordinates: ``Uᵀ φ``, ``[m, r]``.
        along: ``Uᵀ v``, ``[r]``.
        rest: The squared norm of each example's part outside of U, ``[m]``.
        rest_along: The inner product of that part with v, ``[m]``.
    """

    values: Float64[Tensor, " r"]
    coordinates: Float64[Tensor, "m r"]
    along: Float64[Tensor, " r"]
    rest: Float64[Tensor, " m"]
    rest_along: Float64[Tensor, " m"]


def _inverse(values: Float64[Tensor, " r"], regularization: float) -> Float64[Tensor, " r"]:
    """Return ``1 / (s + λ)`` of eigenvalues; if λ is 0, zero for those that are rounding errors."""
    if regularization > 0:
        return 1 / (values + regularization)
    cutoff = torch.finfo(values.dtype).eps * len(values) * values.max()
    return torch.where(values > cutoff, 1 / values, 0.0)


def leave_one_out(
    seen: Seen,
    weights: Float64[Tensor, " m"],
    residuals: Float64[Tensor, " m"],
    lambdas: Float64[Tensor, " G"],
) -> Float64[Tensor, "m G"]:
    """Predict what a network has learned about examples from the other examples, for each λ.

    The network is taken for a linear model in its features that began at nothing. One Newton step from its outputs f
    aims at the working response ``f − Q/w`` of each example: ``output_change − Q/w`` more than at the beginning.
    Gradient flow on the weighted squares approaches it at a rate of its own in each direction u of curvature s. After
    learning rates that sum to τ, on the mean of N losses, it has come by ``1 − exp(−s/λ)``, with ``λ = N/τ`` (Ali et
    al. 2019). So the weights are ``θ = F Φᵀ r`` with ``F = (1 − exp(−K/λ)) / K`` and the residual
    ``r = w · output_change − Q``, and an example is predicted as ``p = φᵀθ``. Without itself it is
    ``(p − h r) / (1 − w h)`` with ``h = φᵀ F φ``, the leave-one-out formula of linear smoothers (Craven & Wahba 1979),
    which is exact for the ridge ``F = (K + λI)⁻¹``.

    Args:
        seen: φ of the m examples to predict, and ``Φᵀ r`` over all training examples, in eigenvectors of
            ``K = Φᵀ diag(w) Φ``.
        weights: w of these examples.
        residuals: r of these examples.
        lambdas: The λ to try, all positive.

    Returns:
        Predictions in units of f; NaN for a λ so small that examples mostly predict themselves: the mean of
        ``1 − w h`` is below `MIN_MEAN_DIVISOR`.
    """
    values = seen.values
    if len(values):
        values = values.clamp(min=max(1e-30 * float(values.max()), torch.finfo(values.dtype).tiny)).unsqueeze(1)
    filters = -torch.expm1(-values.reshape(-1, 1) / lambdas) / values.reshape(-1, 1)  # [r, G], at most 1 / λ
    leverage = seen.coordinates.square() @ filters + seen.rest.unsqueeze(1) / lambdas  # h, [m, G]
    predicted = seen.coordinates @ (seen.along.unsqueeze(1) * filters) + seen.rest_along.unsqueeze(1) / lambdas
    predicted -= leverage * residuals.unsqueeze(1)
    divisor = 1 - weights.unsqueeze(1) * leverage
    found = predicted / divisor.clamp(min=_MIN_DIVISOR)
    return torch.where(divisor.mean(0) < MIN_MEAN_DIVISOR, torch.nan, found)


@dataclass(frozen=True)
class Regularization:
    """A regularization and how it was chosen.

    Attributes:
        value: λ, in the kernel's units, those of ``Σ w ‖φ‖²``.
        rule: ``"given"``, ``"optimum"`` (see `optimum_regularization`), or ``"held-out"`` or ``"trace"`` (see
            `choose_regularization`).
    """

    value: float
    rule: str


def optimum_regularization(
    gradient_sum: Float64[Tensor, " k"], weights: Float64[Tensor, " k"]
) -> Regularization | None:
    """Return λ of a model at the optimum of ``Σ L + λ/2 ‖θ‖²``, or None if it is not at one.

    There the gradient of the losses is ``−λθ``. Parts of θ that are not penalized, such as biases, have no gradient:
    ``λ = ‖g‖² / −⟨g, θ⟩`` holds with them too. Models that are trained on a share of the examples have that λ for the
    mean of their losses, so the same λ for the whole kernel.

    Args:
        gradient_sum: ``g = Φᵀ Q``, the features of the gradient of the summed loss.
        weights: θ in the space of features.

    >>> theta = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    >>> optimum_regularization(-0.5 * theta, theta).value
    0.5
    """
    product, squared_norm = -float(gradient_sum @ weights), float(gradient_sum.square().sum())
    if product <= 0 or product < OPTIMUM_COSINE * math.sqrt(squared_norm) * float(weights.norm()):
        return None
    return Regularization(squared_norm / product, "optimum")


def choose_regularization(
    unit: float,
    predictions: Float64[Tensor, "m G"],
    output_changes: Float64[Tensor, " m"],
    share: float = TRAINED_SHARE,
) -> Regularization:
    """Choose λ without training again.

    - ``held-out``: the λ under which leave-one-out predictions, averaged over checkpoints as scores are, have the
      highest correlation with what was learned. A model that is trained on a share of the examples for as many epochs
      has that share of the kernel and the same λ, which is λ over the share for the whole kernel.
    - ``trace``: the mean of ``w ‖φ‖²`` over the share, if it is not known what was learned, if noise could have this
      correlation (it is below two standard errors, ``2 / √m``), or if no λ within `LAMBDAS` is better than both ends.

    Args:
        unit: The mean of ``w ‖φ‖²``.
        predictions: From `leave_one_out`, for each of `LAMBDAS` times the unit.
        output_changes: What was learned about each example, in units of f.
        share: The share of training examples that the models to predict are trained on.

    Returns:
        λ and the rule.
    """
    # Correlation and not squared error, since an optimizer may change the scale of what is learned. Averages over more
    # checkpoints have less noise, so their best λ is smaller.
    predictions, output_changes = predictions - predictions.mean(0), output_changes - output_changes.mean()
    lengths = predictions.norm(dim=0) * output_changes.norm()
    correlations = torch.where(lengths > 0, output_changes @ predictions / lengths, torch.nan).cpu()
    best = int(correlations.nan_to_num(nan=-1.0).argmax())
    inside = 0 < best < len(LAMBDAS) - 1 and bool(correlations[best - 1 : best + 2].isfinite().all())
    if not inside or correlations[best] <= 2 / math.sqrt(len(output_changes)):
        return Regularization(unit / share, "trace")
    before, here, after = correlations[best - 1 : best + 2]
    bend = 2 * here - before - after
    shift = 0.5 * float((after - before) / bend) if bend > 0 else 0.0  # to the top of the parabola, in steps
    step = math.log(float(LAMBDAS[1] / LAMBDAS[0]))
    return Regularization(unit * float(LAMBDAS[best]) * math.exp(shift * step) / share, "held-out")
