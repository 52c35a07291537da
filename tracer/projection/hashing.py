"""The hash of the count sketch: where each entry of a parameter goes and with which sign.

A parameter is a matrix ``[O, I]`` cut into tiles of at most k rows and k columns, k being the number of buckets. Each
tile has a hash of its own, keyed by seed, name and tile, and laid out so that memory order does the work: the tile is
written as ``o`` memory rows of ``stride`` numbers, where memory row m holds the tile's row ``row_order[m]`` and memory
column n its column ``col_order[n]``, both orders random permutations. Then::

    bucket(m, n) = (offset + m * stride + n) mod k        sign(m, n) = row_sign[m] * col_sign[n]

so that folding a tile is to view the buffer as rows of length k, to sum them and to roll by ``offset``. This is a count
sketch (Charikar, Chen & Farach-Colton 2002; Weinberger et al. 2009) whose hash is a sum of a row and a column hash, as
in the tensor sketch of Pham & Pagh (2013): a sketched outer product is a circular convolution of two small sketches.

Why it is as good as a fully random hash:

- ``stride >= i`` is coprime to k and ``o, i <= k``, so both hashes are injective: two entries of one row or of one
  column never collide. The plain tensor sketch lets whole rows collide, and a gradient's rows resemble each other.
- The two permutations make all pairs of entries that differ in row and column alike, whatever structure a gradient has
  (hot rows, hot columns, periods), so such a pair collides with the average probability. As the lattice fills buckets
  evenly that is about 1/k, and 0 in a tile that fits into k numbers, which therefore needs no permutation. Without
  permuting, the distances that collide are fixed by a few candidate strides; the error's variance was then 8 times 1/k
  for two unluckily placed rows, 3 times for two such columns and 2 times for every ninth column, the centre taps of a
  3 x 3 convolution. With rows permuted alone, the figures for columns stay.
- Offsets are uniform and signs independent between tiles: entries of different tiles collide with probability 1/k.

The sign products of a colliding pair have mean zero, so ``E <Sx, Sy> = <x, y>`` exactly; the variance is at most about
``(|x|² |y|² + <x, y>²) / k``, the Johnson-Lindenstrauss rate of a dense projection.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tracer.projection.seeds import Stream


@dataclass(frozen=True)
class Tile:
    """The hash of one tile of ``o`` rows and ``i`` columns; tables are in memory order, on one device.

    Attributes:
        rows: The tile's rows of the matrix.
        cols: The tile's columns of the matrix.
        offset: The bucket of the first number in memory.
        stride: Numbers from one memory row to the next.
        row_order: ``[o]``, int64, the row that each memory row holds; None if they are in order.
        col_order: ``[stride]``, int64, the column that each memory column holds, 0 where there is none; None as above.
        row_sign: ``[o]``, float32.
        col_sign: ``[i]``, or ``[stride]`` with zeros at the end where ``col_order`` is given; float32.
    """

    rows: slice
    cols: slice
    offset: int
    stride: int
    row_order: Tensor | None
    col_order: Tensor | None
    row_sign: Tensor
    col_sign: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """The tile's number of rows and columns."""
        return self.rows.stop - self.rows.start, self.cols.stop - self.cols.start

    def row_bucket(self, k: int) -> Tensor:
        """Return the bucket of each memory row's first number: ``[o]``, int64."""
        memory = torch.arange(self.shape[0], device=self.row_sign.device)
        return (self.offset + memory * self.stride) % k


def coprime_stride(least: int, k: int) -> int:
    """Return the smallest stride from ``least`` on that is coprime to ``k``.

    There always is one: ``least`` to ``least + k`` holds ``1 mod k``.

    >>> coprime_stride(64, 4096), coprime_stride(27, 4096), coprime_stride(5, 30)
    (65, 27, 7)
    """
    stride = least
    while math.gcd(stride, k) != 1:
        stride += 1
    return stride


def tile_ranges(size: int, k: int) -> list[slice]:
    """Cut ``range(size)`` into pieces of ``k``, the last one shorter.

    Args:
        size: How many rows or columns there are.
        k: The number of buckets.

    Returns:
        The pieces in order.

    >>> tile_ranges(5, 2)
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return [slice(start, min(start + k, size)) for start in range(0, size, k)]


def make_tile(stream: Stream, rows: slice, cols: slice, k: int, device: torch.device) -> Tile:
    """Draw the hash of one tile.

    The stream gives, in this order: the offset, the row order, the column order (neither if the tile fits into ``k``
    numbers or is one row), the row signs and the column signs, both signs in memory order.

    Args:
        stream: Random words of this tile.
        rows: The tile's rows, at most ``k``.
        cols: The tile's columns, at most ``k``.
        k: The number of buckets.
        device: Where the tables go.

    Returns:
        The tile.
    """
    num_rows, num_cols = rows.stop - rows.start, cols.stop - cols.start
    offset = stream.below(k)
    if num_rows == 1 or num_rows * num_cols <= k:
        row_sign, col_sign = stream.signs(num_rows), stream.signs(num_cols)
        signs = torch.from_numpy(row_sign).to(device), torch.from_numpy(col_sign).to(device)
        return Tile(rows, cols, offset, num_cols, None, None, *signs)
    stride = coprime_stride(num_cols, k)
    row_order, col_order = stream.permutation(num_rows), stream.permutation(num_cols)
    row_sign, col_sign = stream.signs(num_rows), stream.signs(num_cols)
    padding = (0, stride - num_cols)
    tables = (row_order, np.pad(col_order, padding), row_sign, np.pad(col_sign, padding))
    return Tile(rows, cols, offset, stride, *(torch.from_numpy(table).to(device) for table in tables))


def arrange(values: Tensor, order: Tensor | None, sign: Tensor) -> Tensor:
    """Bring the last dimension of ``[b, n, size]`` into memory order and multiply by the signs.

    Args:
        values: ``[b, n, size]``, float32 or float64.
        order: ``[length]``, int64, or None to leave the order.
        sign: ``[length]``, float32, 0 where memory holds padding.

    Returns:
        ``[b, n, length]``, a new tensor.
    """
    if order is None:
        return values * sign
    if values.stride(1) == 1 and values.shape[1] > 1:
        # Unfolded convolution inputs lie as [b, size, n]: whole rows move, several times faster than single numbers.
        return values.transpose(1, 2).index_select(1, order).transpose(1, 2).mul_(sign)
    return values.gather(2, order.expand(*values.shape[:2], -1)).mul_(sign)
