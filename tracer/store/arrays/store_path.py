"""The two kinds of path that a store can have, and the one that a user's ``save_dir`` names."""

from __future__ import annotations

import os

from tracer.errors import InputError, InputTypeError
from tracer.store.arrays.local_path import LocalPath
from tracer.store.arrays.remote_path import RemotePath

StorePath = LocalPath | RemotePath
"""A path in a store: both kinds have the same calls, so callers need not know which one they have."""

_LOCAL = ("file://", "local://")


def store_path(save_dir: str | os.PathLike[str] | StorePath) -> StorePath:
    """Return the absolute path of a directory, or of a URL that fsspec knows."""
    if isinstance(save_dir, RemotePath):
        return save_dir
    if not isinstance(save_dir, (str, os.PathLike)):
        raise InputTypeError(f"save_dir is of type {type(save_dir).__name__}: expected a str or a path")
    text = os.fspath(save_dir)
    for protocol in _LOCAL:
        text = text.removeprefix(protocol)
    if "://" in text:
        return RemotePath.of(text)
    path = LocalPath(text).absolute()
    LocalPath.roots.add(str(path))
    return path


def local_path(save_dir: str | os.PathLike[str]) -> LocalPath:
    """Return the path of a directory on this machine; refuse a remote URL."""
    path = store_path(save_dir)
    if isinstance(path, RemotePath):
        raise InputError(f"save_dir={save_dir!r} is remote; expected a folder on this machine.")
    return path
