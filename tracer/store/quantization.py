"""Rows as they are stored: relative to a scale of their own, in float32, float16, int8, or as signs.

Layout: features ``[n, k]``, scales ``[n]``, row indices ``[n]``. An int8 row is in units of its largest absolute value
over 127, rounded up or down at random with the odds that make the expectation exact: the value 2.25 becomes 3 once in
four times. Training and target rows have separate pools of random numbers.

A binary row ``x [k]`` is the signs of its features and the scale ``‖x‖² / Σ |x_i|``. After a random rotation, which
leaves inner products as they are, ``scale * <sign(x), y>`` has the expectation ``<x, y>`` for any y (Gao & Long 2024,
RaBitQ); its error is that of ``2 k / π`` features. So of the bytes of a row most inner products come from more features
with fewer bits.
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


def binary_scale(features: Float32[np.ndarray, "n k"], largest: Float32[np.ndarray, " n"]) -> np.ndarray:
    """Return the numbers ``[n]``, float32, that the signs of rows are to be multiplied by; 0 for a row of zeros."""
    relative = features / np.where(largest > 0, largest, 1)[:, None]  # whose squares do not overflow
    sizes = np.abs(relative).sum(1, dtype=np.float64)
    scale = largest * np.square(relative).sum(1, dtype=np.float64) / np.where(sizes > 0, sizes, 1)
    return scale.astype(np.float32)


def signs(packed: Shaped[np.ndarray, "n bytes"]) -> Shaped[np.ndarray, "n k"]:
    """Return packed signs as int8, 1 and -1.

    >>> signs(np.array([[0b101]], np.uint8)).tolist()
    [[1, -1, 1, -1, -1, -1, -1, -1]]
    """
    bits = np.unpackbits(packed, axis=1, bitorder="little").view(np.int8)
    bits *= 2
    bits -= 1
    return bits


@lru_cache(maxsize=8)
def _rotation_signs(dim: int, number: int) -> Float[Tensor, " k"]:
    """Return random signs, the same for each number of features and of the turn."""
    drawn = np.random.Philox(np.random.SeedSequence([1, dim, number])).random_raw(-(-dim // 64)).view(np.uint8)
    with torch.inference_mode(False):
        return torch.from_numpy(signs(drawn[None])[0, :dim].astype(np.float32))


def rotated(features: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Return features after two turns of random signs and a Hadamard matrix, a rotation; k is a power of two.

    One turn is not enough: if few features differ from zero, as of a small model, its signs repeat.
    """
    rows, dim = features.shape
    found = features
    for number in range(2):
        found = found * _rotation_signs(dim, number).to(features)
        width = 1
        while width < dim:
            pairs = found.view(rows, dim // (2 * width), 2, width)
            found = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).view(rows, dim)
            width *= 2
        found = found * dim**-0.5
    return found


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
) -> Shaped[np.ndarray, "n columns"]:
    """Return rows over their ``scale``: int8 for int8, else float32; ``rows`` and ``pool`` choose the rounding.

    Of binary rows the packed signs are returned, ``[n, k / 8]``, uint8.
    """
    if storage == "binary":
        return np.packbits(features >= 0, axis=1, bitorder="little")
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
