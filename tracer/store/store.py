"""The store: everything that is computed, in one zarr version 3 hierarchy on a local disk.

    save_dir/                           group; its attributes are the manifest
      checkpoints/<model_id>/           a `RowTable` of train rows
      targets/<exp_name>/<model_id>/    a `RowTable` of target rows
      scores/<exp_name>/<estimator>     a `ScoreArray`, with ``<estimator>_done`` beside it
      top/<exp_name>/<estimator>/<key>/<rows>           the strongest rows of each target (`selections`)
      cosines/<exp_name>/<model_id>/<first target>      the same, of exact gradients, which are not stored themselves

A store exists from the instant that its root ``zarr.json`` does, a table from the instant that its directory has its
name; both are renamed into place when complete. Nothing is locked, so nothing stays locked after a crash: one
process writes a table or a score array at a time, which is for the caller to see to. The files are memory-mapped, so
processes that share a store must run on one machine.
"""

from __future__ import annotations

import logging
import operator
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, SupportsIndex

from tracer.errors import CallOrderError, InputError, InputTypeError, StoreError
from tracer.store.documents import NODE, PARTIAL, disk_errors, read_document, sweep, sync, write_group
from tracer.store.manifest import Manifest, check_same, json_value, listing
from tracer.store.mapped import FLUSH_SECONDS
from tracer.store.score_array import DONE_SUFFIX, ScoreArray, mask_path, open_scores
from tracer.store.tables import RowTable, create_table

logger = logging.getLogger("tracer")

_SAFE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", re.ASCII)


class Store:
    """A directory that holds features, their tables' attributes, and scores.

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

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @classmethod
    def open(cls, save_dir: str | os.PathLike[str], manifest: Manifest, *, resume: bool = True) -> Store:
        """Create a store, or open the one that is there if it was made with the same settings.

        Args:
            save_dir: A directory: of a store, empty, or not there yet.
            manifest: The settings that decide the numbers.
            resume: Whether a store that is there may be continued.

        Returns:
            The store.

        Raises:
            InputError: A store is there and ``resume`` is False.
            StoreError: The path is a file, or a directory that is neither empty nor a store.
        """
        path = _local_path(save_dir)
        with disk_errors(path):
            if path.exists() and not path.is_dir():
                raise StoreError(f"{path} is a file: expected a directory as save_dir; choose another")
            if not (path / NODE).exists():
                others = sorted(entry.name for entry in path.iterdir()) if path.exists() else []
                others = [name for name in others if not name.startswith(PARTIAL)]
                if others:
                    raise StoreError(
                        f"{path} is no store and not empty (it holds {listing(others)}): nothing was changed; choose "
                        "another save_dir or an empty directory"
                    )
                path.mkdir(parents=True, exist_ok=True)
                write_group(path, manifest.attributes(), replace=False)
                sync(path.parent)
            elif not resume:
                raise InputError(
                    f"{path} holds a store and resume is False: choose another save_dir, or pass resume=True"
                )
        store = cls.open_existing(path)
        check_same(store.manifest, manifest, path)
        return store

    @classmethod
    def open_existing(cls, save_dir: str | os.PathLike[str]) -> Store:
        """Open a store with the settings that it was made with.

        Args:
            save_dir: The store's directory.

        Returns:
            The store.

        Raises:
            StoreError: There is none, it is damaged, or a newer version of this package wrote it.
        """
        path = _local_path(save_dir)
        try:
            document = read_document(path / NODE)
        except FileNotFoundError as error:
            raise StoreError(f"{path} holds no store (there is no {NODE} in it): check save_dir") from error
        sweep(path)
        return cls(path, Manifest.from_attributes(document["attributes"], path))

    def checkpoint_ids(self) -> list[int]:
        """Return the model ids of all checkpoints, ascending."""
        return _table_ids(self.path / "checkpoints")

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
            The empty table.

        Raises:
            StoreError: There is one already; it stays as it is.
        """
        attributes = _table_attributes(weights_fingerprint, learning_rate)
        path = self._checkpoint_path(model_id)
        return self._create(path, self.manifest.train_set_size, attributes, flush_seconds)

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

    def other_checkpoint(self, model_id: int) -> RowTable | None:
        """Return the fullest table of train rows at another checkpoint, with which rows can be compared, or None."""
        return _fullest(self.checkpoint(other) for other in self.checkpoint_ids() if other != model_id)

    def other_targets(self, exp_name: str, model_id: int) -> RowTable | None:
        """Return the fullest table of a target set at another checkpoint, or None."""
        return _fullest(self.targets(exp_name, other) for other in self.target_ids(exp_name) if other != model_id)

    def exp_names(self) -> list[str]:
        """Return the names of all target sets that have a table, sorted."""
        return [path.name for path in _directories(self.path / "targets") if _table_ids(path)]

    def target_ids(self, exp_name: str) -> list[int]:
        """Return the model ids for which a target set has a table, ascending."""
        return _table_ids(self.path / "targets" / _checked_name("exp_name", exp_name))

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
            The empty table.

        Raises:
            StoreError: There is one already; it stays as it is.
        """
        attributes = _table_attributes(weights_fingerprint, learning_rate)
        path = self._targets_path(exp_name, model_id)
        if self.manifest.storage == "int8":
            attributes["rounding"] = "targets"  # not by the numbers that round train rows
        return self._create(path, _integer("num_targets", num_targets, 1), attributes, flush_seconds)

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

    def scores(
        self,
        exp_name: str,
        estimator: str,
        shape: tuple[int, int],
        inputs: Mapping[str, Any],
        *,
        tile_rows: int | None = None,
    ) -> ScoreArray:
        """Open scores for writing: those that are there if they come from the same inputs, else new ones.

        Scores that come from other inputs are removed; matrices of them that are still held stay valid.

        Args:
            exp_name: The target set's name.
            estimator: The estimator's name: letters, digits and ``-_.``.
            shape: ``(N, M)``, both at least 1.
            inputs: Everything that decides the scores, as JSON values: checkpoints and their weights'
                fingerprints, learning rates, the estimator's options.
            tile_rows: The rows of a tile; None keeps what is there, or takes tiles of about 16 MB.

        Returns:
            The array; `ScoreArray.remaining` lists the tiles still to be written.

        Raises:
            InputError: A name, the shape or ``tile_rows`` cannot be used.
        """
        path = self._scores_path(exp_name, estimator)
        with disk_errors(path):
            self._ensure_groups(path.parent)
        return open_scores(path, self.path, shape, inputs, tile_rows)

    def selections_path(self, exp_name: str, estimator: str) -> Path:
        """Return where the selections of a target set stand (see `tracer.store.selections`), a zarr group."""
        path = self.path / "top" / _checked_name("exp_name", exp_name) / _checked_name("estimator", estimator)
        with disk_errors(path):
            self._ensure_groups(path)
        return path

    def score_names(self, exp_name: str) -> list[str]:
        """Return the estimators for which a target set has scores, complete or not, sorted."""
        names = [path.name for path in _directories(self.path / "scores" / _checked_name("exp_name", exp_name))]
        return [name for name in names if name + DONE_SUFFIX in names]

    def read_scores(self, exp_name: str, estimator: str) -> ScoreArray:
        """Open scores that are there, whatever their inputs.

        Args:
            exp_name: The target set's name.
            estimator: The estimator's name.

        Returns:
            The array.

        Raises:
            CallOrderError: There are none.
            StoreError: They are damaged.
        """
        path = self._scores_path(exp_name, estimator)
        if estimator not in self.score_names(exp_name):
            raise CallOrderError(
                f"{self.path} has no {estimator!r} scores of {exp_name!r}, only {self.score_names(exp_name)}: "
                "finalize them first"
            )
        return ScoreArray(path)

    def cosines(self, exp_name: str, model_id: int) -> list[tuple[int, ScoreArray]]:
        """Open the cosines of all train rows with a target set at a checkpoint, as far as there are any.

        Args:
            exp_name: The target set's name.
            model_id: The checkpoint's number.

        Returns:
            Blocks of consecutive targets: the first target and an array ``[N, targets]``, ascending. A block that a
            crash left half made is not among them; `cosine_block` makes it anew.
        """
        path, found = self._cosines_path(exp_name, model_id), []
        for first in _table_ids(path):
            try:
                found.append((first, ScoreArray(path / str(first))))
            except StoreError as error:
                logger.info("computing %s again: %s", path / str(first), error)
        return found

    def cosine_block(
        self, exp_name: str, model_id: int, first: int, num_targets: int, inputs: Mapping[str, Any], *, tile_rows: int
    ) -> ScoreArray:
        """Open a block of cosines for writing: what is there if it comes from the same inputs, else a new one.

        Blocks of later targets are removed with a block that is replaced.

        Args:
            exp_name: The target set's name.
            model_id: The checkpoint's number.
            first: The first target of the block.
            num_targets: The number of its targets.
            inputs: Everything that decides the cosines, as JSON values.
            tile_rows: The train rows of a tile.

        Returns:
            The array; `ScoreArray.remaining` lists the tiles still to be written.
        """
        path = self._cosines_path(exp_name, model_id)
        with disk_errors(path):
            self._ensure_groups(path)
        known = dict(self.cosines(exp_name, model_id))
        if first not in known or known[first].inputs != json_value(dict(inputs), "inputs"):
            for start, block in known.items():
                if start >= first:
                    block.close()
                    with disk_errors(block.path):
                        shutil.rmtree(mask_path(block.path))  # first: without it the array does not count
                        shutil.rmtree(block.path, ignore_errors=True)
        shape = (self.manifest.train_set_size, num_targets)
        return open_scores(path / str(_integer("first", first, 0)), self.path, shape, inputs, tile_rows)

    def _cosines_path(self, exp_name: str, model_id: int) -> Path:
        return self.path / "cosines" / _checked_name("exp_name", exp_name) / str(_integer("model_id", model_id, 0))

    def _checkpoint_path(self, model_id: int) -> Path:
        return self.path / "checkpoints" / str(_integer("model_id", model_id, 0))

    def _targets_path(self, exp_name: str, model_id: int) -> Path:
        return self.path / "targets" / _checked_name("exp_name", exp_name) / str(_integer("model_id", model_id, 0))

    def _scores_path(self, exp_name: str, estimator: str) -> Path:
        path = self.path / "scores" / _checked_name("exp_name", exp_name) / _checked_name("estimator", estimator)
        if estimator.endswith(DONE_SUFFIX):
            raise InputError(f"estimator is {estimator!r}: names that end with {DONE_SUFFIX!r} are taken by tile marks")
        return path

    def _ensure_groups(self, path: Path) -> None:
        """Make every directory between the root and this one, itself included, a zarr group."""
        for group in [*reversed(path.relative_to(self.path).parents), path.relative_to(self.path)][1:]:
            directory = self.path / group
            if not (directory / NODE).exists():
                directory.mkdir(exist_ok=True)
                write_group(directory, {}, replace=False)
                sync(directory.parent)

    def _create(self, path: Path, num_rows: int, attributes: dict[str, Any], flush_seconds: float) -> RowTable:
        with disk_errors(path):
            self._ensure_groups(path.parent)
        create_table(
            path,
            self.path,
            num_rows=num_rows,
            dim=self.manifest.feature_dim,
            storage=self.manifest.storage,
            attributes=attributes,
        )
        return RowTable(path, flush_seconds=flush_seconds)

    def _table(self, path: Path, num_rows: int | None, flush_seconds: float) -> RowTable:
        """Open a table after checking that it fits the manifest."""
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


def _local_path(save_dir: str | os.PathLike[str]) -> Path:
    if not isinstance(save_dir, (str, os.PathLike)):
        raise InputTypeError(f"save_dir is of type {type(save_dir).__name__}: expected a str or a path")
    if "://" in str(save_dir):
        raise InputError(f"save_dir is {str(save_dir)!r}: expected a local directory; copy a finished store elsewhere")
    return Path(save_dir).absolute()


def _table_attributes(weights_fingerprint: str | None, learning_rate: float | None) -> dict[str, Any]:
    attributes = {
        "learning_rate": learning_rate,
        "weights_fingerprint": weights_fingerprint,
        "finalized": False,
        "table_id": uuid.uuid4().hex,  # scores remember it: a table that was removed and made anew is another one
    }
    return dict(json_value(attributes, "attributes"))


def _directories(path: Path) -> list[Path]:
    """Return the directories that are zarr nodes, sorted by name; none where the path does not exist."""
    return sorted(node.parent for node in path.glob(f"[!.]*/{NODE}"))


def _table_ids(path: Path) -> list[int]:
    names = [directory.name for directory in _directories(path)]
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def _fullest(tables: Iterable[RowTable]) -> RowTable | None:
    return max(tables, key=lambda table: table.num_done, default=None)


def _checked_name(what: str, name: str) -> str:
    """Return a name that is safe as one component of a path."""
    if not isinstance(name, str):
        raise InputTypeError(f"{what} is of type {type(name).__name__}: expected a str")
    if not _SAFE_NAME.fullmatch(name) or name.startswith("__") or name.lower() == NODE:
        raise InputError(
            f"{what} is {name!r}: expected 1 to 128 letters, digits, '-', '_' and '.', not beginning with '.' or '__'"
        )
    return name


def _integer(what: str, value: SupportsIndex, least: int) -> int:
    """Return an integer that is not below the least allowed."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise InputTypeError(f"{what} is {value!r}: expected an integer")
    number = operator.index(value)
    if number < least:
        raise InputError(f"{what} is {number}: expected an integer of at least {least}")
    return number
