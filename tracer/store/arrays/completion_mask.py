"""Which rows (or tiles) of some arrays are durably there: a bool array of its own, set after the data is durable."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tracer.store.arrays.chunked import ChunkedArray

FLUSH_SECONDS = 5.0
_OPEN_CHUNKS = 8


class Completion:
    """Marks what is done. Chunks of the marks and of the data belong together by their position.

    Several processes may write as long as no two of them write rows of the same chunk.

    On a disk, written rows wait for a flush, which comes by itself every few seconds of writing. Where chunks are
    uploaded as a whole, each is when it is full; `flush` uploads the others as they are.

    Args:
        mask: The bool array ``[R]``.
        data: The arrays that must be durable first.
        flush_seconds: How long written rows may wait before a write flushes them.
    """

    def __init__(self, mask: ChunkedArray, data: Sequence[ChunkedArray], flush_seconds: float) -> None:
        self._mask, self._data = mask, tuple(data)
        self.flush_seconds = flush_seconds
        self._pending = np.zeros(mask.layout.shape[0], dtype=bool)
        self._last_flush = time.monotonic()

    @property
    def done(self) -> np.ndarray:
        """``[R]``, bool, a copy: what is durably there."""
        return np.array(self._mask.read(0, len(self._pending)))

    @property
    def pending(self) -> np.ndarray:
        """``[R]``, bool, a copy: what was written and not flushed yet."""
        return self._pending.copy()

    def written(self, items: np.ndarray) -> np.ndarray:
        """Return which of these rows are there, durably or pending: ``[n]``, bool, without copying the whole mask."""
        return np.asarray(self._mask.take(items) | self._pending[items])

    def unmark(self, items: np.ndarray) -> None:
        """Say durably that rows are not done.

        Args:
            items: ``[n]``, int64, the rows.
        """
        marked = items[self._mask.take(items)]
        if len(marked):
            self._mask.assign(marked, np.zeros(len(marked), dtype=bool))
            self._mask.flush()
        self._pending[items] = False

    @contextlib.contextmanager
    def writing(self, items: np.ndarray) -> Iterator[None]:
        """Wrap the writing of rows: those done lose their mark before they change, then all wait for a flush.

        Args:
            items: ``[n]``, int64, the rows.

        Yields:
            Nothing; write the data inside.
        """
        try:
            self.unmark(items)
            yield
        except BaseException:
            self._pending[:] = False  # some of it may be lost: nothing of it will be marked done
            raise
        self._pending[items] = True
        if self._mask.uploads:
            self._upload(items)
        elif time.monotonic() - self._last_flush > self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Make the data of pending rows durable, then mark them done and make the marks durable.

        When that fails for the data nothing is marked, and the rows no longer count as pending: the system drops
        pages that it could not write, so a second try would succeed without them.
        """
        self._last_flush = time.monotonic()
        items = np.flatnonzero(self._pending)
        if len(items):
            self._finish(items, None)

    def _upload(self, items: np.ndarray) -> None:
        """Upload the chunks that these rows filled; when too many wait half full, all of them."""
        size, full = self._mask.layout.chunk_rows, []
        for chunk in np.unique(items // size).tolist():
            rows = slice(chunk * size, (chunk + 1) * size)
            known = self._mask.chunk(chunk)[: len(self._pending[rows])]
            if (self._pending[rows] | known).all():
                full.append(chunk)
        pending = np.flatnonzero(self._pending)
        if len(np.unique(pending // size)) - len(full) > _OPEN_CHUNKS:
            self._finish(pending, None)
        elif full:
            self._finish(pending[np.isin(pending // size, full)], full)

    def _finish(self, items: np.ndarray, chunks: Collection[int] | None) -> None:
        self._pending[items] = False
        try:
            if self._mask.uploads:
                with ThreadPoolExecutor(len(self._data)) as pool:
                    list(pool.map(lambda array: array.flush(chunks), self._data))
            else:
                for array in self._data:
                    array.flush(chunks)
        except BaseException:
            self._pending[:] = False
            raise
        self._mask.assign(items, np.ones(len(items), dtype=bool))
        self._mask.flush(chunks)
