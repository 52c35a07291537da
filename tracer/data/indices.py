"""Indices of examples: a batch's own, a running cursor, and selections; all checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from tracer.errors import BatchError, InputError, InputTypeError

ExampleIndices = Sequence[int] | np.ndarray | Tensor
"""The type of ``inds=``: the index of each example of a batch."""

ExampleSelection = slice | range | Sequence[int] | Sequence[bool] | np.ndarray | Tensor
"""The type of ``rows=``: a slice or range, indices in any order, or a bool for each training example."""


def resolve_selection(rows: ExampleSelection | None, num_train: int) -> range | Int64[np.ndarray, " n"]:
    """Return the selected indices in ascending order, each once; None selects all training examples.

    Raises:
        InputTypeError: ``rows`` is not a selection.
        InputError: A mask has the wrong length, or an index is out of range.

    >>> resolve_selection([4, 2, 4], 5).tolist(), resolve_selection(slice(-2, None), 5)
    ([2, 4], range(3, 5))
    """
    if rows is None:
        return range(num_train)
    if isinstance(rows, slice):
        rows = range(*rows.indices(num_train))
    if isinstance(rows, range):
        rows = rows if rows.step > 0 else rows[::-1]
        if len(rows) and (rows[0] < 0 or rows[-1] >= num_train):
            raise InputError(f"rows={rows} is outside the {num_train} training examples, 0 to {num_train - 1}.")
        return rows if rows.step == 1 else np.arange(rows.start, rows.stop, rows.step)
    try:
        found = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    except (TypeError, ValueError):
        found = np.zeros((0, 0))
    if found.ndim != 1 or (found.dtype.kind not in "biu" and found.size):
        raise InputTypeError(
            f"rows is {type(rows).__name__} of shape {found.shape} and dtype {found.dtype}; expected a slice or range, "
            f"indices, or a bool for each of the {num_train} training examples."
        )
    if found.dtype == bool:
        if len(found) != num_train:
            raise InputError(f"rows is a mask of {len(found)} values; expected {num_train}, one a training example.")
        return np.flatnonzero(found)
    found = np.unique(found.astype(np.int64))
    outside = found[(found < 0) | (found >= num_train)]
    if len(outside):
        raise InputError(
            f"rows has {outside[:5].tolist()}, outside the {num_train} training examples, 0 to {num_train - 1}."
        )
    return found


class IndexCursor:
    """Returns the indices of each batch and counts on from the batch before if only ``num_samples`` is given."""

    def __init__(self, num_examples: int, size_name: str) -> None:
        self.num_examples, self.size_name = num_examples, size_name
        self.position = 0

    def indices(self, inds: ExampleIndices | None, num_samples: int | None) -> Int64[np.ndarray, " n"]:
        """Return the indices of a batch; `advance` moves the cursor once the batch is done."""
        if (inds is None) == (num_samples is None):
            raise InputError(
                f"expected exactly one of inds and num_samples, got {'neither' if inds is None else 'both'}; pass "
                f"inds=, the index of each example in the batch, or num_samples=len(batch), which counts on from the "
                f"batch before, for loaders that keep the order."
            )
        return self._following(num_samples) if inds is None else check_indices(inds, self.num_examples, self.size_name)

    def advance(self, num_samples: int | None) -> None:
        """Move the cursor behind a batch; None, for a batch with explicit indices, does not move it."""
        self.position += num_samples or 0

    def _following(self, num_samples: int | None) -> Int64[np.ndarray, " n"]:
        if isinstance(num_samples, bool) or not isinstance(num_samples, (int, np.integer)):
            raise InputTypeError(f"num_samples is {num_samples!r}; expected the batch size, an int.")
        if num_samples < 1:
            raise BatchError(f"num_samples is {num_samples}; expected 1 or more.")
        stop = self.position + int(num_samples)
        if stop > self.num_examples:
            raise BatchError(
                f"{num_samples} examples after the first {self.position} make {stop}, more than "
                f"{self.size_name}={self.num_examples}. Loading a checkpoint sets the count back to 0; pass inds= for "
                f"examples in another order."
            )
        return np.arange(self.position, stop, dtype=np.int64)


def check_indices(
    inds: ExampleIndices, num_examples: int, size_name: str, repeats: bool = False
) -> Int64[np.ndarray, " n"]:
    """Return the indices of a batch in the given order; refuse none, those out of range, and repeated ones or not."""
    values = inds.detach().cpu().numpy() if isinstance(inds, torch.Tensor) else np.asarray(inds)
    if values.shape == (0,):
        raise BatchError("inds is empty; expected at least one index.")
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InputTypeError(
            f"inds has type {type(inds).__name__}, dtype {values.dtype} and shape {values.shape}; expected a "
            f"one-dimensional list, array or tensor of integers."
        )
    indices = values.astype(np.int64)
    outside = indices[(indices < 0) | (indices >= num_examples)]
    if len(outside):
        raise BatchError(
            f"inds has {outside[:5].tolist()}, outside 0...{num_examples - 1} ({size_name}={num_examples})."
        )
    unique, counts = np.unique(indices, return_counts=True)
    if len(unique) < len(indices) and not repeats:
        raise BatchError(f"inds has {unique[counts > 1][:5].tolist()} more than once; give each example once.")
    return indices
