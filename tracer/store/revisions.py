"""Revisions: what a result was computed from, and whether that is still what the tables hold.

A table has a random ``revision``, and gets another one, durably, before any of its rows is replaced, added, or marked
as damaged. A result is stored under a name that is a digest of its inputs, the revisions of its tables among them. So
results of other rows have other names, whatever the order of processes, crashes and lost directory entries.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from tracer._core.files import disk_errors
from tracer.errors import StoreError
from tracer.store.arrays.metadata import NODE
from tracer.store.arrays.store_path import StorePath
from tracer.store.table_schema import content_checksums, mixed, read_attributes

if TYPE_CHECKING:
    from tracer.store.row_table import RowTable
    from tracer.store.store import Store


def result_key(inputs: Any) -> str:
    """Return the name of a result: a digest of everything that decides it, JSON values."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def remove_result(path: StorePath) -> None:
    """Remove a result, its document first, so that a part of it never counts."""
    with disk_errors(path):
        (path / NODE).remove()
        with contextlib.suppress(FileNotFoundError):  # another process may remove it at the same time
            path.remove()


def is_superseded(root: StorePath, inputs: Mapping[str, Any]) -> bool:
    """Return whether a table that a result comes from has another revision now, or is gone."""
    known = inputs.get("revisions", {})
    return any(not _is_table(path) or _revision(root / path) != revision for path, revision in known.items())


def _is_table(path: str) -> bool:
    """Return whether a path of a document is that of a table, and so leads nowhere else."""
    kind, *names = path.split("/")
    return kind in ("checkpoints", "targets") and not {"", ".", ".."} & set(names)


def same_but_rows(inputs: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    """Return whether two results are computed alike, from training examples that may or may not be the same."""
    # Each training example has a part in a kernel, and so in the score of every other one.
    return _without_rows(inputs) == _without_rows(others) and (inputs == others or "regularization" not in inputs)


def _without_rows(inputs: Mapping[str, Any]) -> dict[str, Any]:
    known = inputs.get("revisions", {})
    kept = {path: None if path.startswith("checkpoints/") else revision for path, revision in known.items()}
    return {**inputs, "revisions": kept}


def _revision(path: StorePath) -> str | None:
    try:
        return str(read_attributes(path)["revision"])
    except (StoreError, KeyError):
        return None


class Revisions:
    """The tables that results come from, with their revisions at the time that this object was made.

    Args:
        store: The store.
        model_ids: The checkpoints.
        exp_name: The target set; None: training examples only.

    Attributes:
        model_ids: As passed.
        tables: The revision of each table by its path in the store.
    """

    def __init__(self, store: Store, model_ids: Sequence[int], exp_name: str | None = None) -> None:
        self._store, self.model_ids = store, list(model_ids)
        paths = [f"checkpoints/{number}" for number in model_ids]
        if exp_name is not None:
            paths += [f"targets/{exp_name}/{number}" for number in model_ids]
        self.tables = {path: str(read_attributes(store.path / path)["revision"]) for path in paths}

    def check(self) -> None:
        """Raise `StoreError` if rows were replaced, added or found damaged since this object was made."""
        for path, revision in self.tables.items():
            if _revision(self._store.path / path) != revision:
                raise StoreError(
                    f"rows of {self._store.path / path} were replaced, added or found damaged while results were "
                    "computed from them: what was not finished is not stored; finalize the features and ask again"
                )

    def digest(self, start: int, stop: int) -> int:
        """Return a digest, 64 bits, of training examples ``start`` to ``stop``; 0 if any is missing at a checkpoint."""
        rows = np.zeros(stop - start, np.uint64)
        for number, table in zip(self.model_ids, self.checkpoints, strict=True):
            if not table.column("done", start, stop).all():
                return 0
            checksums, audited = (table.column(name, start, stop) for name in ("checksum", "audited"))
            rows = mixed(rows, content_checksums(checksums, audited))
            if table.storage == "none":
                # The checksum is not that of gradients, so it takes the weights and the inputs too to know them. If
                # inputs are unknown, without check_rows, examples of another revision are never the same.
                weights, revision = str(table.attributes["weights_fingerprint"]), self.tables[f"checkpoints/{number}"]
                unknown = table.column("fingerprint", start, stop) == 0
                rows = mixed(rows, np.where(unknown, _bits(revision), _bits(weights)))
        return int(_bits(rows.tobytes()))

    @cached_property
    def checkpoints(self) -> list[RowTable]:
        """The tables of training examples, which are opened once: of thousands, that takes the most time."""
        return [self._store.checkpoint(number) for number in self.model_ids]


def _bits(value: str | bytes) -> np.uint64:
    """Return a hash of a value, 64 bits."""
    digest = hashlib.sha256(value.encode() if isinstance(value, str) else value).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))
