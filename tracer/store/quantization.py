"""Rows as they are stored: relative to a scale of their own, in float32, float16 or int8.

Layout: features ``[n, k]``, scales ``[n]``, row indices ``[n]``. An int8 row is in units of its largest absolute value
over 127, rounded up or down at random with the odds that make the expectation exact: the value 2.25 becomes 3 once in
four times. The random numbers are a fixed pool, of which each row takes a window by its index. What is stored depends
on a row's values, its index and whether it is a train or a target row, and not on batches, processes or time. Train
and target rows have pools of their own, so that the rounding errors of a pair never go together.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

INT8_MOST = 127
"""The largest absolute value of an int8 row; -128 is not used."""

RELATIVE = ("float16", "int8")
"""The storages that keep rows relative to a scale."""

_WINDOWS = 1 << 16
_LEVELS = 1 << 16
_MIX = np.uint64(0x9E3779B97F4A7C15)


def row_scale(largest: np.ndarray, storage: str) -> np.ndarray:
    """Return what a stored row is to be multiplied by.

    Args:
        largest: ``[n]``, float32, the largest absolute value of each row.
        storage: ``"float32"``, ``"float16"`` or ``"int8"``.

    Returns:
        ``[n]``, float32, positive: 1 in float32; else the largest value, or the smallest unit of which it is at most
        127; 1 for a row of zeros.

    >>> row_scale(np.array([0.0, 254.0], np.float32), "int8").tolist()
    [1.0, 2.0]
    """
    if storage not in RELATIVE:
        return np.ones_like(largest)
    scale = largest.copy()
    if storage == "int8":
        scale /= np.float32(INT8_MOST)
        low = scale.astype(np.float64) * INT8_MOST < largest  # rounded down, in the range of denormals to zero
        scale[low] = np.nextafter(scale[low], np.float32(np.inf))
    scale[largest == 0] = 1
    return scale


def relative_rows(
    features: np.ndarray, scale: np.ndarray, rows: np.ndarray, storage: str, pool: str, memory: Tensor | None = None
) -> np.ndarray:
    """Return rows as they are stored.

    Args:
        features: ``[n, k]``, float32.
        scale: ``[n]``, float32, as `row_scale` gives it.
        rows: ``[n]``, int64, their indices.
        storage: ``"float32"``, ``"float16"`` or ``"int8"``.
        pool: Which random numbers round: ``"train"`` or ``"targets"``.
        memory: ``[n, k]``, float32, to be overwritten.

    Returns:
        ``[n, k]``, int8 for int8, else float32, which float16 storage rounds as it is written.
    """
    if storage not in RELATIVE:
        return features
    memory = torch.empty(features.shape) if memory is None else memory
    torch.div(torch.from_numpy(features), torch.from_numpy(scale)[:, None], out=memory)
    if storage == "float16":
        return memory.numpy()
    windows = _dither(features.shape[1], pool).unfold(0, features.shape[1], 1)
    first = (rows.astype(np.uint64) * _MIX) >> np.uint64(64 - 16)
    memory += windows[torch.from_numpy(first.astype(np.int64))]
    return memory.floor_().clamp_(-INT8_MOST, INT8_MOST).to(torch.int8).numpy()


@lru_cache(maxsize=4)
def _dither(dim: int, pool: str) -> Tensor:
    """Return numbers between 0 and 1, in steps that a float32 next to 127 still has: ``[windows + dim - 1]``."""
    seed = np.random.SeedSequence([0, *pool.encode()])
    words = np.random.Philox(seed).random_raw((_WINDOWS + dim + 2) // 4 + 1).view(np.uint16)
    with torch.inference_mode(False):
        return torch.from_numpy((words[: _WINDOWS + dim - 1].astype(np.float32) + 0.5) / _LEVELS)
