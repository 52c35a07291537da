"""Arrays in a remote store: chunks are downloaded whole, and written to in memory until they are uploaded whole."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from tracer.errors import StoreError
from tracer.store.arrays import ChunkedArray
from tracer.store.documents import disk_errors
from tracer.store.remote import RemotePath

CACHE_BYTES = 256 << 20
"""How many bytes of chunks that were read are kept, of all arrays together."""
_TRANSFERS = 16
_pool: ThreadPoolExecutor | None = None
_pool_lock = threading.Lock()


def transfers() -> ThreadPoolExecutor:
    """Return the threads that upload and download; they are started at the first use."""
    global _pool
    with _pool_lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(_TRANSFERS, thread_name_prefix="tracer-transfer")
        return _pool


Download = Future["np.ndarray | None"]


class _Cache:
    """Downloads, the least recently used of which are dropped when there are too many bytes of them."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a finalizer may run anywhere, also in here
        self._known: OrderedDict[tuple[int, int], tuple[int, Download]] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[int, int], num_bytes: int, begin: Callable[[], Download]) -> Download:
        """Return a download, which begins now if it is not known."""
        with self._lock:
            if key not in self._known:
                self._put(key, num_bytes, begin())
            self._known.move_to_end(key)
            return self._known[key][1]

    def put(self, key: tuple[int, int], num_bytes: int, download: Download) -> None:
        """Keep a download in the place of the one that is known."""
        with self._lock:
            self._drop(key)
            self._put(key, num_bytes, download)

    def drop(self, key: tuple[int, int]) -> None:
        """Forget a download."""
        with self._lock:
            self._drop(key)

    def forget(self, owner: int) -> None:
        """Forget all downloads of an array."""
        with self._lock:
            for key in [key for key in self._known if key[0] == owner]:
                self._drop(key)

    def _put(self, key: tuple[int, int], num_bytes: int, download: Download) -> None:
        self._known[key] = num_bytes, download
        self._bytes += num_bytes
        while self._bytes > CACHE_BYTES and len(self._known) > 1:
            self._drop(next(iter(self._known)))

    def _drop(self, key: tuple[int, int]) -> None:
        if key in self._known:
            self._bytes -= self._known.pop(key)[0]


_cache = _Cache()
_numbers = itertools.count()


class UploadedArray(ChunkedArray):
    """One array through its objects.

    Chunks that were read lately are kept, of all arrays together up to `CACHE_BYTES`. What other processes write to a
    chunk that is kept is not seen; open the array again for that.

    Args:
        path: The array's key.
    """

    uploads = True
    path: RemotePath

    def __init__(self, path: RemotePath) -> None:
        super().__init__(path)
        self._number = next(_numbers)
        weakref.finalize(self, _cache.forget, self._number).atexit = False
        self._dirty: dict[int, np.ndarray] = {}

    def chunk(self, chunk: int, *, writable: bool = False) -> np.ndarray:
        """Return the rows of a chunk with their padding: ``[chunk_rows, ...]``.

        Args:
            chunk: Its position along the rows.
            writable: Whether it is to be written to; it is downloaded first where it exists.

        Returns:
            The rows, in memory; zeros where the object does not exist.

        Raises:
            StoreError: The object has another size than its layout, or the download fails.
        """
        if chunk in self._dirty:
            return self._dirty[chunk]
        try:
            known = self._fetch(chunk).result()
        except BaseException:
            _cache.drop((self._number, chunk))  # the next one asks again
            raise
        rows = np.broadcast_to(np.zeros((), self.dtype), self.chunk_shape) if known is None else known
        if not writable:
            return rows
        _cache.drop((self._number, chunk))
        self._dirty[chunk] = np.array(rows)
        return self._dirty[chunk]

    def _fetch(self, chunk: int) -> Download:
        """Return the download of a chunk, which begins now if it did not before."""
        key = self._number, chunk
        return _cache.get(key, self.layout.data_bytes, lambda: transfers().submit(self._download, chunk))

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
        """Yield the rows from ``start`` to ``stop`` as views of one chunk each, downloading some at the same time."""
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
        """Upload chunks that were written to; after an error what was written to them counts as lost.

        Args:
            chunks: Only these chunks; None: all.
        """
        wanted = [chunk for chunk in self._dirty if chunks is None or chunk in chunks]
        dirty = {chunk: self._dirty.pop(chunk) for chunk in wanted}
        tail = self.layout.index()
        uploads = []
        for chunk, rows in dirty.items():
            uploads.append(transfers().submit(self.chunk_path(chunk).write_bytes, rows.tobytes() + tail))
            done: Download = Future()
            rows.flags.writeable = False
            done.set_result(rows)
            _cache.put((self._number, chunk), self.layout.data_bytes, done)
        for chunk, upload in zip(dirty, uploads, strict=True):
            with disk_errors(self.chunk_path(chunk)):
                try:
                    upload.result()
                except BaseException:
                    _cache.forget(self._number)
                    raise

    def stored_chunks(self) -> set[int]:
        """Return which objects exist."""
        names = (self.path / "c").children()
        return {int(name) for name in names if name.isdigit()}

    def close(self) -> None:
        """Forget the chunks."""
        _cache.forget(self._number)
        self._dirty.clear()
