"""One array of a store, read and written chunk by chunk: the interface of local and remote arrays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped

from tracer._core.files import disk_errors
from tracer._core.syncing import SyncGroup
from tracer.errors import StoreError
from tracer.store.arrays.layout import DTYPES, Layout
from tracer.store.arrays.store_path import StorePath

_PARALLEL_BYTES = 1 << 20


class ChunkedArray(ABC):
    """One array through its chunks. A missing chunk reads as zeros, as in zarr.

    Args:
        path: The array's directory.
        layout: How it is cut into files. Default: as its document says.

    Attributes:
        path: The array's directory.
        layout: How it is cut into files.
        uploads: Whether a chunk is written as a whole: one that is not full then waits for `flush`.
    """

    uploads = False

    def __init__(self, path: StorePath, layout: Layout | None = None) -> None:
        self.path = path
        self.layout = layout or Layout.read(path)
        self.dtype = np.dtype(DTYPES[self.layout.dtype])

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """The shape of a chunk, its padding included."""
        return (self.layout.chunk_rows, *self.layout.shape[1:])

    def chunk_path(self, chunk: int) -> StorePath:
        """Return the path of a chunk, which may not exist yet."""
        path = self.path / "c" / str(chunk)
        for _ in self.layout.shape[1:]:
            path = path / "0"
        return path

    @abstractmethod
    def chunk(self, chunk: int, *, writable: bool = False) -> np.ndarray:
        """Return the rows of a chunk with their padding: ``[chunk_rows, ...]``, read-only unless ``writable``.

        Writes become durable with `flush`. It raises StoreError if the chunk has another size than its layout, or
        cannot be read.
        """

    @abstractmethod
    def flush(self, chunks: Collection[int] | None = None) -> None:
        """Make durable what was written to these chunks (None: all) since the last flush; after an error it is lost."""

    @staticmethod
    @abstractmethod
    def flush_together(
        arrays: Sequence[Any], chunks: Collection[int] | None = None, group: SyncGroup | None = None
    ) -> None:
        """Flush arrays of one kind at once, with the group of `sync_group` that began before they were written."""

    def sync_group(self) -> SyncGroup | None:
        """Begin a group of files that are made durable together; None if there is no such thing."""
        return None

    @abstractmethod
    def stored_chunks(self) -> set[int]:
        """Return the chunks that exist."""

    def missing_chunks(self, wanted: Collection[int]) -> list[int]:
        """Return those of some chunks that do not exist, ascending."""
        return sorted(set(wanted) - self.stored_chunks())

    def remove_unusable(self, chunks: Iterable[int]) -> None:
        """Remove those of some chunks that have another size than their layout, so that they are created again."""
        for chunk in chunks:
            try:
                self.chunk(chunk)
            except StoreError as error:
                if error.__cause__ is not None:
                    raise  # the disk failed, or the network
                with disk_errors(self.path):
                    self.chunk_path(chunk).remove()

    @abstractmethod
    def close(self) -> None:
        """Release the chunks; views that are held stay valid."""

    @abstractmethod
    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read rows ``start`` to ``stop`` in the background."""

    def prefetch_all(self, pieces: Sequence[tuple[int, int]]) -> None:
        """Begin to read several ranges ``(start, stop)`` of rows, ascending, in the background."""
        for start, stop in pieces:
            self.prefetch(start, stop)

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows from ``start`` to ``stop`` as views of one chunk each, with the index of the first."""
        while start < stop:
            chunk, offset = divmod(start, self.layout.chunk_rows)
            length = min(stop - start, self.layout.chunk_rows - offset)
            yield start, self.chunk(chunk)[offset : offset + length]
            start += length

    def read(self, start: int, stop: int, column: int | None = None) -> np.ndarray:
        """Return rows as one array that must not be written: a view if they are in one chunk, else a copy.

        Of rows of several columns, it may be one ``column`` alone.
        """
        inside = ... if column is None else (slice(None), column)
        chunk, offset = divmod(start, self.layout.chunk_rows)
        if start < stop <= (chunk + 1) * self.layout.chunk_rows:
            return self.chunk(chunk)[offset : offset + stop - start][inside]
        width = self.layout.shape[1:] if column is None else ()
        found = np.empty((max(stop - start, 0), *width), self.dtype)
        for first, view in self.rows(start, stop):  # views are not collected: each map holds a file descriptor
            found[first - start : first - start + len(view)] = view[inside]
        return found

    def take(self, rows: Int64[np.ndarray, " n"]) -> Shaped[np.ndarray, "n ..."]:
        """Return a copy of single rows, in any order."""
        found = np.empty((len(rows), *self.layout.shape[1:]), self.dtype)
        for chunk, mine, inside in self._by_chunk(rows):
            found[mine] = self.chunk(chunk)[inside]
        return found

    def assign(self, rows: Int64[np.ndarray, " n"], values: Shaped[np.ndarray, "n ..."]) -> None:
        """Write rows in any order, converting their dtype (float32 is rounded to float16); `flush` makes it durable."""
        for chunk, mine, inside in self._by_chunk(rows):
            self.assign_in_chunk(chunk, inside, values[mine])

    def _by_chunk(self, rows: Int64[np.ndarray, " n"]) -> Iterator[tuple[int, Any, Int64[np.ndarray, " m"]]]:
        """Yield each chunk that holds some of the rows, which of them it holds, and their positions in it."""
        size = self.layout.chunk_rows
        first, last = (int(rows.min()) // size, int(rows.max()) // size) if len(rows) else (0, -1)
        if first == last:  # a batch mostly is in one chunk, and finding the chunks of each row took most of its time
            yield first, slice(None), rows - first * size
            return
        chunks = rows // size
        for chunk in np.unique(chunks).tolist():
            mine = chunks == chunk
            yield chunk, mine, rows[mine] - chunk * size

    def assign_in_chunk(self, chunk: int, inside: Int64[np.ndarray, " n"], values: Shaped[np.ndarray, "n ..."]) -> None:
        """Write rows of one chunk, given by their positions in it."""
        target = self.chunk(chunk, writable=True)
        if is_consecutive(inside):
            copy_values(values, target[inside[0] : inside[-1] + 1])
        else:
            target[inside] = values


def is_consecutive(rows: Int64[np.ndarray, " n"]) -> bool:
    """Return whether each row follows the one before."""
    return not len(rows) or bool(rows[-1] - rows[0] == len(rows) - 1 and (rows[1:] > rows[:-1]).all())


def copy_values(values: Shaped[np.ndarray, "*shape"], target: Shaped[np.ndarray, "*shape"]) -> None:
    """Copy floats into a chunk, converting; torch spreads conversion and page faults over the cores."""
    if values.nbytes < _PARALLEL_BYTES or {values.dtype.kind, target.dtype.kind} != {"f"}:
        target[...] = values
    else:
        torch.from_numpy(target).copy_(torch.from_numpy(values))
