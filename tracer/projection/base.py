"""What every projector is: a linear map from the per-parameter gradients of a sample to ``dim`` numbers.

A projector is keyed by parameter name and seed: the numbers it gives for a parameter do not depend on the batch, the
process, the machine or the device. It sees factors (`tracer.factors`), so that it need not build gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tracer.factors import PerSampleGradient
from tracer.types import Projection

BLOCK_BYTES = 8 << 20
"""How many bytes of built gradient are held at once; a few samples fit while they are hot in cache."""


class Projector(ABC):
    """A linear map P of a sample's gradient with ``E[PᵀP] = I`` over seeds: inner products keep their value.

    Subclass it to add a projection of your own: set `kind` and `version`, set `dim` in ``__init__`` and implement
    `add`; then `tracer.projection.register_projector`.

    Attributes:
        kind: The name users pass as ``projector=``.
        version: Raised whenever the numbers change for the same seed; recorded in the store.
        dim: The number of values stored for a row.
        shapes: The shape of each parameter by name, in the model's order.
    """

    kind: ClassVar[str]
    version: ClassVar[int] = 1
    dim: int

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], proj_dim: int, seed: int) -> None:
        self.shapes = dict(shapes)
        self.proj_dim = proj_dim
        self.seed = seed

    @abstractmethod
    def add(self, name: str, gradient: PerSampleGradient, features: Tensor, squared_norm: Tensor) -> None:
        """Add one parameter's share to the features, and its exact squared norm, both in place.

        Args:
            name: The parameter's name, a key of `shapes`.
            gradient: Its per-sample gradient, of ``B`` samples.
            features: ``[B, dim]``, where P's share of this parameter is added.
            squared_norm: ``[B]``, float64, where the squared norm of this parameter's gradient is added.
        """

    def project(self, gradients: Mapping[str, PerSampleGradient]) -> Projection:
        """Project the gradients of ``B`` samples; a parameter that is not there has gradient zero.

        Args:
            gradients: The per-sample gradient of each parameter; at least one.

        Returns:
            The features ``[B, dim]`` and the exact squared norms ``[B]``.
        """
        first = next(iter(gradients.values()))
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        features = torch.zeros(first.batch_size, self.dim, dtype=dtype, device=first.device)
        squared_norm = torch.zeros(first.batch_size, dtype=torch.float64, device=first.device)
        for name, gradient in gradients.items():
            self.add(name, gradient, features, squared_norm)
        return Projection(features, squared_norm)

    def settings(self) -> dict[str, Any]:
        """Return what decides the numbers, as plain JSON values: the store records it and compares it."""
        return {"kind": self.kind, "version": self.version, "proj_dim": self.proj_dim, "seed": self.seed}


def row_blocks(batch_size: int, row_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Yield ranges of samples whose built gradients take at most ``block_bytes``, one sample at least.

    >>> list(row_blocks(5, 10, 20))
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, batch_size, step):
        yield start, min(start + step, batch_size)
