"""Which rows a batch is: explicit indices or a running cursor, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tracer.errors import BatchError, InputError, InputTypeError

RowIndices = Sequence[int] | np.ndarray | Tensor
"""What ``inds=`` takes."""

RowChoice = slice | range | Sequence[int] | Sequence[bool] | np.ndarray | Tensor
"""What ``rows=`` takes: a slice or range, indices in any order, or a bool for each train row."""


def chosen_rows(rows: RowChoice | None, num_rows: int) -> range | np.ndarray:
    """Return the train rows that count.

    Args:
        rows: What the user passed; None: all.
        num_rows: N.

    Returns:
        Ascending row indices, each once: a range, or ``[n]``, int64.

    Raises:
        InputTypeError: It is nothing that chooses rows.
        InputError: A mask has another length than N, or an index is out of range.

    >>> chosen_rows([4, 2, 4], 5).tolist(), chosen_rows(slice(-2, None), 5)
    ([2, 4], range(3, 5))
    """
    if rows is None:
        return range(num_rows)
    if isinstance(rows, slice):
        rows = range(*rows.indices(num_rows))
    if isinstance(rows, range):
        rows = rows if rows.step > 0 else rows[::-1]
        if len(rows) and (rows[0] < 0 or rows[-1] >= num_rows):
            raise InputError(f"rows={rows} is not within the {num_rows} train rows.")
        return rows if rows.step == 1 else np.arange(rows.start, rows.stop, rows.step)
    try:
        found = rows.detach().cpu().numpy() if isinstance(rows, Tensor) else np.asarray(rows)
    except (TypeError, ValueError):
        found = np.zeros((0, 0))
    if found.ndim != 1 or (found.dtype.kind not in "biu" and found.size):
        raise InputTypeError(
            f"rows is {type(rows).__name__} of shape {found.shape} and dtype {found.dtype}; expected a slice or range, "
            f"row indices, or a bool for each of the {num_rows} train rows."
        )
    if found.dtype == bool:
        if len(found) != num_rows:
            raise InputError(f"rows is a mask of {len(found)} values; expected one for each of the {num_rows} rows.")
        return np.flatnonzero(found)
    found = np.unique(found.astype(np.int64))
    outside = found[(found < 0) | (found >= num_rows)]
    if len(outside):
        raise InputError(f"rows {outside[:5].tolist()} are outside the {num_rows} train rows, 0 to {num_rows - 1}.")
    return found


class RowCursor:
    """Gives each batch its row indices and remembers how far ``num_samples`` has come.

    Args:
        num_rows: The number of rows that there are.
        size_name: What the number is called in messages, such as ``"train_set_size"``.
    """

    def __init__(self, num_rows: int, size_name: str) -> None:
        self.num_rows, self.size_name = num_rows, size_name
        self.position = 0

    def rows(self, inds: RowIndices | None, num_samples: int | None) -> np.ndarray:
        """Return the row indices of a batch.

        Args:
            inds: The indices, or None.
            num_samples: The number of rows, taken from where the last such batch ended, or None.

        Returns:
            ``[n]``, int64. `advance` moves the cursor once the batch is done.

        Raises:
            InputError: Both or neither are given.
            BatchError: Indices are repeated or out of range, or there are more rows than there should be.
        """
        if (inds is None) == (num_samples is None):
            came = "neither" if inds is None else "both"
            raise InputError(
                f"Pass exactly one of inds and num_samples; {came} came. inds= are the batch's row indices; "
                f"num_samples=len(batch) counts on from the batch before, for loaders that keep the order."
            )
        return self._following(num_samples) if inds is None else row_indices(inds, self.num_rows, self.size_name)

    def advance(self, num_samples: int | None) -> None:
        """Move the cursor behind a batch that was given by ``num_samples``."""
        self.position += num_samples or 0

    def _following(self, num_samples: int | None) -> np.ndarray:
        if isinstance(num_samples, bool) or not isinstance(num_samples, (int, np.integer)):
            raise InputTypeError(f"num_samples is {num_samples!r}; expected the number of rows in the batch, an int.")
        if num_samples < 1:
            raise BatchError(f"num_samples is {num_samples}; a batch has one row at least.")
        stop = self.position + int(num_samples)
        if stop > self.num_rows:
            raise BatchError(
                f"{num_samples} rows after the first {self.position} make {stop}, more than "
                f"{self.size_name}={self.num_rows}. Loading a checkpoint puts the count back to 0; pass inds= for rows "
                f"out of order."
            )
        return np.arange(self.position, stop, dtype=np.int64)


def row_indices(inds: RowIndices, num_rows: int, size_name: str) -> np.ndarray:
    """Return row indices as an array after checking them.

    Args:
        inds: The indices.
        num_rows: How many rows there are.
        size_name: What that number is called in messages.

    Returns:
        ``[n]``, int64, in the given order.

    Raises:
        InputTypeError: They are no integers.
        BatchError: There are none, one comes twice, or one is out of range.
    """
    values = inds.detach().cpu().numpy() if isinstance(inds, torch.Tensor) else np.asarray(inds)
    if values.shape == (0,):
        raise BatchError("inds is empty; a batch has one row at least.")
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise InputTypeError(
            f"inds must be a one-dimensional list, array or tensor of integers; got "
            f"{type(inds).__name__} with dtype {values.dtype} and shape {values.shape}."
        )
    rows = values.astype(np.int64)
    outside = rows[(rows < 0) | (rows >= num_rows)]
    if len(outside):
        raise BatchError(f"inds has {outside[:5].tolist()} outside 0...{num_rows - 1} ({size_name}={num_rows}).")
    unique, counts = np.unique(rows, return_counts=True)
    if len(unique) < len(rows):
        raise BatchError(f"inds has rows {unique[counts > 1][:5].tolist()} more than once; give each row once.")
    return rows
