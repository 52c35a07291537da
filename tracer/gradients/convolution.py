"""Per-sample gradients of convolution weights, from the layer's settings."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tracer.gradients.per_sample import WindowGradient


def conv_weight_gradient(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, g: Tensor) -> WindowGradient:
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
    return WindowGradient(
        padded,
        g,
        module.weight.shape,
        stride=module.stride,
        dilation=module.dilation,
        groups=module.groups,
    )
