"""Scores ``[N train rows, M targets]`` in one file that is both a zarr array and a plain matrix.

The array is a single zarr shard whose inner chunks are tiles of whole rows: they lie one after another, so the file's
head is the matrix in row-major order and one memory map shows it, while any zarr reader goes through the index at the
file's end. Beside it stands ``<estimator>_done``, a bool for each tile.
"""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from tracer.errors import CallOrderError, InputError, InputTypeError, StoreError
from tracer.store.documents import create_file, disk_errors, partial_path, sync
from tracer.store.manifest import json_value
from tracer.store.mapped import FLUSH_SECONDS, Completion, Layout, MappedArray, create_array

DONE_SUFFIX = "_done"
TILE_BYTES = 16 << 20

logger = logging.getLogger("tracer")


class ScoreArray:
    """Float32 scores ``[N, M]``, written tile by tile, each tile done only once it is on the disk.

    Get one from `tracer.store.Store.scores`. One process writes an array at a time.

    Args:
        path: The array's directory.
        flush_seconds: How long written tiles may wait for a flush.

    Attributes:
        shape: ``(N, M)``.
        tile_rows: The rows of a tile; the last tile may have fewer.
        num_tiles: How many tiles there are.
        inputs: What the scores are computed from, JSON values.

    Raises:
        StoreError: The array is damaged, or a crash left it half replaced.
    """

    def __init__(self, path: Path, *, flush_seconds: float = FLUSH_SECONDS) -> None:
        self.path = path
        self._scores = MappedArray(path)
        mask = MappedArray(mask_path(path))
        self.num_tiles = self._scores.layout.num_tiles
        if mask.attributes.get("generation") != self._scores.attributes.get("generation") or (
            mask.layout.shape != (self.num_tiles,)
        ):
            raise StoreError(f"{path} and {mask.path.name} do not belong together: remove both to compute them again")
        if not self._scores.chunk_path(0).exists():
            raise StoreError(
                f"{self._scores.chunk_path(0)} is missing: restore it, or remove {path} to compute it again"
            )
        self._scores.chunk(0)  # checks the file's size
        self.shape: tuple[int, int] = (self._scores.layout.shape[0], self._scores.layout.shape[1])
        self.tile_rows = int(self._scores.layout.tile_rows or 0)
        self.inputs: dict[str, Any] = self._scores.attributes["inputs"]
        self._completion = Completion(mask, [self._scores], flush_seconds)
        self._closed = False

    @property
    def tile_done(self) -> np.ndarray:
        """``[num_tiles]``, bool, a copy: which tiles are durably done."""
        return self._completion.done

    @property
    def complete(self) -> bool:
        """Whether every tile is durably done."""
        return bool(self.tile_done.all())

    @property
    def pending(self) -> int:
        """How many tiles were written since the last flush."""
        return int(np.count_nonzero(self._completion.pending))

    def remaining(self) -> list[tuple[int, int]]:
        """Flush and return the row ranges ``(start, stop)`` of the tiles that are not done, in order."""
        self.flush()
        starts = (np.flatnonzero(~self.tile_done) * self.tile_rows).tolist()
        return [(start, min(start + self.tile_rows, self.shape[0])) for start in starts]

    def write(self, start: int, rows: np.ndarray) -> None:
        """Write the scores of whole tiles; they are pending until the next flush.

        Args:
            start: The first row, a multiple of ``tile_rows``.
            rows: ``[n, M]``, float; n is a multiple of ``tile_rows`` or reaches the last row.

        Raises:
            CallOrderError: The array is closed.
            InputTypeError: The values are not of shape ``[n, M]`` or not floats.
            InputError: They are not whole tiles within the array.
        """
        if self._closed:
            raise CallOrderError(f"{self.path} is closed: get it again from the store")
        rows = np.asarray(rows)
        if rows.ndim != 2 or rows.shape[1] != self.shape[1] or rows.dtype.kind != "f":
            raise InputTypeError(
                f"scores are {rows.dtype} of shape {rows.shape}: expected float32 [n, {self.shape[1]}]"
            )
        stop = start + len(rows)
        whole = start % self.tile_rows == 0 and (stop % self.tile_rows == 0 or stop == self.shape[0])
        if not whole or not 0 <= start < stop <= self.shape[0]:
            raise InputError(
                f"rows {start} to {stop} are no whole tiles: expected start to be a multiple of {self.tile_rows} and "
                f"the end another one or {self.shape[0]}; `remaining()` lists the tiles"
            )
        with self._completion.writing(np.arange(start // self.tile_rows, -(-stop // self.tile_rows))):
            self._scores.assign(np.arange(start, stop), rows)

    def flush(self) -> None:
        """Make pending tiles durable, then mark them done; when that fails they have to be written again."""
        self._completion.flush()

    def matrix(self) -> np.ndarray:
        """Return all scores without copying: ``[N, M]``, float32, a memory map that cannot be written.

        Tiles that are not done may hold zeros or anything: look at `complete` first.
        """
        return self._scores.chunk(0)[: self.shape[0]]

    def close(self) -> None:
        """Flush and let go of the file; the matrix stays valid as long as it is held."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._closed = True
            self._scores.close()

    def __enter__(self) -> ScoreArray:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def mask_path(path: Path) -> Path:
    """Return where the tile marks of a score array stand."""
    return path.with_name(path.name + DONE_SUFFIX)


def open_scores(
    path: Path, staging: Path, shape: tuple[int, int], inputs: Mapping[str, Any], tile_rows: int | None
) -> ScoreArray:
    """Continue the scores that are there if they come from the same inputs, else begin them anew.

    Args:
        path: The array's directory; its parent is a zarr group.
        staging: A directory on the same file system where a new array is put together.
        shape: ``(N, M)``, both at least 1.
        inputs: Everything that decides the scores, as JSON values.
        tile_rows: The rows of a tile; None keeps what is there, or takes tiles of about 16 MB.

    Returns:
        The array, some of its tiles perhaps done.

    Raises:
        InputError: The shape or ``tile_rows`` cannot be used.
    """
    rows, cols = shape
    if rows < 1 or cols < 1:
        raise InputError(f"scores of shape {shape} were asked for: expected at least one train row and one target")
    if tile_rows is not None and tile_rows < 1:
        raise InputError(f"tile_rows is {tile_rows}: expected at least 1")
    wanted = json_value(dict(inputs), "inputs")
    if path.exists():
        try:
            scores = ScoreArray(path)
        except StoreError as error:
            logger.info("computing %s again: %s", path, error)
        else:
            same_tiles = tile_rows is None or scores.tile_rows == min(tile_rows, rows)
            if scores.inputs == wanted and scores.shape == (rows, cols) and same_tiles:
                return scores
            scores.close()
            logger.info("computing %s again: it comes from other inputs or has another shape", path)
    size = tile_rows or TILE_BYTES // (4 * cols) or 1
    _replace(path, staging, Layout.tiled((rows, cols), "float32", min(size, rows)), wanted)
    return ScoreArray(path)


def _replace(path: Path, staging: Path, layout: Layout, inputs: Mapping[str, Any]) -> None:
    """Put a new array of zeros, with no tile done, in the place of what is there.

    The old marks go first and the new ones come last, and both arrays carry the same random generation: at no instant
    do marks stand beside an array that they were not made for.
    """
    partial = partial_path(staging)
    mask = mask_path(path)
    attributes = {"inputs": dict(inputs), "generation": uuid.uuid4().hex}
    marks = Layout((layout.num_tiles,), "bool", layout.num_tiles)
    with disk_errors(path):
        partial.mkdir()
        try:
            for position, old in enumerate((mask, path)):
                if old.exists():
                    old.rename(partial / f"old-{position}")
                    sync(path.parent)
                    shutil.rmtree(partial / f"old-{position}")  # first, so that the disk need not hold both
            create_array(partial / "scores", layout, attributes)
            create_file(partial / "scores" / "c" / "0" / "0", layout.data_bytes, layout.index())
            create_array(partial / "done", marks, {"generation": attributes["generation"]})
            for new, name in ((partial / "scores", path), (partial / "done", mask)):
                new.rename(name)
                sync(path.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
