"""Rows as they are stored: relative to a scale of their own, in float32, float16 or int8.

Layout: features ``[n, k]``, scales ``[n]``, row indices ``[n]``. An int8 row is in units of its largest absolute value
over 127, rounded up or down at random with the odds that make the expectation exact: the value 2.25 becomes 3 once in
four times. Training and target rows have separate pools of random numbers.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Shaped
from torch import Tensor

INT8_MOST = 127
"""The largest absolute value of an int8 row; -128 is not used."""

RELATIVE = ("float16", "int8")
"""The storages that keep rows relative to a scale."""

_WINDOWS = 1 << 16
_LEVELS = 1 << 16
_MIX = np.uint64(0x9E3779B97F4A7C15)


def row_scale(largest: Float32[np.ndarray, " n"], storage: str) -> Float32[np.ndarray, " n"]:
    """Return the positive numbers that stored rows are to be multiplied by, from the rows' largest absolute values.

    >>> row_scale(np.array([0.0, 254.0], np.float32), "int8").tolist()
    [1.0, 2.0]
    """
    if storage not in RELATIVE:
        return np.ones_like(largest)
    scale = largest.copy()
    if storage == "int8":
        scale /= np.float32(INT8_MOST)
        # The division may round down, among denormals even to zero: then the row would not fit into 127 units.
        low = scale.astype(np.float64) * INT8_MOST < largest
        scale[low] = np.nextafter(scale[low], np.float32(np.inf))
    scale[largest == 0] = 1
    return scale


def relative_rows(
    features: Float32[np.ndarray, "n k"],
    scale: Float32[np.ndarray, " n"],
    rows: Int64[np.ndarray, " n"],
    storage: str,
    pool: str,
    memory: Float[Tensor, "n k"] | None = None,
) -> Shaped[np.ndarray, "n k"]:
    """Return rows over their ``scale``: int8 for int8, else float32; ``rows`` and ``pool`` choose the rounding."""
    if storage not in RELATIVE:
        return features
    memory = torch.empty(features.shape) if memory is None else memory
    torch.div(torch.from_numpy(features), torch.from_numpy(scale)[:, None], out=memory)
    if storage == "float16":
        return memory.numpy()
    # A row takes a window of a fixed pool by its index, so it is stored the same whatever the batches, processes and
    # interruptions. Pools differ for training and target rows: with one, the rounding errors of a pair of equal index
    # would have a common part, whose square does not average out.
    windows = _dither(features.shape[1], pool).unfold(0, features.shape[1], 1)
    first = (rows.astype(np.uint64) * _MIX) >> np.uint64(64 - 16)
    memory += windows[torch.from_numpy(first.astype(np.int64))]
    return memory.floor_().clamp_(-INT8_MOST, INT8_MOST).to(torch.int8).numpy()


@lru_cache(maxsize=4)
def _dither(dim: int, pool: str) -> Float[Tensor, " windows"]:
    """Return numbers between 0 and 1, in steps that float32 can still represent next to 127."""
    seed = np.random.SeedSequence([0, *pool.encode()])
    words = np.random.Philox(seed).random_raw((_WINDOWS + dim + 2) // 4 + 1).view(np.uint16)
    with torch.inference_mode(False):  # it is cached, and inference tensors could not be used outside of the mode
        return torch.from_numpy((words[: _WINDOWS + dim - 1].astype(np.float32) + 0.5) / _LEVELS)
