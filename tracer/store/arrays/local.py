"""Arrays on a local disk, seen through memory maps of their chunk files.

A chunk file is the array's rows as they lie in memory. Any zarr reader opens the result; rows are read through the maps
and written into the files in place, which is tens of times faster than zarr's update of part of a chunk.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np

from tracer._core.files import create_file, disk_errors, sync
from tracer.errors import StoreError
from tracer.store.arrays.chunk_cache import Kept
from tracer.store.arrays.chunked import ChunkedArray

_MAX_MAPS = 256
"""How many maps are kept, of all arrays together: each holds a file descriptor."""
_WRITTEN_BYTES = 1 << 16
_ADVISED_BYTES = 1 << 20  # Linux reads no more than the device's read-ahead window for one advice


_maps: Kept[np.ndarray] = Kept(lambda: _MAX_MAPS)


class MappedArray(ChunkedArray):
    """One array through maps of its files.

    Maps are kept and dropped as needed; a view stays valid as long as it is held, also after `close`.

    Args:
        path: The array's directory.
    """

    path: Path

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._number = _maps.number(self)
        self._dirty: set[int] = set()
        self._nameless: set[Path] = set()  # directories with new names in them that are not durable yet

    def chunk_path(self, chunk: int) -> Path:
        """Return the file of a chunk, which may not exist yet."""
        return Path(str(super().chunk_path(chunk)))

    def chunk(self, chunk: int, *, writable: bool = False) -> np.ndarray:
        """Return the rows of a file with their padding: ``[chunk_rows, ...]``, not copied.

        Args:
            chunk: Its position along the rows.
            writable: Whether to map it for writing, and to create it where it is missing.

        Returns:
            A memory map; zeros that cannot be written where the file is missing and not asked for writing.

        Raises:
            StoreError: The file has another size than its layout, or the disk fails or is full.
        """
        mapped = _maps.get((self._number, chunk, writable))
        if mapped is None:
            mapped = self._map(chunk, writable)
            if mapped is None:
                return np.broadcast_to(np.zeros((), self.dtype), self.chunk_shape)
            _maps.put((self._number, chunk, writable), mapped)
        if writable:
            self._dirty.add(chunk)
        return mapped

    def _map(self, chunk: int, writable: bool) -> np.ndarray | None:
        """Map a file; None where it is missing and not to be written."""
        path, tail = self.chunk_path(chunk), self.layout.index()
        with disk_errors(path):
            if not path.exists():
                if not writable:
                    return None
                if not self.path.exists():
                    raise FileNotFoundError(2, "the array has been removed", str(self.path))
                create_file(path, self.layout.data_bytes, tail)
                self._nameless.update(path.parents[: len(self.layout.shape) + 1])
            size = path.stat().st_size
            if size != self.layout.data_bytes + len(tail):  # mapping a shorter file would end in SIGBUS
                raise StoreError(
                    f"{path} is damaged: expected {self.layout.data_bytes + len(tail)} bytes, found "
                    f"{size}; restore it, or run tracer.verify to have its rows computed again"
                )
            return np.memmap(path, self.dtype, mode="r+" if writable else "r", shape=self.chunk_shape)

    def assign_in_chunk(self, chunk: int, inside: np.ndarray, values: np.ndarray) -> None:
        """Write rows of one file; scores by the system's call, which takes a fifth of the processor's time.

        Features go through the map, whose new pages torch fills on all cores while nothing else is to be done.
        """
        many = values.nbytes >= _WRITTEN_BYTES and values.dtype == self.dtype and values.flags.c_contiguous
        if not many or self.layout.tile_rows is None or not hasattr(os, "pwrite") or not (np.diff(inside) == 1).all():
            super().assign_in_chunk(chunk, inside, values)
            return
        self.chunk(chunk, writable=True)  # makes the file, and `flush` will make it durable
        offset = int(inside[0]) * (self.layout.data_bytes // self.layout.chunk_rows)
        left = values.reshape(-1).view(np.uint8).data
        with disk_errors(self.chunk_path(chunk)), self.chunk_path(chunk).open("r+b", buffering=0) as file:
            while len(left):
                written = os.pwrite(file.fileno(), left, offset)
                offset, left = offset + written, left[written:]

    def flush(self, chunks: Collection[int] | None = None) -> None:
        """Make durable what was written since the last flush; after an error it counts as lost.

        Args:
            chunks: Only these chunks; None: all.
        """
        wanted = [chunk for chunk in self._dirty if chunks is None or chunk in chunks]
        self._dirty.difference_update(wanted)
        nameless, self._nameless = self._nameless, set()
        for chunk in sorted(wanted):  # the system drops pages it could not write: trying again would lie
            with disk_errors(self.chunk_path(chunk)):
                os.stat(self.chunk_path(chunk))  # a file that was removed takes writes and never shows them
                sync(self.chunk_path(chunk))  # lets other threads run, which the map's own flush does not
                mapped = _maps.get((self._number, chunk, True))  # what a dropped map held went with the sync
                if mapped is not None:
                    mapped.flush()  # type: ignore[attr-defined]
        for directory in sorted(nameless, reverse=True):
            with disk_errors(directory):
                sync(directory)

    def stored_chunks(self) -> set[int]:
        """Return which files exist."""
        with disk_errors(self.path):
            named = self._named_chunks()
            if len(self.layout.shape) == 1:  # the name is the file's own
                return set(named)
            return {chunk for chunk in named if self.chunk_path(chunk).exists()}

    def _named_chunks(self) -> list[int]:
        directory = self.path / "c"
        names = os.listdir(directory) if directory.is_dir() else []
        return [int(name) for name in names if name.isdigit()]

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read rows into the system's cache."""
        row_bytes = self.layout.data_bytes // self.layout.chunk_rows
        for chunk in range(start // self.layout.chunk_rows, -(-stop // self.layout.chunk_rows)):
            first = max(start - chunk * self.layout.chunk_rows, 0)
            last = min(stop - chunk * self.layout.chunk_rows, self.layout.chunk_rows)
            advise_will_need(self.chunk_path(chunk), first * row_bytes, (last - first) * row_bytes)

    def close(self) -> None:
        """Drop the maps; views that are held stay valid."""
        _maps.forget(self._number)
        self._dirty.clear()


def advise_will_need(path: Path, offset: int, length: int) -> None:
    """Ask the system to read a part of a file in the background; does nothing where it cannot."""
    if not hasattr(os, "posix_fadvise"):
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # whoever reads the rows says what is wrong
        return
    try:
        for piece in range(offset, offset + length, _ADVISED_BYTES):
            size = min(_ADVISED_BYTES, offset + length - piece)
            os.posix_fadvise(descriptor, piece, size, os.POSIX_FADV_WILLNEED)
    finally:
        os.close(descriptor)
