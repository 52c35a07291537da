"""Fingerprints: a 64-bit hash of each example's inputs, by which it is recognized when it is featurized again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import UInt64
from torch import Tensor

from tracer.data.batches import is_per_sample, leaves
from tracer.types import Batch


def fingerprint_samples(batch: Batch, batch_size: int) -> UInt64[np.ndarray, " B"]:
    """Return the xxh3 hash of each sample's inputs: the same in any batch, with any padding, and on any machine."""
    # xxh3 is no cryptographic hash: this finds accidents, such as a shuffled loader, not inputs made to collide.
    hashes = [0] * batch_size
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    attended = mask.bool().cpu().numpy() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim == 0:
            leaf = leaf.expand(batch_size)
        elif _is_shared(leaf):  # hashed for each sample: in a batch of one it cannot be told from the sample's own
            leaf = leaf.expand(batch_size, *leaf.shape[1:]) if isinstance(leaf, Tensor) else list(leaf) * batch_size
        if not is_per_sample(leaf, batch_size):
            continue
        if isinstance(leaf, Tensor):
            # A collator pads with other values and to other lengths: only attended positions belong to the sample.
            masked = attended is not None and tuple(leaf.shape[:2]) == attended.shape
            items = _tensor_bytes(leaf, attended if masked else None)
        else:
            items = (f"{path}={item!r};".encode() for item in leaf)
        # The hash of the leaves before is the seed of the next: leaves may not change places.
        hashes = list(map(xxhash.xxh3_64_intdigest, items, hashes))
    return np.array(hashes, np.uint64)


def _tensor_bytes(leaf: Tensor, attended: np.ndarray | None) -> Iterator[Any]:
    """Yield the values of each sample as contiguous little-endian memory."""
    values = leaf.detach().cpu()
    if values.dtype == torch.bfloat16:  # numpy has no such dtype
        values = values.view(torch.int16)
    array = values.numpy()
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    if attended is not None:
        yield from (np.ascontiguousarray(row[mask]) for row, mask in zip(array, attended, strict=True))
    else:
        yield from np.ascontiguousarray(array).reshape(len(array), math.prod(array.shape[1:]))


def _is_shared(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.ndim > 0 and leaf.shape[0] == 1
    return isinstance(leaf, (list, tuple)) and len(leaf) == 1
