"""Inner products of convolutions' gradients from those of single pixels, without unfolding a window.

A window holds a pixel for each tap of the kernel, so that the product of two windows is a sum of products of pixels.
Those are computed once for all windows that share them, with a ninth of the operations for a kernel of 3 x 3.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from tracer._core.scratch import Scratch
from tracer.gradients.per_sample import PerSampleGradient
from tracer.gradients.windows import WindowGradient, has_windows


def window_pair(one: PerSampleGradient, other: PerSampleGradient) -> tuple[WindowGradient, WindowGradient] | None:
    """Return both gradients if they are of one convolution whose windows share pixels, else None."""
    if not (has_windows(one) and has_windows(other)) or one.groups > 1 or math.prod(one.shape[2:]) == 1:
        return None
    alike = (one.stride, one.dilation, one.groups) == (other.stride, other.dilation, other.groups)
    return (one, other) if alike else None


def window_operations(one: WindowGradient, other: WindowGradient) -> int:
    """Return the number of operations for the product of two samples."""
    positions = math.prod(one.left.shape[2:]) * math.prod(other.left.shape[2:])
    pixels = math.prod(one.padded.shape[2:]) * math.prod(other.padded.shape[2:])
    return positions * (one.shape[0] + 4 + 4 * math.prod(one.shape[2:])) + pixels * one.shape[1]


def window_bytes(one: WindowGradient, other: WindowGradient) -> int:
    """Return the bytes that the product of two samples takes meanwhile."""
    positions = math.prod(one.left.shape[2:]) * math.prod(other.left.shape[2:])
    return 8 * (2 * positions + math.prod(one.padded.shape[2:]) * math.prod(other.padded.shape[2:]))


def window_products(one: WindowGradient, ours: slice, other: WindowGradient, theirs: slice, scratch: Scratch) -> Tensor:
    """Return the inner products of some samples of one gradient with some of another: ``[b, m]``, float64."""
    (pixels, before), (other_pixels, other_before) = _pixels(one, ours), _pixels(other, theirs)
    of_pixels = _gram(pixels, other_pixels, scratch, "pixel gram")
    left = _gram(_last(one.left[ours]), _last(other.left[theirs]), scratch, "left gram")
    right = scratch.take("right gram", left.shape, left.dtype, left.device).zero_()
    for tap in itertools.product(*map(range, one.shape[2:])):
        windows, taken = _touched(one, pixels, before, tap)
        other_windows, other_taken = _touched(other, other_pixels, other_before, tap)
        right[windows + other_windows] += of_pixels[taken + other_taken]
    right *= left
    positions, other_positions = (math.prod(each.left.shape[2:]) for each in (one, other))
    return right.view(positions, pixels.shape[-2], other_positions, other_pixels.shape[-2]).sum((0, 2))


def _last(values: Tensor) -> Tensor:
    """Return ``[b, C, *S]`` as ``[*S, b, C]``, float64: samples last, so that slices of positions are long runs."""
    return values.movedim((0, 1), (-2, -1)).double()


def _gram(one: Tensor, other: Tensor, scratch: Scratch, use: str) -> Tensor:
    """Return products over the last dimension: ``[*S, b, *S', m]``."""
    shape = (*one.shape[:-1], *other.shape[:-1])
    out = scratch.take(use, (one[..., 0].numel(), other[..., 0].numel()), one.dtype, one.device)
    return torch.mm(one.flatten(0, -2), other.flatten(0, -2).T, out=out).view(shape)


def _pixels(gradient: WindowGradient, part: slice) -> tuple[Tensor, list[int]]:
    """Return a convolution's input ``[*S, b, C]`` without zeros at its border, and how many were before it.

    Zeros add nothing. Padding is a large part of small images: 20 of 36 pixels around 4 x 4.
    """
    inside, before = gradient.padded[part], []
    for dim in range(2, inside.ndim):
        filled = inside.transpose(0, dim).flatten(1).any(1).nonzero()
        first, last = (int(filled[0]), int(filled[-1]) + 1) if len(filled) else (0, 1)
        inside = inside.narrow(dim, first, last - first)
        before.append(first)
    return _last(inside), before


def _touched(
    gradient: WindowGradient, pixels: Tensor, before: list[int], tap: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return the windows whose pixel at a tap is not in the border, and these pixels: slices of ``[*S, b]``."""
    windows, taken = [], []
    for dim, (stride, dilation) in enumerate(zip(gradient.stride, gradient.dilation, strict=True)):
        offset = tap[dim] * dilation - before[dim]  # of the first window's pixel
        first = max(0, -(offset // stride))
        last = min(gradient.left.shape[2 + dim], (pixels.shape[dim] - 1 - offset) // stride + 1)
        count = max(0, last - first)
        begin = first * stride + offset if count else 0
        windows.append(slice(first, first + count))
        taken.append(slice(begin, begin + count * stride, stride))
    return (*windows, slice(None)), (*taken, slice(None))
