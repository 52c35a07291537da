"""The count sketch, the default projection: one hash and one sign for every entry, summed over all parameters.

Layout: ``B`` samples (``b`` in a block), ``T`` positions, a parameter as ``[O, I]``, one of its tiles as ``[o, i]``,
and ``k`` buckets. `tracer.projection.sketch.hashing` defines the hash. All forms of a gradient are mapped by the same
linear map, in one of these ways, which depends only on the form and its sizes:

- built: outer products ``sum_t left[t] (outer) right[t]`` are built for a tile and a few samples at a time, from
  factors that already have signs and memory order, and folded while they are in cache;
- lattice (`tracer.projection.sketch.lattice`): few positions are folded within the matrix product that builds them;
- spectral (`tracer.projection.sketch.spectral`): factors are sketched and multiplied as spectra, nothing is built;
- rows: an embedding's touched rows are scattered, ``T * I`` numbers a sample;
- scaled: outer products with a factor for each entry are built and scaled before they are folded;
- dense: anything else is built in blocks, signed and folded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tracer._core.blocks import full_precision, row_blocks
from tracer._core.random_streams import Stream
from tracer._core.scratch import Scratch
from tracer.gradients import norms
from tracer.gradients.combined import cross_terms
from tracer.gradients.per_sample import PerSampleGradient, matrix_shape
from tracer.gradients.windows import has_windows
from tracer.projection.base import Projector, RunningProjection
from tracer.projection.sketch.arrangement import factors
from tracer.projection.sketch.hashing import Tile, column_ranges, make_tile, tile_ranges
from tracer.projection.sketch.lattice import Lattice
from tracer.projection.sketch.spectral import Spectrum, SpectrumRows, spectral_cost
from tracer.types import Projection

FACTOR_BYTES, BUILT_BYTES = 16 << 20, 8 << 20
"""The bytes of factors brought into memory order at once, and of gradients built while they are in cache."""


class _RunningSketch(RunningProjection):
    """A sketch whose spectral parts share one inverse transform."""

    def __init__(self, projector: SketchProjector, into: Projection) -> None:
        super().__init__(projector, into)
        self._sketch, self._spectrum = projector, Spectrum(into.features)

    def _add(
        self, name: str, gradient: PerSampleGradient, start: int, stop: int, features: Tensor, squared_norm: Tensor
    ) -> None:
        squared_norm += self._sketch.add_to(name, gradient, features, self._spectrum.rows(start, stop))

    def finish(self) -> Projection:
        """Return the projection after transforming the spectra back."""
        self._spectrum.finish()
        return self.result


class _Lookup(NamedTuple):
    """The hash of one column tile in the matrix's own order, for gradients that touch single rows."""

    cols: Tensor  # [i], int64
    row_bucket: Tensor  # [O], int64
    row_sign: Tensor  # [O], float32
    col_bucket: Tensor  # [num_row_tiles, i], int64
    col_sign: Tensor  # [num_row_tiles, i], float32


class SketchProjector(Projector):
    """Count sketch of all parameters into ``proj_dim`` buckets: ``E <Sx, Sy> = <x, y>``, no scale factor.

    The relative root mean square error of an inner product is about ``1 / sqrt(proj_dim)``, as for a dense projection.
    If all parameters together have no more entries than there are buckets, each entry has a bucket of its own and inner
    products are exact.

    >>> import torch
    >>> from tracer.gradients.per_sample import DenseGradient
    >>> projector = SketchProjector({"weight": (3, 2)}, 8, seed=0)
    >>> projector.project({"weight": DenseGradient(torch.ones(1, 3, 2))}).features.abs().sum()
    tensor(6.)
    """

    kind = "sketch"

    def _prepare(self, device: torch.device | str | None) -> None:
        self._tiles: dict[tuple[str, torch.device], list[Tile]] = {}
        self._lattices_of: dict[tuple[str, torch.device], list[Lattice]] = {}
        self._lookups: dict[tuple[str, torch.device], list[_Lookup]] = {}
        self._scratch = Scratch()
        self._starts: dict[str, int] = {}
        self._num_entries = 0
        for name, shape in self.shapes.items():
            self._starts[name] = self._num_entries
            self._num_entries += math.prod(shape)

    def add(self, name: str, gradient: PerSampleGradient, features: Tensor, squared_norm: Tensor) -> None:
        """Add one parameter's sketch to ``features [B, k]`` and its exact squared norm, in place."""
        running = self.start(Projection(features, squared_norm))
        running.add({name: gradient})
        running.finish()

    def start(self, into: Projection) -> RunningProjection:
        """Start a sketch of gradients that arrive by parameter, with one inverse transform for all of them."""
        return _RunningSketch(self, into)

    def add_to(self, name: str, gradient: PerSampleGradient, features: Tensor, spectrum: SpectrumRows) -> Tensor:
        """Add one parameter's sketch to features or spectrum and return its squared norms: ``[B]``, float64."""
        if gradient.numel == 0:
            return self._norms(gradient)
        parts = gradient.parts()
        if len(parts) > 1:
            total = cross_terms(parts) if self.adds_norms else self._norms(gradient)
            for part in parts:
                total += self.add_to(name, part, features, spectrum)
            return total
        if gradient.touches_rows:
            self._add_rows(name, gradient, features)
            return self._norms(gradient)
        inner, scale = gradient.unscaled()
        positions = inner.num_positions
        if positions is None:
            return self._add_dense(name, gradient, features)
        if scale is not None:
            return self._add_built(name, inner, positions, features, scale)
        way = self._way(name, gradient, positions)
        if way == "built":
            return self._add_built(name, gradient, positions, features)
        if way == "spectral":
            spectrum.add(gradient, self.tiles(name, gradient.device), self._scratch)
        else:
            for lattice in self._lattices(name, gradient.device):
                lattice.add(gradient, features, self._scratch)
        return self._norms(gradient)

    def _norms(self, gradient: PerSampleGradient) -> Tensor:
        """Return squared norms ``[B]``, or zeros if none are wanted."""
        if self.adds_norms:
            return gradient.squared_norm()
        return torch.zeros(gradient.batch_size, dtype=torch.float64, device=gradient.device)

    def _way(self, name: str, gradient: PerSampleGradient, positions: int) -> str:
        """Choose the cheapest way by sizes alone: ``built``, ``spectral`` or ``lattice``."""
        shape = matrix_shape(gradient.shape)
        # for norms, which building gives besides
        gram = norms.gram_cost(positions, *shape) if self.adds_norms else 0
        costs = {
            "built": norms.build_cost(positions, *shape) + (12.0 * math.prod(shape) if positions > 1 else 0.0),
            "spectral": spectral_cost(positions, shape, self.dim) + gram,
        }
        if not has_windows(gradient):
            lattices = self._lattices(name, gradient.device)
            if all(lattice.fits for lattice in lattices):
                costs["lattice"] = sum(lattice.cost(positions) for lattice in lattices) + gram
        return min(costs, key=costs.__getitem__)

    def _lattices(self, name: str, device: torch.device) -> list[Lattice]:
        """Return the buckets of each tile as a matrix."""
        key = name, device
        if key not in self._lattices_of:
            self._lattices_of[key] = [Lattice(tile, self.dim) for tile in self.tiles(name, device)]
        return self._lattices_of[key]

    def tiles(self, name: str, device: torch.device) -> list[Tile]:
        """Return the tiles of a parameter, row tiles first, with tables on ``device``."""
        key = name, device
        if key not in self._tiles:
            k, key_words = self.dim, (self.seed, self.version, self.kind, name)
            num_rows, num_cols = matrix_shape(self.shapes[name])
            num_taps = math.prod(self.shapes[name][2:])
            columns = column_ranges(num_cols // max(1, num_taps), num_taps, k)
            self._tiles[key] = [
                make_tile(Stream(*key_words, a, c), rows, *columns[c], num_taps, k, device, self._place(name))
                for a, rows in enumerate(tile_ranges(num_rows, k))
                for c in range(len(columns))
            ]
        return self._tiles[key]

    def _place(self, name: str) -> int | None:
        """Return the first bucket of a parameter if all parameters together fit into the buckets, else None."""
        place = self._starts[name]
        return place if self._num_entries <= self.dim else None

    def _add_built(
        self, name: str, gradient: PerSampleGradient, positions: int, features: Tensor, scale: Tensor | None = None
    ) -> Tensor:
        """Build ``[b, o, stride]`` from factors, tile by tile, scale and fold it, and return squared norms ``[B]``."""
        if positions == 1 and scale is None:
            for tile in self.tiles(name, gradient.device):
                self._add_products(gradient, tile, features)
            return self._norms(gradient)
        total = torch.zeros(gradient.batch_size, dtype=torch.float64, device=gradient.device)
        for tile in self.tiles(name, gradient.device):
            row_norms = features.new_zeros(gradient.batch_size, tile.num_rows)
            placed = None if scale is None else place_tile(scale.reshape(1, *matrix_shape(scale.shape)), tile)
            for start, stop, built in self._built(gradient, positions, tile, features.element_size()):
                if placed is not None:
                    built *= placed
                if self.adds_norms:
                    torch.linalg.vector_norm(built, dim=2, out=row_norms[start:stop])
                fold_tile(built, tile, features[start:stop])
            total += row_norms.double().square_().sum(1)
        return total

    def _built(
        self, gradient: PerSampleGradient, positions: int, tile: Tile, item: int
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Yield ranges of samples with their gradients in memory order, ``[b, o, stride]``, valid until the next."""
        row_bytes = item * positions * (tile.num_rows + tile.stride)
        for start, stop in row_blocks(gradient.batch_size, row_bytes, FACTOR_BYTES):
            left, right = factors(gradient, start, stop, tile, self._scratch)
            for low, high in row_blocks(stop - start, item * tile.num_rows * tile.stride, BUILT_BYTES):
                shape = high - low, tile.num_rows, tile.stride
                built = self._scratch.take("built", shape, left.dtype, left.device)
                torch.bmm(left[low:high], right[low:high], out=built)
                yield start + low, start + high, built

    def _add_products(self, gradient: PerSampleGradient, tile: Tile, features: Tensor) -> None:
        """Add outer products of one position; a tile that fits into the buckets is not built."""
        if tile.num_rows * tile.stride > self.dim:
            for start, stop, built in self._built(gradient, 1, tile, features.element_size()):
                fold_tile(built, tile, features[start:stop])
            return
        before = min(tile.num_rows, (self.dim - tile.offset) // tile.stride)  # rows before the last bucket
        after = min(tile.num_rows, before + 1)  # rows that begin at or behind the first bucket; one is in between
        for start, stop in row_blocks(gradient.batch_size, features.element_size() * self.dim, FACTOR_BYTES):
            left, right = factors(gradient, start, stop, tile, self._scratch)  # [b, o, 1] and [b, 1, stride]
            for low, high in ((0, before), (after, tile.num_rows)):
                first = (tile.offset + low * tile.stride) % self.dim
                place = features[start:stop, first : first + (high - low) * tile.stride]
                place.unflatten(1, (high - low, tile.stride)).addcmul_(left[:, low:high], right)
            if before < after:
                row = left[:, before] * right[:, 0]
                fold(row, (tile.offset + before * tile.stride) % self.dim, features[start:stop])

    def _add_dense(self, name: str, gradient: PerSampleGradient, features: Tensor) -> Tensor:
        """Sign, order and fold built gradients ``[b, O, I]`` and return squared norms ``[B]``."""
        total = torch.zeros(gradient.batch_size, dtype=torch.float64, device=gradient.device)
        rows, cols = matrix_shape(gradient.shape)
        for start, stop in row_blocks(gradient.batch_size, 2 * rows * cols * features.element_size()):
            built = gradient.entries(start, stop)
            if self.adds_norms:
                total[start:stop] = norms.row_squares(built)
            matrix = built.reshape(stop - start, rows, cols)
            for tile in self.tiles(name, gradient.device):
                if rows == tile.num_taps == 1:  # a vector is in order; with taps, memory goes tap by tap
                    signed = matrix[:, 0, tile.channels] * (tile.col_sign * tile.row_sign)
                    fold(signed, tile.offset, features[start:stop])
                else:
                    fold_tile(arrange_tile(matrix, tile), tile, features[start:stop])
        return total

    def _add_rows(self, name: str, gradient: PerSampleGradient, features: Tensor) -> None:
        """Scatter the touched rows ``values [b, T, I]`` into their buckets."""
        row_bytes = 4 * 8 * gradient.touched_rows(0, 1)[1].numel()
        for cols, row_bucket, row_sign, col_bucket, col_sign in self._lookup(name, gradient.device):
            for start, stop in row_blocks(gradient.batch_size, row_bytes):
                index, values = gradient.touched_rows(start, stop)
                row_tile = index // self.dim
                values = full_precision(values[..., cols]) * row_sign[index].unsqueeze(-1)
                values = values.to(features.dtype).mul_(col_sign[row_tile])
                bucket = (row_bucket[index].unsqueeze(-1) + col_bucket[row_tile]).remainder_(self.dim)
                features[start:stop].scatter_add_(1, bucket.flatten(1), values.flatten(1))

    def _lookup(self, name: str, device: torch.device) -> list[_Lookup]:
        """Return the hash in the matrix's own order, one for each column tile."""
        key = name, device
        if key not in self._lookups:
            tiles = self.tiles(name, device)
            num_row_tiles = len(tile_ranges(matrix_shape(self.shapes[name])[0], self.dim))
            num_cols = len(tiles) // num_row_tiles
            self._lookups[key] = [self._lookup_column(tiles[c::num_cols]) for c in range(num_cols)]
        return self._lookups[key]

    def _lookup_column(self, tiles: list[Tile]) -> _Lookup:
        """Join the row tiles of one column tile into tables, rows in the matrix's own order."""
        row_bucket, row_sign, col_bucket, col_sign = [], [], [], []
        columns = tiles[0].columns.sort().values
        for tile in tiles:
            rows = tile.matrix_rows.argsort()
            row_bucket.append(tile.row_bucket(self.dim)[rows])
            row_sign.append(tile.row_sign[rows])
            memory = tile.columns.argsort()
            col_bucket.append(memory)
            col_sign.append(tile.col_sign[memory])
        joined = torch.cat(row_bucket), torch.cat(row_sign)
        return _Lookup(columns, *joined, torch.stack(col_bucket), torch.stack(col_sign))


def arrange_tile(matrix: Tensor, tile: Tile) -> Tensor:
    """Bring a tile of ``[b, O, I]`` into memory order and sign it: ``[b, o, stride]``."""
    return place_tile(matrix, tile).mul_(tile.col_sign).mul_(tile.row_sign.unsqueeze(1))


def place_tile(matrix: Tensor, tile: Tile) -> Tensor:
    """Bring a tile of ``[b, O, I]`` into memory order, with any numbers behind it: ``[b, o, stride]``."""
    columns = torch.nn.functional.pad(tile.columns, (0, tile.stride - tile.num_cols))
    return matrix.index_select(1, tile.matrix_rows).index_select(2, columns)


def fold_tile(built: Tensor, tile: Tile, features: Tensor) -> None:
    """Add a tile in memory order ``[b, o, stride]`` to the features ``[b, k]``, group by group of its rows."""
    rows, k = features.shape
    groups, rest = divmod(tile.num_rows, tile.group)
    if rest == 0:  # a group is a whole number of lines, and all groups are added up at once
        lines = tile.group * tile.stride // k
        folded = torch.bmm(built.new_ones(rows * groups, 1, lines), built.view(rows * groups, lines, k))
        for number, group in enumerate(folded.view(rows, groups, k).unbind(1)):
            fold(group, (tile.offset + number) % k, features)
        return
    for number, start in enumerate(range(0, tile.num_rows, tile.group)):
        flat = built[:, start : start + tile.group].flatten(1)
        fold(flat, (tile.offset + start * tile.stride + number) % k, features)


def fold(flat: Tensor, offset: int, features: Tensor) -> None:
    """Add position p of ``flat [b, n]`` to bucket ``(offset + p) mod k`` of ``features [b, k]``, in place.

    >>> features = torch.zeros(1, 3)
    >>> fold(torch.tensor([[1.0, 2.0, 3.0, 40.0]]), 1, features)
    >>> features
    tensor([[ 3., 41.,  2.]])
    """
    rows, k = features.shape
    lines, rest = divmod(flat.shape[1], k)
    tail = flat if flat.shape[1] == k else flat[:, lines * k :]
    if lines and flat.shape[1] > k:
        ones = flat.new_ones(rows, 1, lines)  # a product adds up lines several times faster than a sum
        folded = torch.bmm(ones, flat[:, : lines * k].unflatten(1, (lines, k))).squeeze(1)
        if rest:
            folded[:, :rest] += tail
        tail = folded
    before = min(k - offset, tail.shape[1])
    features[:, offset : offset + before] += tail[:, :before]
    if before < tail.shape[1]:
        features[:, : tail.shape[1] - before] += tail[:, before:]
