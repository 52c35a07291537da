"""The store: everything that is computed, in one zarr version 3 hierarchy, on a local disk or remote.

    save_dir/                           group; its attributes are the manifest
      checkpoints/<model_id>/           a `RowTable` of training examples
      targets/<exp_name>/<model_id>/    a `RowTable` of targets
      scores/<exp_name>/<estimator>/<key>       a `ScoreArray`
      cosines/<exp_name>/<model_id>/<key>       a `ScoreArray` of exact gradients, which are not stored
      top/<exp_name>/<estimator>/<key>/<rows>   the strongest training examples among some of them
      kernels/<model_id>/<weighting>/<key>      a kernel of all training examples, for estimators with curvature
      ids/train/<key>, ids/targets/<exp_name>/<key>     names of examples (see `tracer.store.example_ids`)
      curvature/<model_id>/<key>                what gradients are whitened with (see `tracer.store.curvature`)

A ``<key>`` is a digest of everything that decides a result, the revisions of its tables among it (see
`tracer.store.revisions`). A store exists as soon as its root ``zarr.json`` does, a table as soon as its own does. There
are no locks, so none is left behind by a crash: processes may create the same things at once, and they write different
chunks.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tracer._core.files import PARTIAL, disk_errors
from tracer._core.text import listing
from tracer._core.validation import check_integer
from tracer.errors import CallOrderError, InputError, MismatchError, StoreError
from tracer.store.arrays.completion_mask import FLUSH_SECONDS
from tracer.store.arrays.layout import rows_per_chunk
from tracer.store.arrays.metadata import NODE, read_document, write_group
from tracer.store.arrays.store_path import StorePath, store_path
from tracer.store.audited import AuditedShare
from tracer.store.catalog import Catalog
from tracer.store.computed_results import ComputedResults
from tracer.store.example_ids import ExampleIds
from tracer.store.manifest import Manifest, check_same, json_value
from tracer.store.paths import ensure_groups
from tracer.store.row_table import KnownTables, RowTable
from tracer.store.table_schema import changing, check_num_rows, create_table, grow_table, read_attributes

_COMPARED = 8

logger = logging.getLogger("tracer")


class Store:
    """A directory, or remote prefix, that holds features, their tables' attributes, and scores.

    Args:
        path: The directory of an existing store; use `open` or `open_existing`.
        manifest: The settings that it was made with.

    Attributes:
        path: The directory.
        manifest: The settings that it was made with.
        catalog: What exists in it, for example ``store.catalog.checkpoint_ids()``.

    >>> import tempfile
    >>> manifest = Manifest({"train_set_size": 5, "feature_dim": 2, "storage": "float16"})
    >>> store = Store.open(os.path.join(tempfile.mkdtemp(), "run"), manifest)
    >>> with store.create_checkpoint(0, "5f", learning_rate=0.1) as table:
    ...     table.remaining().tolist()
    [0, 1, 2, 3, 4]
    >>> Store.open_existing(store.path).catalog.checkpoint_ids()
    [0]
    """

    def __init__(self, path: StorePath, manifest: Manifest) -> None:
        if not manifest.layout:
            raise StoreError(f"the manifest in {path / NODE} is damaged: it lacks the layout; restore it")
        self.path, self.manifest, self.catalog = path, manifest, Catalog(path)
        self._ids: dict[str | None, ExampleIds] = {}
        self._known: KnownTables = {}
        self._asked: dict[str | None, list[int]] = {}  # checkpoints whose tables were last asked for, of each set

    @classmethod
    def open(
        cls, save_dir: str | os.PathLike[str], manifest: Manifest, *, resume: bool = True, processes: int = 1
    ) -> Store:
        """Create a store, or open the existing one if it was made with the same settings.

        Args:
            save_dir: A directory, or a URL that fsspec knows: a store, empty, or not existing yet.
            manifest: The settings that decide the numbers.
            resume: Whether an existing store may be continued.
            processes: The number of processes to share the examples of a new store.

        Returns:
            The store.

        Raises:
            InputError: If a store exists and ``resume`` is False.
            MismatchError: If it was made with other settings.
            StoreError: If the path is a file, or a directory that is neither empty nor a store.
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
                chunk_rows = _chunk_rows(path, manifest, manifest.train_set_size, processes)
                check_num_rows(manifest.train_set_size, chunk_rows)
                laid_out = replace(manifest, layout={"chunk_rows": chunk_rows, "processes": processes})
                # Of processes that create a store at once, one writes the manifest and all compare theirs with it.
                write_group(path, laid_out.attributes(), replace=False)
        store = cls.open_existing(path)
        check_same(store.manifest, manifest, path)
        return store

    @classmethod
    def open_existing(cls, save_dir: str | os.PathLike[str] | StorePath) -> Store:
        """Open a store with the settings it was made with; raise `StoreError` if there is none or it cannot be read."""
        path = store_path(save_dir)
        try:
            # Whatever it says, the format comes first: another one may have other checksums.
            manifest = Manifest.from_attributes(read_document(path / NODE, checked=False)["attributes"], path)
            read_document(path / NODE)
        except FileNotFoundError as error:
            raise StoreError(f"{path} holds no store (there is no {NODE} in it): check save_dir") from error
        path.remove_stale()
        return cls(path, manifest)

    def require_gradients(self, what: str) -> None:
        """Refuse a call or argument for a store whose rows are no gradients at its checkpoints."""
        if self.manifest.is_collected:
            raise CallOrderError(
                f"{what} needs the gradients of training examples at checkpoints, and {self.path} holds sums over the "
                f"steps of a training, which GradientCollector collected; featurize into another save_dir."
            )

    def ids(self, exp_name: str | None = None) -> ExampleIds:
        """Return the ids of training examples, or of targets."""
        if exp_name not in self._ids:
            self._ids[exp_name] = ExampleIds(self.path, exp_name)
        return self._ids[exp_name]

    @property
    def results(self) -> ComputedResults:
        """Scores, cosines, top-k parts and kernels that were computed from the store's tables."""
        return ComputedResults(self)

    @property
    def chunk_rows(self) -> int:
        """The training examples of one file: processes that write at the same time write different chunks."""
        return self.manifest.layout["chunk_rows"]

    def target_chunk_rows(self, num_targets: int) -> int:
        """Return the targets of one file, in a table of so many."""
        return _chunk_rows(self.path, self.manifest, num_targets, self.manifest.layout["processes"])

    def num_rows(self, exp_name: str | None = None) -> int:
        """Return the number of training examples, or of targets in a set."""
        if exp_name is None:
            return self.manifest.train_set_size
        return next((self.targets(exp_name, each).num_rows for each in self.catalog.target_ids(exp_name)), 0)

    def set_info(self, **changes: Any) -> None:
        """Change what the manifest records beside the settings."""
        manifest = replace(self.manifest, info={**self.manifest.info, **json_value(changes, "info")})
        with disk_errors(self.path):
            write_group(self.path, manifest.attributes())
        self.manifest = manifest

    def grow(self, train_set_size: int) -> None:
        """Raise the number of training examples; new ones are missing at all checkpoints."""
        known = self.manifest.train_set_size
        if train_set_size < known:
            raise InputError(
                f"expected at least the {known} training rows that the store has, got {train_set_size}: a store can "
                "only grow"
            )
        if train_set_size == known:
            return
        self.require_gradients(f"train_set_size={train_set_size}")
        check_num_rows(train_set_size, self.chunk_rows)  # once it is written, no table could be read any more
        settings = {**self.manifest.settings, "train_set_size": train_set_size}
        manifest = replace(self.manifest, settings=settings)
        # Only the manifest is written, in one step; tables grow when they are next opened. So a process that is killed
        # here has grown the whole store or nothing.
        with disk_errors(self.path):
            write_group(self.path, manifest.attributes())
        self.manifest = manifest

    def invalidate_rows(self, rows: np.ndarray, exp_name: str | None = None) -> None:
        """Mark training examples, or targets of ``exp_name``, as not done at all checkpoints, and results from them."""
        if exp_name is None:
            tables = [self.checkpoint(model_id) for model_id in self.catalog.checkpoint_ids()]
        else:
            tables = [self.targets(exp_name, model_id) for model_id in self.catalog.target_ids(exp_name)]
        for table in tables:
            table.checked_rows(rows)
        _unmark([(table, rows) for table in tables])

    def replace_rows(self, rows: np.ndarray, exp_name: str | None = None) -> None:
        """Mark examples as not done, since others will have their rows, and forget their ids."""
        self.invalidate_rows(rows, exp_name)
        self.ids(exp_name).forget(rows)

    def invalidate_checkpoint(self, model_id: int) -> int:
        """Mark all training examples and targets at a checkpoint as not done; return how many there were."""
        names = [name for name in self.catalog.exp_names() if self.catalog.has_targets(name, model_id)]
        tables = [self.checkpoint(model_id), *(self.targets(name, model_id) for name in names)]
        started = [table for table in tables if table.num_done]
        count = sum(table.num_done for table in started)
        _unmark([(table, np.arange(table.num_rows)) for table in started])
        return count

    def create_checkpoint(
        self,
        model_id: int,
        weights_fingerprint: str,
        learning_rate: float | None,
        *,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> RowTable:
        """Create the table of a checkpoint, or return the existing one; raise `MismatchError` for other weights."""
        attributes = _table_attributes(weights_fingerprint, learning_rate)
        path = self.catalog.checkpoint_path(model_id)
        return self._create(path, self.manifest.train_set_size, self.chunk_rows, attributes, flush_seconds)

    def checkpoint(self, model_id: int, *, flush_seconds: float = FLUSH_SECONDS) -> RowTable:
        """Open the table of a checkpoint, or raise `CallOrderError`."""
        path = self.catalog.checkpoint_path(model_id)
        if not self.catalog.has_checkpoint(model_id):
            raise CallOrderError(
                f"{self.path} has no checkpoint {model_id}, only {self.catalog.checkpoint_ids()}: featurize it first"
            )
        return self._table(path, self.manifest.train_set_size, flush_seconds)

    def table_attributes(self, model_id: int, exp_name: str | None = None) -> dict[str, Any]:
        """Return the attributes of a checkpoint's table, or of its targets' table, without opening it."""
        catalog = self.catalog
        path = catalog.checkpoint_path(model_id) if exp_name is None else catalog.targets_path(exp_name, model_id)
        return read_attributes(path)

    def audited(self, model_ids: Sequence[int] | None = None) -> AuditedShare:
        """Return how many gradients of examples and targets were audited, at some checkpoints or at all."""
        catalog = self.catalog
        chosen = set(catalog.checkpoint_ids() if model_ids is None else model_ids)
        sets = {name: chosen.intersection(catalog.target_ids(name)) for name in catalog.exp_names()}
        trains = (self.checkpoint(model_id) for model_id in sorted(chosen))
        targets = (self.targets(name, model_id) for name, ids in sets.items() for model_id in sorted(ids))
        return AuditedShare.of(itertools.chain(trains, targets))

    def other_checkpoint(self, model_id: int) -> RowTable | None:
        """Return a table of training examples at another checkpoint, to compare fingerprints, or None."""
        return self._other(None, model_id)

    def other_targets(self, exp_name: str, model_id: int) -> RowTable | None:
        """Return a table of a target set at another checkpoint, or None."""
        return self._other(exp_name, model_id)

    def _other(self, exp_name: str | None, model_id: int) -> RowTable | None:
        """Return the fullest of the tables asked for last, or at first of a few: there may be thousands."""
        catalog = self.catalog
        numbers = [each for each in self._asked.get(exp_name, ()) if each != model_id]
        if not numbers:
            known = catalog.checkpoint_ids() if exp_name is None else catalog.target_ids(exp_name)
            numbers = [each for each in known if each != model_id][:_COMPARED]
        found: dict[int, RowTable] = {}
        for each in numbers:
            if catalog.has_checkpoint(each) if exp_name is None else catalog.has_targets(exp_name, each):
                found[each] = self.checkpoint(each) if exp_name is None else self.targets(exp_name, each)
                if found[each].num_done == found[each].num_rows:
                    break
        best = max(found, key=lambda each: found[each].num_done, default=None)
        self._asked[exp_name] = [each for each in (best, model_id) if each is not None]
        return None if best is None else found[best]

    def create_targets(
        self,
        exp_name: str,
        model_id: int,
        num_targets: int,
        *,
        weights_fingerprint: str | None = None,
        learning_rate: float | None = None,
        target_task: Mapping[str, Any] | None = None,
        flush_seconds: float = FLUSH_SECONDS,
    ) -> RowTable:
        """Create a table of targets at a checkpoint, or return the existing one unless its weights differ."""
        attributes = _table_attributes(weights_fingerprint, learning_rate)
        if target_task is not None:
            attributes["target_task"] = json_value(target_task, "target_task")
        path = self.catalog.targets_path(exp_name, model_id)
        if self.manifest.storage == "int8":
            attributes["rounding"] = "targets"  # another random pool than training rows: see `quantization`
        size = check_integer(num_targets, "num_targets", 1)
        return self._create(path, size, self.target_chunk_rows(size), attributes, flush_seconds)

    def targets(self, exp_name: str, model_id: int, *, flush_seconds: float = FLUSH_SECONDS) -> RowTable:
        """Open the table of targets at a checkpoint, or raise `CallOrderError`."""
        path = self.catalog.targets_path(exp_name, model_id)
        if not self.catalog.has_targets(exp_name, model_id):
            raise CallOrderError(
                f"{self.path} has no targets {exp_name!r} of checkpoint {model_id}: it has "
                f"{self.catalog.target_ids(exp_name)}, and the target sets {self.catalog.exp_names()}; score them first"
            )
        return self._table(path, None, flush_seconds)

    def _create(
        self, path: StorePath, num_rows: int, chunk_rows: int, attributes: dict[str, Any], flush_seconds: float
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
                    storage=self._storage_of(path),
                    chunk_rows=chunk_rows,
                    attributes=attributes,
                )
        table = self._table(path, num_rows, flush_seconds)
        if table.attributes["weights_fingerprint"] != attributes["weights_fingerprint"]:
            raise MismatchError(
                f"{path} exists already: expected its weights {table.attributes['weights_fingerprint']}, got "
                f"{attributes['weights_fingerprint']}; pass the checkpoint it was made with, or another model_id"
            )
        return table

    def _storage_of(self, path: StorePath) -> str:
        """Return the storage of a table of training examples or of targets."""
        manifest = self.manifest
        return manifest.storage if path.parent.name == "checkpoints" else manifest.feature_storage.of_targets

    def _table(self, path: StorePath, num_rows: int | None, flush_seconds: float) -> RowTable:
        """Open a table after checking that it fits the manifest; grow it first if the store has grown since."""
        if num_rows is not None and path.parent.name == "checkpoints":
            grow_table(path, num_rows)
        table = RowTable(path, flush_seconds=flush_seconds, known=self._known)
        dim = self.manifest.feature_dim if self.manifest.feature_storage.stores_features else 0
        expected = (num_rows or table.num_rows, dim, self._storage_of(path))
        found = (table.num_rows, table.dim, table.storage)
        if found != expected:
            raise StoreError(
                f"{path} is damaged: expected (rows, dim, storage) {expected}, found {found}; "
                "remove it to compute it again"
            )
        return table


def _chunk_rows(path: StorePath, manifest: Manifest, num_rows: int, processes: int) -> int:
    """Return the rows of one file of a table of this many rows, in a store at this path."""
    row_bytes = manifest.feature_storage.row_bytes(manifest.feature_dim)
    return rows_per_chunk(num_rows, row_bytes, processes, path.feature_chunk_bytes)


def _unmark(chosen: Sequence[tuple[RowTable, np.ndarray]]) -> None:
    """Mark rows of tables as not done."""
    for table, _ in chosen:
        # From here on no process computes scores from these tables, or takes earlier ones for theirs.
        table.set_attributes(finalized=False)
    for table, rows in chosen:
        with table:
            table.unmark(rows)


def _check_empty(path: StorePath) -> None:
    """Check that a store can be made here without touching anything that exists."""
    if path.exists() and not path.is_dir():
        raise StoreError(f"{path} is a file: expected a directory as save_dir; choose another")
    found = [name for name in path.children() if not name.startswith(PARTIAL) and name != NODE]
    if found and not (path / NODE).exists():  # if another process has just made a store here, its document came first
        raise StoreError(
            f"{path} is not a store and not empty (it holds {listing(found)}): nothing was changed; choose "
            f"another save_dir or an empty directory, or restore {NODE} if it was a store"
        )


def _table_attributes(weights_fingerprint: str | None, learning_rate: float | None) -> dict[str, Any]:
    attributes = {"learning_rate": learning_rate, "weights_fingerprint": weights_fingerprint}
    return dict(json_value(changing(attributes), "attributes"))
