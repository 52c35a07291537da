"""Arrays in a remote store: chunks are downloaded whole, and changed in memory until they are uploaded whole."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from tracer._core.files import disk_errors
from tracer._core.syncing import SyncGroup
from tracer.errors import StoreError
from tracer.store.arrays.chunk_cache import ChunkCache
from tracer.store.arrays.chunked import ChunkedArray
from tracer.store.arrays.layout import Layout
from tracer.store.arrays.remote_path import RemotePath

CACHE_BYTES = 256 << 20
"""How many bytes of downloaded chunks are cached, of all arrays together."""
_TRANSFERS = 16
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def transfers() -> ThreadPoolExecutor:
    """Return the threads that upload and download, which are started at the first use."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="tracer-transfer")
        return _pool


Download = Future["np.ndarray | None"]
_cache: ChunkCache[Download] = ChunkCache(lambda: CACHE_BYTES)


class RemoteArray(ChunkedArray):
    """One array through its objects.

    Recently read chunks are cached, of all arrays together up to `CACHE_BYTES`. Changes that other processes make to a
    cached chunk are not seen; open the array again for that.

    Args:
        path: The array's key.
        layout: How it is cut into objects. Default: as its document says.
    """

    uploads = True
    path: RemotePath

    def __init__(self, path: RemotePath, layout: Layout | None = None) -> None:
        super().__init__(path, layout)
        self._number = _cache.number(self)
        self._dirty: dict[int, np.ndarray] = {}

    def chunk(self, chunk: int, *, writable: bool = False) -> np.ndarray:
        """Return the rows of a chunk in memory; zeros if the object does not exist."""
        if chunk in self._dirty:
            return self._dirty[chunk]
        try:
            known = self._fetch(chunk).result()
        except BaseException:
            _cache.drop((self._number, chunk, False))  # the next call downloads it again
            raise
        rows = np.broadcast_to(np.zeros((), self.dtype), self.chunk_shape) if known is None else known
        if not writable:
            return rows
        _cache.drop((self._number, chunk, False))
        self._dirty[chunk] = np.array(rows)
        return self._dirty[chunk]

    def _fetch(self, chunk: int) -> Download:
        """Return the download of a chunk, which begins now unless it is cached."""
        key = self._number, chunk, False
        return _cache.get_or_make(key, self.layout.data_bytes, lambda: transfers().submit(self._download, chunk))

    def _download(self, chunk: int) -> np.ndarray | None:
        path, tail = self.chunk_path(chunk), len(self.layout.index())
        with disk_errors(path):
            try:
                data = path.read_bytes()
            except FileNotFoundError:
                return None
        if len(data) != self.layout.data_bytes + tail:
            raise StoreError(
                f"{path} is damaged: expected {self.layout.data_bytes + tail} bytes, found {len(data)}; restore it, "
                "or run tracer.verify to have its rows computed again"
            )
        return np.frombuffer(data, self.dtype, self.layout.data_bytes // self.dtype.itemsize).reshape(self.chunk_shape)

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows from ``start`` to ``stop`` as views of one chunk each; several are downloaded at a time."""
        size = self.layout.chunk_rows
        ahead = max(1, min(_TRANSFERS, CACHE_BYTES // 4 // max(1, self.layout.data_bytes))) * size
        while start < stop:
            end = min(start // size * size + ahead, stop)
            self.prefetch(start, end)
            yield from super().rows(start, end)
            start = end

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to download the chunks of rows."""
        for chunk in range(start // self.layout.chunk_rows, -(-stop // self.layout.chunk_rows)):
            if chunk not in self._dirty:
                self._fetch(chunk)

    def flush(self, chunks: Collection[int] | None = None) -> None:
        """Upload chunks that were written to; after an error what was written is lost."""
        wanted = [chunk for chunk in self._dirty if chunks is None or chunk in chunks]
        dirty = {chunk: self._dirty.pop(chunk) for chunk in wanted}
        tail = self.layout.index()
        uploads = []
        for chunk, rows in dirty.items():
            uploads.append(transfers().submit(self.chunk_path(chunk).write_whole, rows.tobytes() + tail))
            done: Download = Future()
            rows.flags.writeable = False
            done.set_result(rows)
            _cache.put((self._number, chunk, False), done, self.layout.data_bytes)
        for chunk, upload in zip(dirty, uploads, strict=True):
            with disk_errors(self.chunk_path(chunk)):
                try:
                    upload.result()
                except BaseException:
                    _cache.forget(self._number)  # it holds rows of this upload that the store does not have
                    raise

    @staticmethod
    def flush_together(
        arrays: Sequence[RemoteArray], chunks: Collection[int] | None = None, group: SyncGroup | None = None
    ) -> None:
        """Upload the chunks of several arrays at once."""
        with ThreadPoolExecutor(len(arrays)) as pool:
            list(pool.map(lambda array: array.flush(chunks), arrays))

    def stored_chunks(self) -> set[int]:
        """Return the chunks whose objects exist."""
        names = (self.path / "c").children()
        return {int(name) for name in names if name.isdigit()}

    def close(self) -> None:
        """Drop the chunks."""
        _cache.forget(self._number)
        self._dirty.clear()
