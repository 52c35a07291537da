"""The JSON metadata of zarr nodes, read and written whole, on a local disk or in a remote store."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracer._core.files import sweep, sync, write_whole
from tracer.errors import StoreError
from tracer.store.remote_path import RemotePath

NODE = "zarr.json"

StorePath = Path | RemotePath
"""Where a node of a store lies."""


def read_document(path: StorePath) -> dict[str, Any]:
    """Read the JSON document of a zarr node.

    Args:
        path: The ``zarr.json``.

    Returns:
        The document, with a dict under ``attributes``.

    Raises:
        FileNotFoundError: There is none.
        StoreError: It cannot be read or is no zarr version 3 node.
    """
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read ({error}): restore it, or remove what it describes") from error
    if not isinstance(document, dict) or document.get("zarr_format") != 3:
        raise StoreError(f"{path} is no zarr version 3 metadata: expected zarr_format 3; choose another save_dir")
    if not isinstance(document.setdefault("attributes", {}), dict):
        raise StoreError(f"{path} is damaged: expected a JSON object under 'attributes'; restore it")
    return document


def write_document(path: StorePath, document: Mapping[str, Any], *, replace: bool = True) -> None:
    """Write a JSON document so that readers and crashes see all of it or none.

    Args:
        path: Where; its directory is made where it is missing.
        document: JSON values.
        replace: Whether a document that is already there is replaced; otherwise it stays, and nothing is written.
    """
    text = json.dumps(document, indent=2, allow_nan=False).encode()
    if isinstance(path, RemotePath):
        (path.write_bytes if replace else path.create_bytes)(text)
        return
    _make_directory(path.parent)
    sweep(path.parent)
    write_whole(path, lambda file: file.write(text), replace=replace)


def write_group(path: StorePath, attributes: Mapping[str, Any], *, replace: bool = True) -> None:
    """Make a directory a zarr group with these attributes."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    write_document(path / NODE, document, replace=replace)


def _make_directory(path: Path) -> None:
    """Make a directory and the names of all that had to be made durable."""
    missing = [path]
    while not missing[-1].exists():
        missing.append(missing[-1].parent)
    if len(missing) > 1:
        path.mkdir(parents=True, exist_ok=True)
        for directory in missing[1:]:
            sync(directory)


def child_nodes(path: StorePath) -> list[str]:
    """Return the names of the zarr nodes directly below a directory, sorted; none where it does not exist."""
    if isinstance(path, RemotePath):
        return [name for name in path.children() if not name.startswith(".") and (path / name / NODE).exists()]
    return sorted(node.parent.name for node in path.glob(f"[!.]*/{NODE}"))


def remove(path: StorePath) -> None:
    """Remove a file, or a directory with everything in it; nothing where there is nothing."""
    if isinstance(path, RemotePath):
        path.remove()
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
