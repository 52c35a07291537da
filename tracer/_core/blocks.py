"""Blocks of samples whose built gradients fit into cache, and the dtype of features."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 8 << 20
"""The bytes of built gradients that are held at once: few enough to stay in cache."""


def row_blocks(batch_size: int, row_bytes: int, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """Yield ranges of samples whose built gradients take at most ``block_bytes``, one sample at least.

    >>> list(row_blocks(5, 10, 20))
    [(0, 2), (2, 4), (4, 5)]
    """
    step = max(1, block_bytes // max(1, row_bytes))
    for start in range(0, batch_size, step):
        yield start, min(start + step, batch_size)


def full_precision(values: Tensor) -> Tensor:
    """Return the values in the dtype of features: float32, or float64 for float64 values."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
