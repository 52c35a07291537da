"""Computes score matrices into the store; a thread writes one tile while the next one is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tracer._core.validation import bar_disabled
from tracer.scoring.read_ahead import ReadAhead
from tracer.scoring.streaming import NUM_TILES_HELD, TileScorer
from tracer.store import ScoreArray


def write_scores(
    scorer: TileScorer,
    scores: ScoreArray,
    progress: bool | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
) -> np.ndarray:
    """Compute scores into the store.

    Args:
        scorer: Computes tiles.
        scores: The matrix to write.
        progress: Show a progress bar. None: only on a terminal.
        ranges: Ranges ``(start, stop)`` of training examples to compute, whole stored tiles each. None: all that are
            not done yet.

    Returns:
        ``[N, M]``, float32, read-only and mapped from the store.
    """
    todo = scores.remaining() if ranges is None else list(ranges)
    num_rows = scores.shape[0]
    if todo:
        step = max(1, scorer.tile_rows // scores.tile_rows) * scores.tile_rows
        tiles = list(_split(todo, step))
        ahead = ReadAhead(scorer.pairs, tiles)
        num_known = num_rows - sum(map(len, tiles))
        bar = tqdm(total=num_rows, initial=num_known, unit="row", desc="scores", disable=bar_disabled(progress))
        with bar, _Writer(scores, min(step, num_rows)) as writer:
            for tile in tiles:
                buffer = writer.buffer()
                out = buffer[: len(tile)]
                if scorer.device.type == "cpu":
                    scorer.score(tile, out, ahead)
                else:
                    on_device = torch.empty(out.shape, device=scorer.device)
                    scorer.score(tile, on_device, ahead)
                    out.copy_(on_device)
                writer.write(tile.start, len(tile), buffer)
                bar.update(len(tile))
    scores.flush()
    return scores.matrix()


def _split(ranges: Iterable[tuple[int, int]], step: int) -> Iterator[range]:
    """Yield ranges, adjacent ones joined, in ranges of at most ``step`` indices."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    for start, stop in joined:
        for first in range(start, stop, step):
            yield range(first, min(first + step, stop))


class _Writer:
    """Writes tiles of at most ``tile_rows`` rows to the store in a thread."""

    # syncing a tile to the disk takes as long as computing one, so both go on at the same time in two buffers

    def __init__(self, scores: ScoreArray, tile_rows: int) -> None:
        self._scores = scores
        self._free: queue.SimpleQueue[Tensor] = queue.SimpleQueue()
        for _ in range(NUM_TILES_HELD):
            self._free.put(torch.empty(tile_rows, scores.shape[1]))
        self._full: queue.SimpleQueue[tuple[int, int, Tensor] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="tracer-scores", daemon=True)

    def buffer(self) -> Tensor:
        """Return a buffer ``[tile_rows, M]`` as soon as one is free."""
        buffer = self._free.get()
        self._check()
        return buffer

    def write(self, start: int, num_rows: int, buffer: Tensor) -> None:
        """Write the first rows of a buffer, later."""
        self._full.put((start, num_rows, buffer))

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
            start, num_rows, buffer = item
            try:
                if self._error is None:
                    self._scores.write(start, buffer[:num_rows].numpy())
                    if not self._scores.uploads:  # an object cannot be written in part, so it goes when it is full
                        self._scores.flush()
            except BaseException as error:  # noqa: BLE001 - raised in the thread that waits for a buffer
                self._error = error
            self._free.put(buffer)
