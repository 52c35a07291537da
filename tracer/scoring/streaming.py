"""Rank: scores and top rows from the rows of a store, band by band, in bounded memory.

Layout: train rows ``[N, k]`` and target rows ``[M, k]`` of each checkpoint, scores ``[N, M]``. A *band* is a run of
train rows with their scores of all targets. Blocks of train rows are read ahead, converted, multiplied while they are
in the cache, weighted and added up over checkpoints; a finished band goes to the store, or through a running selection.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tracer._core.validation import bar_disabled
from tracer.errors import NonFiniteError
from tracer.scoring.estimators import Estimate, self_influence
from tracer.scoring.matmul import Multiplier, Plan
from tracer.scoring.topk import RunningTopK
from tracer.store import RowTable, ScoreArray
from tracer.store.quantization import relative_rows, row_scale
from tracer.types import TopK

MEMORY_BYTES = 1 << 30
"""How many bytes scoring holds at once by default, about; independent of the numbers of rows and targets."""

TILE_BYTES = 16 << 20
"""The most bytes of scores in a tile of the store."""

_BAND_ROWS = 16384
_AHEAD_BYTES, _PIECE_BYTES = 64 << 20, 4 << 20
_GAP_ROWS = 64
_BANDS = 2


Band = range | np.ndarray
"""Ascending train rows."""


class Rows(Protocol):
    """Rows as `tracer.store.RowTable` has them."""

    @property
    def num_rows(self) -> int:
        """How many there are."""

    @property
    def dim(self) -> int:
        """The values of a row."""

    @property
    def storage(self) -> str:
        """The dtype of raw features."""

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a value of each row, or of some: ``[stop - start]``."""

    def raw_features(self, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """Return rows as stored, in one or more pieces."""


@dataclass(frozen=True)
class CheckpointPair:
    """The tables of one checkpoint.

    Attributes:
        factor: The weight of its dot products.
        train: The table of train rows.
        targets: The target rows: as they are stored, or derived from them.
        cosines: In place of features: exact cosines of all train rows with blocks of targets, each with its first.
    """

    factor: float
    train: RowTable
    targets: Rows
    cosines: Sequence[tuple[int, ScoreArray]] | None = None


@dataclass(frozen=True)
class MemoryRows:
    """Target rows that are in memory and not in a store.

    Attributes:
        raw: ``[R, k]``, as they would be stored.
        storage: The dtype's name.
        columns: ``loss_grad``, ``gradient_norm`` and ``scale`` of each row, ``[R]`` each.
    """

    raw: np.ndarray
    storage: str
    columns: dict[str, np.ndarray]

    @classmethod
    def of(cls, features: np.ndarray, loss_grad: np.ndarray, gradient_norm: np.ndarray, storage: str) -> MemoryRows:
        """Return rows rounded as they would be in a store, from index 0 on.

        Args:
            features: ``[R, k]``, float32.
            loss_grad: ``[R]``.
            gradient_norm: ``[R]``.
            storage: ``"float32"``, ``"float16"`` or ``"int8"``.

        Returns:
            The rows.

        Raises:
            NonFiniteError: A value is NaN or infinite.
        """
        largest = np.abs(features).max(1)
        bad = np.flatnonzero(~np.isfinite(largest) | ~np.isfinite(loss_grad) | ~np.isfinite(gradient_norm))
        if len(bad):
            raise NonFiniteError(
                f"The gradient or slope of rows {bad[:5].tolist()} of the batch is NaN or infinite (in float32). Look "
                f"at these rows' inputs and labels; if all rows are concerned, at the checkpoint's weights."
            )
        scale = row_scale(largest, storage)
        raw = relative_rows(features, scale, np.arange(len(features)), storage, "targets")
        columns = {"loss_grad": loss_grad, "gradient_norm": gradient_norm, "scale": scale}
        return cls(raw.astype(storage), storage, columns)

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return len(self.raw)

    @property
    def dim(self) -> int:
        """The values of a row."""
        return self.raw.shape[1]

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a value of each row, or of some: ``[stop - start]``."""
        return self.columns[name][start:stop]

    def raw_features(self, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """Return rows as stored, in one piece."""
        return [(start, self.raw[start:stop])]


class BandScorer:
    """Computes the scores of bands of train rows.

    Args:
        pairs: The tables of each checkpoint; the same numbers of rows in all.
        estimate: What scores are to say; if it derives targets, those of the pairs are derived.
        device: Where to multiply.
        memory_bytes: How much to hold, about.

    Attributes:
        band_rows: The most rows of a band that keep within the memory, a multiple of ``grid_rows``.
        grid_rows: Consecutive train rows are multiplied in blocks that begin at multiples of this, whatever the band.
            So scores are the same to the last bit however rows are divided among bands and processes.
        tile_rows: How many rows a tile of the store's scores best has.
    """

    def __init__(
        self, pairs: Sequence[CheckpointPair], estimate: Estimate, device: torch.device, memory_bytes: int
    ) -> None:
        self.pairs, self.estimate, self.device = pairs, estimate, device
        self.num_targets = pairs[0].targets.num_rows
        dim = max(1, pairs[0].train.dim)
        self._plan = Plan.of(memory_bytes, dim, self.num_targets)
        self._multiplier = Multiplier(
            self._plan, device, "float32" if estimate.transforms_targets else pairs[0].train.storage
        )
        size = self._multiplier.target_bytes(self.num_targets, dim)
        self._resident: list[Tensor | None] = [None] * len(pairs)
        self._num_resident = min(len(pairs), self._plan.resident_bytes // size)
        # targets that do not stay leave their memory to the bands, in which they are converted less often
        band_bytes = self._plan.band_bytes if self._num_resident else self._plan.resident_bytes // _BANDS
        band_rows = int(max(1, min(_BAND_ROWS, band_bytes // (4 * self.num_targets))))
        self.grid_rows = min(self._plan.rows, band_rows)
        self.band_rows = band_rows // self.grid_rows * self.grid_rows
        tile_rows = min(TILE_BYTES // (4 * self.num_targets), self.band_rows)
        self.tile_rows = max(1, tile_rows // self.grid_rows) * self.grid_rows

    def score(self, band: Band, out: Tensor, ahead: ReadAhead | None = None, *, on_grid: bool = True) -> None:
        """Compute the scores of some train rows.

        Args:
            band: The rows, n of them.
            out: ``[n, M]``, float32, on the device: overwritten.
            ahead: Is told what was read.
            on_grid: Multiply consecutive rows in blocks of the grid, with rows beside the band where it cuts one.
        """
        rows = _indices(band)
        out.zero_()
        loss_grads = self._slopes(rows)
        for position, pair in enumerate(self.pairs):
            sides = self._train_weights(pair, rows, loss_grads[position]), self._target_weights(pair)
            left, right = (torch.from_numpy(weights).to(self.device, torch.float32) for weights in sides)
            for block, inside, place in self._blocks(rows, on_grid):
                part, weights = out[place], left[place].unsqueeze(1)
                for columns, products in self._products(position, pair, block):
                    found = products[inside]
                    # one after the other, in stored units: folded into one factor they could leave float32's range
                    part[:, columns].add_(found.mul_(weights).mul_(right[columns]), alpha=pair.factor)
                if ahead is not None:
                    ahead.consumed(len(part))

    def _slopes(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return Q of train rows at each checkpoint, or, for estimators with a kernel, their mean at each."""
        loss_grads = [_values(pair.train, "loss_grad", rows).astype(np.float64) for pair in self.pairs]
        return loss_grads if self.estimate.kernel is None else [np.mean(loss_grads, axis=0)] * len(loss_grads)

    def _train_weights(self, pair: CheckpointPair, rows: np.ndarray, loss_grad: np.ndarray) -> np.ndarray:
        """Return the factor of the products of each train row, ``[n]``, float64."""
        norm = _values(pair.train, "gradient_norm", rows)
        unit = norm if pair.cosines is not None else _values(pair.train, "scale", rows)
        return self.estimate.train_weights(loss_grad, norm) * unit

    def _target_weights(self, pair: CheckpointPair) -> np.ndarray:
        """Return the factor of the products of each target row, ``[M]``, float64."""
        if self.estimate.transforms_targets:  # which has put weights in
            return pair.targets.column("scale").astype(np.float64)
        norm = pair.targets.column("gradient_norm")
        weights = self.estimate.target_weights(pair.targets.column("loss_grad"), norm)
        return weights * (norm if pair.cosines is not None else pair.targets.column("scale"))

    def _blocks(self, rows: np.ndarray, on_grid: bool) -> Iterator[tuple[np.ndarray, slice, slice]]:
        """Yield blocks of train rows to multiply, which of their rows are wanted, and where those stand in a band."""
        step, first, last = self.grid_rows, int(rows[0]), int(rows[-1]) + 1
        if not on_grid or last - first != len(rows):
            for start in range(0, len(rows), step):
                yield rows[start : start + step], slice(None), slice(start, start + step)
            return
        for start in range(first // step * step, last, step):
            low, high = max(start, first), min(start + step, last)
            block = np.arange(start, min(start + step, self.pairs[0].train.num_rows))
            yield block, slice(low - start, high - start), slice(low - first, high - first)

    def _products(self, position: int, pair: CheckpointPair, rows: np.ndarray) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of targets and products of rows with them, ``[n, m]``, float32, to be used up at once."""
        if pair.cosines is not None:
            for begin, block in pair.cosines:
                values = torch.from_numpy(np.array(_pick(block.matrix(), rows)))
                yield slice(begin, begin + block.shape[1]), values.to(self.device)
            return
        raw = _raw_rows(pair.train, rows)
        for first in range(0, self.num_targets, self._plan.targets):
            last = min(first + self._plan.targets, self.num_targets)
            yield slice(first, last), self._multiplier.multiply(raw, self._targets(position, first, last))

    def _targets(self, position: int, first: int, last: int) -> Tensor | np.ndarray:
        """Return target rows, converted where they stay."""
        targets = self.pairs[position].targets
        if position >= self._num_resident:
            return _joined(targets.raw_features(first, last))
        known = self._resident[position]
        if known is None:
            known = self._multiplier.convert(_joined(targets.raw_features(0, self.num_targets)))
            self._resident[position] = known
        return known[first:last]


def _values(table: Rows, name: str, rows: np.ndarray) -> np.ndarray:
    """Return a column's values of ascending rows."""
    return table.column(name, int(rows[0]), int(rows[-1]) + 1)[rows - rows[0]]


def _joined(pieces: list[tuple[int, np.ndarray]]) -> np.ndarray:
    return pieces[0][1] if len(pieces) == 1 else np.concatenate([view for _, view in pieces])


def _runs(rows: np.ndarray) -> list[np.ndarray]:
    """Return ascending rows in parts between which many rows are left out."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return [rows]
    return np.split(rows, np.flatnonzero(np.diff(rows) > _GAP_ROWS) + 1)


def _raw_rows(table: Rows, rows: np.ndarray) -> np.ndarray:
    """Return ascending rows as stored, ``[n, k]``: a view where they lie together."""
    parts = []
    for run in _runs(rows):
        view = _joined(table.raw_features(int(run[0]), int(run[-1]) + 1))
        parts.append(view if len(view) == len(run) else view[run - run[0]])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _pick(matrix: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return matrix[rows[0] : rows[-1] + 1] if rows[-1] - rows[0] + 1 == len(rows) else matrix[rows]


class ReadAhead:
    """Lets the system read train rows in the background, some megabytes before they are used.

    Args:
        pairs: The tables of each checkpoint.
        bands: The rows of each band in the order in which they are scored.
    """

    def __init__(self, pairs: Sequence[CheckpointPair], bands: Iterable[Band]) -> None:
        self._reads = self._in_order([pair.train for pair in pairs if pair.cosines is None], bands)
        self._rows_ahead = max((_AHEAD_BYTES // _row_bytes(pair.train) for pair in pairs if pair.train.dim), default=0)
        self._issued = 0
        self.consumed(0)

    def consumed(self, num_rows: int) -> None:
        """Take note that so many rows were used, and ask for as many more."""
        self._issued -= num_rows
        while self._issued < self._rows_ahead and (read := next(self._reads, None)) is not None:
            table, rows = read
            for run in _runs(rows):
                table.prefetch(int(run[0]), int(run[-1]) + 1)
            self._issued += len(rows)

    def _in_order(self, tables: list[RowTable], bands: Iterable[Band]) -> Iterator[tuple[RowTable, np.ndarray]]:
        for band in bands:
            rows = _indices(band)
            for table in tables:
                step = max(1, _PIECE_BYTES // _row_bytes(table))
                for first in range(0, len(rows), step):
                    yield table, rows[first : first + step]


def _row_bytes(table: Rows) -> int:
    return table.dim * np.dtype(table.storage).itemsize


class _Writer:
    """Writes bands to the store in a thread, so that syncing them does not stop the computation.

    Args:
        scores: Where bands go.
        band_rows: The most rows of a band.

    Its memory is two bands: one is computed while the other is written.
    """

    def __init__(self, scores: ScoreArray, band_rows: int) -> None:
        self._scores = scores
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(_BANDS):
            self._free.put(torch.empty(band_rows, scores.shape[1]))
        self._full: queue.SimpleQueue[tuple[int, int, Tensor] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tracer-scores", daemon=True)

    def memory(self) -> Tensor:
        """Return memory for a band as soon as some is free: ``[band rows, M]``."""
        memory = self._free.get()
        self._check()
        return memory

    def write(self, start: int, num_rows: int, memory: Tensor) -> None:
        """Write the first rows of a band's memory, later."""
        self._full.put((start, num_rows, memory))

    def __enter__(self) -> _Writer:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._full.put(None)
        self._thread.join()
        if error is None:
            self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (item := self._full.get()) is not None:
            start, num_rows, memory = item
            try:
                if self._error is None:
                    self._scores.write(start, memory[:num_rows].numpy())
                    if not self._scores.uploads:  # else a file goes when it is full
                        self._scores.flush()
            except BaseException as error:  # noqa: BLE001 - handed to the thread that waits for memory
                self._error = error
            self._free.put(memory)


def write_scores(
    pairs: Sequence[CheckpointPair],
    estimate: Estimate,
    scores: ScoreArray,
    device: torch.device,
    progress: bool | None = None,
    *,
    memory_bytes: int = MEMORY_BYTES,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> np.ndarray:
    """Compute scores into the store.

    Args:
        pairs: The tables of each checkpoint.
        estimate: What scores are to say.
        scores: Where they go.
        device: Where to multiply.
        progress: Show a bar; None: on a terminal only.
        memory_bytes: How much to hold, about.
        ranges: The train rows ``(start, stop)`` to compute, whole tiles each; None: all that are not done yet.

    Returns:
        ``[N, M]``, float32, read-only and mapped from the store.
    """
    todo = scores.remaining() if ranges is None else list(ranges)
    num_rows = scores.shape[0]
    if todo:
        scorer = BandScorer(pairs, estimate, device, memory_bytes)
        step = max(1, scorer.band_rows // scores.tile_rows) * scores.tile_rows
        bands = [range(start, stop) for start, stop in _pieces(todo, step)]
        ahead = ReadAhead(pairs, bands)
        known = num_rows - sum(len(band) for band in bands)
        bar = tqdm(total=num_rows, initial=known, unit="row", desc="scores", disable=bar_disabled(progress))
        with bar, _Writer(scores, min(step, num_rows)) as writer:
            for band in bands:
                memory = writer.memory()
                _score_into(scorer, band, memory, ahead)
                writer.write(band.start, len(band), memory)
                bar.update(len(band))
    scores.flush()
    return scores.matrix()


def _score_into(scorer: BandScorer, band: Band, memory: Tensor, ahead: ReadAhead | None) -> None:
    """Score a band into the CPU's memory."""
    out = memory[: len(band)]
    if scorer.device.type == "cpu":
        scorer.score(band, out, ahead)
    else:
        scores = torch.empty(out.shape, device=scorer.device)
        scorer.score(band, scores, ahead)
        out.copy_(scores)


def _indices(band: Band) -> np.ndarray:
    return np.arange(band.start, band.stop) if isinstance(band, range) else band


def _pieces(ranges: Iterable[tuple[int, int]], step: int) -> Iterator[tuple[int, int]]:
    """Yield ranges, adjacent ones joined, in pieces of at most ``step`` rows."""
    waiting: deque[tuple[int, int]] = deque()
    for start, stop in ranges:
        if waiting and waiting[-1][1] == start:
            start = waiting.pop()[0]
        waiting.append((start, stop))
    for start, stop in waiting:
        for first in range(start, stop, step):
            yield first, min(first + step, stop)


def select_rows(
    pairs: Sequence[CheckpointPair],
    estimate: Estimate,
    rows: Band,
    k: int,
    device: torch.device,
    progress: bool | None = None,
    *,
    memory_bytes: int = MEMORY_BYTES,
    begin: tuple[TopK, TopK] | None = None,
    on_grid: bool = True,
) -> Iterator[tuple[int, RunningTopK, RunningTopK]]:
    """Find the strongest rows of each target, both ends at once, without holding or storing all scores.

    Args:
        pairs: The tables of each checkpoint.
        estimate: What scores are to say.
        rows: The train rows that count.
        k: How many rows for each target and end.
        device: Where to multiply.
        progress: Show a bar; None: on a terminal only.
        memory_bytes: How much to hold, about.
        begin: Proponents and opponents of earlier rows, with which the selection begins.
        on_grid: As `BandScorer.score` takes it; not for a choice of rows, of which no others are to be read.

    Yields:
        After each band: how many of the rows have been seen, and the running selections of proponents and of
        opponents, the same objects each time.
    """
    scorer = BandScorer(pairs, estimate, device, memory_bytes)
    proponents, opponents = (RunningTopK(scorer.num_targets, k, largest) for largest in (True, False))
    for running, found in zip((proponents, opponents), begin or (), strict=False):
        running.merge(found)
    step = scorer.band_rows
    bands = [rows[first : first + step] for first in range(0, len(rows), step)]
    ahead = ReadAhead(pairs, bands)
    memory = torch.empty(min(step, len(rows)), scorer.num_targets, device=device)
    with tqdm(total=len(rows), unit="row", desc="top", disable=bar_disabled(progress)) as bar:
        seen = 0
        for band in bands:
            scores = memory[: len(band)]
            scorer.score(band, scores, ahead, on_grid=on_grid)
            for running in (proponents, opponents):
                running.update(_indices(band), scores)
            seen += len(band)
            bar.update(len(band))
            yield seen, proponents, opponents


def summed_self_influence(tables: Sequence[tuple[float, RowTable]]) -> np.ndarray:
    """Return ``sum_c lr_c ‖gradient of the loss‖²`` of each train row, from exact norms.

    Args:
        tables: Learning rate and train table of each checkpoint.

    Returns:
        ``[N]``, float64.
    """
    total = np.zeros(tables[0][1].num_rows)
    for learning_rate, table in tables:
        total += learning_rate * self_influence(table.column("loss_grad")[:], table.column("gradient_norm")[:])
    return total
