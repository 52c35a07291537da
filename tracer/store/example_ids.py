"""The ids of a store's examples, by which people know them.

They are in parts: groups ``ids/train/<key>`` and ``ids/targets/<exp_name>/<key>`` with indices and ids. So
processes write at once without locks, and a part that is written twice is the same one.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tracer._core.files import disk_errors
from tracer._core.text import listing
from tracer.errors import InputError, MismatchError, StoreError
from tracer.store.arrays.metadata import NODE, child_nodes, read_document, write_group
from tracer.store.arrays.store_path import StorePath
from tracer.store.paths import checked_name, ensure_groups
from tracer.store.revisions import remove_result

_FLUSH_SECONDS = 2.0  # less than those of tables, so that a crash loses an example before it loses its id
_MAX_NAMED = 5


class ExampleIds:
    """The ids of training examples, or of a set of targets.

    Args:
        root: The store's directory.
        exp_name: The name of the targets; None: the training examples.
    """

    def __init__(self, root: StorePath, exp_name: str | None) -> None:
        self._root, self._name = root, "training example" if exp_name is None else "target"
        self._path = id_path(root, exp_name)
        self._parts: tuple[str, ...] | None = None  # that were read or written; None: not read yet
        self._known: dict[int, str | int] = {}
        self._rows: dict[str, int] = {}
        self._pending: dict[int, str | int] = {}
        self._flushed = time.monotonic()

    def known(self) -> Mapping[int, str | int]:
        """Return the ids by row, also those that other processes have written."""
        parts = tuple(child_nodes(self._path))
        if parts != self._parts:
            self._known, self._parts = dict(self._pending), parts
            for part in parts:
                with contextlib.suppress(FileNotFoundError):  # another process has joined it with others
                    self._known.update(read_ids(self._path / part))
            self._rows = {str(name): row for row, name in self._known.items()}
        return self._known

    def listed(self, num_rows: int) -> list[str | int] | None:
        """Return the id of each row, its index if it has none; None if no row has one."""
        known = self.known()
        return [known.get(row, row) for row in range(num_rows)] if known else None

    def add(self, rows: Sequence[int] | np.ndarray, ids: Sequence[str | int]) -> None:
        """Give rows their ids, which are stored by the next `flush`, or at once if the last one is some time ago.

        Raises:
            MismatchError: If a row has another id.
            InputError: If another row has the id.
        """
        known = self.known() if self._parts is None else self._known  # listing parts for each batch would take long
        for row, name in zip(np.asarray(rows).tolist(), ids, strict=True):
            if row in known and known[row] != name:
                raise MismatchError(
                    f"{self._name} {row} has the id {known[row]!r} in {self._root}, got {name!r}; expected the same "
                    f"examples in the same order. To give other names to the same examples, call set_ids."
                )
            if self._rows.setdefault(str(name), row) != row:
                raise InputError(
                    f"{self._name} {row} got the id {name!r}, which {self._name} {self._rows[str(name)]} has; expected "
                    f"another id for each."
                )
            if row not in known:
                self._known[row] = self._pending[row] = name
        if time.monotonic() - self._flushed >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Store the ids that were added."""
        if self._pending:
            self._parts = tuple(sorted({*(self._parts or ()), self._write(self._pending)}))
            self._pending = {}
        self._flushed = time.monotonic()

    def replace(self, ids: Mapping[int, str | int]) -> None:
        """Store these ids and no others, as one part."""
        before = child_nodes(self._path)
        written = self._write(ids) if ids else None
        for part in before:
            if part != written:
                remove_result(self._path / part)
        self._pending, self._parts = {}, None

    def forget(self, rows: np.ndarray) -> None:
        """Forget the ids of rows, in whose place there will be other examples."""
        gone = set(rows.tolist())
        if gone & self.known().keys():
            self.replace({row: name for row, name in self.known().items() if row not in gone})

    def join(self) -> None:
        """Join parts to one.

        Raises:
            InputError: If an id names several rows, which several processes wrote.
        """
        known = self.known()
        if len(self._rows) < len(known):
            repeated = [
                f"{name!r} ({self._rows[str(name)]} and {row})"
                for row, name in known.items()
                if self._rows[str(name)] != row
            ]
            raise InputError(
                f"ids name several {self._name}s: {listing(repeated, 3)}; expected another id for each: call set_ids."
            )
        if len(self._parts or ()) > 1:
            self.replace(dict(sorted(known.items())))

    def named(self, rows: np.ndarray) -> str:
        """Return the first rows with their ids, and how many more there are, for errors."""
        known = self.known()
        return listing([f"{row} ({known[row]!r})" if row in known else row for row in rows.tolist()], _MAX_NAMED)

    def _write(self, ids: Mapping[int, str | int]) -> str:
        """Write a part and return its name."""
        rows = np.fromiter(ids, np.int64, len(ids)).astype("<i8").tobytes()
        names = json.dumps(list(ids.values()), ensure_ascii=True).encode()
        key = hashlib.sha256(rows + names).hexdigest()[:16]
        with disk_errors(self._path):
            ensure_groups(self._root, self._path)
            write_group(self._path / key, {"examples": _packed(rows), "ids": _packed(names)}, replace=False)
        return key


def id_path(root: StorePath, exp_name: str | None) -> StorePath:
    """Return the path of the parts of ids."""
    return root / "ids" / "train" if exp_name is None else root / "ids" / "targets" / checked_name("exp_name", exp_name)


def read_ids(path: StorePath) -> dict[int, str | int]:
    """Return the ids of a part by row; raise `StoreError` if it is damaged."""
    attributes: Mapping[str, Any] = read_document(path / NODE)["attributes"]
    try:
        rows = np.frombuffer(_unpacked(attributes["examples"]), "<i8").tolist()
        return dict(zip(rows, json.loads(_unpacked(attributes["ids"])), strict=True))
    except (KeyError, ValueError, TypeError, zlib.error) as error:
        raise StoreError(f"{path} is damaged ({error!r}): remove it, and give the ids again by set_ids") from error


def id_parts(root: StorePath) -> Iterator[StorePath]:
    """Yield the paths of all parts of ids in a store."""
    sets = [
        root / "ids" / "train",
        *(root / "ids" / "targets" / name for name in child_nodes(root / "ids" / "targets")),
    ]
    for path in sets:
        for name in path.children():
            if name != NODE and not name.startswith("."):
                yield path / name


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode("ascii")


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))
