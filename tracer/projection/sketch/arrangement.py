"""Factors of a gradient in the memory order of a tile, signed: the input of the sketch's products and folds.

Layout: ``b`` samples, ``T`` positions, a tile of ``o`` rows and ``i`` columns in memory rows of ``stride`` numbers.
Everything here writes into scratch memory that is valid until the next call for the same use.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from tracer._core.blocks import full_precision
from tracer._core.scratch import Scratch
from tracer.gradients.per_sample import PerSampleGradient
from tracer.gradients.windows import WindowGradient, has_windows
from tracer.projection.sketch.hashing import Order, Tile


def factors(gradient: PerSampleGradient, start: int, stop: int, tile: Tile, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """Return signed ``left [b, o, T]`` and ``right [b, T, stride]`` whose product is the tile in memory order."""
    if has_windows(gradient):
        return _left_planes(gradient, start, stop, tile, scratch), _patches(gradient, start, stop, tile, scratch)
    outer = gradient.factors(start, stop)
    left = full_precision(outer[0][..., tile.rows])
    placed = scratch.take("right", (*left.shape[:2], tile.stride), left.dtype, left.device)
    place_columns(outer[1], tile, placed)
    signed = scratch.take("left", left.shape, left.dtype, left.device)
    return place(left, tile.row_order, tile.row_sign, signed).transpose(1, 2), placed


def place_columns(values: Tensor, tile: Tile, out: Tensor) -> Tensor:
    """Bring the tile's columns of ``values [b, n, I]`` into memory order, signed, in ``out [b, n, stride]``."""
    if tile.num_taps == 1:
        return place(full_precision(values[..., tile.channels]), tile.channel_order, tile.col_sign, out)
    taps = values.unflatten(-1, (-1, tile.num_taps))[..., tile.channels, tile.taps]
    taps = taps.transpose(-1, -2)  # [..., taps, channels]
    if tile.channel_order is not None:
        taps = taps.index_select(-1, tile.channel_order.indices)
    return place(full_precision(taps.flatten(-2)), None, tile.col_sign, out)


def place(values: Tensor, order: Order | None, sign: Tensor, out: Tensor) -> Tensor:
    """Bring ``values [b, n, size]`` into memory order and multiply by ``sign [length]``, in ``out [b, n, length]``."""
    size = values.shape[-1]
    target = out[..., :size]
    if order is None:
        torch.mul(values, sign[:size], out=target)
    elif order.run > 1:
        runs = (-1, order.run)
        torch.index_select(values.unflatten(-1, runs), values.ndim - 1, order.runs, out=target.unflatten(-1, runs))
        target *= sign[:size]
    else:
        torch.gather(values, -1, order.runs.expand_as(values), out=target)
        target *= sign[:size]
    out[..., size:] = 0
    return out


def _planes(values: Tensor, order: Order | None) -> Tensor:
    """Bring channels ``[b, C, ...]`` into memory order."""
    return values if order is None else values.index_select(1, order.indices)


def _left_planes(gradient: WindowGradient, start: int, stop: int, tile: Tile, scratch: Scratch) -> Tensor:
    """Return signed output gradients ``[b, o, L]``."""
    left = full_precision(gradient.left[start:stop, tile.rows]).flatten(2)
    signed = scratch.take("left", left.shape, left.dtype, left.device)
    if tile.row_order is None:
        return torch.mul(left, tile.row_sign.unsqueeze(1), out=signed)
    return torch.index_select(left, 1, tile.row_order.indices, out=signed).mul_(tile.row_sign.unsqueeze(1))


def _patches(gradient: WindowGradient, start: int, stop: int, tile: Tile, scratch: Scratch) -> Tensor:
    """Return signed patches ``[b, L, stride]``, a transposed view: one copy for each tap, of shifted input planes."""
    padded = full_precision(_planes(gradient.padded[start:stop, tile.channels], tile.channel_order))
    windows = gradient.windows(padded)
    places = windows.shape[windows.ndim - len(gradient.stride) :]
    channels, count = tile.num_channels, tile.taps.stop - tile.taps.start
    patches = scratch.take("right", (stop - start, tile.stride, *places), padded.dtype, padded.device)
    by_tap = patches[:, : tile.num_cols].unflatten(1, (count, channels))
    sign = tile.col_sign[: tile.num_cols].view(count, channels, *(1 for _ in places))
    for number, tap in enumerate(kernel_taps(gradient, tile)):
        torch.mul(windows[(slice(None), slice(None), *tap)], sign[number], out=by_tap[:, number])
    patches[:, tile.num_cols :] = 0
    return patches.flatten(2).transpose(1, 2)


def kernel_taps(gradient: WindowGradient, tile: Tile) -> list[tuple[Any, ...]]:
    """Return the kernel positions of the tile's taps, in order, as indices of windows."""
    kernel = gradient.shape[2:]
    return list(itertools.product(*(range(size) for size in kernel)))[tile.taps]


def window_rows(gradient: WindowGradient, start: int, stop: int, tile: Tile, out: Tensor) -> None:
    """Write signed patches position by position to ``out [b, L, length]``, zero from column ``i`` on."""
    channels_last = full_precision(_planes(gradient.padded[start:stop, tile.channels], tile.channel_order))
    channels_last = channels_last.movedim(1, -1).contiguous().movedim(-1, 1)
    windows = gradient.windows(channels_last).movedim(1, -1)  # [b, *K, *L, C]
    places = gradient.left.shape[2:]
    by_place = out.view(stop - start, *places, out.shape[-1])
    for number, tap in enumerate(kernel_taps(gradient, tile)):
        columns = slice(number * tile.num_channels, (number + 1) * tile.num_channels)
        torch.mul(windows[(slice(None), *tap)], tile.col_sign[columns], out=by_place[..., columns])
    out[..., tile.num_cols :] = 0
