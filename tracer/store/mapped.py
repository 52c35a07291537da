"""Zarr arrays seen through memory maps of their chunk files, and which of their rows are durably there.

Chunks are uncompressed little-endian bytes, so a chunk file is the array's rows as they lie in memory. Zarr creates the
metadata and any zarr reader opens the result; data goes through the maps, which is tens of times faster than
zarr's update of part of a chunk. A chunk file that is missing reads as zeros, as zarr has it.

Layouts: an array ``[R, ...]`` is cut into chunks of ``chunk_rows`` rows, the last one padded to full size. A *tiled*
array is one shard: the whole padded array in one file, its inner chunks of ``tile_rows`` rows one after another, so
that the head of the file is the matrix in row-major order; behind it stands the index that zarr readers look up.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from tracer.errors import StoreError
from tracer.store.documents import NODE, create_file, disk_errors, read_document, sync

CHUNK_BYTES = 64 << 20
"""How many bytes of rows one file holds at most."""
FLUSH_SECONDS = 5.0
_MAX_MAPS = 128
_PARALLEL_BYTES = 1 << 20
_ADVISED_BYTES = 1 << 20  # Linux reads no more than the device's read-ahead window for one advice
_DTYPES = {"int8": "|i1", "float16": "<f2", "float32": "<f4", "uint64": "<u8", "bool": "|b1"}


@dataclass(frozen=True)
class Layout:
    """How an array lies in its files.

    Attributes:
        shape: Of the array, ``(R,)`` or ``(R, D)``, every size at least 1.
        dtype: ``"int8"``, ``"float16"``, ``"float32"``, ``"uint64"`` or ``"bool"``.
        chunk_rows: The rows of one file.
        tile_rows: The rows of an inner chunk where the whole array is one shard, else None.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    tile_rows: int | None = None

    @classmethod
    def rows(cls, shape: tuple[int, ...], dtype: str, chunk_bytes: int) -> Layout:
        """Return the layout with files of at most ``chunk_bytes``, one row at least."""
        row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
        return cls(shape, dtype, max(1, min(shape[0], chunk_bytes // row_bytes)))

    @classmethod
    def tiled(cls, shape: tuple[int, int], dtype: str, tile_rows: int) -> Layout:
        """Return the layout of one shard with inner chunks of ``tile_rows`` rows."""
        return cls(shape, dtype, -(-shape[0] // tile_rows) * tile_rows, tile_rows)

    @property
    def num_tiles(self) -> int:
        """The number of inner chunks of the shard; 0 for an array that is not tiled."""
        return self.chunk_rows // self.tile_rows if self.tile_rows else 0

    @property
    def data_bytes(self) -> int:
        """The bytes of one file that hold rows."""
        return self.chunk_rows * math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def index(self) -> bytes:
        """Return what stands behind the rows: a shard's (offset, bytes) pairs and their checksum, else nothing."""
        if not self.num_tiles:
            return b""
        tile_bytes = self.data_bytes // self.num_tiles
        pairs = [(tile * tile_bytes, tile_bytes) for tile in range(self.num_tiles)]
        index = np.array(pairs, "<u8").tobytes()
        return index + crc32c(index).to_bytes(4, "little")

    def metadata(self) -> dict[str, Any]:
        """Return the parts of zarr's metadata that decide where each number lies."""
        plain: dict[str, Any] = {"name": "bytes"}
        if np.dtype(self.dtype).itemsize > 1:
            plain["configuration"] = {"endian": "little"}
        outer = [self.chunk_rows, *self.shape[1:]]
        codecs = [plain]
        if self.tile_rows:
            inner = {"chunk_shape": [self.tile_rows, *self.shape[1:]], "codecs": [plain], "index_location": "end"}
            inner["index_codecs"] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
            codecs = [{"name": "sharding_indexed", "configuration": inner}]
        return {
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": outer}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": codecs,
        }

    @classmethod
    def read(cls, path: Path) -> tuple[Layout, dict[str, Any]]:
        """Read the layout and the attributes of an array.

        Args:
            path: The array's directory.

        Returns:
            Both.

        Raises:
            StoreError: The metadata is missing, damaged or says another layout than this module can map.
        """
        try:
            document = read_document(path / NODE)
            inner = document["codecs"][0].get("configuration", {}).get("chunk_shape")
            outer = document["chunk_grid"]["configuration"]["chunk_shape"]
            layout = cls(tuple(document["shape"]), document["data_type"], outer[0], inner[0] if inner else None)
            same = layout.dtype in _DTYPES and layout.metadata() == {key: document[key] for key in layout.metadata()}
        except (FileNotFoundError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise StoreError(
                f"{path / NODE} is missing or damaged ({error!r}): restore it, or remove {path.parent} "
                "to compute it again"
            ) from error
        if not same:
            raise StoreError(
                f"{path} is not laid out as this package writes it: expected uncompressed little-endian "
                f"chunks; restore it, or remove {path.parent} to compute it again"
            )
        return layout, document["attributes"]


def create_array(path: Path, layout: Layout, attributes: Mapping[str, Any] | None = None) -> None:
    """Create the metadata of an array through zarr, durably; no chunk is written."""
    chunks = (layout.chunk_rows, *layout.shape[1:])
    zarr.create_array(
        str(path),
        shape=layout.shape,
        dtype=layout.dtype,
        chunks=(layout.tile_rows, *layout.shape[1:]) if layout.tile_rows else chunks,
        shards=chunks if layout.tile_rows else None,
        filters=None,
        compressors=None,
        fill_value=0,
        zarr_format=3,
        attributes=dict(attributes or {}),
    )
    sync(path / NODE)
    sync(path)


class MappedArray:
    """One array through maps of its files.

    Maps are kept and dropped as needed; a view stays valid as long as it is held, also after `close`.

    Args:
        path: The array's directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.layout, self.attributes = Layout.read(path)
        self._dtype = np.dtype(_DTYPES[self.layout.dtype])
        self._maps: OrderedDict[tuple[int, bool], np.ndarray] = OrderedDict()
        self._dirty: dict[int, np.ndarray] = {}

    def chunk_path(self, chunk: int) -> Path:
        """Return the file of a chunk, which may not exist yet."""
        return self.path.joinpath("c", str(chunk), *("0" for _ in self.layout.shape[1:]))

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
        known = self._maps.get((chunk, writable))
        if known is not None:
            self._maps.move_to_end((chunk, writable))
            return known
        path, tail = self.chunk_path(chunk), self.layout.index()
        shape = (self.layout.chunk_rows, *self.layout.shape[1:])
        with disk_errors(path):
            if not path.exists():
                if not writable:
                    return np.broadcast_to(np.zeros((), self._dtype), shape)
                create_file(path, self.layout.data_bytes, tail)
            size = path.stat().st_size
            if size != self.layout.data_bytes + len(tail):  # mapping a shorter file would end in SIGBUS
                raise StoreError(
                    f"{path} is damaged: expected {self.layout.data_bytes + len(tail)} bytes, found "
                    f"{size}; restore it, or remove {self.path.parent} to compute it again"
                )
            mapped = np.memmap(path, self._dtype, mode="r+" if writable else "r", shape=shape)
        self._maps[chunk, writable] = mapped
        if len(self._maps) > _MAX_MAPS:  # each holds a file descriptor
            self._maps.popitem(last=False)
        return mapped

    def rows(self, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the rows from ``start`` to ``stop`` as views of one file each, with the position of the first."""
        while start < stop:
            chunk, offset = divmod(start, self.layout.chunk_rows)
            length = min(stop - start, self.layout.chunk_rows - offset)
            yield start, self.chunk(chunk)[offset : offset + length]
            start += length

    def assign(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Write rows into the maps, which does not make them durable.

        Args:
            rows: ``[n]``, int64, in any order, within the array.
            values: ``[n, ...]``, of a dtype that casts to the array's; float32 is rounded to float16.
        """
        chunks = rows // self.layout.chunk_rows
        for chunk in np.unique(chunks).tolist():
            pick = chunks == chunk
            whole = bool(pick.all())
            inside = (rows if whole else rows[pick]) - chunk * self.layout.chunk_rows
            if len(self._dirty) >= _MAX_MAPS and chunk not in self._dirty:
                self.flush()
            target = self._dirty[chunk] = self.chunk(chunk, writable=True)
            if (np.diff(inside) == 1).all():
                _copy(values if whole else values[pick], target[inside[0] : inside[-1] + 1])
            else:
                target[inside] = values if whole else values[pick]

    def flush(self) -> None:
        """Make durable what was written since the last flush; after an error those rows count as lost."""
        dirty, self._dirty = self._dirty, {}  # the system drops pages it could not write: trying again would lie
        for chunk, mapped in dirty.items():
            with disk_errors(self.chunk_path(chunk)):
                sync(self.chunk_path(chunk))  # lets other threads run, which the map's own flush does not
                mapped.flush()  # type: ignore[attr-defined]

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read rows in the background; does nothing where the system has no way to.

        Args:
            start: The first row.
            stop: One past the last row.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        row_bytes = self.layout.data_bytes // self.layout.chunk_rows
        while start < stop:
            chunk, offset = divmod(start, self.layout.chunk_rows)
            length = min(stop - start, self.layout.chunk_rows - offset)
            with contextlib.suppress(OSError):  # whatever is wrong with the file, reading it will say
                descriptor = os.open(self.chunk_path(chunk), os.O_RDONLY)
                try:
                    for piece in range(offset * row_bytes, (offset + length) * row_bytes, _ADVISED_BYTES):
                        size = min(_ADVISED_BYTES, (offset + length) * row_bytes - piece)
                        os.posix_fadvise(descriptor, piece, size, os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(descriptor)
            start += length

    def close(self) -> None:
        """Drop the maps; views that are held stay valid."""
        self._maps.clear()
        self._dirty.clear()


def _copy(values: np.ndarray, target: np.ndarray) -> None:
    """Copy into a map; torch spreads conversion and page faults over the cores."""
    if values.nbytes < _PARALLEL_BYTES or {values.dtype.kind, target.dtype.kind} != {"f"}:
        target[...] = values
    else:
        torch.from_numpy(target).copy_(torch.from_numpy(values))


class Completion:
    """Which rows (or tiles) of some arrays are durably there: a bool array of its own, set after the data is synced.

    Several processes may write rows of the same arrays as long as no row is written by two of them.

    Args:
        mask: The bool array ``[R]``.
        data: The arrays that must be synced first.
        flush_seconds: How long written rows may stay unsynced before a write syncs them.
    """

    def __init__(self, mask: MappedArray, data: Sequence[MappedArray], flush_seconds: float) -> None:
        self._mask, self._data = mask, tuple(data)
        self.flush_seconds = flush_seconds
        self._pending = np.zeros(mask.layout.shape[0], dtype=bool)
        self._last_flush = time.monotonic()

    @property
    def done(self) -> np.ndarray:
        """``[R]``, bool, a copy: what is durably there."""
        return np.array(self._mask.chunk(0)[: len(self._pending)])

    @property
    def pending(self) -> np.ndarray:
        """``[R]``, bool, a copy: what was written and not synced yet."""
        return self._pending.copy()

    def written(self, items: np.ndarray) -> np.ndarray:
        """Return which of these rows are there, durably or pending: ``[n]``, bool, without copying the whole mask."""
        return np.asarray(self._mask.chunk(0)[items] | self._pending[items])

    @contextlib.contextmanager
    def writing(self, items: np.ndarray) -> Iterator[None]:
        """Wrap the writing of rows: those done lose their mark before they change, then all wait for a flush.

        Args:
            items: ``[n]``, int64, the rows.

        Yields:
            Nothing; write the data inside.
        """
        again = items[self._mask.chunk(0)[items]]
        try:
            if len(again):
                self._mask.assign(again, np.zeros(len(again), dtype=bool))
                self._mask.flush()
            self._pending[items] = False
            yield
        except BaseException:
            self._pending[:] = False  # some of it may be lost: nothing of it will be marked done
            raise
        self._pending[items] = True
        if time.monotonic() - self._last_flush > self.flush_seconds:
            self.flush()

    def flush(self) -> None:
        """Sync the data of pending rows, then mark them done and sync the marks.

        When the data cannot be synced nothing is marked, and the rows no longer count as pending: the system drops
        pages that it could not write, so a second try would succeed without them.
        """
        self._last_flush = time.monotonic()
        items = np.flatnonzero(self._pending)
        if not len(items):
            return
        self._pending[:] = False
        for array in self._data:
            array.flush()
        self._mask.assign(items, np.ones(len(items), dtype=bool))
        self._mask.flush()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli) checksum that zarr puts behind a shard's index.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    value = 0xFFFFFFFF
    for byte in data:
        value = _CRC_TABLE[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


def _crc_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [(entry >> 1) ^ (0x82F63B78 if entry & 1 else 0) for entry in table]
    return table


_CRC_TABLE = _crc_table()
