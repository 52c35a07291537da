"""Scores ``[N training examples, M targets]``, written tile by tile.

    <key>/         group; its attributes say what the scores come from and how they are cut into files
      scores       [N, M]   float32 or float16
      scale        [N]      float32, with float16: the factor of a row, its largest score
      rows         [tiles]  uint64, a digest of the training examples that a tile comes from
      checksum     [tiles]  uint32, CRC-32C of a tile
      done         [tiles]  bool

On a local disk, for one process, all scores are a single zarr shard whose inner chunks are tiles of whole rows, one
after another, so the file begins with the matrix in row-major order and one memory map shows it, while any zarr reader
uses the index at the file's end. Several processes, and remote stores, have a shard for each chunk of rows.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
from tracer.store.arrays.metadata import NODE, group_document, read_document, write_documents
from tracer.store.arrays.opening import open_arrays
from tracer.store.arrays.store_path import StorePath
from tracer.store.lazy_matrix import ScoreMatrix
from tracer.store.manifest import json_value
from tracer.store.revisions import Revisions, remove_result, result_key

SCORE_DTYPES = ("float16", "float32")
TILE_BYTES = 16 << 20
_CHECKED_BYTES = 32 << 20

logger = logging.getLogger("tracer")


class ScoreArray:
    """Scores ``[N, M]``, written tile by tile; a tile is done once it is durable.

    Args:
        path: The group of scores.
        revisions: The tables that written scores are computed from.
        flush_seconds: The time that written tiles may wait for a flush.

    Attributes:
        shape: ``(N, M)``.
        dtype: The stored dtype, ``"float32"`` or ``"float16"``; scores are read as float32.
        tile_rows: The rows of a tile; the last tile may have fewer.
        num_tiles: The number of tiles.
        inputs: Everything that decides the scores, JSON values.

    Raises:
        StoreError: If the scores are damaged.
    """

    def __init__(
        self, path: StorePath, *, revisions: Revisions | None = None, flush_seconds: float = FLUSH_SECONDS
    ) -> None:
        self.path, self._revisions = path, revisions
        described, layouts = read_description(path)
        arrays = open_arrays(path, list(layouts))
        for name, layout in layouts.items():
            if arrays[name].layout != layout:
                raise StoreError(f"{path / name} is damaged: expected {layout}, found {arrays[name].layout}")
        mask = arrays.pop("done")
        self._scores, self._checksums, self._rows = (arrays[name] for name in ("scores", "checksum", "rows"))
        self._scale = arrays.get("scale")
        layout = self._scores.layout
        self.dtype = layout.dtype
        self.num_tiles, self.tile_rows = layout.num_tiles, int(layout.tile_rows or 0)
        self.shape: tuple[int, int] = (layout.shape[0], layout.shape[-1])
        self.inputs: dict[str, Any] = described["inputs"]
        self._mask = CompletionMask(mask, list(arrays.values()), flush_seconds)
        self._closed = False
        self._intact: set[int] = set()
        self._check_files()

    def _check_files(self) -> None:
        """Check that every file with a done tile exists, and the sizes of the small ones and of a single map."""
        needed = set((np.flatnonzero(self.tile_done) // self._scores.layout.tiles_per_chunk).tolist())
        missing = sorted(needed - self._scores.stored_chunks()) if needed else []
        if missing:
            raise StoreError(f"{self._scores.chunk_path(missing[0])} is missing")
        for array in (self._checksums, self._rows):
            array.read(0, self.num_tiles)
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
        sources = np.array([self._row_digest(tile) for tile in tiles.tolist()], np.uint64)
        if self._revisions is not None:  # what these scores come from must not have changed while they were computed
            self._revisions.check()
        with self._mask.writing(tiles):
            if self._scale is not None:
                rows = self._relative(start, rows)
            self._scores.assign(np.arange(start, stop), rows)
            self._rows.assign(tiles, sources)
            self._checksums.assign(tiles, np.array([self._checksum(tile) for tile in tiles.tolist()], np.uint32))

    def _row_digest(self, tile: int) -> int:
        """Return a digest of a tile's training examples; 0 if they are not known."""
        start, stop = tile * self.tile_rows, min((tile + 1) * self.tile_rows, self.shape[0])
        return 0 if self._revisions is None else self._revisions.digest(start, stop)

    def adopt(self, earlier: ScoreArray, ranges: Sequence[tuple[int, int]]) -> None:
        """Copy tiles among ``ranges`` that earlier scores, of equal targets, have of the same training examples."""
        if (earlier.tile_rows, earlier.shape[1], earlier.dtype) != (self.tile_rows, self.shape[1], self.dtype):
            return
        known, done = earlier._rows.read(0, earlier.num_tiles), earlier.tile_done
        for start, stop in ranges:
            tile = start // self.tile_rows
            if stop <= earlier.shape[0] and done[tile] and known[tile] == self._row_digest(tile) and known[tile]:
                if not earlier.is_damaged(tile):
                    self.write(start, earlier.read(start, stop))
        self.flush()

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
        done = np.flatnonzero(self.tile_done)
        return done[np.array([self.is_damaged(tile) for tile in done.tolist()], bool)]

    def is_damaged(self, tile: int) -> bool:
        """Return whether a done tile's content is not what was written."""
        try:
            return bool(self._checksum(tile, writable=False) != self._checksums.read(tile, tile + 1)[0])
        except StoreError:
            return True

    def forget_damaged(self) -> None:
        """Check done tiles, a random choice if they are many, and mark damaged ones as not done."""
        done = np.flatnonzero(self.tile_done)
        most = max(1, _CHECKED_BYTES // (self.tile_rows * self.shape[1] * self._scores.dtype.itemsize))
        chosen = done if len(done) <= most else np.random.default_rng().choice(done, most, replace=False)
        bad = np.array([tile for tile in chosen.tolist() if self.is_damaged(tile)], np.int64)
        if len(bad):
            logger.warning("computing %d tiles of %s again: they do not match their checksum", len(bad), self.path)
            self.unmark(bad)

    def unmark(self, tiles: np.ndarray) -> None:
        """Mark tiles ``[n]``, int64, durably as not done, and remove files of another size."""
        self._mask.unmark(tiles)
        for array in (self._scores, self._scale):
            if array is not None:
                array.remove_unusable(np.unique(tiles // self._scores.layout.tiles_per_chunk).tolist())

    def flush(self) -> None:
        """Make pending tiles durable, then mark them done; after an error they have to be written again."""
        self._mask.flush()

    def matrix(self) -> Any:
        """Return all scores without copying: ``[N, M]``, float32, read-only; a memory map or a `ScoreMatrix`."""
        if self.in_one_file:
            matrix = self._scores.chunk(0)[: self.shape[0]]
            self._check_present(0, self.shape[0])
            return matrix
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
        self._check_present(start, stop)
        if self.uploads:
            self._check_downloaded(start, stop)
        if self._scale is None:
            return rows
        scale = torch.from_numpy(np.array(self._scale.read(start, stop)))
        return (torch.from_numpy(np.array(rows)).float() * scale[:, None]).numpy()

    def _check_downloaded(self, start: int, stop: int) -> None:
        """Raise `StoreError` if tiles of rows that were just downloaded are damaged; each tile is checked once."""
        for tile in range(start // self.tile_rows, -(-stop // self.tile_rows)):
            if tile not in self._intact and self.tile_done[tile] and self.is_damaged(tile):
                raise StoreError(f"a tile of {self.path} does not match its checksum: run tracer.verify and ask again")
            self._intact.add(tile)

    def _check_present(self, start: int, stop: int) -> None:
        """Raise `StoreError` if rows that were just read were removed before that: they read as zeros."""
        size = self._scores.layout.chunk_rows
        for chunk in range(start // size, -(-stop // size)) if self.tile_done.any() else ():
            with disk_errors(self.path):
                if not self._scores.chunk_path(chunk).exists():
                    raise StoreError(f"{self.path} was removed, since its tables have changed: ask for scores again")

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


def open_scores(
    parent: StorePath,
    shape: tuple[int, int],
    inputs: Mapping[str, Any],
    *,
    tile_rows: int | None = None,
    chunk_rows: int | None = None,
    dtype: str | None = None,
    revisions: Revisions | None = None,
) -> ScoreArray:
    """Continue scores of the same inputs, or begin new ones; processes may do so at once.

    Args:
        parent: The group that has scores of other inputs too, each under a name of its own.
        shape: ``(N, M)``, both at least 1.
        inputs: Everything that decides the scores, as JSON values.
        tile_rows: The most rows of a tile; None: tiles of about 16 MB. Existing scores keep theirs.
        chunk_rows: About how many rows a file has; None: all.
        dtype: ``"float32"`` or ``"float16"``; None: the dtype of existing scores of these inputs, else float32.
        revisions: The tables that scores are computed from, checked before a tile counts as written.

    Returns:
        The array; some of its tiles may be done.

    Raises:
        InputError: If the shape, the dtype or ``tile_rows`` is invalid.
        StoreError: If the disk fails.
    """
    rows, cols = shape
    if rows < 1 or cols < 1:
        raise InputError(f"scores are of shape {shape}: expected at least one training row and one target")
    if tile_rows is not None and tile_rows < 1:
        raise InputError(f"tile_rows is {tile_rows}: expected at least 1")
    if dtype not in (None, *SCORE_DTYPES):
        raise InputError(f"dtype is {dtype!r}: expected one of {list(SCORE_DTYPES)}")
    size = min(tile_rows or TILE_BYTES // (4 * cols) or 1, chunk_rows or rows, rows)
    described = {
        "inputs": json_value(dict(inputs), "inputs"),
        "shape": [rows, cols],
        "tile_rows": size,
        "tiles_per_file": max(1, chunk_rows // size) if chunk_rows else -(-rows // size),
    }
    paths = {known: parent / result_key([described["inputs"], [rows, cols], known]) for known in SCORE_DTYPES}
    if dtype is None:
        dtype = "float16" if (paths["float16"] / NODE).exists() else "float32"
    path, described = paths[dtype], {**described, "dtype": dtype}
    try:
        _create(path, described)
        scores = ScoreArray(path, revisions=revisions)
        if not scores.uploads:  # remote ones are checked as they are downloaded
            scores.forget_damaged()
        return scores
    except StoreError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise  # of the disk, and no damage
        logger.warning("computing %s again: %s", path, error)
    remove_result(path)
    _create(path, described)
    return ScoreArray(path, revisions=revisions)


def read_description(path: StorePath) -> tuple[dict[str, Any], dict[str, Layout]]:
    """Return the attributes of a group of scores, and the layouts of its arrays, which follow from them."""
    try:
        described = read_document(path / NODE)["attributes"]
        shape, tile_rows = (int(described["shape"][0]), int(described["shape"][1])), int(described["tile_rows"])
        scores = Layout.tiled(shape, described["dtype"], tile_rows, int(described["tiles_per_file"]))
        found = dict(described["inputs"])
    except (FileNotFoundError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise StoreError(
            f"{path / NODE} is missing or damaged ({error!r}): remove {path} to compute it again"
        ) from error
    marks = (scores.num_tiles,)
    layouts = {"scores": scores} | {
        name: Layout(marks, dtype, scores.tiles_per_chunk)
        for name, dtype in (("rows", "uint64"), ("checksum", "uint32"), ("done", "bool"))
    }
    if scores.dtype == "float16":
        layouts["scale"] = Layout(shape[:1], "float32", scores.chunk_rows)
    return {**described, "inputs": found}, layouts


def _create(path: StorePath, described: Mapping[str, Any]) -> None:
    """Write the documents that are missing; no tile becomes done."""
    with disk_errors(path):
        # The group's own comes first, and one process writes it. The arrays' follow from it, so all write the same.
        if not (path / NODE).exists():
            write_documents({path / NODE: group_document(described)}, replace=False)
        layouts = {path / name / NODE: layout for name, layout in read_description(path)[1].items()}
        write_documents({node: array_document(layout) for node, layout in layouts.items() if not node.exists()})
