"""The layout of an array in its files: chunks of whole rows, uncompressed, as zarr version 3 describes them.

An array ``[R, ...]`` is cut into chunks of ``chunk_rows`` rows, the last one padded to full size, so that a chunk's
file has the bytes that the rows have in memory. A *tiled* array has zarr shards as chunks: a shard's inner chunks of
``tile_rows`` rows follow one another, so that the file begins with a matrix in row-major order; after it comes the
index that zarr readers look up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np

from tracer.errors import StoreError
from tracer.store.arrays.local_path import LocalPath
from tracer.store.arrays.metadata import NODE, read_document, write_document
from tracer.store.arrays.store_path import StorePath

DTYPES = {
    "int8": "|i1",
    "uint8": "|u1",
    "float16": "<f2",
    "float32": "<f4",
    "uint32": "<u4",
    "float64": "<f8",
    "int64": "<i8",
    "uint64": "<u8",
    "bool": "|b1",
}
_ONE_BYTE = ("bool", "int8", "uint8")
_MANY_CHUNKS, _SMALL_CHUNK = 16, 4096
MAX_SIZE, MAX_CHUNKS, _MAX_TILES = 1 << 31, 1 << 20, 1 << 24
"""Bounds of what a document may ask for, whoever wrote it: memory and time grow with them."""


def rows_per_chunk(
    num_rows: int, row_bytes: int, processes: int = 1, chunk_bytes: int = LocalPath.feature_chunk_bytes
) -> int:
    """Return the rows of a chunk: at most ``chunk_bytes`` of features, and a multiple of ``processes`` chunks.

    >>> rows_per_chunk(1000, 8192), rows_per_chunk(1000, 8192, processes=4), rows_per_chunk(10**6, 8192)
    (1000, 250, 8131)
    """
    most = max(1, chunk_bytes // max(1, row_bytes))
    # A chunk is what one process writes, so each process gets the same number, and a large table has several even if a
    # single process begins it: others may join later. A small one has few, since each chunk is a file in four arrays.
    wanted = max(-(-num_rows // most), min(_MANY_CHUNKS, num_rows // _SMALL_CHUNK), 1)
    chunks = -(-wanted // processes) * processes
    return max(1, -(-num_rows // chunks))


@dataclass(frozen=True)
class Layout:
    """The layout of an array in its files.

    Attributes:
        shape: Of the array, ``(R,)`` or ``(R, D)``, every size at least 1.
        dtype: A key of `DTYPES`.
        chunk_rows: The rows of one file.
        tile_rows: The rows of an inner chunk if files are shards, else None.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_rows: int
    tile_rows: int | None = None

    @classmethod
    def tiled(cls, shape: tuple[int, int], dtype: str, tile_rows: int, tiles_per_file: int | None = None) -> Layout:
        """Return the layout of shards with inner chunks of ``tile_rows`` rows; of one shard by default."""
        return cls(shape, dtype, tile_rows * (tiles_per_file or -(-shape[0] // tile_rows)), tile_rows)

    @property
    def num_chunks(self) -> int:
        """The number of files."""
        return -(-self.shape[0] // self.chunk_rows)

    @property
    def tiles_per_chunk(self) -> int:
        """The number of inner chunks of a shard; 0 for an array that is not tiled."""
        return self.chunk_rows // self.tile_rows if self.tile_rows else 0

    @property
    def num_tiles(self) -> int:
        """The number of inner chunks that hold rows; 0 for an array that is not tiled."""
        return -(-self.shape[0] // self.tile_rows) if self.tile_rows else 0

    @property
    def data_bytes(self) -> int:
        """The bytes of one file that hold rows."""
        return self.chunk_rows * math.prod(self.shape[1:]) * np.dtype(self.dtype).itemsize

    def index(self) -> bytes:
        """Return the bytes after the rows: a shard's (offset, bytes) pairs and their checksum, else nothing."""
        if not self.tile_rows:
            return b""
        tile_bytes = self.data_bytes // self.tiles_per_chunk
        offsets = tile_bytes * np.arange(self.tiles_per_chunk, dtype="<u8")
        index = np.stack([offsets, np.full_like(offsets, tile_bytes)], axis=1).tobytes()
        return index + google_crc32c.value(index).to_bytes(4, "little")

    def metadata(self) -> dict[str, Any]:
        """Return the parts of zarr's metadata that decide the position of each number."""
        plain: dict[str, Any] = {"name": "bytes"}
        if self.dtype not in _ONE_BYTE:
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

    def _check_sizes(self) -> None:
        """Raise ValueError unless the sizes are those of an array that this package could have written."""
        sizes = [*self.shape, self.chunk_rows, 1 if self.tile_rows is None else self.tile_rows]
        if len(self.shape) not in (1, 2) or not all(type(size) is int and 0 < size <= MAX_SIZE for size in sizes):
            raise ValueError(f"expected one or two sizes of 1 to {MAX_SIZE}, got {sizes}")
        if self.num_chunks > MAX_CHUNKS or self.num_tiles > _MAX_TILES or self.tiles_per_chunk > _MAX_TILES:
            raise ValueError(f"expected at most {MAX_CHUNKS} files and {_MAX_TILES} tiles")
        if self.tile_rows is not None and self.chunk_rows % self.tile_rows:
            raise ValueError(f"expected files of whole tiles, got {self.chunk_rows} rows and {self.tile_rows}")

    @classmethod
    def read(cls, path: StorePath) -> Layout:
        """Read the layout of an array; refuse layouts that this package does not write."""
        try:
            document = read_document(path / NODE, checked=False)  # whatever matters is compared below
            inner = document["codecs"][0].get("configuration", {}).get("chunk_shape")
            outer = document["chunk_grid"]["configuration"]["chunk_shape"]
            layout = cls(tuple(document["shape"]), document["data_type"], outer[0], inner[0] if inner else None)
            layout._check_sizes()
            same = layout.dtype in DTYPES and layout.metadata() == {key: document[key] for key in layout.metadata()}
        except (FileNotFoundError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"{path / NODE} is missing or damaged ({error!r}): restore it, or remove {path.parent} "
                "to compute it again"
            ) from error
        if not same:
            raise StoreError(
                f"{path} has a layout that this package does not write: expected uncompressed little-endian chunks; "
                f"restore it, or remove {path.parent} to compute it again"
            )
        return layout


def array_document(layout: Layout) -> dict[str, Any]:
    """Return the metadata of an array as zarr makes it, whose import takes longer than a small store's writing."""
    zero = np.zeros((), layout.dtype).item()
    described = {**layout.metadata(), "fill_value": zero, "storage_transformers": []}
    return {"zarr_format": 3, "node_type": "array", **described, "attributes": {}}


def create_array(path: StorePath, layout: Layout) -> None:
    """Write the metadata of an array, replacing existing metadata; no chunk is written."""
    write_document(path / NODE, array_document(layout))
