"""The store: everything that is computed, in one zarr version 3 hierarchy, on a local disk or remote.

    save_dir/                           group; its attributes are the manifest
      checkpoints/<model_id>/           a `RowTable` of train rows
      targets/<exp_name>/<model_id>/    a `RowTable` of target rows
      scores/<exp_name>/<estimator>     a `ScoreArray`, with ``<estimator>_done`` and others beside it
      cosines/<exp_name>/<model_id>/<first target>      the same, of exact gradients, which are not stored themselves
      top/<exp_name>/<estimator>/<key>/<rows>           a running selection of the strongest rows
      kernels/<model_id>/<weighting>    a kernel of all train rows, for estimators with curvature

A store exists from the instant that its root ``zarr.json`` does, a table from the instant that its own does. Nothing is
locked, so nothing stays locked after a crash. Processes may create the same things at once; they write different
blocks of rows.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tracer._core.files import PARTIAL, disk_errors, sweep
from tracer._core.text import listing
from tracer.errors import CallOrderError, InputError, MismatchError, StoreError
from tracer.store.arrays.completion_mask import FLUSH_SECONDS
from tracer.store.arrays.layout import BLOCK_BYTES, rows_per_block
from tracer.store.manifest import Manifest, check_same, json_value
from tracer.store.metadata import NODE, StorePath, child_nodes, read_document, write_group
from tracer.store.nodes import checked_integer, checked_name, ensure_groups, numbered_nodes
from tracer.store.paths import store_path
from tracer.store.remote_path import RemotePath
from tracer.store.results import Results
from tracer.store.row_table import RowTable
from tracer.store.table_schema import create_table, grow_table, read_attributes

logger = logging.getLogger("tracer")

REMOTE_BLOCK_BYTES = 16 << 20
"""How many bytes of features an object of a remote store has at most: a few of them are held in memory."""
_ITEM_BYTES = {"float32": 4, "float16": 2, "int8": 1}


class Store(Results):
    """A directory, or remote prefix, that holds features, their tables' attributes, and scores.

    Args:
        path: The directory of a store that exists; use `open` or `open_existing`.
        manifest: What it was made with.

    Attributes:
        path: The directory.
        manifest: What it was made with.

    >>> import tempfile
    >>> manifest = Manifest({"train_set_size": 5, "feature_dim": 2, "storage": "float16"})
    >>> store = Store.open(Path(tempfile.mkdtemp()) / "run", manifest)
    >>> with store.create_checkpoint(0, "5f", learning_rate=0.1) as table:
    ...     table.remaining().tolist()
    [0, 1, 2, 3, 4]
    >>> Store.open_existing(store.path).checkpoint_ids()
    [0]
    """

    def __init__(self, path: StorePath, manifest: Manifest) -> None:
        super().__init__(path, manifest)

    @classmethod
    def open(
        cls, save_dir: str | os.PathLike[str], manifest: Manifest, *, resume: bool = True, processes: int = 1
    ) -> Store:
        """Create a store, or open the one that is there if it was made with the same settings.

        Args:
            save_dir: A directory, or a URL that fsspec knows: of a store, empty, or not there yet.
            manifest: The settings that decide the numbers.
            resume: Whether a store that is there may be continued.
            processes: Among how many processes rows are to be divided, for a new store.

        Returns:
            The store.

        Raises:
            InputError: A store is there and ``resume`` is False.
            StoreError: The path is a file, or a directory that is neither empty nor a store.
        """
        path = store_path(save_dir)
        with disk_errors(path):
            if (path / NODE).exists():
                if not resume:
                    raise InputError(
                        f"{path} holds a store and resume is False: choose another save_dir, or pass resume=True"
                    )
            else:
                _check_empty(path)
                block_rows = _block_rows(path, manifest, manifest.train_set_size, processes)
                laid_out = replace(manifest, layout={"block_rows": block_rows, "processes": processes})
                write_group(path, laid_out.attributes(), replace=False)
        store = cls.open_existing(path)
        check_same(store.manifest, manifest, path)
        return store

    @classmethod
    def open_existing(cls, save_dir: str | os.PathLike[str] | StorePath) -> Store:
        """Open a store with the settings that it was made with.

        Args:
            save_dir: The store's directory or URL.

        Returns:
            The store.

        Raises:
            StoreError: There is none, it is damaged, or a newer version of this package wrote it.
        """
        path = store_path(save_dir)
        try:
            document = read_document(path / NODE)
        except FileNotFoundError as error:
            raise StoreError(f"{path} holds no store (there is no {NODE} in it): check save_dir") from error
        if isinstance(path, Path):
            sweep(path)
        return cls(path, Manifest.from_attributes(document["attributes"], path))

    @property
    def block_rows(self) -> int:
        """The train rows of one file: processes that write at the same time write different blocks."""
        return self.manifest.layout["block_rows"]

    def target_block_rows(self, num_targets: int) -> int:
        """Return the rows of one file of a table of this many targets."""
        return _block_rows(self.path, self.manifest, num_targets, self.manifest.layout["processes"])

    def grow(self, train_set_size: int) -> None:
        """Raise the number of train rows; the new ones are not done, at any checkpoint.

        Tables grow when they are next opened, so a process that is killed while it does this has done it or not.

        Args:
            train_set_size: The new number, not below the old one.

        Raises:
            InputError: It is below the old one.
            StoreError: The disk fails.
        """
        known = self.manifest.train_set_size
        if train_set_size < known:
            raise InputError(f"the store has {known} train rows and {train_set_size} were asked for: rows only come in")
        if train_set_size == known:
            return
        settings = {**self.manifest.settings, "train_set_size": train_set_size}
        manifest = replace(self.manifest, settings=settings)
        with disk_errors(self.path):
            write_group(self.path, manifest.attributes())
        self.manifest = manifest

    def forget_rows(self, rows: np.ndarray, exp_name: str | None = None) -> None:
        """Say of rows, at all checkpoints, that they are not done, and of all that was computed from them.

        Args:
            rows: ``[n]``, int64, train rows, or targets.
            exp_name: The target set; None for train rows.

        Raises:
            InputError: A row is not in the store, or the target set is not known.
        """
        if exp_name is None:
            tables = [self.checkpoint(model_id) for model_id in self.checkpoint_ids()]
        else:
            tables = [self.targets(exp_name, model_id) for model_id in self.target_ids(exp_name)]
        for table in tables:
            table.checked_rows(rows)
        for table in tables:
            table.set_attributes(finalized=False)  # nothing is ranked from here on
        self.forget_results(rows, exp_name)  # before the marks: a crash in between costs time, and nothing wrong stays
        for table in tables:
            with table:
                table.unmark(rows)

    def checkpoint_ids(self) -> list[int]:
        """Return the model ids of all checkpoints, ascending."""
        return numbered_nodes(self.path / "checkpoints")

    def has_checkpoint(self, model_id: int) -> bool:
        """Tell whether there is a table of train rows for this checkpoint, complete or not."""
        return (self._checkpoint_path(model_id) / NODE).exists()

    def create_checkpoint(
        self,
        model_id: int,
        weights_fingerprint: str,
        learning_rate: float | None,
        *,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> RowTable:
        """Create the table of train rows of a checkpoint.

        Args:
            model_id: The checkpoint's number, 0 or more.
            weights_fingerprint: What tells its weights from others.
            learning_rate: η of the checkpoint; None where it is not known yet.
            flush_seconds: How long written rows may wait for a flush.

        Returns:
            The empty table; where another process made one meanwhile, that one.

        Raises:
            StoreError: There is one already of other weights; it stays as it is.
        """
        attributes = _table_attributes(weights_fingerprint, learning_rate)
        path = self._checkpoint_path(model_id)
        return self._create(path, self.manifest.train_set_size, self.block_rows, attributes, flush_seconds)

    def checkpoint(self, model_id: int, *, flush_seconds: float = FLUSH_SECONDS) -> RowTable:
        """Open the table of train rows of a checkpoint.

        Args:
            model_id: The checkpoint's number.
            flush_seconds: How long written rows may wait for a flush.

        Returns:
            The table.

        Raises:
            CallOrderError: There is none.
            StoreError: It is damaged.
        """
        path = self._checkpoint_path(model_id)
        if not self.has_checkpoint(model_id):
            raise CallOrderError(
                f"{self.path} has no checkpoint {model_id}, only {self.checkpoint_ids()}: featurize it first"
            )
        return self._table(path, self.manifest.train_set_size, flush_seconds)

    def table_attributes(self, model_id: int, exp_name: str | None = None) -> dict[str, Any]:
        """Return what is recorded of a checkpoint's train rows or targets, without opening the table.

        Args:
            model_id: The checkpoint's number.
            exp_name: The target set; None for train rows.

        Returns:
            The attributes.
        """
        path = self._checkpoint_path(model_id) if exp_name is None else self._targets_path(exp_name, model_id)
        return read_attributes(path)

    def other_checkpoint(self, model_id: int) -> RowTable | None:
        """Return the fullest table of train rows at another checkpoint, with which rows can be compared, or None."""
        return _fullest(self.checkpoint(other) for other in self.checkpoint_ids() if other != model_id)

    def other_targets(self, exp_name: str, model_id: int) -> RowTable | None:
        """Return the fullest table of a target set at another checkpoint, or None."""
        return _fullest(self.targets(exp_name, other) for other in self.target_ids(exp_name) if other != model_id)

    def exp_names(self) -> list[str]:
        """Return the names of all target sets that have a table, sorted."""
        return [name for name in child_nodes(self.path / "targets") if numbered_nodes(self.path / "targets" / name)]

    def target_ids(self, exp_name: str) -> list[int]:
        """Return the model ids for which a target set has a table, ascending."""
        return numbered_nodes(self.path / "targets" / checked_name("exp_name", exp_name))

    def has_targets(self, exp_name: str, model_id: int) -> bool:
        """Tell whether there is a table of this target set for this checkpoint, complete or not."""
        return (self._targets_path(exp_name, model_id) / NODE).exists()

    def create_targets(
        self,
        exp_name: str,
        model_id: int,
        num_targets: int,
        *,
        weights_fingerprint: str | None = None,
        learning_rate: float | None = None,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> RowTable:
        """Create the table of target rows of a checkpoint.

        Args:
            exp_name: The target set's name: letters, digits and ``-_.``.
            model_id: The checkpoint's number, 0 or more.
            num_targets: M, at least 1.
            weights_fingerprint: Of the checkpoint that the rows are computed with.
            learning_rate: Recorded only.
            flush_seconds: How long written rows may wait for a flush.

        Returns:
            The empty table; where another process made one meanwhile, that one.

        Raises:
            StoreError: There is one already of other weights or of another size; it stays as it is.
        """
        attributes = _table_attributes(weights_fingerprint, learning_rate)
        path = self._targets_path(exp_name, model_id)
        if self.manifest.storage == "int8":
            attributes["rounding"] = "targets"  # not by the numbers that round train rows
        size = checked_integer("num_targets", num_targets, 1)
        return self._create(path, size, self.target_block_rows(size), attributes, flush_seconds)

    def targets(self, exp_name: str, model_id: int, *, flush_seconds: float = FLUSH_SECONDS) -> RowTable:
        """Open the table of target rows of a checkpoint.

        Args:
            exp_name: The target set's name.
            model_id: The checkpoint's number.
            flush_seconds: How long written rows may wait for a flush.

        Returns:
            The table.

        Raises:
            CallOrderError: There is none.
            StoreError: It is damaged.
        """
        path = self._targets_path(exp_name, model_id)
        if not self.has_targets(exp_name, model_id):
            raise CallOrderError(
                f"{self.path} has no targets {exp_name!r} of checkpoint {model_id}: "
                f"it has {self.target_ids(exp_name)}, and the target sets {self.exp_names()}; score them first"
            )
        return self._table(path, None, flush_seconds)

    def _checkpoint_path(self, model_id: int) -> StorePath:
        return self.path / "checkpoints" / str(checked_integer("model_id", model_id, 0))

    def _targets_path(self, exp_name: str, model_id: int) -> StorePath:
        return (
            self.path / "targets" / checked_name("exp_name", exp_name) / str(checked_integer("model_id", model_id, 0))
        )

    def _create(
        self, path: StorePath, num_rows: int, block_rows: int, attributes: dict[str, Any], flush_seconds: float
    ) -> RowTable:
        """Create a table unless there is one of the same weights and size."""
        manifest = self.manifest
        with disk_errors(path):
            ensure_groups(self.path, path.parent)
            if not (path / NODE).exists():
                create_table(
                    path,
                    num_rows=num_rows,
                    dim=manifest.feature_dim,
                    storage=manifest.storage,
                    block_rows=block_rows,
                    attributes=attributes,
                )
        table = self._table(path, num_rows, flush_seconds)
        if table.attributes["weights_fingerprint"] != attributes["weights_fingerprint"]:
            raise MismatchError(
                f"{path} exists already, of weights {table.attributes['weights_fingerprint']}, and "
                f"{attributes['weights_fingerprint']} came: pass the checkpoint it was made with, or another model_id"
            )
        return table

    def _table(self, path: StorePath, num_rows: int | None, flush_seconds: float) -> RowTable:
        """Open a table after checking that it fits the manifest; one that the store outgrew grows first."""
        if num_rows is not None and path.parent.name == "checkpoints":
            grow_table(path, num_rows)
        table = RowTable(path, flush_seconds=flush_seconds)
        dim = 0 if self.manifest.storage == "none" else self.manifest.feature_dim
        expected = (num_rows or table.num_rows, dim, self.manifest.storage)
        found = (table.num_rows, table.dim, table.storage)
        if found != expected:
            raise StoreError(
                f"{path} is damaged: expected (rows, dim, storage) {expected}, found {found}; "
                "remove it to compute it again"
            )
        return table


def _block_rows(path: StorePath, manifest: Manifest, num_rows: int, processes: int) -> int:
    """Return the rows of a block of a table of this many rows, in a store at this place."""
    row_bytes = manifest.feature_dim * _ITEM_BYTES.get(manifest.storage, 0)
    block_bytes = REMOTE_BLOCK_BYTES if isinstance(path, RemotePath) else BLOCK_BYTES
    return rows_per_block(num_rows, row_bytes, processes, block_bytes)


def _check_empty(path: StorePath) -> None:
    """Check that nothing lies where a store is to be made.

    Raises:
        StoreError: Something does.
    """
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file: expected a directory as save_dir; choose another")
    if isinstance(path, RemotePath):
        others = path.children()
    else:
        others = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
    others = [name for name in others if not name.startswith(PARTIAL) and name != NODE]
    if others and not (path / NODE).exists():  # a store that another process just made has its document first
        raise StoreError(
            f"{path} is no store and not empty (it holds {listing(others)}): nothing was changed; choose "
            "another save_dir or an empty directory"
        )


def _table_attributes(weights_fingerprint: str | None, learning_rate: float | None) -> dict[str, Any]:
    attributes = {
        "learning_rate": learning_rate,
        "weights_fingerprint": weights_fingerprint,
        "finalized": False,
        "table_id": uuid.uuid4().hex,  # scores remember it: a table that was removed and made anew is another one
    }
    return dict(json_value(attributes, "attributes"))


def _fullest(tables: Iterable[RowTable]) -> RowTable | None:
    return max(tables, key=lambda table: table.num_done, default=None)
