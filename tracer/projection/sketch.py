"""The count sketch, the default projection: one hash and one sign for every entry, summed over all parameters.

Layout: ``B`` samples (``b`` in a block), ``T`` positions, a parameter as ``[O, I]``, one of its tiles as ``[o, i]``,
and ``k`` buckets. `tracer.projection.hashing` says what the hash is and why. All forms of a gradient go through the
same linear map; which of these ways a gradient takes depends only on its form and sizes:

- built: outer products ``sum_t left[t] (outer) right[t]`` are built a tile and a few samples at a time, while hot in
  cache, from factors that already carry signs and memory order, and folded at once;
- spectral: the hash adds, so a sketched outer product is the circular convolution of the sketched factors; their
  Fourier transforms are multiplied, summed over positions, layers and tiles, and one inverse transform ends it (Pham &
  Pagh 2013). It never has ``O * I`` numbers, which vector inputs (``T`` = 1) and wide layers gain from;
- rows: an embedding's touched rows are scattered, ``T * I`` numbers a sample;
- dense: anything else is built in blocks, signed and folded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tracer.factors import PerSampleGradient, RowsGradient, SumGradient, matrix_shape
from tracer.projection import norms
from tracer.projection.base import BLOCK_BYTES, Projector, full_precision, row_blocks
from tracer.projection.hashing import Tile, arrange, make_tile, tile_ranges
from tracer.projection.seeds import Stream
from tracer.types import Projection


class _Lookup(NamedTuple):
    """The hash of one column tile in the matrix's own order, for gradients that touch single rows."""

    cols: slice
    row_bucket: Tensor  # [O], int64
    row_sign: Tensor  # [O], float32
    col_bucket: Tensor  # [num_row_tiles, i], int64
    col_sign: Tensor  # [num_row_tiles, i], float32


class _Sums:
    """What a call adds up: features ``[B, k]`` and, if needed, their half spectrum ``[B, k // 2 + 1]``."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.spectrum: Tensor | None = None

    def add_spectrum(self, start: int, stop: int, values: Tensor) -> None:
        """Add ``[b, k // 2 + 1]`` to the spectrum of samples ``start`` to ``stop``."""
        if self.spectrum is None:
            complex_dtype = torch.complex128 if self.features.dtype == torch.float64 else torch.complex64
            shape = self.features.shape[0], self.features.shape[1] // 2 + 1
            self.spectrum = torch.zeros(shape, dtype=complex_dtype, device=self.features.device)
        self.spectrum[start:stop] += values

    def finish(self) -> None:
        """Add the inverse transform of the spectrum to the features."""
        if self.spectrum is not None:
            self.features += torch.fft.irfft(self.spectrum, n=self.features.shape[1])


class SketchProjector(Projector):
    """Count sketch of all parameters into ``proj_dim`` buckets: ``E <Sx, Sy> = <x, y>``, no scale factor.

    The relative root mean square error of an inner product is about ``1 / sqrt(proj_dim)``, as for a dense projection.

    >>> import torch
    >>> from tracer.factors import DenseGradient
    >>> projector = SketchProjector({"weight": (3, 2)}, 8, seed=0)
    >>> projector.project({"weight": DenseGradient(torch.ones(1, 3, 2))}).features.abs().sum()
    tensor(6.)
    """

    kind = "sketch"

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        proj_dim: int,
        seed: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(shapes, proj_dim, seed, device)
        self.dim = self.proj_dim
        self._tiles: dict[tuple[str, torch.device], list[Tile]] = {}
        self._lookups: dict[tuple[str, torch.device], list[_Lookup]] = {}

    def add(self, name: str, gradient: PerSampleGradient, features: Tensor, squared_norm: Tensor) -> None:
        """Add one parameter's sketch to ``features [B, k]`` and its exact squared norm, in place."""
        sums = _Sums(features)
        squared_norm += self._add(name, gradient, sums)
        sums.finish()

    def _add_all(self, gradients: Mapping[str, PerSampleGradient], result: Projection) -> None:
        """Add all parameters with one inverse transform for all of them."""
        sums = _Sums(result.features)
        for name, gradient in gradients.items():
            result.squared_norm.add_(self._add(name, gradient, sums))
        sums.finish()

    def _add(self, name: str, gradient: PerSampleGradient, sums: _Sums) -> Tensor:
        """Add one parameter's sketch to the sums and return its squared norms: ``[B]``, float64."""
        if gradient.numel == 0:
            return norms.squared_norm(gradient)
        if isinstance(gradient, SumGradient):
            parts = norms.flatten_sum(gradient)
            total = norms.cross_terms(parts)
            for part in parts:
                total += self._add(name, part, sums)
            return total
        if isinstance(gradient, RowsGradient):
            self._add_rows(name, gradient, sums.features)
            return norms.squared_norm(gradient)
        positions = norms.num_positions(gradient)
        if positions is None:
            return self._add_dense(name, gradient, sums.features)
        if spectral_pays(positions, matrix_shape(gradient.shape), self.dim):
            self._add_spectral(name, gradient, sums)
            return norms.squared_norm(gradient)
        return self._add_built(name, gradient, positions, sums.features)

    def tiles(self, name: str, device: torch.device) -> list[Tile]:
        """Return the tiles of a parameter, row tiles first, with tables on ``device``."""
        key = name, device
        if key not in self._tiles:
            k, key_words = self.dim, (self.seed, self.version, self.kind, name)
            row_ranges, col_ranges = (tile_ranges(size, k) for size in matrix_shape(self.shapes[name]))
            self._tiles[key] = [
                make_tile(Stream(*key_words, a, c), row_range, col_range, k, device)
                for a, row_range in enumerate(row_ranges)
                for c, col_range in enumerate(col_ranges)
            ]
        return self._tiles[key]

    def _add_built(self, name: str, gradient: PerSampleGradient, positions: int, features: Tensor) -> Tensor:
        """Build ``[b, o, i]`` from factors, tile by tile, fold it, and return squared norms ``[B]``."""
        total = torch.zeros(gradient.batch_size, dtype=torch.float64, device=gradient.device)
        item = features.element_size()
        for tile in self.tiles(name, gradient.device):
            num_rows, num_cols = tile.shape
            row_bytes = item * (num_rows * tile.stride + 2 * positions * (num_rows + num_cols))
            for start, stop in row_blocks(gradient.batch_size, row_bytes):
                factors = gradient.outer(start, stop)
                assert factors is not None
                left = full_precision(factors[0][:, :, tile.rows])
                right = full_precision(factors[1][:, :, tile.cols])
                if positions <= num_rows:
                    left = arrange(left, tile.row_order, tile.row_sign)
                    right = arrange(right, tile.col_order, tile.col_sign)
                    built = torch.bmm(left.transpose(1, 2), right)
                else:
                    # The built tile is smaller than its factors: order and sign it instead.
                    built = arrange_tile(torch.bmm(left.transpose(1, 2), right), tile)
                flat = built.flatten(1)
                total[start:stop] += norms.row_squares(flat)
                fold(flat, tile.offset, features[start:stop])
        return total

    def _add_spectral(self, name: str, gradient: PerSampleGradient, sums: _Sums) -> None:
        """Add the products of the factors' spectra, in blocks of samples and positions."""
        k, positions = self.dim, norms.num_positions(gradient) or 0
        row_bytes = 5 * k * sums.features.element_size()
        step = max(1, BLOCK_BYTES // row_bytes)
        for tile in self.tiles(name, gradient.device):
            bucket = tile.row_bucket(k)
            for start, stop in row_blocks(gradient.batch_size, row_bytes * positions):
                factors = gradient.outer(start, stop)
                assert factors is not None
                for low in range(0, positions, step):
                    left = full_precision(factors[0][:, low : low + step, tile.rows])
                    right = full_precision(factors[1][:, low : low + step, tile.cols])
                    placed = left.new_zeros(*left.shape[:2], k)
                    placed.index_copy_(2, bucket, arrange(left, tile.row_order, tile.row_sign))
                    # n=k pads, and cuts the zeros that a stride above k has at its end.
                    right = torch.fft.rfft(arrange(right, tile.col_order, tile.col_sign), n=k)
                    product = torch.fft.rfft(placed).mul_(right)  # [b, t, k // 2 + 1]
                    sums.add_spectrum(start, stop, product.sum(1))

    def _add_dense(self, name: str, gradient: PerSampleGradient, features: Tensor) -> Tensor:
        """Sign, order and fold built gradients ``[b, O, I]`` and return squared norms ``[B]``."""
        total = torch.zeros(gradient.batch_size, dtype=torch.float64, device=gradient.device)
        rows, cols = matrix_shape(gradient.shape)
        for start, stop in row_blocks(gradient.batch_size, 2 * rows * cols * features.element_size()):
            built = norms.built(gradient, start, stop)
            total[start:stop] = norms.row_squares(built)
            matrix = built.reshape(stop - start, rows, cols)
            for tile in self.tiles(name, gradient.device):
                values = arrange_tile(matrix[:, tile.rows, tile.cols], tile)
                fold(values.flatten(1), tile.offset, features[start:stop])
        return total

    def _add_rows(self, name: str, gradient: RowsGradient, features: Tensor) -> None:
        """Scatter the touched rows ``values [b, T, I]`` into their buckets."""
        row_bytes = 4 * 8 * gradient.values[:1].numel()
        for cols, row_bucket, row_sign, col_bucket, col_sign in self._lookup(name, gradient.device):
            for start, stop in row_blocks(gradient.batch_size, row_bytes):
                index = gradient.index[start:stop]
                row_tile = index // self.dim
                values = full_precision(gradient.values[start:stop, :, cols]) * row_sign[index].unsqueeze(-1)
                values = values.to(features.dtype).mul_(col_sign[row_tile])
                bucket = (row_bucket[index].unsqueeze(-1) + col_bucket[row_tile]).remainder_(self.dim)
                features[start:stop].scatter_add_(1, bucket.flatten(1), values.flatten(1))

    def _lookup(self, name: str, device: torch.device) -> list[_Lookup]:
        """Return the hash in the matrix's own order, one for each column tile."""
        key = name, device
        if key not in self._lookups:
            tiles = self.tiles(name, device)
            num_cols = len(tile_ranges(matrix_shape(self.shapes[name])[1], self.dim))
            self._lookups[key] = [self._lookup_column(tiles[c::num_cols]) for c in range(num_cols)]
        return self._lookups[key]

    def _lookup_column(self, tiles: list[Tile]) -> _Lookup:
        """Join the row tiles of one column tile into tables in the matrix's own order."""
        num_cols = tiles[0].shape[1]
        row_bucket, row_sign, col_bucket, col_sign = [], [], [], []
        for tile in tiles:
            memory = tile.row_bucket(self.dim)
            columns = torch.arange(num_cols, device=memory.device)
            row_bucket.append(restore(memory, tile.row_order))
            row_sign.append(restore(tile.row_sign, tile.row_order))
            order = None if tile.col_order is None else tile.col_order[:num_cols]
            col_bucket.append(restore(columns, order))
            col_sign.append(restore(tile.col_sign[:num_cols], order))
        rows = torch.cat(row_bucket), torch.cat(row_sign)
        return _Lookup(tiles[0].cols, *rows, torch.stack(col_bucket), torch.stack(col_sign))


def spectral_pays(positions: int, shape: tuple[int, int], k: int) -> bool:
    """Say whether sketching factors by Fourier transforms costs less than building their outer products.

    A fixed estimate in float32 multiply-adds, fitted on CPU, so that the way depends on nothing but sizes.

    Args:
        positions: ``T``.
        shape: ``(O, I)``.
        k: The number of buckets.

    Returns:
        True for the spectral way.
    """
    rows, cols = shape
    num_tiles = math.ceil(rows / k) * math.ceil(cols / k)
    transforms = num_tiles * positions * k * (8.0 * math.log2(k + 1) + 40.0)
    return transforms + norms.gram_cost(positions, rows, cols) < norms.build_cost(positions, rows, cols)


def arrange_tile(matrix: Tensor, tile: Tile) -> Tensor:
    """Bring built tiles ``[b, o, i]`` into memory order and sign them: ``[b, o, stride]``."""
    if tile.row_order is not None:
        matrix = matrix.index_select(1, tile.row_order)
    return arrange(matrix, tile.col_order, tile.col_sign).mul_(tile.row_sign.unsqueeze(1))


def fold(flat: Tensor, offset: int, features: Tensor) -> None:
    """Add position p of ``flat [b, n]`` to bucket ``(offset + p) mod k`` of ``features [b, k]``, in place.

    >>> features = torch.zeros(1, 3)
    >>> fold(torch.tensor([[1.0, 2.0, 3.0, 40.0]]), 1, features)
    >>> features
    tensor([[ 3., 41.,  2.]])
    """
    k = features.shape[1]
    whole = flat.shape[1] // k * k
    tail = flat[:, whole:]
    if whole:
        folded = flat[:, :whole].unflatten(1, (-1, k)).sum(1)
        folded[:, : tail.shape[1]] += tail
        tail = folded
    before = min(k - offset, tail.shape[1])
    features[:, offset : offset + before] += tail[:, :before]
    features[:, : tail.shape[1] - before] += tail[:, before:]


def restore(memory: Tensor, order: Tensor | None) -> Tensor:
    """Return a table in the matrix's order from one in memory order: ``[n]``."""
    return memory if order is None else torch.empty_like(memory).scatter_(0, order, memory)
