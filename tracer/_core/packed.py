"""Packed weights: parameters of integers, whose meaning is in what their layers keep beside them."""

from __future__ import annotations

from torch import Tensor


def is_packed(parameter: Tensor) -> bool:
    """Return whether a parameter is of integers, as quantized weights are.

    >>> import torch
    >>> is_packed(torch.zeros(2, dtype=torch.uint8)), is_packed(torch.zeros(2))
    (True, False)
    """
    return not (parameter.is_floating_point() or parameter.is_complex())
