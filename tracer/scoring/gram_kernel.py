"""Kernels of fewer training examples than features, by the inner products of these examples.

Layout: train features ``Φ [n, k]``, their weights ``w [n]``, inner products ``G = Φ Φᵀ [n, n]``; everything in float64.
The kernel ``K = Φᵀ diag(w) Φ`` has the eigenvalues of ``√w G √w``, and no matrix ``[k, k]`` is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from tracer.scoring.regularization import Kernel, Seen

_BAND = 512
"""How many rows of G are computed at a time, none of them right of the diagonal: half the work of a product."""

_LEAST_REGULARIZATION = 1e-9
"""The least λ in units of the trace with which G is used, as its errors are those of rounding, times trace over λ."""

_LEAST_WEIGHT = 1e-8
"""From which share of the largest weight on an example's coordinates are read off the eigenvectors of ``√w G √w``."""


class GramKernel:
    """``Φᵀ diag(w) Φ`` of n examples, with the calls of `Kernel`; computed when it is first needed.

    Args:
        features: Φ.
        weights: w, 0 or more.

    >>> rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)
    >>> kernel = GramKernel(rows, torch.ones(2, dtype=torch.float64))
    >>> kernel.solve(torch.ones(1, 3, dtype=torch.float64), 1.0).round(decimals=6).tolist()
    [[0.5, 0.2, 0.0]]
    """

    # The part of a target that is orthogonal to all examples has no inner product with any, before a solution or after
    # it; but divided by λ it would drown the rest in the rounding errors of a float32 product. So solutions are
    # combinations of examples, of those of weight zero too: they get scores as well.

    def __init__(self, features: Float64[Tensor, "n k"], weights: Float64[Tensor, " n"]) -> None:
        self._features, self._weights, self._roots = features, weights, weights.sqrt()
        self._factor: tuple[float, Tensor] | None = None

    def solve(self, features: Float64[Tensor, "m k"], regularization: float) -> Float64[Tensor, "m k"]:
        """Return ``(K + λI)⁻¹ φ`` without what no training example sees; with the pseudo-inverse if λ is 0."""
        factor = self._cholesky(regularization)
        if factor is None or self._span is None:
            return self.in_basis.solve(features, regularization)
        inner = features @ self._features.T
        # Woodbury: φᵢᵀ (K + λI)⁻¹ φ = (φᵢᵀ φ − φᵢᵀ Φᵀ √w (√w G √w + λI)⁻¹ √w Φ φ) / λ
        explained = torch.cholesky_solve((inner * self._roots).T, factor).mul_(self._roots.unsqueeze(1))
        return self._with_inner(inner.sub_(explained.T @ self._gram).div_(regularization), self._span)

    def leverages(self, rows: slice, regularization: float) -> Float64[Tensor, " m"] | None:
        """Return ``φᵀ (K + λI)⁻¹ φ`` of some of the examples, or None for a λ that is too small for G."""
        factor = self._cholesky(regularization)
        if factor is None:
            return None
        inner = self._gram[:, rows] * self._roots.unsqueeze(1)
        explained = torch.linalg.solve_triangular(factor, inner, upper=False).square().sum(0)
        return self._gram.diagonal()[rows].sub(explained).div_(regularization)

    def filtered(
        self, features: Float64[Tensor, "m k"], function: Callable[[Tensor], Tensor]
    ) -> Float64[Tensor, "m k"]:
        """Return ``f(K) φ`` without what no training example sees, for a function f of K's eigenvalues."""
        return self.in_basis.filtered(features, function)

    def seen(
        self,
        vector: Float64[Tensor, " k"],
        features: Float64[Tensor, "m k"],
        rows: Int64[np.ndarray, " m"],
    ) -> Seen:
        """Return a vector and the training examples at ``rows`` in eigenvectors of K; see `Kernel.seen`."""
        values, vectors = torch.linalg.eigh(self._gram * self._roots * self._roots.unsqueeze(1))
        kept = values > torch.finfo(values.dtype).eps * len(values) * values.max()
        values, vectors = values[kept], vectors[:, kept]
        own, roots = torch.from_numpy(rows).to(values.device), values.sqrt()
        products = self._features @ vector
        along = (self._roots * products) @ vectors / roots
        found = vectors[own].mul_(roots)  # as √w G √w u = s u
        found /= self._roots[own].clamp(min=torch.finfo(values.dtype).tiny).unsqueeze(1)
        light = self._weights[own] < _LEAST_WEIGHT * self._weights.max()
        found[light] = (self._gram[own[light]] * self._roots) @ vectors / roots
        rest = self._gram.diagonal()[own] - found.square().sum(1)
        return Seen(values, found, along, rest.clamp_(min=0), products[own] - found @ along)

    @cached_property
    def in_basis(self) -> Kernel:
        """The kernel as a matrix, in a basis that spans all examples."""
        basis = torch.linalg.qr(self._features.T).Q
        rows = (self._features @ basis).mul_(self._roots.unsqueeze(1))
        return Kernel(rows.T @ rows, basis)

    @cached_property
    def _gram(self) -> Float64[Tensor, "n n"]:
        found = self._features.new_empty(len(self._features), len(self._features))
        for start in range(0, len(found), _BAND):
            stop = min(start + _BAND, len(found))
            band = torch.mm(self._features[start:stop], self._features[:stop].T)
            found[start:stop, :stop], found[:stop, start:stop] = band, band.T
        return found

    @cached_property
    def _span(self) -> Float64[Tensor, "n n"] | None:
        """The Cholesky factor of G and, on its diagonal, what rounding takes away; None if that is too little."""
        shifted = self._gram.clone()
        shifted.diagonal().add_(torch.finfo(shifted.dtype).eps * float(shifted.norm()))
        factor, failed = torch.linalg.cholesky_ex(shifted)
        return None if int(failed) else factor

    def _with_inner(self, inner: Float64[Tensor, "m n"], span: Float64[Tensor, "n n"]) -> Float64[Tensor, "m k"]:
        """Return the combinations of examples that have these inner products with them."""
        parts = torch.cholesky_solve(inner.T, span)
        parts += torch.cholesky_solve(inner.T - self._gram @ parts, span)  # for what was added to the diagonal
        return parts.T @ self._features

    def _cholesky(self, regularization: float) -> Float64[Tensor, "n n"] | None:
        """Return the Cholesky factor of ``√w G √w + λI``, or None for a λ that is near what rounding leaves."""
        if regularization <= _LEAST_REGULARIZATION * float(self._weights @ self._gram.diagonal()):
            return None
        if self._factor is None or self._factor[0] != regularization:
            shifted = self._gram * self._roots * self._roots.unsqueeze(1)
            shifted.diagonal().add_(regularization)
            factor, failed = torch.linalg.cholesky_ex(shifted)
            if int(failed):
                return None
            self._factor = regularization, factor
        return self._factor[1]
