"""The hash of the count sketch: the bucket and the sign of each entry of a parameter.

A parameter is a matrix ``[O, I]``; for a convolution its columns are ``C`` channels by ``K`` kernel taps (else ``K`` is
1). It is cut into tiles of at most k rows and k columns, k being the number of buckets. Each tile has a hash of its
own, keyed by seed, name and tile, and laid out so that memory order does the work: the tile is written as ``o`` memory
rows of ``stride`` numbers; memory row m holds the tile's row ``row_order[m]``, and memory columns are ordered by tap,
within a tap by ``channel_order``; both orders are random permutations. Then::

    bucket(m, n) = (offset + m * stride + m // group + n) mod k        sign(m, n) = row_sign[m] * col_sign[n]

with ``group = k / gcd(stride, k)``, so that folding a tile is to view each group of memory rows as lines of length k,
to sum them and to roll by the group's offset. This is a count sketch (Charikar, Chen & Farach-Colton 2002; Weinberger
et al. 2009) whose hash is a sum of a row and a column hash, as in the tensor sketch of Pham & Pagh (2013): a sketched
outer product is a circular convolution of two small sketches.

Why it is as good as a fully random hash:

- Both hashes are injective, as ``o, i <= k``: within a group, memory rows begin at different multiples of the gcd, and
  each group has a remainder of its own. So two entries of one row or of one column never collide. In the plain tensor
  sketch whole rows collide, and a gradient's rows resemble each other.
- The permutations make pairs of entries that differ in both row and column alike, whatever structure a gradient has
  (hot rows, hot columns, periods), so such a pair collides with the average probability. As the lattice fills buckets
  evenly that is about 1/k, and 0 in a tile that fits into k numbers, which therefore needs no permutation. Without
  permuting, the distances that collide are fixed by the stride; the error's variance was then 8 times 1/k for two
  unluckily placed rows, 3 times for two such columns and 2 times for every ninth column. If only rows are permuted,
  the figures for columns remain.
- Offsets are uniform and signs independent between tiles: entries of different tiles collide with probability 1/k.

The sign products of a colliding pair have mean zero, so ``E <Sx, Sy> = <x, y>`` exactly; the variance is at most about
``(|x|² |y|² + <x, y>²) / k``, the Johnson-Lindenstrauss rate of a dense projection.

Why it is fast: many rows of a matrix are permuted in runs of 16 neighbours, which move as one cache line, and a
convolution's rows and channels as whole planes; strides are multiples of 16 numbers if that wastes little, so that
matrix products write whole vectors. Columns are permuted one by one: in runs, columns of a period of 16 would meet the
strides' period and share a sixteenth of the buckets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tracer._core.random_streams import Stream

RUN, FEWEST_RUNS = 16, 32
"""The number of neighbouring rows of a matrix that are permuted together, if that makes so many runs."""


@dataclass(frozen=True)
class Order:
    """A permutation of whole runs.

    Attributes:
        runs: ``[size / run]``, int64: memory run m holds run ``runs[m]``.
        run: The length of a run.
    """

    runs: Tensor
    run: int

    @cached_property
    def indices(self) -> Tensor:
        """``[size]``, int64: memory position m holds ``indices[m]``."""
        within = torch.arange(self.run, device=self.runs.device)
        return (self.runs.unsqueeze(1) * self.run + within).flatten()


@dataclass(frozen=True)
class Tile:
    """The hash of one tile of ``o`` rows and ``i`` columns; tables are in memory order, on one device.

    Attributes:
        rows: The tile's rows of the matrix.
        channels: The tile's channels.
        taps: The tile's kernel taps.
        num_taps: The number of taps of the kernel: matrix columns are ``channel * num_taps + tap``.
        offset: The bucket of the first number in memory.
        stride: Numbers from one memory row to the next.
        group: The number of memory rows that are folded without a further shift.
        row_order: The row that each memory row holds; None if they are in order.
        channel_order: The channel that each memory channel holds; None if they are in order.
        row_sign: ``[o]``, float32.
        col_sign: ``[stride]``, float32, with zeros after the ``i`` columns.
    """

    rows: slice
    channels: slice
    taps: slice
    num_taps: int
    offset: int
    stride: int
    group: int
    row_order: Order | None
    channel_order: Order | None
    row_sign: Tensor
    col_sign: Tensor

    @property
    def num_rows(self) -> int:
        """The tile's number of rows ``o``."""
        return self.rows.stop - self.rows.start

    @property
    def num_channels(self) -> int:
        """The tile's number of channels."""
        return self.channels.stop - self.channels.start

    @property
    def num_cols(self) -> int:
        """The tile's number of columns ``i``: channels by taps."""
        return self.num_channels * (self.taps.stop - self.taps.start)

    @cached_property
    def columns(self) -> Tensor:
        """The matrix's column that each memory column holds: ``[i]``, int64."""
        device = self.row_sign.device
        channels = torch.arange(self.num_channels, device=device)
        if self.channel_order is not None:
            channels = self.channel_order.indices
        taps = torch.arange(self.taps.start, self.taps.stop, device=device)
        return ((channels + self.channels.start) * self.num_taps + taps.unsqueeze(1)).flatten()

    @cached_property
    def matrix_rows(self) -> Tensor:
        """The matrix's row that each memory row holds: ``[o]``, int64."""
        if self.row_order is not None:
            return self.row_order.indices + self.rows.start
        return torch.arange(self.rows.start, self.rows.stop, device=self.row_sign.device)

    def row_bucket(self, k: int) -> Tensor:
        """Return the bucket of each memory row's first number: ``[o]``, int64."""
        memory = torch.arange(self.num_rows, device=self.row_sign.device)
        return (self.offset + memory * self.stride + memory // self.group) % k


def padded_stride(num_cols: int, k: int) -> int:
    """Return the length of a memory row: a multiple of 16, 8 or 4 numbers that wastes at most an eighth, or any length.

    >>> padded_stride(256, 4096), padded_stride(64, 4096), padded_stride(27, 4096), padded_stride(3, 4096)
    (272, 72, 28, 4)
    """
    # Of the multiples of a unit, the first with the smallest gcd with k is taken: its rows are in the fewest groups.
    most = num_cols + max(num_cols // 8, 1)
    for unit in (16, 8, 4):
        fitting = range(-(-num_cols // unit) * unit, most + 1, unit)
        best = min((math.gcd(stride, k) for stride in fitting), default=unit + 1)
        if best <= unit:
            return next(stride for stride in fitting if math.gcd(stride, k) == best)
    return min(range(num_cols, most + 1), key=lambda stride: math.gcd(stride, k))


def tile_ranges(size: int, k: int) -> list[slice]:
    """Return the slices of ``k`` that cut ``range(size)``; the last may be shorter.

    >>> tile_ranges(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + k, size)) for start in range(0, size, k)]


def column_ranges(num_channels: int, num_taps: int, k: int) -> list[tuple[slice, slice]]:
    """Return tiles of channels by taps of at most ``k`` columns: several taps of all channels, or one tap of some.

    >>> column_ranges(2, 3, 4)
    [(slice(0, 2, None), slice(0, 2, None)), (slice(0, 2, None), slice(2, 3, None))]
    """
    taps = tile_ranges(num_taps, max(1, k // max(1, num_channels)))
    return [(channels, tap) for tap in taps for channels in tile_ranges(num_channels, k)]


def make_tile(
    stream: Stream,
    rows: slice,
    channels: slice,
    taps: slice,
    num_taps: int,
    k: int,
    device: torch.device,
    place: int | None = None,
) -> Tile:
    """Draw the hash of one tile of at most ``k`` rows and columns; ``place`` replaces the random offset."""
    # The order of draws is part of the numbers: the offset, the row order, the channel order (neither if the tile fits
    # into k numbers or is one row), the row signs and the column signs, both signs in memory order.
    num_rows, num_channels = rows.stop - rows.start, channels.stop - channels.start
    num_cols = num_channels * (taps.stop - taps.start)
    offset = stream.below(k)
    if place is not None:
        offset = place
    row_order = channel_order = None
    stride = num_cols
    if num_rows > 1 and num_rows * num_cols > k:
        stride = padded_stride(num_cols, k)
        row_order = _order(stream, num_rows, RUN if num_taps == 1 else 1, device)
        channel_order = _order(stream, num_channels, 1, device)
    row_sign, col_sign = stream.signs(num_rows), np.pad(stream.signs(num_cols), (0, stride - num_cols))
    return Tile(
        rows,
        channels,
        taps,
        num_taps,
        offset,
        stride,
        k // math.gcd(stride, k),
        row_order,
        channel_order,
        torch.from_numpy(row_sign).to(device),
        torch.from_numpy(col_sign).to(device),
    )


def _order(stream: Stream, size: int, run: int, device: torch.device) -> Order:
    run = run if size % run == 0 and size >= run * FEWEST_RUNS else 1
    return Order(torch.from_numpy(stream.permutation(size // run)).to(device), run)
