"""Fingerprints of rows: a 64-bit hash of each row's inputs, by which a row is recognised when it comes again."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracer.data.batches import is_per_row, leaves
from tracer.types import Batch

_ODD = np.uint64(0x9E3779B97F4A7C15)
_HASH_BYTES = 1 << 20


def row_fingerprints(batch: Batch, num_rows: int) -> np.ndarray:
    """Return a 64-bit hash of each row's input values, to recognise a row that is featurized again.

    With an ``attention_mask``, tensors of its shape are hashed at the attended positions only, so that a row keeps
    its fingerprint when a collator pads it to another length. The hash is a sum of mixed words times odd keys of their
    positions: fast, the same on every machine, and not meant to withstand rows made to collide.

    Args:
        batch: A batch of ``num_rows`` samples.
        num_rows: The number of samples in the batch.

    Returns:
        ``[num_rows]``, uint64.
    """
    hashes = np.zeros(num_rows, np.uint64)
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    attended = None if not isinstance(mask, Tensor) or mask.ndim != 2 else mask.bool().cpu().numpy()
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim == 0:
            leaf = leaf.expand(num_rows)
        elif _is_one_for_all(leaf):  # counted in every row's hash, since in a batch of one row it is that row's
            leaf = leaf.expand(num_rows, *leaf.shape[1:]) if isinstance(leaf, Tensor) else list(leaf) * num_rows
        if not is_per_row(leaf, num_rows):
            continue
        if isinstance(leaf, Tensor):
            masked = attended is not None and tuple(leaf.shape[:2]) == attended.shape
            found = _tensor_hashes(leaf, attended if masked else None)
        else:
            digests = [hashlib.blake2b(f"{path}={item!r};".encode(), digest_size=8).digest() for item in leaf]
            found = np.frombuffer(b"".join(digests), "<u8")
        hashes = _mixed(hashes * _ODD + found)
    return hashes


def _mixed(words: np.ndarray) -> np.ndarray:
    """Return words with every bit spread over the others (the finalizer of splitmix64), a bijection."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


@functools.lru_cache(maxsize=8)
def _position_keys(count: int) -> np.ndarray:
    """Return an odd key for each of ``count`` positions, the same for a position whatever the count."""
    return _mixed(np.arange(1, count + 1, dtype=np.uint64) * _ODD) | np.uint64(1)


def _tensor_hashes(leaf: Tensor, attended: np.ndarray | None) -> np.ndarray:
    """Return a hash of each row of a tensor, or of its attended positions: ``[n]``, uint64."""
    values = leaf.detach().cpu().contiguous()
    if values.dtype == torch.bfloat16:
        values = values.view(torch.int16)
    array = values.numpy().reshape(len(values), -1) if attended is None else values.numpy()
    row_bytes = math.prod(array.shape[1:]) * array.itemsize
    lengths = np.full(len(array), row_bytes)
    if attended is not None:  # the attended positions first, zeros behind them, which add nothing
        lengths = attended.sum(1) * (row_bytes // max(1, array.shape[1]))
        shape = attended.shape + (1,) * (array.ndim - 2)
        array = np.take_along_axis(array, np.argsort(~attended, axis=1, kind="stable").reshape(shape), axis=1)
        array[~np.sort(attended, axis=1)[:, ::-1]] = 0
    flat = np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8) if row_bytes else None
    if flat is None:
        return np.zeros(len(array), np.uint64)
    if row_bytes % 8:
        flat = np.pad(flat, ((0, 0), (0, -row_bytes % 8)))
    words = flat.view("<u8")
    keys, sums = _position_keys(words.shape[1]), np.empty(len(words), np.uint64)
    step = max(1, _HASH_BYTES // (8 * words.shape[1]))
    for start in range(0, len(words), step):
        block = words[start : start + step] * _ODD
        block ^= block >> np.uint64(32)
        block *= keys
        block.sum(axis=1, out=sums[start : start + step])
    return _mixed(sums + lengths.astype(np.uint64))


def _is_one_for_all(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.ndim > 0 and leaf.shape[0] == 1
    return isinstance(leaf, (list, tuple)) and len(leaf) == 1
