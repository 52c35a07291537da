"""Arrays on a local disk, seen through memory maps of their chunk files.

Rows are read through the maps and written into the files in place, which is tens of times faster than zarr's update of
part of a chunk: that reads and writes the whole chunk. Any zarr reader opens the result.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from jaxtyping import Int64, Shaped

from tracer._core.files import create_file, disk_errors, sync
from tracer._core.syncing import SyncGroup
from tracer.errors import StoreError
from tracer.store.arrays.chunk_cache import ChunkCache
from tracer.store.arrays.chunked import ChunkedArray, is_consecutive
from tracer.store.arrays.layout import Layout
from tracer.store.arrays.local_path import LocalPath

if sys.platform != "win32":
    import resource

_MAX_MAPS = 256
"""How many maps are cached, of all arrays together: each holds a file descriptor."""
_FSYNC_HAS_MAPS = sys.platform == "linux"
"""Whether a sync of a file includes what was written through its maps."""
_WRITTEN_BYTES = 1 << 16
_LOOKED_UP = 8
_ADVISED_BYTES = 1 << 20  # Linux reads no more than the device's read-ahead window for one advice


def _max_maps() -> int:
    """Return how many maps may be cached: a quarter of the descriptors that the process may have, if that is less."""
    if sys.platform == "win32":
        return _MAX_MAPS
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _MAX_MAPS if limit == resource.RLIM_INFINITY else max(1, min(_MAX_MAPS, limit // 4))


_maps: ChunkCache[np.ndarray] = ChunkCache(_max_maps)


class LocalArray(ChunkedArray):
    """One array through maps of its files.

    Maps are cached and dropped as needed; a view stays valid as long as it is held, also after `close`.

    Args:
        path: The array's directory.
        layout: How it is cut into files. Default: as its document says.
    """

    path: LocalPath

    def __init__(self, path: LocalPath, layout: Layout | None = None) -> None:
        super().__init__(path, layout)
        self._number = _maps.number(self)
        self._files: dict[int, int] = {}  # the inodes of files that were opened to write
        self._dirty: dict[int, int] = {}  # those of files that were written to since the last flush
        self._sparse: set[int] = set()  # those of which the disk may lack blocks
        self._unsynced_directories: set[LocalPath] = set()  # new names in them are not durable yet

    def chunk_path(self, chunk: int) -> LocalPath:
        """Return the file of a chunk, which may not exist yet."""
        return self.path.joinpath("c", str(chunk), *["0"] * (len(self.layout.shape) - 1))

    def chunk(self, chunk: int, *, writable: bool = False) -> np.ndarray:
        """Return a memory map of a file's rows; if the file is missing, create it or return read-only zeros."""
        mapped = _maps.get((self._number, chunk, writable))
        if mapped is None:
            mapped = self._map(chunk, writable)
            if mapped is None:
                return np.broadcast_to(np.zeros((), self.dtype), self.chunk_shape)
            _maps.put((self._number, chunk, writable), mapped)
        if writable:
            self._dirty.setdefault(chunk, self._files[chunk])
        return mapped

    def _map(self, chunk: int, writable: bool) -> np.ndarray | None:
        """Map a file; None if it is missing and need not be written."""
        path, tail = self.chunk_path(chunk).checked(), self.layout.index()
        with disk_errors(path):
            if not path.exists():
                if not writable:
                    return None
                if not self.path.exists():
                    raise FileNotFoundError(2, "the array has been removed", str(self.path))
                create_file(path, self.layout.data_bytes, tail)
                # With the array's parent, whose document may be new.
                self._unsynced_directories.update(path.parents[: len(self.layout.shape) + 2])
            found = path.stat()
            size = found.st_size
            if writable:
                self._files[chunk] = found.st_ino
                if 512 * getattr(found, "st_blocks", found.st_size) < found.st_size:
                    self._sparse.add(chunk)
            if size != self.layout.data_bytes + len(tail):  # reading beyond the end of a shorter file raises SIGBUS
                raise StoreError(
                    f"{path} is damaged: expected {self.layout.data_bytes + len(tail)} bytes, found "
                    f"{size}; restore it, or run tracer.verify to have its rows computed again"
                )
            # numpy resolves links in a path, which takes as long as everything else, but not in a str
            return np.memmap(str(path), self.dtype, mode="r+" if writable else "r", shape=self.chunk_shape)

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows from ``start`` to ``stop`` of one chunk each: views, or copies if there would be many maps."""
        many = -(-(stop - start) // self.layout.chunk_rows) > _max_maps() // 2
        for first, view in super().rows(start, stop):
            yield first, np.array(view) if many else view

    def assign_in_chunk(self, chunk: int, inside: Int64[np.ndarray, " n"], values: Shaped[np.ndarray, "n ..."]) -> None:
        """Write rows of one file: scores, and rows of sparse files, with `os.pwrite`, everything else through the map.

        A write to a page of a map for which the disk has no block is a signal that ends the process; of pwrite it is an
        error. It also takes a fifth of the processor time of a map, which scores share with the matrix products.
        Features go through the map, whose new pages torch fills on all cores while nothing else is to be done.
        """
        self.chunk(chunk, writable=True)  # creates the file, and `flush` will sync it
        matrix = self.layout.tile_rows is not None and values.nbytes >= _WRITTEN_BYTES
        matrix = matrix and values.dtype == self.dtype and values.flags.c_contiguous and is_consecutive(inside)
        if not hasattr(os, "pwrite") or not (matrix or chunk in self._sparse):
            super().assign_in_chunk(chunk, inside, values)
            return
        path, row_bytes = self.chunk_path(chunk), self.layout.data_bytes // self.layout.chunk_rows
        data = np.ascontiguousarray(values, self.dtype).reshape(-1).view(np.uint8).data
        ranges = np.split(inside, np.flatnonzero(np.diff(inside) != 1) + 1)
        with disk_errors(path), path.open("r+b", buffering=0) as file:
            for rows in ranges:
                left, data = data[: len(rows) * row_bytes], data[len(rows) * row_bytes :]
                offset = int(rows[0]) * row_bytes
                while len(left):
                    written = os.pwrite(file.fileno(), left, offset)
                    offset, left = offset + written, left[written:]

    def flush(self, chunks: Collection[int] | None = None) -> None:
        """Sync files, then the directories with their names; after an error what was written is lost."""
        self.flush_together([self], chunks)

    @staticmethod
    def flush_together(
        arrays: Sequence[LocalArray], chunks: Collection[int] | None = None, group: SyncGroup | None = None
    ) -> None:
        """Flush arrays of one file system."""
        # Forgotten before the sync: the system drops pages that it could not write, so after an error a second sync
        # would succeed without them and claim data that is lost.
        taken = [array._take_written(chunks) for array in arrays]
        paths = [path for files, _ in taken for path in files]
        paths += sorted({path for _, directories in taken for path in directories}, reverse=True)
        if group is not None:
            group.sync(paths)
            return
        for path in paths:
            with disk_errors(path):
                sync(path)

    def _take_written(self, chunks: Collection[int] | None) -> tuple[list[LocalPath], set[LocalPath]]:
        """Return what is to be synced, files and directories, and forget it."""
        wanted = sorted(chunk for chunk in self._dirty if chunks is None or chunk in chunks)
        written = {self.chunk_path(chunk): self._dirty.pop(chunk) for chunk in wanted}
        directories, self._unsynced_directories = self._unsynced_directories, set()
        for (path, inode), chunk in zip(written.items(), wanted, strict=True):
            with disk_errors(path):
                # A map of a file that was removed still takes writes, for nobody.
                if os.stat(path).st_ino != inode:
                    raise FileNotFoundError(2, "the file was replaced while it was written", str(path))
                mapped = _maps.get((self._number, chunk, True))
                if mapped is not None and not _FSYNC_HAS_MAPS:
                    mapped.flush()  # type: ignore[attr-defined]
        return list(written), directories

    def sync_group(self) -> SyncGroup:
        """Begin a group of files that are made durable together."""
        return SyncGroup(self.path)

    def stored_chunks(self) -> set[int]:
        """Return the chunks whose files exist."""
        with disk_errors(self.path):
            named = [int(name) for name in (self.path / "c").children() if name.isdigit()]
            if len(self.layout.shape) == 1:  # the name is the file's; otherwise a directory's, which may be empty
                return set(named)
            return {chunk for chunk in named if self.chunk_path(chunk).exists()}

    def missing_chunks(self, wanted: Collection[int]) -> list[int]:
        """Return those of some chunks whose files do not exist, ascending; a few are looked up without a listing."""
        if len(wanted) > _LOOKED_UP:
            return super().missing_chunks(wanted)
        return [chunk for chunk in sorted(wanted) if not os.path.exists(self.chunk_path(chunk))]

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read rows into the system's page cache."""
        self.prefetch_all([(start, stop)])

    def prefetch_all(self, pieces: Sequence[tuple[int, int]]) -> None:
        """Begin to read several ranges of rows, ascending, into the system's page cache; opens each file once."""
        row_bytes = self.layout.data_bytes // self.layout.chunk_rows
        parts: dict[int, list[tuple[int, int]]] = {}
        for start, stop in pieces:
            for chunk in range(start // self.layout.chunk_rows, -(-stop // self.layout.chunk_rows)):
                first = max(start - chunk * self.layout.chunk_rows, 0)
                last = min(stop - chunk * self.layout.chunk_rows, self.layout.chunk_rows)
                parts.setdefault(chunk, []).append((first * row_bytes, (last - first) * row_bytes))
        for chunk, wanted in parts.items():
            advise_will_need(self.chunk_path(chunk), wanted)

    def close(self) -> None:
        """Drop the maps; views that are held stay valid."""
        _maps.forget(self._number)
        self._dirty.clear()


def advise_will_need(path: LocalPath, parts: Sequence[tuple[int, int]]) -> None:
    """Ask the system to read parts of a file, offset and length, in the background, if it has a call for that."""
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        descriptor = os.open(path.checked(), os.O_RDONLY)
    except OSError:  # reading the rows will raise the error with its path
        return
    try:
        for offset, length in parts:
            for begin in range(offset, offset + length, _ADVISED_BYTES):
                size = min(_ADVISED_BYTES, offset + length - begin)
                os.posix_fadvise(descriptor, begin, size, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
