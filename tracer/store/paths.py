"""Names and numbers of the nodes in a store's hierarchy."""

from __future__ import annotations

import re

from tracer.errors import InputError, InputTypeError
from tracer.store.arrays.metadata import NODE, child_nodes, group_document, write_documents
from tracer.store.arrays.store_path import StorePath

_SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)


def numbered_nodes(path: StorePath) -> list[int]:
    """Return the nodes below a directory whose names are numbers, ascending."""
    return sorted(int(name) for name in child_nodes(path) if re.fullmatch("0|[1-9][0-9]*", name))


def ensure_groups(root: StorePath, path: StorePath) -> None:
    """Make every directory from a store's root down to ``path``, itself included, a zarr group."""
    groups = []
    while path != root:
        groups.append(path)
        path = path.parent
    missing = [group / NODE for group in reversed(groups) if not (group / NODE).exists()]
    write_documents({document: group_document({}) for document in missing}, replace=False)


def checked_name(what: str, name: str) -> str:
    """Return a name after checking that it is safe as one component of a path."""
    if not isinstance(name, str):
        raise InputTypeError(f"{what} is of type {type(name).__name__}: expected a str")
    if not _SAFE_NAME.fullmatch(name) or name.startswith("__") or name.lower() == NODE:
        raise InputError(
            f"{what} is {name!r}: expected 1 to 128 letters, digits, '-', '_' and '.', not beginning with '.' or '__'"
        )
    return name
