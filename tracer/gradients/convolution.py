"""Per-sample gradients of convolution weights, from unfolded inputs.

Layout: input ``x [N, C, *S]``, output gradient ``g [N, O, *L]`` for ``S`` and ``L`` of one to three dimensions, weight
``[O, C / groups, *K]``. With patches ``[N, C * prod(K), prod(L)]`` the gradient is ``g @ patchesᵀ``, a sum over output
positions; with groups it is one such product a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracer.factors import PerSampleGradient


class ConvGradient(PerSampleGradient):
    """Per-sample gradients of a convolution's weight; patches are unfolded only for the samples asked for.

    Args:
        padded: The input with its padding, ``[N, C, *S]``.
        grad_output: ``[N, O, *L]``.
        shape: The weight's shape ``[O, C / groups, *K]``.
        stride: One a spatial dimension.
        dilation: One a spatial dimension.
        groups: The number of groups.
    """

    def __init__(
        self,
        padded: Tensor,
        grad_output: Tensor,
        shape: Sequence[int],
        *,
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> None:
        self.padded, self.grad_output = padded, grad_output
        self.shape = tuple(shape)
        self.batch_size = padded.shape[0]
        self.stride, self.dilation, self.groups = tuple(stride), tuple(dilation), groups

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.padded.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.grad_output.dtype

    def dense(self, start: int, stop: int) -> Tensor:
        """Build the gradients by one product a sample and group: ``[b, numel]``."""
        rows = stop - start
        patches = self._patches(start, stop).reshape(rows * self.groups, -1, math.prod(self.grad_output.shape[2:]))
        g = self.grad_output[start:stop].reshape(rows * self.groups, -1, patches.shape[-1])
        return torch.bmm(g, patches.transpose(1, 2)).reshape(rows, self.numel)

    def outer(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Return output gradients ``[b, T, O]`` and patches ``[b, T, I]`` over positions; None with groups."""
        if self.groups > 1:
            return None
        positions = math.prod(self.grad_output.shape[2:])
        right = self._patches(start, stop).reshape(stop - start, -1, positions).transpose(1, 2)
        return self.grad_output[start:stop].flatten(2).transpose(1, 2), right

    def _patches(self, start: int, stop: int) -> Tensor:
        """Return a view of the windows: ``[b, C, *K, *L]``."""
        padded = self.padded[start:stop]
        spatial = padded.stride()[2:]
        window = tuple(step * rate for step, rate in zip(spatial, self.dilation, strict=True))
        moves = tuple(step * rate for step, rate in zip(spatial, self.stride, strict=True))
        sizes = (*padded.shape[:2], *self.shape[2:], *self.grad_output.shape[2:])
        return padded.as_strided(sizes, (*padded.stride()[:2], *window, *moves), padded.storage_offset())


def conv_weight_gradient(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, g: Tensor) -> ConvGradient:
    """Return the per-sample gradient of a convolution's weight.

    Args:
        module: The layer; stride, padding (also ``"same"``, ``"valid"`` and modes other than zeros), dilation and
            groups are taken from it.
        x: Its input, ``[N, C, *S]``.
        g: The gradient with respect to its output, ``[N, O, *L]``.

    Returns:
        The gradient, ``N`` rows.
    """
    pads = module._reversed_padding_repeated_twice  # as F.pad takes it; resolved for 'same' and 'valid'
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, pads, mode=mode) if any(pads) else x
    return ConvGradient(
        padded,
        g,
        module.weight.shape,
        stride=module.stride,
        dilation=module.dilation,
        groups=module.groups,
    )
