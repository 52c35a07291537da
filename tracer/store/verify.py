"""Verify: read everything that a store says is there, name what is damaged, and have it computed again."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from tracer._core.files import disk_errors
from tracer._core.text import listing
from tracer.errors import StoreError
from tracer.store.arrays.chunked import ChunkedArray
from tracer.store.arrays.layout import Layout, create_array
from tracer.store.metadata import NODE, StorePath, child_nodes, read_document, remove, write_group
from tracer.store.nodes import numbered_nodes
from tracer.store.paths import open_array
from tracer.store.remote_path import RemotePath
from tracer.store.score_array import SUFFIXES, ScoreArray, remove_scores
from tracer.store.store import Store
from tracer.store.table_schema import COLUMNS, row_checksums, table_layouts

logger = logging.getLogger("tracer")


@dataclass(frozen=True)
class Damage:
    """One thing in a store that is not as it was written.

    Attributes:
        path: The group or array concerned.
        what: What is wrong with it.
        rows: The rows, or train rows of scores, that are lost by it, ascending; empty where only metadata is.
        mended: Whether it was repaired: lost rows are then marked as missing.
    """

    path: str
    what: str
    rows: np.ndarray
    mended: bool

    def __str__(self) -> str:
        lost = f"; {len(self.rows)} rows: {listing(self.rows)}" if len(self.rows) else ""
        return f"{self.path}: {self.what}{lost}{'' if self.mended else ' (not repaired)'}"


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        save_dir: The store.
        damage: What is damaged.
        num_rows: How many rows that were marked as done were read.
        num_tiles: How many tiles of scores that were marked as done were read.
    """

    save_dir: str
    damage: list[Damage]
    num_rows: int
    num_tiles: int

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not self.damage

    def __str__(self) -> str:
        seen = f"{self.save_dir}: {self.num_rows} rows and {self.num_tiles} tiles of scores read"
        if self.ok:
            return f"{seen}, all as they were written"
        return "\n  - ".join([f"{seen}, {len(self.damage)} found damaged:", *map(str, self.damage)])


def verify(save_dir: str | os.PathLike[str], *, repair: bool = True, progress: bool | None = None) -> Verification:
    """Check every chunk of a store: files and their sizes, marks against data, and the checksum of every row.

    No other process may write the store meanwhile.

    Args:
        save_dir: The store's directory or URL.
        repair: Mark damaged rows as missing, at their checkpoint, so that featurizing again computes them and nothing
            else; remove scores and selections that come from them. With False nothing is changed.
        progress: Show a bar; None: on a terminal only.

    Returns:
        What was found; ``print`` shows it.

    Raises:
        StoreError: There is no store, or its manifest is damaged.
    """
    store = Store.open_existing(save_dir)
    checker = _Checker(store, repair)
    tables: list[tuple[StorePath, str | None]] = []
    tables += [(path, None) for path in _table_paths(store.path / "checkpoints")]
    for exp_name in child_nodes(store.path / "targets"):
        tables += [(path, exp_name) for path in _table_paths(store.path / "targets" / exp_name)]
    with tqdm(tables, unit="table", desc="verify", disable=None if progress is None else not progress) as bar:
        for path, exp_name in bar:
            checker.check_table(path, exp_name)
    for path in _score_paths(store):
        checker.check_scores(path)
    return Verification(str(store.path), checker.damage, checker.num_rows, checker.num_tiles)


def _table_paths(path: StorePath) -> list[StorePath]:
    """Return all that should be a table below a directory, also without its document."""
    if isinstance(path, RemotePath):
        names = path.children()
    else:
        names = os.listdir(path) if path.is_dir() else []
    return [path / name for name in sorted(names) if name.isdigit()]


def _score_paths(store: Store) -> list[StorePath]:
    paths = []
    for exp_name in child_nodes(store.path / "scores"):
        names = child_nodes(store.path / "scores" / exp_name)
        paths += [store.path / "scores" / exp_name / name for name in names if not name.endswith(SUFFIXES)]
    for exp_name in child_nodes(store.path / "cosines"):
        for model_id in numbered_nodes(store.path / "cosines" / exp_name):
            room = store.path / "cosines" / exp_name / str(model_id)
            paths += [room / str(first) for first in numbered_nodes(room)]
    return paths


class _Checker:
    """Collects what is damaged, and mends it where that is wanted."""

    def __init__(self, store: Store, repair: bool) -> None:
        self.store, self.repair = store, repair
        self.damage: list[Damage] = []
        self.num_rows = self.num_tiles = 0

    def _found(self, path: StorePath, what: str, rows: np.ndarray | None = None, mended: bool | None = None) -> None:
        lost = np.empty(0, np.int64) if rows is None else rows
        found = Damage(str(path), what, lost, self.repair if mended is None else mended)
        logger.warning("%s", found)
        self.damage.append(found)

    def check_table(self, path: StorePath, exp_name: str | None) -> None:
        """Check a table of train rows, or of targets where ``exp_name`` is given."""
        try:
            described = read_document(path / NODE)["attributes"]
            num_rows, storage = int(described["num_rows"]), str(described["storage"])
            block_rows = int(described["block_rows"])
        except (FileNotFoundError, StoreError, KeyError, TypeError, ValueError) as error:
            self._found(path, f"its {NODE} is missing or damaged ({error}): remove the directory", mended=False)
            return
        dim = 0 if storage == "none" else self.store.manifest.feature_dim
        arrays: dict[str, ChunkedArray] = {}
        for name, layout in table_layouts(num_rows, dim, storage, block_rows).items():
            if not self._check_document(path / name, layout):
                return
            arrays[name] = open_array(path / name)
        lost = list(self._lost_rows(arrays, num_rows, block_rows, bool(described.get("finalized"))))
        rows = np.unique(np.concatenate(lost)) if lost else np.empty(0, np.int64)
        if len(rows) and self.repair:
            self.store.forget_results(rows, exp_name)
            write_group(path, {**described, "finalized": False})
            marked = rows[arrays["done"].take(rows)]
            arrays["done"].assign(marked, np.zeros(len(marked), bool))
            arrays["done"].flush()

    def _check_document(self, path: StorePath, layout: Layout) -> bool:
        """Check an array's metadata, which the table's own decides; False where it is wrong and not mended."""
        try:
            if Layout.read(path)[0] == layout:
                return True
            what = f"its {NODE} describes another array"
        except StoreError as error:
            what = str(error)
        self._found(path, what)
        if self.repair:
            create_array(path, layout)
        return self.repair

    def _lost_rows(
        self, arrays: dict[str, ChunkedArray], num_rows: int, block_rows: int, finalized: bool
    ) -> Iterator[np.ndarray]:
        """Yield rows that should be there and are not as they were written, block by block."""
        mask = arrays["done"]
        for block, start in enumerate(range(0, num_rows, block_rows)):
            stop = min(start + block_rows, num_rows)
            everything = np.arange(start, stop)
            try:
                done = everything[np.asarray(mask.read(start, stop), bool)]
            except StoreError as error:
                yield self._lost(mask, block, everything, str(error))
                continue
            if finalized and len(done) < len(everything):
                gone = np.setdiff1d(everything, done)
                self._found(mask.path, "rows were there when the table was finalized and have no mark any more", gone)
                yield gone
            if not len(done):
                continue
            self.num_rows += len(done)
            broken = False
            for array in arrays.values():
                problem = _problem(array, block)
                if problem:
                    yield self._lost(array, block, done, problem)
                    broken = True
            if broken:
                continue
            columns = {name: arrays[name].read(start, stop) for name in COLUMNS}
            features = arrays["features"].read(start, stop) if "features" in arrays else None
            wrong = row_checksums(features, columns) != columns["checksum"]
            bad = done[wrong[done - start]]
            if len(bad):
                self._found(mask.path.parent, "rows do not have the checksum that they were written with", bad)
                yield bad

    def _lost(self, array: ChunkedArray, block: int, rows: np.ndarray, what: str) -> np.ndarray:
        """Note a chunk that cannot be used, and remove it so that it is made anew."""
        self._found(array.path, what, rows)
        if self.repair:
            with disk_errors(array.path):
                remove(array.chunk_path(block))
            array.close()
        return rows

    def check_scores(self, path: StorePath) -> None:
        """Check a score array."""
        try:
            scores = ScoreArray(path)
        except StoreError as error:
            self._found(path, f"{error}; scores are computed again")
            if self.repair:
                remove_scores(path)
            return
        tiles = scores.damaged_tiles()
        self.num_tiles += int(np.count_nonzero(scores.tile_done))
        if len(tiles):
            rows = (tiles[:, None] * scores.tile_rows + np.arange(scores.tile_rows)).ravel()
            self._found(path, "tiles do not have their checksum", rows[rows < scores.shape[0]])
            if self.repair:
                scores.unmark(tiles)
        scores.close()


def _problem(array: ChunkedArray, block: int) -> str:
    """Return what is wrong with a chunk that should be there, or nothing."""
    try:
        array.chunk(block)
    except StoreError as error:
        return str(error)
    with disk_errors(array.path):
        there = array.chunk_path(block).exists()
    return "" if there else f"{array.chunk_path(block)} is missing although rows in it are done"
