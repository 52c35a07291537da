"""One array of a store seen chunk by chunk, wherever the chunks lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator

import numpy as np
import torch

from tracer.store.arrays.layout import DTYPES, Layout
from tracer.store.metadata import StorePath

_PARALLEL_BYTES = 1 << 20


class ChunkedArray(ABC):
    """One array through its chunks. A chunk that is missing reads as zeros, as zarr has it.

    Args:
        path: The array's directory.

    Attributes:
        path: The array's directory.
        layout: How it lies in its files.
        attributes: Of the array, as they were when it was opened.
        uploads: Whether a chunk is written as a whole: one that is not full then waits for `flush`.
    """

    uploads = False

    def __init__(self, path: StorePath) -> None:
        self.path = path
        self.layout, self.attributes = Layout.read(path)
        self.dtype = np.dtype(DTYPES[self.layout.dtype])

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The shape of a chunk, its padding included."""
        return (self.layout.chunk_rows, *self.layout.shape[1:])

    def chunk_path(self, chunk: int) -> StorePath:
        """Return where a chunk lies, which may not exist yet."""
        path = self.path / "c" / str(chunk)
        for _ in self.layout.shape[1:]:
            path /= "0"
        return path

    @abstractmethod
    def chunk(self, chunk: int, *, writable: bool = False) -> np.ndarray:
        """Return the rows of a chunk with their padding: ``[chunk_rows, ...]``, not copied where that can be.

        Args:
            chunk: Its position along the rows.
            writable: Whether it is to be written to; `flush` makes that durable.

        Returns:
            The rows; they cannot be written unless that was asked for.
        """

    @abstractmethod
    def flush(self, chunks: Collection[int] | None = None) -> None:
        """Make durable what was written since the last flush; after an error it counts as lost.

        Args:
            chunks: Only these chunks; None: all.
        """

    @abstractmethod
    def stored_chunks(self) -> set[int]:
        """Return which chunks exist."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the chunks; views that are held stay valid."""

    @abstractmethod
    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read rows in the background."""

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows from ``start`` to ``stop`` as views of one chunk each, with the position of the first."""
        while start < stop:
            chunk, offset = divmod(start, self.layout.chunk_rows)
            length = min(stop - start, self.layout.chunk_rows - offset)
            yield start, self.chunk(chunk)[offset : offset + length]
            start += length

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows as one array that is not to be written: a view where they lie in one chunk, else a copy."""
        if start < stop and start // self.layout.chunk_rows == (stop - 1) // self.layout.chunk_rows:
            return next(self.rows(start, stop))[1]
        found = np.empty((max(stop - start, 0), *self.layout.shape[1:]), self.dtype)
        for first, view in self.rows(start, stop):  # not held all at once: a map has a file descriptor
            found[first - start : first - start + len(view)] = view
        return found

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Return a copy of single rows ``[n]``, int64, in any order."""
        chunks, offsets = np.divmod(rows, self.layout.chunk_rows)
        found = np.empty((len(rows), *self.layout.shape[1:]), self.dtype)
        for chunk in np.unique(chunks).tolist():
            mine = chunks == chunk
            found[mine] = self.chunk(chunk)[offsets[mine]]
        return found

    def assign(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write rows, which does not make them durable.

        Args:
            rows: ``[n]``, int64, in any order, within the array.
            values: ``[n, ...]``, of a dtype that casts to the array's; float32 is rounded to float16.
        """
        chunks = rows // self.layout.chunk_rows
        for chunk in np.unique(chunks).tolist():
            pick = chunks == chunk
            whole = bool(pick.all())
            inside = (rows if whole else rows[pick]) - chunk * self.layout.chunk_rows
            self.assign_in_chunk(chunk, inside, values if whole else values[pick])

    def assign_in_chunk(self, chunk: int, inside: np.ndarray, values: np.ndarray) -> None:
        """Write rows of one chunk, given by their positions in it."""
        target = self.chunk(chunk, writable=True)
        if (np.diff(inside) == 1).all():
            copy_values(values, target[inside[0] : inside[-1] + 1])
        else:
            target[inside] = values


def copy_values(values: np.ndarray, target: np.ndarray) -> None:
    """Copy floats into a chunk, converting; torch spreads conversion and page faults over the cores."""
    if values.nbytes < _PARALLEL_BYTES or {values.dtype.kind, target.dtype.kind} != {"f"}:
        target[...] = values
    else:
        torch.from_numpy(target).copy_(torch.from_numpy(values))
