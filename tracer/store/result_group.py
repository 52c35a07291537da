"""Results that are computed as a whole: a few arrays in a group, whose document has their checksums and is last."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import google_crc32c
import numpy as np

from tracer._core.files import disk_errors
from tracer.errors import StoreError
from tracer.store.arrays.layout import Layout, array_document
from tracer.store.arrays.metadata import NODE, read_document, write_documents, write_group
from tracer.store.arrays.opening import open_array, open_arrays
from tracer.store.arrays.store_path import StorePath
from tracer.store.paths import checked_name

_CHUNK_BYTES = 16 << 20


def save_group(path: StorePath, attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a group of arrays ``[n, k]`` with its attributes durably, in place of a damaged one."""
    with disk_errors(path):
        # Document first when replacing, last when writing: a crash in between leaves a group that counts as missing.
        (path / NODE).remove()
        rows = {name: max(1, min(len(each), _CHUNK_BYTES // max(1, each[0].nbytes))) for name, each in arrays.items()}
        layouts = {name: Layout(each.shape, str(each.dtype), rows[name]) for name, each in arrays.items()}
        write_documents({path / name / NODE: array_document(layout) for name, layout in layouts.items()})
        opened = open_arrays(path, list(arrays))
        for first in list(opened.values())[:1]:
            group = first.sync_group()
            for name, array in opened.items():
                array.remove_unusable(range(array.layout.num_chunks))
                array.assign(np.arange(len(arrays[name])), arrays[name])
            first.flush_together(list(opened.values()), None, group)
        for array in opened.values():
            array.close()
        write_group(path, {**attributes, "crc32c": _sums(arrays)})


def load_group(path: StorePath) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return attributes and arrays; raise `FileNotFoundError` if there is no group, `StoreError` if it is damaged."""
    attributes = read_document(path / NODE)["attributes"]
    try:
        # A name is one in this directory, whoever wrote it.
        arrays = {name: _read(path / checked_name("array", name)) for name in attributes["crc32c"]}
        same = _sums(arrays) == attributes["crc32c"]
    except (StoreError, OSError, LookupError, TypeError, ValueError) as error:
        if not (path / NODE).exists():
            raise FileNotFoundError(path) from error
        raise StoreError(f"{path} is damaged ({error})") from error
    if not same:
        if not (path / NODE).exists():
            raise FileNotFoundError(path)
        raise StoreError(f"{path} is damaged: its arrays do not match their checksums")
    return attributes, arrays


def _read(path: StorePath) -> np.ndarray:
    array = open_array(path)
    try:
        return np.array(array.read(0, array.layout.shape[0]))
    finally:
        array.close()


def _sums(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {name: google_crc32c.value(np.ascontiguousarray(values).tobytes()) for name, values in arrays.items()}
