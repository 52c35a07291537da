"""The lattice way of the sketch: outer products of few positions are folded within the product that builds them.

Layout as in `tracer.projection.sketch`. A tile's hash maps memory row ``m = q * group + r`` and memory column
``n = u * d + v``, with ``d = gcd(stride, k)`` and ``stride = c * d``, to bucket

    offset + q + d * ((r * c + u) mod group) + v   (mod k),

so with ``w = (r * c + u) mod group`` the buckets of a group of rows are a matrix ``[group, d]`` over ``(w, v)``, and

    out[w, v] = sum over t and u of left_t[q * group + (w - u) / c] * right_t[u * d + v]

is a matrix product of sum length ``T * c``: its left factor holds windows of one vector, as dividing by ``c`` modulo
``group`` is a fixed order of rows. Groups differ by shifts of one bucket, so they are further terms of the sum, with
the right factor shifted: the product is ``d + groups - 1`` wide, and what exceeds the width belongs to the next ``w``.
All ``O * I`` products are summed up in registers; nothing of that size is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tracer._core.blocks import full_precision, row_blocks
from tracer._core.scratch import Scratch
from tracer.gradients.per_sample import PerSampleGradient
from tracer.projection.sketch.arrangement import place_columns
from tracer.projection.sketch.hashing import Tile

VECTOR_BYTES, LATTICE_BYTES = 16 << 20, 4 << 20
"""The bytes of factors ordered at once, and of windows and products worked on while they are in cache."""


@dataclass(frozen=True)
class Lattice:
    """The buckets of a tile as a matrix.

    Attributes:
        tile: The tile.
        k: The number of buckets.
    """

    tile: Tile
    k: int

    @property
    def width(self) -> int:
        """``d``: neighbouring columns that stay neighbours."""
        return self.k // self.tile.group

    @property
    def steps(self) -> int:
        """``c``: the stride over ``d``."""
        return self.tile.stride // self.width

    @property
    def groups(self) -> int:
        """The number of groups of rows, the last perhaps not full."""
        return math.ceil(self.tile.num_rows / self.tile.group)

    def cost(self, positions: int) -> float:
        """Estimate a sample's cost in float32 multiply-adds: the product, copies of its factors, and folding."""
        terms, breadth = self.groups * self.steps, self.width + self.groups - 1
        copies = terms * (self.tile.group if self.steps > 1 else 1) + terms * (breadth if self.groups > 1 else 1)
        wide = -(-breadth // 16) * 16  # products take as long as those of whole vectors
        return positions * (1.2 * self.tile.group * wide * terms + 4.0 * copies) + 8.0 * self.k

    @property
    def fits(self) -> bool:
        """Whether the shifts of groups stay within the neighbouring ``w``."""
        return self.groups <= self.width + 1

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor]:
        """The row of the tile at each place of the windowed vectors, and its sign or zero: ``[groups, G + c - 1]``."""
        tile, group = self.tile, self.tile.group
        device = tile.row_sign.device
        place = (torch.arange(group + self.steps - 1) - (self.steps - 1)) % group
        within = place * pow(self.steps, -1, group) % group if group > 1 else place
        memory = (torch.arange(self.groups).unsqueeze(1) * group + within).to(device)
        there = memory < tile.num_rows
        memory = memory.clamp(max=tile.num_rows - 1)
        rows = memory if tile.row_order is None else tile.row_order.indices[memory]
        return rows + tile.rows.start, torch.where(there, tile.row_sign[memory], 0.0)

    def add(self, gradient: PerSampleGradient, features: Tensor, scratch: Scratch) -> None:
        """Add the tile's sketch of a gradient in outer form to ``features [B, k]``, in place."""
        positions = gradient.num_positions or 0
        terms, breadth = positions * self.groups * self.steps, self.width + self.groups - 1
        item, group = features.element_size(), self.tile.group
        vector_bytes = 2 * item * positions * (self._rows[0].numel() + self.tile.stride)
        product_bytes = item * (terms * (group + breadth) + group * breadth)
        for start, stop in row_blocks(gradient.batch_size, vector_bytes, VECTOR_BYTES):
            lefts, rights = self._ordered(gradient, start, stop, scratch)
            for low, high in row_blocks(stop - start, product_bytes, LATTICE_BYTES):
                left, right = self._windows(lefts[low:high], scratch), self._shifts(rights[low:high], scratch)
                out = scratch.take("lattice", (high - low, group, breadth), left.dtype, left.device)
                self._fold(torch.bmm(left.transpose(1, 2), right, out=out), features[start + low : start + high])

    def _ordered(self, gradient: PerSampleGradient, start: int, stop: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """Return signed factors in order: ``[b, T, groups, G + c - 1]`` and ``[b, T, c, d]``, the last step first."""
        outer = gradient.factors(start, stop)
        left, (rows, sign) = full_precision(outer[0]), self._rows
        b, positions = left.shape[:2]
        vectors = scratch.take("left", (b, positions, rows.numel()), left.dtype, left.device)
        torch.index_select(left, 2, rows.flatten(), out=vectors).mul_(sign.flatten())
        placed = scratch.take("right", (b, positions, self.tile.stride), left.dtype, left.device)
        place_columns(outer[1], self.tile, placed)
        right = placed.view(b, positions, self.steps, self.width)
        return vectors.view(b, positions, *rows.shape), right.flip(2) if self.steps > 1 else right

    def _windows(self, vectors: Tensor, scratch: Scratch) -> Tensor:
        """Return the left factor: ``[b, terms, G]``, terms being positions, groups and steps."""
        group = self.tile.group
        if self.steps > 1:
            shape = *vectors.shape[:3], self.steps, group
            windows = scratch.take("windows", shape, vectors.dtype, vectors.device)
            vectors = windows.copy_(vectors.unfold(3, group, 1))
        return vectors.view(len(vectors), -1, group)

    def _shifts(self, right: Tensor, scratch: Scratch) -> Tensor:
        """Return the right factor: ``[b, terms, breadth]``, that of each group shifted by one more bucket."""
        if self.groups > 1:
            padded = torch.nn.functional.pad(right, (self.groups - 1, self.groups - 1))
            shifted = padded.unfold(3, self.width + self.groups - 1, 1).transpose(2, 3).flip(2)
            right = scratch.take("shifted", shifted.shape, right.dtype, right.device).copy_(shifted)
        return right.view(len(right), -1, right.shape[-1])

    def _fold(self, out: Tensor, features: Tensor) -> None:
        """Add ``out [b, group, breadth]`` to its buckets."""
        over = self.groups - 1
        if over:  # no number both gives and takes
            out[:, 1:, :over] += out[:, :-1, self.width :]
            out[:, 0, :over] += out[:, -1, self.width :]
        flat = out[..., : self.width].reshape(len(out), self.k)
        split = self.k - self.tile.offset
        features[:, self.tile.offset :] += flat[:, :split]
        features[:, : self.tile.offset] += flat[:, split:]
