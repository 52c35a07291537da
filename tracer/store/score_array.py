"""Scores ``[N training examples, M targets]``, written tile by tile.

On a local disk, for one process, all scores are a single zarr shard whose inner chunks are tiles of whole rows, one
after another, so the file begins with the matrix in row-major order and one memory map shows it, while any zarr reader
uses the index at the file's end. Several processes, and remote stores, have a shard for each chunk of rows. Float16
scores are relative to the largest score of their row, in ``<estimator>_scale``. ``<estimator>_done`` has a bool for
each tile, and ``<estimator>_checksum`` its CRC-32C. All these arrays have a digest of the inputs of the scores, so that
marks never count for an array that they were not made for.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np
import torch
from jaxtyping import Float, Float32, Int64

from tracer._core.files import disk_errors
from tracer.errors import CallOrderError, IncompleteError, InputError, InputTypeError, StoreError
from tracer.store.arrays.completion_mask import FLUSH_SECONDS, CompletionMask
from tracer.store.arrays.layout import Layout, array_document
from tracer.store.arrays.metadata import NODE, write_documents
from tracer.store.arrays.opening import open_array
from tracer.store.arrays.store_path import StorePath
from tracer.store.lazy_matrix import ScoreMatrix
from tracer.store.manifest import json_value
from tracer.store.paths import CHECKSUM_SUFFIX, DONE_SUFFIX, SCALE_SUFFIX

SCORE_DTYPES = ("float16", "float32")
TILE_BYTES = 16 << 20

logger = logging.getLogger("tracer")


class ScoreArray:
    """Scores ``[N, M]``, written tile by tile; a tile is done once it is durable.

    Args:
        path: The array's directory.
        flush_seconds: The time that written tiles may wait for a flush.

    Attributes:
        shape: ``(N, M)``.
        dtype: The stored dtype, ``"float32"`` or ``"float16"``; scores are read as float32.
        tile_rows: The rows of a tile; the last tile may have fewer.
        num_tiles: The number of tiles.
        inputs: Everything that decides the scores, JSON values.

    Raises:
        StoreError: If the array is damaged, or a crash left it half replaced.
    """

    def __init__(self, path: StorePath, *, flush_seconds: float = FLUSH_SECONDS) -> None:
        self.path = path
        self._scores = open_array(path)
        layout = self._scores.layout
        self._checksums = open_array(beside(path, CHECKSUM_SUFFIX))
        mask = open_array(beside(path, DONE_SUFFIX))
        self.dtype = layout.dtype
        self._scale = open_array(beside(path, SCALE_SUFFIX)) if self.dtype == "float16" else None
        self.num_tiles, self.tile_rows = layout.num_tiles, int(layout.tile_rows or 0)
        self.shape: tuple[int, int] = (layout.shape[0], layout.shape[-1])
        data = [self._scores, self._checksums, *([] if self._scale is None else [self._scale])]
        generation = self._scores.attributes.get("generation")
        fits = all(array.attributes.get("generation") == generation for array in (mask, *data))
        if not fits or mask.layout.shape != (self.num_tiles,) or self._checksums.layout.shape != (self.num_tiles,):
            raise StoreError(f"{path} and {mask.path.name} do not belong together: remove both to compute them again")
        self.inputs: dict[str, Any] = self._scores.attributes["inputs"]
        self._mask = CompletionMask(mask, data, flush_seconds)
        self._closed = False
        self._check_files()

    def _check_files(self) -> None:
        """Check that every file with a done tile exists, and the size of the one that is mapped as a whole."""
        needed = set((np.flatnonzero(self.tile_done) // self._scores.layout.tiles_per_chunk).tolist())
        missing = sorted(needed - self._scores.stored_chunks()) if needed else []
        if missing:
            raise StoreError(
                f"{self._scores.chunk_path(missing[0])} is missing: restore it, or remove {self.path} to compute it "
                "again"
            )
        if self.in_one_file and needed:
            self._scores.chunk(0)

    @property
    def uploads(self) -> bool:
        """Whether files are written as a whole, so that flushing half of one should be avoided."""
        return self._scores.uploads

    @property
    def in_one_file(self) -> bool:
        """Whether the matrix is one memory map."""
        return self._scores.layout.num_chunks == 1 and not self._scores.uploads and self._scale is None

    @property
    def tile_done(self) -> np.ndarray:
        """``[num_tiles]``, bool, a copy of the marks of durably done tiles."""
        return self._mask.done

    @property
    def complete(self) -> bool:
        """Whether every tile is durably done."""
        return bool(self.tile_done.all())

    @property
    def pending(self) -> int:
        """The number of tiles written since the last flush."""
        return int(np.count_nonzero(self._mask.pending))

    def remaining(self, process: tuple[int, int] = (0, 1)) -> list[tuple[int, int]]:
        """Flush and return the row ranges of tiles that are not done, in files of this process ``(number, count)``."""
        self.flush()
        files = self._scores.layout.num_chunks
        first, last = (files * (process[0] + part) // process[1] for part in (0, 1))
        tiles = np.flatnonzero(~self.tile_done)
        owner = tiles // self._scores.layout.tiles_per_chunk
        starts = (tiles[(owner >= first) & (owner < last)] * self.tile_rows).tolist()
        return [(start, min(start + self.tile_rows, self.shape[0])) for start in starts]

    def write(self, start: int, rows: np.ndarray) -> None:
        """Write scores ``rows [n, M]``, whole tiles from row ``start`` on; they are pending until the next flush."""
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
                f"got rows {start} to {stop}: expected whole tiles, from a multiple of {self.tile_rows} to another one "
                f"or {self.shape[0]}; `remaining()` lists the tiles"
            )
        tiles = np.arange(start // self.tile_rows, -(-stop // self.tile_rows))
        with self._mask.writing(tiles):
            if self._scale is not None:
                rows = self._relative(start, rows)
            self._scores.assign(np.arange(start, stop), rows)
            self._checksums.assign(tiles, np.array([self._checksum(tile) for tile in tiles.tolist()], np.uint32))

    def _relative(self, start: int, rows: Float[np.ndarray, "n M"]) -> Float32[np.ndarray, "n M"]:
        """Write the scales of rows and return the rows relative to them."""
        assert self._scale is not None
        values = torch.from_numpy(np.ascontiguousarray(rows, np.float32))
        # A score beyond float32 must not become the scale, or every other score of its row would turn into zero.
        scale = values.nan_to_num(0, 0, 0).abs().amax(1)
        scale[scale == 0] = 1
        self._scale.assign(np.arange(start, start + len(rows)), scale.numpy())
        return (values / scale[:, None]).numpy()

    def _checksum(self, tile: int, writable: bool = True) -> int:
        """Return the CRC-32C of a tile as it is stored, including its padding and its scales."""
        chunk, inside = divmod(tile, self._scores.layout.tiles_per_chunk)
        rows = slice(inside * self.tile_rows, (inside + 1) * self.tile_rows)
        sums = 0
        for array in (self._scores, self._scale):
            if array is not None:
                stored = np.asarray(array.chunk(chunk, writable=writable)).view()[rows]
                stored.flags.writeable = False
                sums = google_crc32c.extend(sums, np.ascontiguousarray(stored).reshape(-1).view(np.uint8))
        return int(sums)

    def damaged_tiles(self) -> Int64[np.ndarray, " n"]:
        """Return the done tiles whose content is not what was written."""
        stored, bad = self._checksums.read(0, self.num_tiles), []
        for tile in np.flatnonzero(self.tile_done).tolist():
            try:
                fine = self._checksum(tile, writable=False) == stored[tile]
            except StoreError:
                fine = False
            if not fine:
                bad.append(tile)
        return np.array(bad, np.int64)

    def unmark(self, tiles: np.ndarray) -> None:
        """Mark tiles ``[n]``, int64, durably as not done."""
        self._mask.unmark(tiles)

    def unmark_rows(self, rows: np.ndarray) -> None:
        """Mark the tiles of training rows ``[n]``, int64, durably as not done."""
        tiles = np.unique(np.asarray(rows) // self.tile_rows)
        self.unmark(tiles[tiles < self.num_tiles])

    def flush(self) -> None:
        """Make pending tiles durable, then mark them done; after an error they have to be written again."""
        self._mask.flush()

    def matrix(self) -> Any:
        """Return all scores without copying: ``[N, M]``, float32, read-only; a memory map or a `ScoreMatrix`."""
        if self.in_one_file:
            return self._scores.chunk(0)[: self.shape[0]]
        return ScoreMatrix(self.shape, self.read)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the scores of rows ``start`` to ``stop``, float32, or raise `IncompleteError`."""
        done = self._mask.written(np.arange(start // self.tile_rows, -(-stop // self.tile_rows)))
        if not done.all() and stop > start:
            raise IncompleteError(
                f"Of rows {start} to {stop - 1} of {self.path}, {int((~done).sum())} tiles of {self.tile_rows} rows "
                f"are not computed: other processes still work on them, or were stopped. Call finalize_scores again."
            )
        rows = self._scores.read(start, stop)
        if self._scale is None:
            return rows
        scale = torch.from_numpy(np.array(self._scale.read(start, stop)))
        return (torch.from_numpy(np.array(rows)).float() * scale[:, None]).numpy()

    def close(self) -> None:
        """Flush and release the files; the matrix stays valid as long as it is held."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._closed = True
            if self.in_one_file:
                self._scores.close()

    def __enter__(self) -> ScoreArray:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def beside(path: StorePath, suffix: str) -> StorePath:
    """Return the path of an array that belongs to scores."""
    return path.with_name(path.name + suffix)


def remove_scores(path: StorePath) -> None:
    """Remove scores and the arrays that belong to them; what a crash leaves counts as not done."""
    with disk_errors(path):
        mask = beside(path, DONE_SUFFIX)
        (mask / "c").remove()  # marks first: without them nothing counts as done
        for array in (path, beside(path, SCALE_SUFFIX), beside(path, CHECKSUM_SUFFIX), mask):
            array.remove()


def open_scores(
    path: StorePath,
    shape: tuple[int, int],
    inputs: Mapping[str, Any],
    *,
    tile_rows: int | None = None,
    chunk_rows: int | None = None,
    dtype: str | None = None,
    may_replace: bool = True,
) -> ScoreArray:
    """Continue existing scores if they come from the same inputs, else remove them and begin new ones.

    If training examples were added, their scores are missing. Processes may create the same scores at once.

    Args:
        path: The array's directory; its parent is a zarr group.
        shape: ``(N, M)``, both at least 1.
        inputs: Everything that decides the scores, as JSON values.
        tile_rows: The most rows of a tile; None: tiles of about 16 MB. Existing scores keep theirs.
        chunk_rows: About how many rows a file has; None: all.
        dtype: ``"float32"`` or ``"float16"``; None: the dtype of existing scores of these inputs, else float32.
        may_replace: Whether scores of other inputs, or of another dtype, may be removed.

    Returns:
        The array; some of its tiles may be done.

    Raises:
        InputError: If the shape, the dtype or ``tile_rows`` is invalid.
        IncompleteError: If scores of other inputs exist and this process may not replace them.
    """
    rows, cols = shape
    if rows < 1 or cols < 1:
        raise InputError(f"scores are of shape {shape}: expected at least one training row and one target")
    if tile_rows is not None and tile_rows < 1:
        raise InputError(f"tile_rows is {tile_rows}: expected at least 1")
    if dtype not in (None, *SCORE_DTYPES):
        raise InputError(f"dtype is {dtype!r}: expected one of {list(SCORE_DTYPES)}")
    wanted = json_value(dict(inputs), "inputs")
    if dtype is None:
        existing = (_described(path) or {}).get("generation")
        dtype = "float16" if existing == _generation(path.name, wanted, cols, "float16") else "float32"
    described = {"inputs": wanted, "generation": _generation(path.name, wanted, cols, dtype)}
    mask = beside(path, DONE_SUFFIX)
    with disk_errors(path):
        found = (path / NODE).exists(), (mask / NODE).exists()
    if all(found):
        scores = _same_scores(path, described, rows, cols)
        if scores is not None:
            return scores
    if any(found):
        # Scores without marks, of the same inputs: another process is creating them just now, or a crash left them.
        # Either way their remaining documents can be written over them, and nothing has to be removed.
        unfinished = found == (True, False) and _described(path) == described
        if not unfinished:
            if not may_replace:
                raise IncompleteError(
                    f"{path} holds scores of other inputs, which only the first process replaces: run that one, or "
                    "one process alone, and then this one again."
                )
            remove_scores(path)
    size = min(tile_rows or TILE_BYTES // (4 * cols) or 1, chunk_rows or rows, rows)
    tiles = max(1, (chunk_rows or rows) // size) if chunk_rows else None
    layout = Layout.tiled((rows, cols), dtype, size, tiles)
    _create(path, layout, described)
    return ScoreArray(path)


def _generation(name: str, inputs: Mapping[str, Any], cols: int, dtype: str) -> str:
    """Return a digest that ties an array of scores to the arrays that belong to it."""
    text = json.dumps([name, inputs, cols, dtype], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _described(path: StorePath) -> dict[str, Any] | None:
    try:
        return Layout.read(path)[1]
    except StoreError:
        return None


def _same_scores(path: StorePath, described: Mapping[str, Any], rows: int, cols: int) -> ScoreArray | None:
    """Return existing scores if they come from the same inputs, with rows added up to ``rows``; else None."""
    try:
        scores = ScoreArray(path)
    except StoreError as error:
        logger.info("computing %s again: %s", path, error)
        return None
    known = {name: scores._scores.attributes.get(name) for name in described}
    if known != described or scores.shape[1] != cols or scores.shape[0] > rows:
        scores.close()
        logger.info("computing %s again: it comes from other inputs or has another shape", path)
        return None
    if scores.shape[0] == rows:
        return scores
    scores.unmark_rows(np.array([scores.shape[0] - 1]))  # the last tile may get more rows
    layout = scores._scores.layout
    scores.close()
    _create(path, Layout((rows, cols), layout.dtype, layout.chunk_rows, layout.tile_rows), described)
    return ScoreArray(path)


def _create(path: StorePath, layout: Layout, described: Mapping[str, Any]) -> None:
    """Write the documents of all arrays; no tile becomes done."""
    with disk_errors(path):
        own = {"generation": described["generation"]}
        documents = {path: array_document(layout, described)}
        if layout.dtype == "float16":
            scale = Layout(layout.shape[:1], "float32", layout.chunk_rows)
            documents[beside(path, SCALE_SUFFIX)] = array_document(scale, own)
        # The marks' document comes last: while it is missing, or has another generation, nothing counts as done.
        for suffix, dtype in ((CHECKSUM_SUFFIX, "uint32"), (DONE_SUFFIX, "bool")):
            marks = Layout((layout.num_tiles,), dtype, layout.tiles_per_chunk)
            documents[beside(path, suffix)] = array_document(marks, own)
        write_documents({array / NODE: document for array, document in documents.items()})
