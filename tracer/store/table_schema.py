"""The arrays of a table of rows: which there are, how they lie in files, how a table begins and grows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np

from tracer._core.files import disk_errors
from tracer.errors import InputError, StoreError
from tracer.store.arrays.layout import Layout, create_array
from tracer.store.metadata import NODE, StorePath, read_document, write_group

VALUES = ("loss", "loss_grad", "loss_hess", "gradient_norm", "output_change")
"""The float32 columns that come with a row, all ``[N]``."""
NO_LABEL = int(np.iinfo(np.int64).min)
"""The label of a row whose task gave none."""
COLUMNS = {
    "scale": "float32",
    **dict.fromkeys(VALUES, "float32"),
    "label": "int64",
    "fingerprint": "uint64",
    "checksum": "uint64",
    "done": "bool",
}
_CHECKED = ("scale", *VALUES, "label", "fingerprint")


def table_layouts(num_rows: int, dim: int, storage: str, block_rows: int) -> dict[str, Layout]:
    """Return how the arrays of a table lie in their files: all are cut into the same blocks of rows.

    Args:
        num_rows: N.
        dim: The values of a row.
        storage: The dtype of features, or ``"none"``.
        block_rows: The rows of a block.

    Returns:
        Layouts by name.
    """
    layouts = {name: Layout((num_rows,), dtype, block_rows) for name, dtype in COLUMNS.items()}
    if storage != "none":
        layouts["features"] = Layout((num_rows, dim), storage, block_rows)
    return layouts


def create_table(
    path: StorePath, *, num_rows: int, dim: int, storage: str, block_rows: int, attributes: Mapping[str, Any]
) -> None:
    """Create an empty table, unless there is one; it exists from the instant that its group's document does.

    Processes that create the same table at once all write the same arrays, and one of them writes the document.

    Args:
        path: Where; its parent is a zarr group.
        num_rows: N.
        dim: The values of a row.
        storage: The dtype of features; ``"none"`` makes a table without features.
        block_rows: The rows of a block.
        attributes: Of the group, JSON values.

    Raises:
        InputError: There are no rows.
    """
    if num_rows < 1:
        raise InputError(f"a table of {num_rows} rows was asked for: expected at least 1")
    with disk_errors(path):
        for name, layout in table_layouts(num_rows, dim, storage, block_rows).items():
            create_array(path / name, layout)
        described = {**attributes, "num_rows": num_rows, "storage": storage, "block_rows": block_rows}
        write_group(path, described, replace=False)


def read_attributes(path: StorePath) -> dict[str, Any]:
    """Return what is recorded of a table, as it stands now.

    Args:
        path: The table's directory.

    Returns:
        The attributes of its group.

    Raises:
        StoreError: The table has been removed, or its document is damaged.
    """
    try:
        return dict(read_document(path / NODE)["attributes"])
    except FileNotFoundError as error:
        raise StoreError(f"{path} has been removed: open the store again") from error


def grow_table(path: StorePath, num_rows: int) -> None:
    """Add rows to a table that are not done, where it has fewer; nothing that is there is read or written.

    A process that is killed while it does this leaves a table that the next call finishes.

    Args:
        path: The table's directory.
        num_rows: The new N.

    Raises:
        StoreError: The table is damaged, or the disk fails.
    """
    with disk_errors(path):
        described = read_document(path / NODE)["attributes"]
        if not int(described.get("num_rows", num_rows)) < num_rows:
            return
        dim = 0 if described["storage"] == "none" else Layout.read(path / "features")[0].shape[-1]
        for name, layout in table_layouts(num_rows, dim, described["storage"], described["block_rows"]).items():
            create_array(path / name, layout)
        write_group(path, {**described, "num_rows": num_rows, "finalized": False})


def row_checksums(features: np.ndarray | None, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return a checksum of each row as it is stored.

    Args:
        features: ``[n, dim]`` in the storage dtype, or None.
        columns: The columns of the rows, ``[n]`` each; those that count are taken from among them.

    Returns:
        ``[n]``, uint64: CRC-32C of the features, and a multiplicative hash of the other values.
    """
    parts = [np.ascontiguousarray(columns[name]) for name in _CHECKED]
    sums = np.full(len(parts[0]), 0x9E3779B97F4A7C15, np.uint64)
    for part in parts:
        bits = part.view(np.uint32 if part.dtype.itemsize == 4 else np.uint64).astype(np.uint64)
        sums = (sums ^ bits) * np.uint64(0xFF51AFD7ED558CCD)
        sums ^= sums >> np.uint64(32)
    if features is not None:
        raw = np.ascontiguousarray(features).view(np.uint8).view()
        raw.flags.writeable = False  # the checksum's C code takes no other
        crcs = np.fromiter(map(google_crc32c.value, raw), np.uint64, len(raw))
        sums ^= crcs | crcs << np.uint64(32)
    return sums
