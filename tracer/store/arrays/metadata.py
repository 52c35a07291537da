"""The JSON metadata of zarr nodes, read and written whole."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import google_crc32c

from tracer._core.files import disk_errors
from tracer.errors import StoreError
from tracer.store.arrays.store_path import StorePath

NODE = "zarr.json"
_MAX_BYTES = 32 << 20  # the manifest names every parameter
_CHECKSUM = "document_crc32c"
_NUMBER, _TEXT = (int, float), (str, type(None))
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("num_rows", "chunk_rows", "format_version", "start", "stop", "rows", "layout.*"), (int,)),
    **dict.fromkeys(("storage", "revision", "unmarked", "rounding", "versions.*", "inputs.revisions.*"), (str,)),
    **dict.fromkeys(("weights_fingerprint", "source"), _TEXT),
    **dict.fromkeys(("settings", "info", "versions", "layout", "inputs", "sums", "crc32c"), (dict,)),
    **dict.fromkeys(("settings.projector", "settings.task", "settings.params", "inputs.revisions"), (dict,)),
    **dict.fromkeys(("settings.projector.kind", "settings.task.name"), (str,)),
    **dict.fromkeys(("inputs.k", "crc32c.*"), (int,)),
    "settings.params.*": (list,),
    "finalized": (bool,),
    "learning_rate": (*_NUMBER, type(None)),
    "sums.*": _NUMBER,
}
"""The types of attributes by their place in a document; ``*`` is any name. Other attributes may be anything."""


def read_document(path: StorePath, checked: bool = True) -> dict[str, Any]:
    """Return a ``zarr.json``, compared with its checksum if ``checked``; raise FileNotFoundError if there is none."""
    try:
        data = path.read_bytes(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it has more than {_MAX_BYTES} bytes")
        document = json.loads(data, parse_constant=_no_number)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise StoreError(f"{path} cannot be read ({error}): restore it, or remove what it describes") from error
    if not isinstance(document, dict) or document.get("zarr_format") != 3:
        raise StoreError(f"{path} is not zarr version 3 metadata: expected zarr_format 3; choose another save_dir")
    if not isinstance(document.setdefault("attributes", {}), dict):
        raise StoreError(f"{path} is damaged: expected a JSON object under 'attributes'; restore it")
    checksum = document["attributes"].pop(_CHECKSUM, None)
    if checked and checksum is not None and checksum != _checksum(document):
        raise StoreError(f"{path} is damaged: it does not match its checksum; restore it, or remove what it describes")
    _check_types(path, document["attributes"])
    return document


def _check_types(path: StorePath, attributes: Mapping[str, Any], place: str = "") -> None:
    """Raise StoreError unless attributes have their types, and their numbers are ones that arrays can hold."""
    for name, value in attributes.items():
        kinds = _TYPES.get(place + name) or _TYPES.get(f"{place}*")
        if kinds is None:
            continue
        least = name in ("num_rows", "chunk_rows") if kinds == (int,) else -1 << 64
        fits = type(value) in kinds and (type(value) is not int or least <= value < 1 << 64)
        if not fits or (type(value) is float and not math.isfinite(value)):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise StoreError(f"{path} is damaged: expected {place}{name} of type {expected}; restore it")
        if isinstance(value, dict):
            _check_types(path, value, f"{place}{name}.")


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no number in JSON")


def write_documents(documents: Mapping[StorePath, Mapping[str, Any]], *, replace: bool = True) -> None:
    """Write several ``zarr.json``, of which the last one is seen only once all are durable.

    Args:
        documents: By path, in their order.
        replace: Whether an existing last one is replaced.
    """
    files: dict[Any, bytes] = {path: _encoded(document) for path, document in documents.items()}
    if files:
        first: StorePath = next(iter(files))
        with disk_errors(first):
            first.write_all(files, replace=replace)


def write_document(path: StorePath, document: Mapping[str, Any], *, replace: bool = True) -> None:
    """Write a JSON document whole; without ``replace`` an existing one stays as it is."""
    with disk_errors(path):
        path.write_whole(_encoded(document), replace=replace)


def group_document(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the document of a zarr group with these attributes."""
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def write_group(path: StorePath, attributes: Mapping[str, Any], *, replace: bool = True) -> None:
    """Make a directory a zarr group with these attributes."""
    write_document(path / NODE, group_document(attributes), replace=replace)


def _encoded(document: Mapping[str, Any]) -> bytes:
    attributes = {**document.get("attributes", {}), _CHECKSUM: _checksum(document)}
    return json.dumps({**document, "attributes": attributes}, indent=2, allow_nan=False).encode()


def _checksum(document: Mapping[str, Any]) -> int:
    """Return the CRC-32C of a document without its checksum, however it is laid out."""
    return int(google_crc32c.value(json.dumps(document, sort_keys=True).encode()))


def child_nodes(path: StorePath) -> list[str]:
    """Return the names of the zarr nodes directly below a directory, sorted; none if it does not exist."""
    with disk_errors(path):
        return [name for name in path.children() if not name.startswith(".") and (path / name / NODE).exists()]
