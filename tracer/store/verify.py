"""Verify a store: read everything that is marked as done, and mark what is damaged to be computed again."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tracer._core.files import disk_errors
from tracer._core.progress import tqdm
from tracer._core.text import listing
from tracer.errors import StoreError
from tracer.store.arrays.chunked import ChunkedArray
from tracer.store.arrays.layout import Layout, create_array
from tracer.store.arrays.metadata import NODE, child_nodes, read_document, write_group
from tracer.store.arrays.opening import open_array
from tracer.store.arrays.store_path import StorePath
from tracer.store.audited import AuditedShare
from tracer.store.example_ids import id_parts, read_ids
from tracer.store.result_group import load_group
from tracer.store.revisions import remove_result
from tracer.store.score_array import ScoreArray, read_description
from tracer.store.store import Store
from tracer.store.table_schema import changing, damaged_rows, lost_document, table_layouts, take_column
from tracer.store.topk_parts import load_part, read_part

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
        audited: How many gradients were run alone when they were computed; None if there is damage.
    """

    save_dir: str
    damage: list[Damage]
    num_rows: int
    num_tiles: int
    audited: AuditedShare | None = None

    @property
    def ok(self) -> bool:
        """Whether everything is as it was written."""
        return not self.damage

    def __str__(self) -> str:
        seen = f"{self.save_dir}: {self.num_rows} rows and {self.num_tiles} tiles of scores read"
        if self.ok:
            return f"{seen}, all as they were written\nrun alone: {self.audited}"
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
    for path in store.catalog.group_paths():
        checker.check_group(path)
    tables = store.catalog.table_paths()
    with tqdm(tables, unit="table", desc="verify", disable=None if progress is None else not progress) as bar:
        for path, exp_name in bar:
            checker.check_table(path, exp_name)
    for path in store.catalog.score_paths():
        checker.check_scores(path)
    for path in store.catalog.kernel_paths():
        checker.check_arrays(path, load_group)
    for path in store.catalog.part_paths():
        checker.check_arrays(path, lambda path: load_part(read_part(path)))
    for path in id_parts(store.path):
        checker.check_arrays(path, read_ids, "pass the ids again")
    audited = None if checker.damage else AuditedShare(checker.num_audited, checker.num_rows)
    return Verification(str(store.path), checker.damage, checker.num_rows, checker.num_tiles, audited)


class _Checker:
    """Collects what is damaged, and repairs it if ``repair`` is set."""

    def __init__(self, store: Store, repair: bool) -> None:
        self.store, self.repair = store, repair
        self.damage: list[Damage] = []
        self.num_rows = self.num_audited = self.num_tiles = 0

    def _found(self, path: StorePath, what: str, rows: np.ndarray | None = None, repaired: bool | None = None) -> None:
        lost = np.empty(0, np.int64) if rows is None else rows
        found = Damage(str(path), what, lost, self.repair if repaired is None else repaired)
        logger.warning("%s", found)
        self.damage.append(found)

    def check_group(self, path: StorePath) -> None:
        """Check a group that only holds other ones."""
        try:
            read_document(path / NODE)
            return
        except FileNotFoundError:
            what = f"its {NODE} is missing"
        except StoreError as error:
            what = str(error)
        if what.endswith("missing") and not child_nodes(path):
            return  # a process was killed while it made the group
        self._found(path, what)
        if self.repair:
            write_group(path, {})

    def check_table(self, path: StorePath, exp_name: str | None) -> None:
        """Check a table of training rows, or of targets if ``exp_name`` is given."""
        again = "featurize this checkpoint again" if exp_name is None else "score these targets again"
        try:
            described = read_document(path / NODE)["attributes"]
            num_rows, storage = int(described["num_rows"]), str(described["storage"])
            chunk_rows = int(described["chunk_rows"])
        except FileNotFoundError:
            if lost_document(path):  # else a killed process was about to make it
                self._found(path, f"its {NODE} is missing: restore it, or {again}, which replaces it", repaired=False)
            return
        except (StoreError, LookupError, TypeError, ValueError) as error:
            self._found(path, f"its {NODE} is damaged ({error}), so nobody knows what its rows are: {again}")
            if self.repair:
                with disk_errors(path):
                    (path / NODE).remove()
            return
        arrays: dict[str, ChunkedArray] = {}
        manifest = self.store.manifest
        growing = manifest.train_set_size if exp_name is None else num_rows  # or about to, when a process was killed
        layouts, grown = (table_layouts(n, manifest.feature_dim, storage, chunk_rows) for n in (num_rows, growing))
        for name, layout in layouts.items():
            if not self._check_document(path / name, (layout, grown[name])):
                return
            arrays[name] = open_array(path / name)
        lost = list(self._lost_rows(arrays, num_rows, chunk_rows, bool(described.get("finalized"))))
        rows = np.unique(np.concatenate(lost)) if lost else np.empty(0, np.int64)
        if len(rows) and exp_name is None and manifest.is_collected:
            what = "they were collected in a training and cannot be computed again: restore the checkpoint's directory"
            self._found(path, f"{what}, or choose other checkpoints by model_ids=", rows, repaired=False)
        if len(rows) and self.repair:
            write_group(path, changing(described))  # first, so that no result of these rows counts any more
            marked = rows[arrays["done"].take(rows)]
            arrays["done"].assign(marked, np.zeros(len(marked), bool))
            arrays["done"].flush()

    def _check_document(self, path: StorePath, layouts: Sequence[Layout]) -> bool:
        """Check an array's metadata against its table's; return False if it is wrong and not repaired."""
        try:
            if Layout.read(path) in layouts and read_document(path / NODE):
                return True
            what = f"its {NODE} describes another array"
        except StoreError as error:
            what = str(error)
        self._found(path, what)
        if self.repair:
            create_array(path, layouts[0])
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
            self.num_rows += len(done)
            problems = {name: _problem(array, chunk, len(done) > 0) for name, array in arrays.items()}
            for name, problem in problems.items():
                if problem and len(done):
                    yield self._lost(arrays[name], chunk, done, problem)
                elif problem and self.repair:  # left by a power failure before any row was done
                    arrays[name].remove_unusable([chunk])
            if any(problems.values()) or not len(done):
                continue
            bad = np.intersect1d(done, damaged_rows(arrays, np.arange(start, stop)))
            if len(bad):
                self._found(mask.path.parent, "rows do not match the checksum that they were written with", bad)
                yield bad
            self.num_audited += int(np.count_nonzero(take_column(arrays, "audited", done)))

    def _lost(self, array: ChunkedArray, chunk: int, rows: np.ndarray, what: str) -> np.ndarray:
        """Note a chunk that cannot be used, and remove it so that it is created again."""
        self._found(array.path, what, rows)
        if self.repair:
            array.remove_unusable([chunk])
        return rows

    def check_scores(self, path: StorePath) -> None:
        """Check a score array."""
        if not (path / NODE).exists():
            return  # a process was killed while it made or removed them
        try:
            read_description(path)
            if not (path / "done" / "c").children():
                return  # nothing is done, and whatever is missing is made again
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

    def check_arrays(
        self, path: StorePath, load: Callable[[StorePath], object], then: str = "it is computed again"
    ) -> None:
        """Check a kernel, a curvature, a top-k part or a part of ids."""
        try:
            load(path)
        except FileNotFoundError:
            return  # a process was killed while it made or removed it
        except StoreError as error:
            self._found(path, f"{error}; {then}")
            if self.repair:
                remove_result(path)


def _problem(array: ChunkedArray, chunk: int, needed: bool) -> str:
    """Return the problem with a chunk, which should exist if it is ``needed``, or an empty string."""
    try:
        array.chunk(chunk)
    except StoreError as error:
        return str(error)
    with disk_errors(array.path):
        exists = not needed or array.chunk_path(chunk).exists()
    return "" if exists else f"{array.chunk_path(chunk)} is missing although rows in it are done"
