"""Projections of per-sample gradients to a few thousand numbers that preserve inner products.

>>> projector = make_projector("sketch", {"weight": (10, 784)}, proj_dim=1024, seed=0)
>>> projector.dim, projector_kinds()
(1024, ('factored', 'fast_jl', 'gaussian', 'none', 'rademacher', 'sketch'))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

from tracer._core.blocks import row_blocks
from tracer.errors import InputError, InputTypeError, nearest_name
from tracer.projection.base import Projector
from tracer.projection.dense import GaussianProjector, RademacherProjector
from tracer.projection.exact import ExactProjector
from tracer.projection.factored import FactoredProjector
from tracer.projection.fast_jl import FastJLProjector
from tracer.projection.sketch.projector import SketchProjector

__all__ = [
    "ExactProjector",
    "FactoredProjector",
    "FastJLProjector",
    "GaussianProjector",
    "Projector",
    "RademacherProjector",
    "SketchProjector",
    "make_projector",
    "projector_kinds",
    "register_projector",
    "row_blocks",
]

ProjectorClass = TypeVar("ProjectorClass", bound=type[Projector])

_KINDS: dict[str, type[Projector]] = {}


def register_projector(projector: ProjectorClass) -> ProjectorClass:
    """Register a projector class under its ``kind``; may be used as a decorator.

    Args:
        projector: A subclass of `Projector` with `kind` set.

    Returns:
        The class itself.

    Raises:
        InputTypeError: If it is not such a class.
        InputError: If another class already has this kind.
    """
    if not (isinstance(projector, type) and issubclass(projector, Projector)):
        raise InputTypeError(f"register_projector takes a subclass of tracer.projection.Projector, got {projector!r}")
    kind = getattr(projector, "kind", None)
    if not isinstance(kind, str) or not kind:
        raise InputTypeError(f"{projector.__name__} needs a class attribute `kind`, the name users pass; got {kind!r}")
    taken = _KINDS.setdefault(kind, projector)
    if taken is not projector:
        raise InputError(f"projector kind {kind!r} is taken by {taken.__name__}; give {projector.__name__} another")
    return projector


def projector_kinds() -> tuple[str, ...]:
    """Return the names of all registered projectors, sorted."""
    return tuple(sorted(_KINDS))


def make_projector(
    kind: str,
    shapes: Mapping[str, tuple[int, ...]],
    proj_dim: int,
    seed: int,
    device: torch.device | str | None = None,
) -> Projector:
    """Build a projector.

    Args:
        kind: Its name, one of `projector_kinds`.
        shapes: The shape of each parameter by name, in the model's order.
        proj_dim: The number of values wanted for an example; ignored by ``"none"``.
        seed: The seed of all random numbers, from 0 to 2**64 - 1.
        device: The device of the gradients; only ``"fast_jl"`` needs a certain one.

    Returns:
        The projector.

    Raises:
        InputError: If the kind is unknown, or the projector refuses an argument.
    """
    if kind not in _KINDS:
        raise InputError(f"unknown projector {kind!r}: {nearest_name(kind, _KINDS)}")
    return _KINDS[kind](shapes, proj_dim, seed, device)


for _projector in (
    SketchProjector,
    RademacherProjector,
    GaussianProjector,
    FactoredProjector,
    FastJLProjector,
    ExactProjector,
):
    register_projector(_projector)
