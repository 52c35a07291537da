"""The spectral way of the sketch: a sketched outer product is the circular convolution of its sketched factors.

As the hash adds row and column buckets, the sketch of ``g (outer) a`` has the spectrum
``FFT(sketch g) * FFT(sketch a)`` (Pham & Pagh 2013). Spectra are summed over positions, layers and tiles, and one
inverse transform ends it. It never has ``O * I`` numbers, which vector inputs and wide layers gain from.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tracer.factors import PerSampleGradient, WindowGradient
from tracer.projection import norms
from tracer.projection.arrangement import place, place_columns, window_rows
from tracer.projection.base import full_precision
from tracer.projection.hashing import Tile
from tracer.projection.scratch import Scratch

SPECTRAL_BYTES = 4 << 20
"""How many bytes of sketched factors are transformed at once."""


class Spectrum:
    """The half spectra of ``B`` sketches of ``k`` buckets, summed up; made when the first is added.

    Args:
        features: ``[B, k]``, to which `finish` adds.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features
        self.values: Tensor | None = None

    def add(self, start: int, stop: int, values: Tensor) -> None:
        """Add ``[b, k // 2 + 1]`` to the spectra of samples ``start`` to ``stop``."""
        if self.values is None:
            dtype = torch.complex128 if self.features.dtype == torch.float64 else torch.complex64
            shape = self.features.shape[0], self.features.shape[1] // 2 + 1
            self.values = torch.zeros(shape, dtype=dtype, device=self.features.device)
        self.values[start:stop] += values

    def finish(self) -> None:
        """Add the inverse transform to the features."""
        if self.values is not None:
            self.features += torch.fft.irfft(self.values, n=self.features.shape[1])


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


def add_spectral(gradient: PerSampleGradient, tile: Tile, spectrum: Spectrum, scratch: Scratch) -> None:
    """Add the products of the factors' spectra, in blocks of samples or, for long ones, of positions.

    Args:
        gradient: A gradient that has an outer form.
        tile: The tile.
        spectrum: Where they are added.
        scratch: Memory.
    """
    k, positions = spectrum.features.shape[1], norms.num_positions(gradient) or 0
    row_bytes = k * spectrum.features.element_size()
    samples = max(1, SPECTRAL_BYTES // (row_bytes * max(1, positions)))
    step = max(1, SPECTRAL_BYTES // row_bytes)
    bucket = tile.row_bucket(k)
    for start in range(0, gradient.batch_size, samples):
        stop = min(start + samples, gradient.batch_size)
        if isinstance(gradient, WindowGradient):
            left, right = _placed_windows(gradient, start, stop, tile, bucket, k, scratch)
            spectrum.add(start, stop, _product(left, right, k))
            continue
        outer = gradient.outer(start, stop)
        assert outer is not None
        for low in range(0, positions, step):
            left = full_precision(outer[0][:, low : low + step, tile.rows])
            size = (*left.shape[:2], max(k, tile.stride))
            placed = scratch.take("right", size, left.dtype, left.device)
            placed[..., tile.stride :] = 0
            place_columns(outer[1][:, low : low + step], tile, placed[..., : tile.stride])
            spectrum.add(start, stop, _product(_placed_rows(left, tile, bucket, k, scratch), placed[..., :k], k))


def _product(left: Tensor, right: Tensor, k: int) -> Tensor:
    """Return the spectra's products summed over positions: ``[b, k // 2 + 1]``."""
    product = torch.fft.rfft(left).mul_(torch.fft.rfft(right, n=k))
    return product.sum(1) if product.shape[1] > 1 else product.squeeze(1)


def _placed_rows(left: Tensor, tile: Tile, bucket: Tensor, k: int, scratch: Scratch) -> Tensor:
    """Put ``left [b, t, o]`` signed into its buckets: ``[b, t, k]``."""
    signed = place(left, tile.row_order, tile.row_sign, scratch.take("left", left.shape, left.dtype, left.device))
    placed = scratch.take("buckets", (*left.shape[:2], k), left.dtype, left.device).zero_()
    return placed.index_copy_(2, bucket, signed)


def _placed_windows(
    gradient: WindowGradient, start: int, stop: int, tile: Tile, bucket: Tensor, k: int, scratch: Scratch
) -> tuple[Tensor, Tensor]:
    """Put a convolution's output gradients and patches into their buckets: ``[b, L, k]`` each."""
    left = full_precision(gradient.left[start:stop, tile.rows]).flatten(2).transpose(1, 2)
    if tile.row_order is not None:
        left = left.index_select(2, tile.row_order.indices)
    placed = scratch.take("buckets", (*left.shape[:2], k), left.dtype, left.device).zero_()
    placed.index_copy_(2, bucket, left * tile.row_sign)
    patches = scratch.take("right", (*left.shape[:2], k), left.dtype, left.device)
    window_rows(gradient, start, stop, tile, patches)
    return placed, patches
