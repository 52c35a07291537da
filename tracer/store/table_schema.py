"""The arrays of a table of rows: their names and layouts, how a table is created, how it grows."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import google_crc32c
import numpy as np
from jaxtyping import Bool, Int64, Shaped, UInt64

from tracer._core.files import disk_errors
from tracer.errors import InputError, StoreError
from tracer.store.arrays.chunked import ChunkedArray
from tracer.store.arrays.layout import MAX_CHUNKS, MAX_SIZE, Layout, array_document
from tracer.store.arrays.metadata import NODE, group_document, read_document, write_documents
from tracer.store.arrays.store_path import StorePath
from tracer.store.feature_storage import FeatureStorage

VALUES = ("loss", "loss_grad", "loss_hess", "gradient_norm", "output_change", "rival_share")
"""The float32 columns that are computed for each row, all ``[N]``."""
OPTIONAL_VALUES = ("output_change", "rival_share")
"""Those that a task may not know; they are 0 then."""
NO_LABEL = int(np.iinfo(np.int64).min)
"""The label of a row if the task has none."""
ARRAYS = {
    "floats": ("scale", *VALUES),
    "integers": ("label", "rival", "fingerprint", "checksum", "audited"),
}
"""The columns of an array ``[N, columns]``: few files, since a small store takes most of its time to make them."""
COLUMNS = (*ARRAYS["floats"], *ARRAYS["integers"], "done")
_PLACES = {name: (array, place) for array, names in ARRAYS.items() for place, name in enumerate(names)}
_UNSIGNED = ("fingerprint", "checksum")
_REQUIRED = ("num_rows", "storage", "chunk_rows", "finalized", "revision", "weights_fingerprint", "learning_rate")
_CHECKED = ("scale", *VALUES, "label", "rival", "fingerprint")
_AUDITED = np.uint64(0xD6E8FEB86659FD93)


def check_num_rows(num_rows: int, chunk_rows: int) -> None:
    """Raise `InputError` if a table of files of ``chunk_rows`` rows could not be read with so many rows."""
    most = min(MAX_SIZE, chunk_rows * MAX_CHUNKS)
    if num_rows > most:
        raise InputError(
            f"expected at most {most:,} examples in tables with {chunk_rows:,} in a file, got {num_rows:,}; divide "
            f"them among stores, or make a new store of this size, which has larger files"
        )


def table_layouts(num_rows: int, dim: int, storage: str, chunk_rows: int) -> dict[str, Layout]:
    """Return the layouts of a table's arrays by name; ``dim`` is ignored if features are not stored."""
    # All arrays have the same chunks of rows, also the small columns: a file of a whole column would be one file that
    # all processes write.
    layouts = {
        "floats": Layout((num_rows, len(ARRAYS["floats"])), "float32", chunk_rows),
        "integers": Layout((num_rows, len(ARRAYS["integers"])), "int64", chunk_rows),
        "done": Layout((num_rows,), "bool", chunk_rows),
    }
    kind = FeatureStorage(storage)
    if kind.stores_features:
        layouts["features"] = Layout((num_rows, kind.columns(dim)), kind.dtype, chunk_rows)
    return layouts


def create_table(
    path: StorePath, *, num_rows: int, dim: int, storage: str, chunk_rows: int, attributes: Mapping[str, Any]
) -> None:
    """Create an empty table, unless there is one, in a parent that is a zarr group."""
    if num_rows < 1:
        raise InputError(f"expected a table of at least 1 row, got {num_rows}")
    check_num_rows(num_rows, chunk_rows)
    with disk_errors(path):
        layouts = table_layouts(num_rows, dim, storage, chunk_rows)
        if lost_document(path):
            path.remove()  # nobody knows whose rows these are
        described = {**attributes, "num_rows": num_rows, "storage": storage, "chunk_rows": chunk_rows}
        # The group's document comes last: the table exists from this instant on, with all of its arrays. Processes
        # that create the same table at once all write the same arrays, and one of them writes the document.
        _write(path, layouts, described, replace=False)


def lost_document(path: StorePath) -> bool:
    """Return whether there are finished rows of a table without its document, which is written before them.

    Files without a row that is done are left where power failed before the document's name was on the disk.
    """
    if (path / NODE).exists():
        return False
    marks = path / "done" / "c"
    with suppress(FileNotFoundError):  # of a table that another process removes
        if not any(np.frombuffer((marks / name).read_bytes(), bool).any() for name in marks.children()):
            return False
    try:
        read_document(path / NODE)
    except FileNotFoundError:
        return True
    return False  # another process has just written both


def read_attributes(path: StorePath) -> dict[str, Any]:
    """Return a table's attributes as they are on the disk now."""
    try:
        attributes = dict(read_document(path / NODE)["attributes"])
        if missing := [name for name in _REQUIRED if name not in attributes]:
            raise StoreError(f"{path / NODE} is damaged: it lacks {', '.join(missing)}; restore it, or remove {path}")
        return attributes
    except FileNotFoundError as error:
        raise StoreError(f"{path} has been removed: open the store again") from error


def changing(attributes: Mapping[str, Any], grows: bool = False) -> dict[str, Any]:
    """Return the attributes of a table whose rows may change from now on: not finalized, and of another revision.

    Unless the table only ``grows``, rows may lose their marks too, which `Writable` finds by ``unmarked``.
    """
    # Random and no counter: of two processes that change a table at once, neither can give it an earlier revision.
    revision = uuid.uuid4().hex
    return {**attributes, "finalized": False, "revision": revision} | ({} if grows else {"unmarked": revision})


class Writable:
    """Whether rows may be written and marked: not once another process has removed marks, so that others can be.

    Args:
        path: The table's directory.
        attributes: Its attributes when it was opened.
    """

    def __init__(self, path: StorePath, attributes: Mapping[str, Any]) -> None:
        self._path = path
        self.renew(attributes)

    def renew(self, attributes: Mapping[str, Any]) -> None:
        """Begin with attributes that this process has written."""
        self._unmarked = attributes.get("unmarked")

    def check(self, attributes: Mapping[str, Any] | None = None) -> None:
        """Raise `StoreError` if marks were removed since; ``attributes`` are those on the disk."""
        if (read_attributes(self._path) if attributes is None else attributes).get("unmarked") != self._unmarked:
            raise StoreError(
                f"rows of {self._path} were replaced or found damaged by another process: rows that this one had not "
                "stored yet are not marked as done; load the checkpoint again, and pass these examples again"
            )


def grow_table(path: StorePath, num_rows: int) -> None:
    """Add rows that are not done, if the table has fewer than ``num_rows``; no existing row is read or written."""
    with disk_errors(path):
        described = read_attributes(path)
        if not described["num_rows"] < num_rows:
            return
        kind = FeatureStorage(described["storage"])
        dim = kind.dim(Layout.read(path / "features").shape[-1]) if kind.stores_features else 0
        layouts = table_layouts(num_rows, dim, described["storage"], described["chunk_rows"])
        # The new size comes last: after a crash the table has its old one here, and the next call does all of it again.
        _write(path, layouts, changing({**described, "num_rows": num_rows}, grows=True), replace=True)


def _write(path: StorePath, layouts: Mapping[str, Layout], described: Mapping[str, Any], replace: bool) -> None:
    arrays = {path / name / NODE: array_document(layout) for name, layout in layouts.items()}
    write_documents({**arrays, path / NODE: group_document(described)}, replace=replace)


def row_checksums(
    features: Shaped[np.ndarray, "n k"] | None, columns: Mapping[str, Shaped[np.ndarray, " n"]]
) -> UInt64[np.ndarray, " n"]:
    """Return a checksum of each row as it is stored: CRC-32C of its features, mixed with a hash of its columns."""
    # A checksum of a chunk would be wrong from the first row written to it until the next flush, that is after every
    # crash. A row's own is written with the row, and says which rows are damaged.
    parts = [np.ascontiguousarray(columns[name]) for name in _CHECKED]
    sums = np.full(len(parts[0]), 0x9E3779B97F4A7C15, np.uint64)
    for part in parts:
        sums = mixed(sums, part.view(np.uint32 if part.dtype.itemsize == 4 else np.uint64).astype(np.uint64))
    if features is not None:
        raw = np.ascontiguousarray(features).view(np.uint8).view()
        raw.flags.writeable = False  # google_crc32c takes read-only buffers only
        crcs = np.fromiter(map(google_crc32c.value, raw), np.uint64, len(raw))
        sums ^= crcs | crcs << np.uint64(32)
    return content_checksums(sums, columns["audited"])


def content_checksums(
    checksums: UInt64[np.ndarray, " n"], audited: Bool[np.ndarray, " n"] | Int64[np.ndarray, " n"]
) -> UInt64[np.ndarray, " n"]:
    """Return checksums of rows without their marks of the audit, which say nothing about what is computed from them."""
    return checksums ^ audited.astype(np.uint64) * _AUDITED


def damaged_rows(arrays: Mapping[str, ChunkedArray], rows: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " m"]:
    """Return those of some rows of a table, ascending, that do not match their checksum, done or not."""
    start, stop = int(rows[0]), int(rows[-1]) + 1
    together = stop - start == len(rows)
    read = {name: arrays[name] for name in ("features", *ARRAYS) if name in arrays}
    for array in read.values():
        if array.uploads and together:  # all downloads at once
            array.prefetch(start, stop)
    found = {name: array.read(start, stop) if together else array.take(rows) for name, array in read.items()}
    columns = {name: _unsigned(name, found[array][:, place]) for name, (array, place) in _PLACES.items()}
    return rows[row_checksums(found.get("features"), columns) != columns["checksum"]]


def join_columns(array: str, columns: Mapping[str, Shaped[np.ndarray, " n"]]) -> Shaped[np.ndarray, "n columns"]:
    """Return the rows of an array of `ARRAYS`."""
    dtype = np.float32 if array == "floats" else np.int64
    return np.stack([columns[name].astype(dtype, copy=False) for name in ARRAYS[array]], axis=1)


def read_column(arrays: Mapping[str, ChunkedArray], name: str, start: int, stop: int) -> Shaped[np.ndarray, " n"]:
    """Return a column of rows ``start`` to ``stop``: a view if they are in one file, else a copy."""
    if name == "done":
        return arrays[name].read(start, stop)
    array, place = _PLACES[name]
    values = _unsigned(name, arrays[array].read(start, stop, place))
    return values != 0 if name == "audited" else values


def take_column(
    arrays: Mapping[str, ChunkedArray], name: str, rows: Int64[np.ndarray, " n"]
) -> Shaped[np.ndarray, " n"]:
    """Return a copy of a column of single rows, in any order."""
    array, place = _PLACES[name]
    return _unsigned(name, arrays[array].take(rows)[:, place])


def _unsigned(name: str, values: Shaped[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    return values.view(np.uint64) if name in _UNSIGNED else values


def mixed(sums: UInt64[np.ndarray, " n"], bits: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """Return hashes with more bits mixed into each."""
    sums = (sums ^ bits) * np.uint64(0xFF51AFD7ED558CCD)
    return sums ^ sums >> np.uint64(32)
