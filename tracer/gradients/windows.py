"""Per-sample gradients of convolutions, from views of their input."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from tracer._core.blocks import full_precision
from tracer._core.scratch import Scratch
from tracer.gradients.per_sample import PerSampleGradient


class WindowGradient(PerSampleGradient):
    """Gradients of a convolution's weight: output gradients times the windows of the input they were computed from.

    With ``L`` output positions, ``K`` kernel taps and patches ``[B, C * K, L]`` the gradient is ``left @ patchesᵀ``,
    one such product for each group of channels. Patches are views here; callers that need them unfolded copy them.

    Args:
        padded: The input with its padding, ``[B, C, *S]``.
        left: The gradient with respect to the output, ``[B, O, *L]``.
        shape: The weight's shape ``[O, C / groups, *K]``.
        stride: One for each spatial dimension.
        dilation: One for each spatial dimension.
        groups: The number of groups.
    """

    def __init__(
        self,
        padded: Tensor,
        left: Tensor,
        shape: Sequence[int],
        *,
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int = 1,
    ) -> None:
        super().__init__(shape, padded.shape[0], left)
        self.padded, self.left = padded, left
        self.stride, self.dilation, self.groups = tuple(stride), tuple(dilation), groups

    def dense(self, start: int, stop: int) -> Tensor:
        rows = stop - start
        patches = self.windows(self.padded[start:stop])
        patches = patches.reshape(rows * self.groups, -1, math.prod(self.left.shape[2:]))
        left = self.left[start:stop].reshape(rows * self.groups, -1, patches.shape[-1])
        dtype = torch.promote_types(left.dtype, patches.dtype)  # `divided` widens one of them
        left, patches = left.to(dtype), patches.to(dtype)
        return torch.bmm(left, patches.transpose(1, 2)).reshape(rows, self.numel)

    def outer(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        if self.groups > 1:
            return None
        positions = math.prod(self.left.shape[2:])
        patches = self.windows(self.padded[start:stop]).reshape(stop - start, -1, positions)
        return self.left[start:stop].flatten(2).transpose(1, 2), patches.transpose(1, 2)

    def windows(self, padded: Tensor) -> Tensor:
        """Return a view ``[b, C, *K, *L]`` of the windows of inputs ``[b, C, *S]`` of this layer's spatial size."""
        spatial = padded.stride()[2:]
        taps = tuple(step * rate for step, rate in zip(spatial, self.dilation, strict=True))
        moves = tuple(step * rate for step, rate in zip(spatial, self.stride, strict=True))
        sizes = (*padded.shape[:2], *self.shape[2:], *self.left.shape[2:])
        return padded.as_strided(sizes, (*padded.stride()[:2], *taps, *moves), padded.storage_offset())

    def position_views(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        spatial = len(self.stride)
        windows = self.windows(self.padded[start:stop])
        windows = windows.movedim(tuple(range(-spatial, 0)), tuple(range(1, spatial + 1)))
        return self.left[start:stop].flatten(2).transpose(1, 2), windows

    def product_factors(self, start: int, stop: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
        windows = self.windows(full_precision(self.padded[start:stop]))
        patches = scratch.take("rows", windows.shape, windows.dtype, windows.device).copy_(windows)
        left = full_precision(self.left[start:stop]).flatten(2)
        return left, patches.view(stop - start, -1, left.shape[2]).transpose(1, 2)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.padded, self.left

    def with_tensors(self, tensors: Sequence[Tensor]) -> WindowGradient:
        padded, left = tensors
        return WindowGradient(padded, left, self.shape, stride=self.stride, dilation=self.dilation, groups=self.groups)

    @property
    def form(self) -> Hashable:
        return super().form, self.stride, self.dilation, self.groups


def has_windows(gradient: PerSampleGradient) -> TypeGuard[WindowGradient]:
    """Return whether a gradient is a convolution's, whose windows can be read without unfolding them."""
    return isinstance(gradient, WindowGradient)
