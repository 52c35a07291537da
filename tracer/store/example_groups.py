"""The documents and groups of a store's training examples, by which their scores are summed."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
from jaxtyping import Int64

from tracer._core.files import disk_errors
from tracer.errors import InputError, StoreError
from tracer.store.arrays.metadata import NODE, read_document, write_group
from tracer.store.store import Store

KINDS = ("document", "group")


def write_example_groups(
    store: Store, documents: Int64[np.ndarray, " N"], groups: tuple[np.ndarray, list[str]] | None
) -> None:
    """Write the document of each training example, and its group with the groups' names."""
    attributes: dict[str, Any] = {"document": _encoded(documents)}
    if groups is not None:
        attributes |= {"group": _encoded(groups[0]), "names": groups[1]}
    with disk_errors(store.path):
        write_group(store.path / "examples", attributes)


def read_example_groups(store: Store, kind: str) -> tuple[Int64[np.ndarray, " N"], list[str] | None]:
    """Return the number of each example's document or group, and the names of groups.

    Raises:
        InputError: If the store has none.
        StoreError: If they are damaged.
    """
    path = store.path / "examples" / NODE
    with disk_errors(store.path):
        attributes = read_document(path)["attributes"] if path.exists() else {}
    if kind not in attributes:
        known = [name for name in KINDS if name in attributes]
        raise InputError(
            f"the store knows no {kind} of its training examples (it has {known or 'none'}); build it with "
            f"group_column=, or pass the number of each example's group."
        )
    try:
        found = np.frombuffer(zlib.decompress(base64.b64decode(attributes[kind])), np.dtype("<i8"))
    except (ValueError, TypeError, zlib.error) as error:
        raise StoreError(f"{path} is damaged ({error!r}): build the store again, which writes only this") from error
    return found.astype(np.int64), attributes.get("names") if kind == "group" else None


def _encoded(numbers: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(np.ascontiguousarray(numbers, "<i8").tobytes())).decode("ascii")
