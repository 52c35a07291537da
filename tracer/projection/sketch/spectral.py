"""The spectral way of the sketch: a sketched outer product is the circular convolution of its sketched factors.

As the hash adds row and column buckets, the sketch of ``g (outer) a`` has the spectrum
``FFT(sketch g) * FFT(sketch a)`` (Pham & Pagh 2013). Spectra are summed over positions, layers and tiles, and one
inverse transform ends it. It never builds ``O * I`` numbers, which pays for vector inputs and wide layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tracer._core.blocks import full_precision, row_blocks
from tracer._core.scratch import Scratch
from tracer.gradients.per_sample import PerSampleGradient
from tracer.gradients.windows import WindowGradient, has_windows
from tracer.projection.sketch.arrangement import place, place_columns, window_rows
from tracer.projection.sketch.hashing import Tile

SPECTRAL_BYTES = 1 << 20
"""The bytes of sketched factors that are transformed at once."""
HELD_BYTES = 16 << 20
"""The bytes of vector factors that wait for more, so that the spectra of some samples stay in cache over layers."""


class Spectrum:
    """The half spectra of ``B`` sketches of ``k`` buckets, summed up; allocated when the first is needed.

    Factors of vector inputs (one position a sample) wait until `finish`, or until they take `HELD_BYTES`: then all of
    them are transformed for a few samples at a time, whose spectra are added up and transformed back while they are in
    cache.

    Args:
        features: ``[B, k]``, updated by `finish`.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self._values: Tensor | None = None
        self._vectors: list[tuple[PerSampleGradient, Sequence[Tile], Scratch]] = []
        self._held = 0

    def rows(self, start: int, stop: int) -> SpectrumRows:
        """Return the part of samples ``start`` to ``stop``."""
        return SpectrumRows(self, start, stop)

    def values(self) -> Tensor:
        """Return the spectra: ``[B, k // 2 + 1]``, complex."""
        if self._values is None:
            dtype = torch.complex128 if self.features.dtype == torch.float64 else torch.complex64
            shape = self.features.shape[0], self.features.shape[1] // 2 + 1
            self._values = torch.zeros(shape, dtype=dtype, device=self.features.device)
        return self._values

    def hold(self, gradient: PerSampleGradient, tiles: Sequence[Tile], scratch: Scratch) -> None:
        """Store the gradient of a vector-input layer, of all samples, to transform it with those of other layers."""
        self._vectors.append((gradient, tiles, scratch))
        factors = gradient.factors(0, gradient.batch_size)
        self._held += sum(factor.untyped_storage().nbytes() for factor in factors)  # a view keeps more than it shows
        if self._held > HELD_BYTES:
            self._transform_vectors(last=False)

    def finish(self) -> None:
        """Add the inverse transform to the features."""
        if self._vectors:
            self._transform_vectors(last=True)
        elif self._values is not None:
            self.features += torch.fft.irfft(self._values, n=self.features.shape[1])
        self._values = None

    def _transform_vectors(self, last: bool) -> None:
        """Transform the stored factors, block by block of samples; with ``last``, also transform back."""
        num_rows, k = self.features.shape
        step = max(1, SPECTRAL_BYTES // (k * self.features.element_size()))
        for start in range(0, num_rows, step):
            stop = min(start + step, num_rows)
            total = None if last and self._values is None else self.values()[start:stop]
            for gradient, tiles, scratch in self._vectors:
                for tile in tiles:
                    for product in _products(gradient, start, stop, tile, k, scratch):
                        total = product if total is None else total.add_(product)
            if last and total is not None:
                self.features[start:stop] += torch.fft.irfft(total, n=k)
        self._vectors.clear()
        self._held = 0


class SpectrumRows:
    """The spectra of samples ``start`` to ``stop``."""

    def __init__(self, spectrum: Spectrum, start: int, stop: int) -> None:
        self._spectrum, self._start, self._stop = spectrum, start, stop

    def add(self, gradient: PerSampleGradient, tiles: Sequence[Tile], scratch: Scratch) -> None:
        """Add a gradient of these samples that has an outer form, given the tiles of its parameter."""
        num_rows, k = self._spectrum.features.shape
        positions = gradient.num_positions or 0
        if positions == 1 and gradient.batch_size == num_rows and not has_windows(gradient):
            self._spectrum.hold(gradient, tiles, scratch)
            return
        item = self._spectrum.features.element_size()
        for tile in tiles:
            for start, stop in row_blocks(gradient.batch_size, k * item * max(1, positions), SPECTRAL_BYTES):
                total = self._spectrum.values()[self._start + start : self._start + stop]
                for product in _products(gradient, start, stop, tile, k, scratch):
                    total += product


def spectral_cost(positions: int, shape: tuple[int, int], k: int) -> float:
    """Estimate sketching a sample's ``[T, O]`` and ``[T, I]`` by Fourier transforms, in multiply-adds."""
    # A fixed estimate, fitted on CPU, so that the choice depends on sizes alone: transforms, and placing the factors.
    rows, cols = shape
    row_tiles, column_tiles = math.ceil(rows / k), math.ceil(cols / k)
    transforms = row_tiles * column_tiles * k * (6.0 * math.log2(k + 1) + 32.0)
    return positions * (transforms + 60.0 * (rows * column_tiles + cols * row_tiles))


def _products(
    gradient: PerSampleGradient, start: int, stop: int, tile: Tile, k: int, scratch: Scratch
) -> Iterator[Tensor]:
    """Yield products of the factors' spectra, ``[b, k // 2 + 1]``, whose sum is a tile's, in blocks of positions."""
    bucket = tile.row_bucket(k)
    if has_windows(gradient):
        left, right = _placed_windows(gradient, start, stop, tile, bucket, k, scratch)
        yield _product(left, right, k)
        return
    outer = gradient.factors(start, stop)
    positions = outer[0].shape[1]
    step = max(1, SPECTRAL_BYTES // (k * outer[0].element_size()))
    for low in range(0, positions, step):
        left = full_precision(outer[0][:, low : low + step, tile.rows])
        size = (*left.shape[:2], max(k, tile.stride))
        placed = scratch.take("right", size, left.dtype, left.device)
        placed[..., tile.stride :] = 0
        place_columns(outer[1][:, low : low + step], tile, placed[..., : tile.stride])
        yield _product(_placed_rows(left, tile, bucket, k, scratch), placed[..., :k], k)


def _product(left: Tensor, right: Tensor, k: int) -> Tensor:
    """Return the spectra's products summed over positions: ``[b, k // 2 + 1]``."""
    product = torch.fft.rfft(left).mul_(torch.fft.rfft(right, n=k))
    return product.sum(1) if product.shape[1] > 1 else product.squeeze(1)


def _placed_rows(left: Tensor, tile: Tile, bucket: Tensor, k: int, scratch: Scratch) -> Tensor:
    """Put ``left [b, t, o]`` signed into its buckets: ``[b, t, k]``."""
    signed = place(left, tile.row_order, tile.row_sign, scratch.take("left", left.shape, left.dtype, left.device))
    placed = scratch.take("buckets", (*left.shape[:2], k), left.dtype, left.device).zero_()
    return placed.scatter_(2, bucket.expand_as(signed), signed)


def _placed_windows(
    gradient: WindowGradient, start: int, stop: int, tile: Tile, bucket: Tensor, k: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Put a convolution's output gradients and patches into their buckets: ``[b, L, k]`` each."""
    left = full_precision(gradient.left[start:stop, tile.rows]).flatten(2).transpose(1, 2)
    if tile.row_order is not None:
        left = left.index_select(2, tile.row_order.indices)
    placed = scratch.take("buckets", (*left.shape[:2], k), left.dtype, left.device).zero_()
    placed.scatter_(2, bucket.expand_as(left), left * tile.row_sign)
    patches = scratch.take("right", (*left.shape[:2], k), left.dtype, left.device)
    window_rows(gradient, start, stop, tile, patches)
    return placed, patches
