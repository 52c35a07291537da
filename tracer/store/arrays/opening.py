"""Opens arrays through the class that fits their path: memory maps on a local disk, whole objects remotely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tracer.store.arrays.chunked import ChunkedArray
from tracer.store.arrays.layout import Layout
from tracer.store.arrays.local import LocalArray
from tracer.store.arrays.remote import RemoteArray, transfers
from tracer.store.arrays.remote_path import RemotePath
from tracer.store.arrays.store_path import StorePath


def open_array(path: StorePath, layout: Layout | None = None) -> ChunkedArray:
    """Open the array in a directory, whose document is read unless the layout is known."""
    return RemoteArray(path, layout) if isinstance(path, RemotePath) else LocalArray(path, layout)


def open_arrays(
    path: StorePath, names: Sequence[str], layouts: Mapping[str, Layout] | None = None
) -> dict[str, ChunkedArray]:
    """Open several arrays of a group, by name; remote ones concurrently, since each takes a round trip."""
    if layouts is not None:
        return {name: open_array(path / name, layouts[name]) for name in names}
    opened = transfers().map if isinstance(path, RemotePath) else map
    return dict(zip(names, opened(open_array, [path / name for name in names]), strict=True))
