"""Scores of groups of training examples: sums over the examples of each document, source or domain."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from tracer.errors import InputError, InputTypeError
from tracer.store import Store
from tracer.store.example_groups import KINDS, read_example_groups
from tracer.types import TopK

_BLOCK = 4096


def train_group_numbers(store: Store, train_groups: Any) -> Int64[np.ndarray, " N"]:
    """Return the group of each training example: as given, or as the store has them for ``document`` or ``group``."""
    if isinstance(train_groups, str):
        if train_groups not in KINDS:
            raise InputError(f"train_groups={train_groups!r}; expected one of {KINDS}, or a number for each example.")
        found = read_example_groups(store, train_groups)[0]
    else:
        found = np.asarray(train_groups)
    size = store.manifest.train_set_size
    if found.dtype.kind not in "iu" or found.shape != (size,):
        raise InputTypeError(
            f"train_groups has shape {found.shape} and dtype {found.dtype}; expected {size} integers, the group of "
            f"each training example, from 0 on and -1 for none."
        )
    if not found.size or found.min() < -1 or found.max() < 0 or found.max() >= 1 << 31:
        raise InputError("train_groups has numbers below -1, above 2**31, or no group; expected numbers from 0 on.")
    return found.astype(np.int64)


def sum_groups(scores: Any, numbers: Int64[np.ndarray, " N"]) -> Float64[np.ndarray, "G M"]:
    """Return the sum of the scores of each group's examples."""
    summed = np.zeros((int(numbers.max()) + 1, scores.shape[1]))
    for start in range(0, len(numbers), _BLOCK):
        own = numbers[start : start + _BLOCK]
        np.add.at(summed, own[own >= 0], np.asarray(scores[start : start + _BLOCK], np.float64)[own >= 0])
    return summed


def top_groups(summed: Float64[np.ndarray, "G M"], numbers: Int64[np.ndarray, " N"], k: int, kind: str) -> TopK:
    """Return the groups of largest or smallest sums for each target, of those that have an example."""
    present, largest = np.unique(numbers[numbers >= 0]), kind == "proponents"
    if not 1 <= k <= len(present):
        raise InputError(f"k={k}; expected 1 to {len(present)}, the number of groups of training examples.")
    values = summed[present].T
    order = np.argsort(-values if largest else values, axis=1, kind="stable")[:, :k]
    return TopK(present[order], np.take_along_axis(values, order, axis=1).astype(np.float32))
