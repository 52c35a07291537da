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
from tracer.gradients.joint import Joint
from tracer.gradients.kronecker import KroneckerCurvature, multiplied, times
from tracer.gradients.per_sample import PerSampleGradient, matrix_shape

PRECONDITIONERS = ("adam", "kfac", "ekfac")
"""The values of ``preconditioner=`` apart from None."""

KRONECKER = ("kfac", "ekfac")
"""Those that need a curvature, which is computed from training examples at each checkpoint."""

CURVATURE_VERSION = 2
"""Rises when the same examples give another curvature; stores of another version cannot be continued."""


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
    """A linear map of gradients."""

    def apply(self, name: str, gradient: PerSampleGradient) -> dict[str, PerSampleGradient]:
        """Return the gradient of a parameter, or of two that are joined, preconditioned, by parameter."""
        ...

    def squared(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``PᵀP g`` of one gradient, ``[*shape]`` each; its inner product with g' is ``<P g, P g'>``."""
        ...


class DiagonalPreconditioner:
    """Multiplies gradients entry by entry.

    Args:
        scales: The factor of each entry, ``[*shape]`` for each parameter.
    """

    def __init__(self, scales: Mapping[str, Tensor]) -> None:
        self.scales = scales

    def apply(self, name: str, gradient: PerSampleGradient) -> dict[str, PerSampleGradient]:
        """Return the gradient of a parameter, scaled."""
        return {name: gradient.scaled(self.scales[name].to(gradient.device))}

    def squared(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return gradients times the squares of the factors."""
        return {name: each * self.scales[name].to(each.device).square() for name, each in gradients.items()}


class KroneckerPreconditioner:
    """Multiplies gradients, as matrices ``[O, I]``, from both sides, and then maybe entry by entry.

    Args:
        sides: For each parameter, or weight with a bias, ``left`` and ``right`` of `multiplied`.
        scales: For each of these the factor of each entry, ``[*shape]`` or a matrix. Default: none.
        joints: The weights that have gradients joined with their bias's, by name. Default: none.
    """

    def __init__(
        self,
        sides: Mapping[str, tuple[Tensor, Tensor]],
        scales: Mapping[str, Tensor] | None = None,
        joints: Mapping[str, Joint] | None = None,
    ) -> None:
        self.sides, self.scales, self.joints = sides, scales, joints or {}

    @classmethod
    def kfac(
        cls, curvatures: Mapping[str, KroneckerCurvature], damping: float, joints: Mapping[str, Joint] | None = None
    ) -> KroneckerPreconditioner:
        """Return ``(c (G + √δ) x (A + √δ))^(-1/2)`` of each parameter: gradients keep their factors."""
        floor = _floor({name: (each.mean_square, each.size) for name, each in curvatures.items()})
        return cls({name: each.root(damping, floor) for name, each in curvatures.items()}, joints=joints)

    @classmethod
    def rotation(
        cls, curvatures: Mapping[str, KroneckerCurvature], joints: Mapping[str, Joint] | None = None
    ) -> KroneckerPreconditioner:
        """Return the rotation into the eigenvectors of each curvature."""
        return cls({name: each.eigenvectors() for name, each in curvatures.items()}, joints=joints)

    def ekfac(
        self, squares: Mapping[str, Tensor], curvatures: Mapping[str, KroneckerCurvature], damping: float
    ) -> KroneckerPreconditioner:
        """Return ``(Λ + δ mean(Λ))^(-1/2)`` after this rotation, Λ the mean ``squares`` of rotated gradients' entries.

        So the diagonal of the curvature in the basis of eigenvectors is exact (George et al. 2018).
        """
        squares = self._joined(squares)
        unseen = {
            name: torch.full((len(each.left), len(each.right)), each.mean_square, dtype=torch.float64)
            for name, each in curvatures.items()
            if name not in squares or not bool(squares[name].any())
        }
        squares = {**squares, **unseen}
        means = {name: float(each.mean(dtype=torch.float64)) for name, each in squares.items()}
        floor = _floor({name: (mean, squares[name].numel()) for name, mean in means.items()})
        scales = {name: (each.double() + damping * means[name] + floor).rsqrt() for name, each in squares.items()}
        return KroneckerPreconditioner(self.sides, scales, self.joints)

    def to(self, dtype: torch.dtype) -> KroneckerPreconditioner:
        """Return the preconditioner with tensors of a dtype."""
        return self.restored({name: each.to(dtype) for name, each in self.state().items()}, self.joints)

    def state(self) -> dict[str, Tensor]:
        """Return all tensors, for `restored`."""
        sides = {f"{side} {name}": both[i] for name, both in self.sides.items() for i, side in enumerate(_SIDES)}
        return {**sides, **{f"scale {name}": each for name, each in (self.scales or {}).items()}}

    @classmethod
    def restored(
        cls, tensors: Mapping[str, Tensor], joints: Mapping[str, Joint] | None = None
    ) -> KroneckerPreconditioner:
        """Return the preconditioner of a `state`."""
        by_kind: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, name = key.split(" ", 1)
            by_kind.setdefault(kind, {})[name] = value
        left, right = (by_kind.get(side, {}) for side in _SIDES)
        return cls({name: (left[name], right[name]) for name in left}, by_kind.get("scale"), joints)

    def apply(self, name: str, gradient: PerSampleGradient) -> dict[str, PerSampleGradient]:
        """Return the gradient of a parameter, or of both that are joined, whitened."""
        left, right = (side.to(gradient.device) for side in self.sides[name])
        whitened, joint = multiplied(gradient, left, right), self.joints.get(name)
        found = {name: whitened} if joint is None else joint.split(whitened)
        if self.scales is None:
            return found
        scale = self.scales[name].to(gradient.device)
        scales = {name: scale} if joint is None else joint.tensors(scale)
        return {each: part.scaled(scales[each].view(part.shape)) for each, part in found.items()}

    def squared(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``PᵀP g``, whitened twice."""
        found: dict[str, Tensor] = {}
        for name, gradient in self._joined(gradients).items():
            left, right = (side.to(gradient.device) for side in self.sides[name])
            once = gradient.reshape(matrix_shape(gradient.shape)).to(left.dtype)
            once = times(times(once, right).T, left).T
            if self.scales is not None:
                once = once * self.scales[name].to(gradient.device).view(once.shape).square()
            left, right = (side if side.ndim == 1 else side.T for side in (left, right))
            twice = times(times(once, right).T, left).T.reshape(gradient.shape)
            found |= self.joints[name].tensors(twice) if name in self.joints else {name: twice}
        return found

    def _joined(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors by parameter with those of weights and biases joined."""
        found = dict(tensors)
        for joint in self.joints.values():
            if joint.weight in found:
                found[joint.weight] = joint.matrix(found[joint.weight], found.pop(joint.bias))
        return found


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
        found: dict[str, PerSampleGradient] = {}
        for name, gradient in gradients.items():
            found |= self._preconditioner.apply(name, gradient)
        self._sink.take(start, stop, found)
