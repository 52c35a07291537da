"""Fingerprints: a 64-bit hash of each example's inputs, by which it is recognized when it is featurized again."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from jaxtyping import UInt64
from torch import Tensor

from tracer.data.batches import is_per_sample, leaves
from tracer.data.model_inputs import LABEL_KEYS
from tracer.types import Batch

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def fingerprint_samples(batch: Batch, batch_size: int) -> UInt64[np.ndarray, " B"]:
    """Return the xxh3 hash of each sample's inputs: the same in any batch, with any padding, and on any machine.

    Padding is what the attention mask leaves out, and zeros (integers also -100) at the end of a dimension. Objects
    count by their ``repr`` without addresses and, if they have it, ``tobytes()``.
    """
    # xxh3 is no cryptographic hash: this finds accidents, such as a shuffled loader, not inputs made to collide.
    hashes = [0] * batch_size
    tensors = {path: leaf for path, leaf in leaves(batch) if isinstance(leaf, Tensor)}
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim == 0:
            leaf = leaf.expand(batch_size)
        elif _is_shared(leaf):  # hashed for each sample: in a batch of one it cannot be told from the sample's own
            leaf = leaf.expand(batch_size, *leaf.shape[1:]) if isinstance(leaf, Tensor) else list(leaf) * batch_size
        if not is_per_sample(leaf, batch_size):
            continue
        if not isinstance(leaf, Tensor):
            hashes = list(map(xxhash.xxh3_64_intdigest, (_object_bytes(path, item) for item in leaf), hashes))
            continue
        shapes, memory = _without_padding(leaf, _counted(path, leaf, tensors))
        # The hash of the leaves before is the seed of the next: leaves may not change places.
        if leaf.ndim > 2:  # a shape is part of a sample, up to its padding
            hashes = list(map(xxhash.xxh3_64_intdigest, (str(shape[1:]).encode() for shape in shapes), hashes))
        hashes = list(map(xxhash.xxh3_64_intdigest, memory, hashes))
    return np.array(hashes, np.uint64)


def _counted(path: str, leaf: Tensor, tensors: Mapping[str, Tensor]) -> np.ndarray | None:
    """Return which positions of a leaf the attention mask beside it declares the samples' own, ``[B, T]``, or None."""
    name = re.findall(r"\w+", path)[-1]
    mask, tokens = (tensors.get(key.join(path.rsplit(name, 1))) for key in ("attention_mask", "input_ids"))
    if mask is None or mask.ndim != 2 or leaf.shape[:2] != mask.shape or name.startswith("decoder"):
        return None
    counted = mask.bool()
    if name in LABEL_KEYS and leaf.ndim == 2:
        # Those of an encoder-decoder may have the inputs' length by chance. Else what is masked is padding or a copy.
        padding = leaf == -100
        if tokens is not None and tokens.shape == leaf.shape:
            padding |= leaf == tokens
        counted = counted | ~(padding | counted).all(1, keepdim=True)
    return counted.cpu().numpy()


def _without_padding(leaf: Tensor, counted: np.ndarray | None) -> tuple[list[tuple[int, ...]], list[Any]]:
    """Return the shape of each sample and its values as contiguous little-endian memory."""
    values = leaf.detach().cpu()
    if values.dtype == torch.bfloat16:  # numpy has no such dtype
        values = values.view(torch.int16)
    array = values.numpy()
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    padded = np.full(len(array), counted is not None)
    for axis in range(1, array.ndim if array.size else 0):
        padded |= _is_padding(array.take(-1, axis)).reshape(len(array), -1).all(1)
    shapes = [array.shape[1:]] * len(array)
    memory = list(array.reshape(len(array), math.prod(array.shape[1:])))
    for number in np.flatnonzero(padded):
        row = array[number] if counted is None else array[number][counted[number]]
        for axis in range(row.ndim):
            used = np.flatnonzero(~_is_padding(row).all(tuple(each for each in range(row.ndim) if each != axis)))
            row = row.take(range(int(used.max(initial=-1)) + 1), axis)
        shapes[number], memory[number] = row.shape, np.ascontiguousarray(row).ravel()
    return shapes, memory


def _is_padding(values: np.ndarray) -> np.ndarray:
    return (values == 0) | (values == -100) if values.dtype.kind == "i" else values == 0


def _object_bytes(path: str, item: Any) -> bytes:
    """Return what an object counts by: an address would be another one in each pass."""
    text = f"{path}={item!r};"
    found = _ADDRESS.sub("", text)
    return found.encode() + (item.tobytes() if found != text and hasattr(item, "tobytes") else b"")


def _is_shared(leaf: Any) -> bool:
    if isinstance(leaf, Tensor):
        return leaf.ndim > 0 and leaf.shape[0] == 1
    return isinstance(leaf, (list, tuple)) and len(leaf) == 1
