"""Preconditioners: linear maps that gradients go through before anything else sees them.

The inner products of preconditioned gradients are ``<P g, P g'>``, on the side of training examples and of targets:
with ``P = Γ^{1/2}`` those of Adam's steps, with ``P = (F + λ)^(-1/2)`` those of influence functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from tracer._core.validation import check_choice
from tracer.errors import InputError
from tracer.gradients.audit import Sink
from tracer.gradients.kronecker import KroneckerCurvature, multiplied, times
from tracer.gradients.per_sample import PerSampleGradient, matrix_shape

PRECONDITIONERS = ("adam", "kfac", "ekfac")
"""The values of ``preconditioner=`` apart from None."""

KRONECKER = ("kfac", "ekfac")
"""Those that need a curvature, which is computed from training examples at each checkpoint."""


def check_preconditioner(preconditioner: str | None, sharded: bool = False) -> str | None:
    """Return a known preconditioner or None; FSDP models, whose gradients are divided, can have none."""
    if preconditioner is None:
        return None
    check_choice("preconditioner", preconditioner, PRECONDITIONERS)
    if sharded:
        raise InputError(
            f"preconditioner={preconditioner!r} got a model that fully_shard divides among processes, whose "
            f"gradients and optimizer state are divided too; pass the plain model, or preconditioner=None."
        )
    return preconditioner


class Preconditioner(Protocol):
    """A linear map of each parameter's gradient, by name."""

    def apply(self, name: str, gradient: PerSampleGradient) -> PerSampleGradient:
        """Return the gradient of a parameter, preconditioned."""
        ...

    def squared(self, name: str, gradient: Tensor) -> Tensor:
        """Return ``PᵀP g`` of one gradient ``[*shape]``; its inner product with g' is ``<P g, P g'>``."""
        ...


class DiagonalPreconditioner:
    """Multiplies gradients entry by entry.

    Args:
        scales: The factor of each entry, ``[*shape]`` for each parameter.
    """

    def __init__(self, scales: Mapping[str, Tensor]) -> None:
        self.scales = scales

    def apply(self, name: str, gradient: PerSampleGradient) -> PerSampleGradient:
        """Return the gradient of a parameter, scaled."""
        return gradient.scaled(self.scales[name].to(gradient.device))

    def squared(self, name: str, gradient: Tensor) -> Tensor:
        """Return a gradient times the squares of the factors."""
        return gradient * self.scales[name].to(gradient.device).square()


class KroneckerPreconditioner:
    """Multiplies gradients, as matrices ``[O, I]``, from both sides, and then maybe entry by entry.

    Args:
        sides: For each parameter ``left`` and ``right`` of `multiplied`.
        scales: For each parameter the factor of each entry, ``[*shape]``. Default: none.
    """

    def __init__(self, sides: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, Tensor] | None = None) -> None:
        self.sides, self.scales = sides, scales

    @classmethod
    def kfac(cls, curvatures: Mapping[str, KroneckerCurvature], damping: float) -> KroneckerPreconditioner:
        """Return ``(c (G + √δ) x (A + √δ))^(-1/2)`` of each parameter: gradients keep their factors."""
        floor = _floor({name: (each.mean_square, each.size) for name, each in curvatures.items()})
        return cls({name: each.root(damping, floor) for name, each in curvatures.items()})

    @classmethod
    def rotation(cls, curvatures: Mapping[str, KroneckerCurvature]) -> KroneckerPreconditioner:
        """Return the rotation into the eigenvectors of each curvature."""
        return cls({name: each.eigenvectors() for name, each in curvatures.items()})

    def ekfac(
        self, squares: Mapping[str, Tensor], curvatures: Mapping[str, KroneckerCurvature], damping: float
    ) -> KroneckerPreconditioner:
        """Return ``(Λ + δ mean(Λ))^(-1/2)`` after this rotation, Λ the mean ``squares`` of rotated gradients' entries.

        So the diagonal of the curvature in the basis of eigenvectors is exact (George et al. 2018).
        """
        unseen = {
            name: torch.full((len(each.left), len(each.right)), each.mean_square, dtype=torch.float64)
            for name, each in curvatures.items()
            if name not in squares or not bool(squares[name].any())
        }
        squares = {**squares, **unseen}
        means = {name: float(each.mean(dtype=torch.float64)) for name, each in squares.items()}
        floor = _floor({name: (mean, squares[name].numel()) for name, mean in means.items()})
        scales = {name: (each.double() + damping * means[name] + floor).rsqrt() for name, each in squares.items()}
        return KroneckerPreconditioner(self.sides, scales)

    def to(self, dtype: torch.dtype) -> KroneckerPreconditioner:
        """Return the preconditioner with tensors of a dtype."""
        return self.restored({name: each.to(dtype) for name, each in self.state().items()})

    def state(self) -> dict[str, Tensor]:
        """Return all tensors, for `restored`."""
        sides = {f"{side} {name}": both[i] for name, both in self.sides.items() for i, side in enumerate(_SIDES)}
        return {**sides, **{f"scale {name}": each for name, each in (self.scales or {}).items()}}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor]) -> KroneckerPreconditioner:
        """Return the preconditioner of a `state`."""
        by_kind: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, name = key.split(" ", 1)
            by_kind.setdefault(kind, {})[name] = value
        left, right = (by_kind.get(side, {}) for side in _SIDES)
        return cls({name: (left[name], right[name]) for name in left}, by_kind.get("scale"))

    def apply(self, name: str, gradient: PerSampleGradient) -> PerSampleGradient:
        """Return the gradient of a parameter, whitened."""
        left, right = (side.to(gradient.device) for side in self.sides[name])
        found = multiplied(gradient, left, right)
        if self.scales is None:
            return found
        return found.scaled(self.scales[name].to(gradient.device).view(gradient.shape))

    def squared(self, name: str, gradient: Tensor) -> Tensor:
        """Return ``PᵀP g``, whitened twice."""
        left, right = (side.to(gradient.device) for side in self.sides[name])
        found = gradient.reshape(matrix_shape(gradient.shape)).to(left.dtype)
        found = times(times(found, right).T, left).T
        if self.scales is not None:
            found = found * self.scales[name].to(gradient.device).view(found.shape).square()
        left, right = (side if side.ndim == 1 else side.T for side in (left, right))
        return times(times(found, right).T, left).T.reshape(gradient.shape)


_SIDES = "left", "right"
_FLOOR = 1e-8


def _floor(means: Mapping[str, tuple[float, int]]) -> float:
    """Return what is added to all eigenvalues, from the mean and number of each parameter's.

    It matters only to rounding noise. The gradient of a key's bias in attention, for example, is zero but for rounding;
    whitened by its own curvature alone, it would count as much as any other.
    """
    total, size = sum(mean * number for mean, number in means.values()), sum(number for _, number in means.values())
    return _FLOOR * total / max(1, size)


class PreconditioningSink:
    """Passes preconditioned gradients to another sink.

    Args:
        sink: The other sink.
        preconditioner: Preconditions gradients.
    """

    def __init__(self, sink: Sink, preconditioner: Preconditioner) -> None:
        self._sink, self._preconditioner = sink, preconditioner

    def begin(self) -> None:
        """Reset the other sink."""
        self._sink.begin()

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Pass on the gradients of samples ``start`` to ``stop``, preconditioned."""
        apply = self._preconditioner.apply
        self._sink.take(start, stop, {name: apply(name, gradient) for name, gradient in gradients.items()})
