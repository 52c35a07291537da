"""Dense random projections: every entry of every parameter has k random numbers of its own.

The slow, plain reference of Johnson & Lindenstrauss (1984), with independent signs (Achlioptas 2003) or normal
numbers. P is generated in blocks of parameter entries, each from a stream keyed by name and block, and cached if it
fits.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from tracer._core.blocks import row_blocks
from tracer._core.random_streams import Stream, unpack_signs
from tracer.gradients import norms
from tracer.gradients.per_sample import DenseGradient, PerSampleGradient, matrix_shape
from tracer.projection.base import Projector

BLOCK_NUMBERS = 1 << 22
"""The numbers of P in one block; blocks are keyed by their index, so changing it changes P."""

CACHE_BYTES = 512 << 20
"""P is cached if it takes at most this much as float32, or else as packed signs; a larger P is generated every time."""


class DenseProjector(Projector):
    """``P [sum of numel, k]`` with independent entries of mean 0 and variance ``1 / k``."""

    def _prepare(self, device: torch.device | str | None) -> None:
        self.block_entries = max(1, BLOCK_NUMBERS // self.dim)
        self._num_numbers = sum(math.prod(shape) for shape in self.shapes.values()) * self.dim
        self._cache: dict[tuple[str, int, torch.device], Tensor] = {}

    def add(self, name: str, gradient: PerSampleGradient, features: Tensor, squared_norm: Tensor) -> None:
        """Add ``P_nameᵀ g`` to ``features [B, k]`` and the exact squared norm of g, both in place."""
        if not gradient.is_divisible:  # build it once for all blocks of P
            for start, stop in row_blocks(gradient.batch_size, 4 * gradient.numel, CACHE_BYTES):
                whole = DenseGradient(gradient.entries(start, stop).view(stop - start, *gradient.shape))
                self.add(name, whole, features[start:stop], squared_norm[start:stop])
            return
        cols = max(1, matrix_shape(gradient.shape)[1])
        for index, first in enumerate(range(0, gradient.numel, self.block_entries)):
            last = min(first + self.block_entries, gradient.numel)
            block = self._block(name, index, last - first, gradient.device).to(features.dtype)
            row_bytes = (-(-last // cols) - first // cols) * cols * features.element_size()
            for start, stop in row_blocks(gradient.batch_size, row_bytes):
                entries = gradient.entries(start, stop, first, last)
                features[start:stop].add_(entries.to(features.dtype) @ block, alpha=self.dim**-0.5)
                squared_norm[start:stop] += norms.row_squares(entries)

    def _block(self, name: str, index: int, num_entries: int, device: torch.device) -> Tensor:
        """Return block ``index`` of a parameter's P, times ``sqrt(k)``: ``[num_entries, k]``, float32."""
        key = name, index, device
        block = self._cache.get(key)
        if block is None:
            stream = Stream(self.seed, self.version, self.kind, name, index)
            numbers = self._draw(name, index, stream, num_entries * self.dim)
            block = torch.from_numpy(numbers).reshape(num_entries, self.dim).to(device)
            if 4 * self._num_numbers <= CACHE_BYTES:
                self._cache[key] = block
        return block

    @abstractmethod
    def _draw(self, name: str, index: int, stream: Stream, count: int) -> np.ndarray:
        """Draw ``count`` numbers of mean 0 and variance 1 for a block: ``[count]``, float32."""


class RademacherProjector(DenseProjector):
    """Dense projection with independent entries ``+-1 / sqrt(k)``.

    >>> projector = RademacherProjector({"bias": (1,)}, 4, seed=0)
    >>> projector.project({"bias": DenseGradient(torch.ones(1, 1))}).features.abs()
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """

    kind: ClassVar[str] = "rademacher"

    def _prepare(self, device: torch.device | str | None) -> None:
        super()._prepare(device)
        self._packed: dict[tuple[str, int], np.ndarray] = {}

    def _draw(self, name: str, index: int, stream: Stream, count: int) -> np.ndarray:
        """Draw signs; they are cached as single bits if the float32 numbers would not fit."""
        packed = self._packed.get((name, index))
        if packed is None:
            packed = stream.packed_signs(count)
            if CACHE_BYTES < 4 * self._num_numbers <= 32 * CACHE_BYTES:
                self._packed[name, index] = packed
        return unpack_signs(packed, count)


class GaussianProjector(DenseProjector):
    """Dense projection with independent normal entries of variance ``1 / k``.

    >>> projector = GaussianProjector({"bias": (1,)}, 4096, seed=0)
    >>> projector.project({"bias": DenseGradient(torch.ones(1, 1))}).features.norm().round(decimals=1)
    tensor(1.)
    """

    kind: ClassVar[str] = "gaussian"

    def _draw(self, name: str, index: int, stream: Stream, count: int) -> np.ndarray:
        """Draw standard normal numbers."""
        return stream.gaussians(count)
