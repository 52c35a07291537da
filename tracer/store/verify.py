"""Verify a store: read everything that is marked as done, and mark what is damaged to be computed again."""

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
from tracer.store.arrays.metadata import NODE, read_document, write_group
from tracer.store.arrays.opening import open_array
from tracer.store.arrays.store_path import StorePath
from tracer.store.revisions import remove_result
from tracer.store.score_array import ScoreArray
from tracer.store.store import Store
from tracer.store.table_schema import COLUMNS, changing, row_checksums, table_layouts

logger = logging.getLogger("tracer")


@dataclass(frozen=True)
class Damage:
    """Damage to one group or array of a store.

    Attributes:
        path: The group or array concerned.
        what: The problem.
        rows: The lost rows (of scores: training examples), ascending; empty if only metadata is damaged.
        repaired: Whether it was repaired: lost rows are then marked as missing.
    """

    path: str
    what: str
    rows: np.ndarray
    repaired: bool

    def __str__(self) -> str:
        lost = f"; {len(self.rows)} rows: {listing(self.rows)}" if len(self.rows) else ""
        return f"{self.path}: {self.what}{lost}{'' if self.repaired else ' (not repaired)'}"


@dataclass(frozen=True)
class Verification:
    """The result of `verify`.

    Attributes:
        save_dir: The store.
        damage: All damage.
        num_rows: The number of rows read.
        num_tiles: The number of tiles of scores read.
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

    No other process may write to the store meanwhile.

    Args:
        save_dir: The store's directory or URL.
        repair: Mark damaged rows as missing, so that featurizing again computes them and nothing else; remove scores
            and top-k parts that depend on them. With False nothing is changed. Default: True.
        progress: Show a bar; None: on a terminal only.

    Returns:
        All damage found; ``print`` shows it.

    Raises:
        StoreError: If there is no store, or its manifest is damaged.
    """
    store = Store.open_existing(save_dir)
    checker = _Checker(store, repair)
    tables = store.catalog.table_paths()
    with tqdm(tables, unit="table", desc="verify", disable=None if progress is None else not progress) as bar:
        for path, exp_name in bar:
            checker.check_table(path, exp_name)
    for path in store.catalog.score_paths():
        checker.check_scores(path)
    return Verification(str(store.path), checker.damage, checker.num_rows, checker.num_tiles)


class _Checker:
    """Collects what is damaged, and repairs it if ``repair`` is set."""

    def __init__(self, store: Store, repair: bool) -> None:
        self.store, self.repair = store, repair
        self.damage: list[Damage] = []
        self.num_rows = self.num_tiles = 0

    def _found(self, path: StorePath, what: str, rows: np.ndarray | None = None, repaired: bool | None = None) -> None:
        lost = np.empty(0, np.int64) if rows is None else rows
        found = Damage(str(path), what, lost, self.repair if repaired is None else repaired)
        logger.warning("%s", found)
        self.damage.append(found)

    def check_table(self, path: StorePath, exp_name: str | None) -> None:
        """Check a table of training rows, or of targets if ``exp_name`` is given."""
        try:
            described = read_document(path / NODE)["attributes"]
            num_rows, storage = int(described["num_rows"]), str(described["storage"])
            chunk_rows = int(described["chunk_rows"])
        except (FileNotFoundError, StoreError, KeyError, TypeError, ValueError) as error:
            self._found(path, f"its {NODE} is missing or damaged ({error}): remove the directory", repaired=False)
            return
        arrays: dict[str, ChunkedArray] = {}
        for name, layout in table_layouts(num_rows, self.store.manifest.feature_dim, storage, chunk_rows).items():
            if not self._check_document(path / name, layout):
                return
            arrays[name] = open_array(path / name)
        lost = list(self._lost_rows(arrays, num_rows, chunk_rows, bool(described.get("finalized"))))
        rows = np.unique(np.concatenate(lost)) if lost else np.empty(0, np.int64)
        if len(rows) and self.repair:
            write_group(path, changing(described))  # first, so that no result of these rows counts any more
            marked = rows[arrays["done"].take(rows)]
            arrays["done"].assign(marked, np.zeros(len(marked), bool))
            arrays["done"].flush()

    def _check_document(self, path: StorePath, layout: Layout) -> bool:
        """Check an array's metadata against its table's; return False if it is wrong and not repaired."""
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
        self, arrays: dict[str, ChunkedArray], num_rows: int, chunk_rows: int, finalized: bool
    ) -> Iterator[np.ndarray]:
        """Yield the indices of done rows that are not as they were written, chunk by chunk."""
        mask = arrays["done"]
        for chunk, start in enumerate(range(0, num_rows, chunk_rows)):
            stop = min(start + chunk_rows, num_rows)
            everything = np.arange(start, stop)
            try:
                done = everything[np.asarray(mask.read(start, stop), bool)]
            except StoreError as error:
                yield self._lost(mask, chunk, everything, str(error))
                continue
            if finalized and len(done) < len(everything):
                gone = np.setdiff1d(everything, done)
                self._found(mask.path, "rows were done when the table was finalized and have no mark any more", gone)
                yield gone
            if not len(done):
                continue
            self.num_rows += len(done)
            broken = False
            for array in arrays.values():
                problem = _problem(array, chunk)
                if problem:
                    yield self._lost(array, chunk, done, problem)
                    broken = True
            if broken:
                continue
            columns = {name: arrays[name].read(start, stop) for name in COLUMNS}
            features = arrays["features"].read(start, stop) if "features" in arrays else None
            wrong = row_checksums(features, columns) != columns["checksum"]
            bad = done[wrong[done - start]]
            if len(bad):
                self._found(mask.path.parent, "rows do not match the checksum that they were written with", bad)
                yield bad

    def _lost(self, array: ChunkedArray, chunk: int, rows: np.ndarray, what: str) -> np.ndarray:
        """Note a chunk that cannot be used, and remove it so that it is created again."""
        self._found(array.path, what, rows)
        if self.repair:
            with disk_errors(array.path):
                array.chunk_path(chunk).remove()
            array.close()
        return rows

    def check_scores(self, path: StorePath) -> None:
        """Check a score array."""
        try:
            scores = ScoreArray(path)
        except StoreError as error:
            self._found(path, f"{error}; scores are computed again")
            if self.repair:
                remove_result(path)
            return
        tiles = scores.damaged_tiles()
        self.num_tiles += int(np.count_nonzero(scores.tile_done))
        if len(tiles):
            rows = (tiles[:, None] * scores.tile_rows + np.arange(scores.tile_rows)).ravel()
            self._found(path, "tiles do not match their checksum", rows[rows < scores.shape[0]])
            if self.repair:
                scores.unmark(tiles)
        scores.close()


def _problem(array: ChunkedArray, chunk: int) -> str:
    """Return the problem with a chunk that should exist, or an empty string."""
    try:
        array.chunk(chunk)
    except StoreError as error:
        return str(error)
    with disk_errors(array.path):
        exists = array.chunk_path(chunk).exists()
    return "" if exists else f"{array.chunk_path(chunk)} is missing although rows in it are done"
