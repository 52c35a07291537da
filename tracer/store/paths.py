"""Where a store lies: a directory on this machine, or a prefix of a remote store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from tracer.errors import InputTypeError
from tracer.store.arrays.chunked import ChunkedArray
from tracer.store.arrays.local import MappedArray
from tracer.store.arrays.remote import UploadedArray, transfers
from tracer.store.metadata import StorePath
from tracer.store.remote_path import RemotePath

_LOCAL = ("file://", "local://")


def store_path(save_dir: str | os.PathLike[str] | StorePath) -> StorePath:
    """Return the place that ``save_dir`` names.

    Args:
        save_dir: A directory, or a URL that fsspec knows.

    Returns:
        An absolute path, or a remote one.

    Raises:
        InputTypeError: It is neither a str nor a path.
    """
    if isinstance(save_dir, RemotePath):
        return save_dir
    if not isinstance(save_dir, (str, os.PathLike)):
        raise InputTypeError(f"save_dir is of type {type(save_dir).__name__}: expected a str or a path")
    text = os.fspath(save_dir)
    for protocol in _LOCAL:
        text = text.removeprefix(protocol)
    return RemotePath.of(text) if "://" in text else Path(text).absolute()


def open_array(path: StorePath) -> ChunkedArray:
    """Open an array, through maps where it is on this machine.

    Args:
        path: The array's directory.

    Returns:
        The array.
    """
    return UploadedArray(path) if isinstance(path, RemotePath) else MappedArray(path)


def open_arrays(path: StorePath, names: Sequence[str]) -> dict[str, ChunkedArray]:
    """Open several arrays of a group; at once where that takes the network's time.

    Args:
        path: The group's directory.
        names: The arrays'.

    Returns:
        The arrays by name.
    """
    opened = transfers().map if isinstance(path, RemotePath) else map
    return dict(zip(names, opened(open_array, [path / name for name in names]), strict=True))
