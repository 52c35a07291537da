"""No projection: the exact gradients, for small models and as the reference for all projections."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tracer._core.blocks import row_blocks
from tracer.gradients import norms
from tracer.gradients.per_sample import PerSampleGradient
from tracer.projection.base import Projector


class ExactProjector(Projector):
    """The flattened gradients of all parameters, one after the other in the order of ``shapes``.

    ``proj_dim`` and ``seed`` are ignored; `dim` is the number of all entries, and a missing parameter is zeros.

    >>> from tracer.gradients.per_sample import DenseGradient
    >>> projector = ExactProjector({"weight": (2, 1), "bias": (2,)})
    >>> projector.project({"bias": DenseGradient(torch.tensor([[3.0, 4.0]]))}).features
    tensor([[0., 0., 3., 4.]])
    """

    kind = "none"

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        proj_dim: object = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self._ends = dict(zip(shapes, accumulate(map(math.prod, shapes.values())), strict=True))
        total = max(self._ends.values(), default=0)
        super().__init__(shapes, max(1, total), seed, device)
        self.dim = self.proj_dim = total

    def add(self, name: str, gradient: PerSampleGradient, features: Tensor, squared_norm: Tensor) -> None:
        """Add a parameter's entries to its columns of ``features [B, dim]`` and its squared norm, in place."""
        end = self._ends[name]
        columns = slice(end - gradient.numel, end)
        for start, stop in row_blocks(gradient.batch_size, gradient.numel * features.element_size()):
            entries = gradient.entries(start, stop)
            features[start:stop, columns] += entries
            squared_norm[start:stop] += norms.row_squares(entries)

    def settings(self) -> dict[str, Any]:
        """Return everything that decides the numbers: neither ``proj_dim`` nor the seed does."""
        return {"kind": self.kind, "version": self.version}
