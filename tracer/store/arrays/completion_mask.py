"""Durable marks of the rows (or tiles) that are done: a bool array of its own, set after the data is durable."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int64

from tracer._core.syncing import SyncGroup
from tracer.store.arrays.chunked import ChunkedArray

FLUSH_SECONDS = 5.0
_OPEN_CHUNKS = 8

logger = logging.getLogger("tracer")


class CompletionMask:
    """Marks what is done. Chunks of the marks and of the data belong together by their position.

    Several processes may write as long as no two of them write rows of the same chunk. On a disk, written rows wait
    for a flush, which happens every few seconds of writing. Remotely, each chunk is uploaded once it is full; `flush`
    uploads the remaining ones as they are. What still waits when a mask is collected or the process ends is flushed
    then, by the process that wrote it: a forked child has nothing pending.

    Args:
        mask: The bool array ``[R]``.
        data: The arrays that must be durable first.
        flush_seconds: How long written rows may wait before a write flushes them.
        check: Raises an error if written rows must not be marked any more.
    """

    _waits = False  # whether rows may be pending: `__del__` may be too late to ask numpy

    def __init__(
        self,
        mask: ChunkedArray,
        data: Sequence[ChunkedArray],
        flush_seconds: float,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._mask, self._data, self._check = mask, tuple(data), check
        self.flush_seconds = flush_seconds
        self._pending = np.zeros(mask.layout.shape[0], dtype=bool)
        self._last_flush = time.monotonic()
        self._group: SyncGroup | None = None

    def __del__(self) -> None:
        if self._waits:
            self._flush_at_end()

    @property
    def done(self) -> Bool[np.ndarray, " R"]:
        """A copy of the durable marks."""
        return np.array(self._mask.read(0, len(self._pending)))

    @property
    def pending(self) -> Bool[np.ndarray, " R"]:
        """A copy of the marks of what was written and not flushed yet."""
        return self._pending.copy()

    def written(self, items: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Return which of these rows are written, durable or pending, without copying the whole mask."""
        return np.asarray(self._mask.take(items) | self._pending[items])

    def unmark(self, items: Int64[np.ndarray, " n"]) -> None:
        """Mark rows durably as not done."""
        marked = items[self._mask.take(items)]
        if len(marked):
            self._mask.assign(marked, np.zeros(len(marked), dtype=bool))
            self._mask.flush()
        self._pending[items] = False

    @contextlib.contextmanager
    def writing(self, items: Int64[np.ndarray, " n"]) -> Iterator[None]:
        """Wrap the writing of rows ``items``: they lose their marks first, and wait for a flush afterwards."""
        self._group = self._group or self._mask.sync_group()
        try:
            # Marks are gone from the disk before the data changes: a crash in between never leaves a marked row that
            # is half old and half new.
            self.unmark(items)
            yield
        except BaseException:
            # Some of the pending data may be lost, and nobody knows which: none of it will be marked.
            self._pending[:] = False
            raise
        self._pending[items] = True
        self._waits = True
        _waiting.add(self)
        if self._mask.uploads:
            self._upload(items)
        elif time.monotonic() - self._last_flush > self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Make the data of pending rows durable, then mark them done and make the marks durable."""
        self._last_flush = time.monotonic()
        self._waits = False
        items = np.flatnonzero(self._pending)
        if len(items):
            self._finish(items, None)

    def _flush_at_end(self) -> None:
        """Flush where no caller could handle an error, which is logged."""
        try:
            self.flush()
        except Exception as error:
            logger.error("the last rows were not stored, and are computed again: %s", error)

    def _upload(self, items: Int64[np.ndarray, " n"]) -> None:
        """Upload the chunks that these rows filled; all chunks if too many of them are half full."""
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

    def _finish(self, items: Int64[np.ndarray, " n"], chunks: Collection[int] | None) -> None:
        # No longer pending, whatever happens: after a failed sync the system drops the pages that it could not write,
        # so a second sync would succeed without them, and rows that are lost would be marked.
        self._pending[items] = False
        group, self._group = self._group, None
        try:
            arrays = list(self._data)
            if not self._mask.uploads:
                for chunk in np.unique(items // self._mask.layout.chunk_rows).tolist():
                    if not self._mask.chunk_path(chunk).exists():
                        self._mask.chunk(chunk, writable=True)
                arrays.append(self._mask)  # names of new files become durable with the data
            self._mask.flush_together(arrays, chunks, group)
            self._check()
        except BaseException:
            self._pending[:] = False
            raise
        finally:
            if group is not None:
                group.close()
        # Only now is the data durable: a mark on the disk is a promise that the row is, too.
        self._mask.assign(items, np.ones(len(items), dtype=bool))
        self._mask.flush(chunks)
        try:
            self._check()  # once more: another process may have removed marks between the first check and these
        except BaseException:
            self._pending[:] = False
            self.unmark(items)
            raise


_waiting: weakref.WeakSet[CompletionMask] = weakref.WeakSet()
"""The masks that may have pending rows."""


def _flush_all() -> None:
    for mask in list(_waiting):
        mask._flush_at_end()


def _disown() -> None:
    """Forget in a forked child what is pending: the parent writes it."""
    for mask in list(_waiting):
        mask._pending[:] = mask._waits = False
    _waiting.clear()


atexit.register(_flush_all)
# Earlier than that: before pools of threads, which uploads need, shut down; and also in children of multiprocessing.
getattr(threading, "_register_atexit", atexit.register)(_flush_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown)
