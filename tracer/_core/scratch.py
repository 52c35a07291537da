"""Memory that is reused: large fresh tensors cost more in page faults than the computation in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Scratch:
    """One flat buffer for each use, as large as the largest request so far.

    >>> scratch = Scratch()
    >>> first = scratch.take("built", (2, 3), torch.float32, torch.device("cpu"))
    >>> scratch.take("built", (3, 2), torch.float32, torch.device("cpu")).data_ptr() == first.data_ptr()
    True
    """

    def __init__(self) -> None:
        self._flat: dict[str, Tensor] = {}

    def take(self, use: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialized contiguous tensor that is valid until the next call for the same use."""
        numel = math.prod(shape)
        flat = self._flat.get(use)
        if flat is None or flat.numel() < numel or flat.dtype != dtype or flat.device != device:
            flat = self._flat[use] = torch.empty(numel, dtype=dtype, device=device)
        return flat[:numel].view(tuple(shape))
