"""Computes score matrices into the store; a thread writes one tile while the next one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from tracer._core.progress import tqdm
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
    """Compute ranges of whole stored tiles (None: all that are missing) and return the stored matrix, read-only."""
    todo = scores.remaining() if ranges is None else list(ranges)
    num_rows = scores.shape[0]
    step = max(1, scorer.tile_rows // scores.tile_rows) * scores.tile_rows
    tiles = list(_split(todo, step))
    ahead = ReadAhead(scorer.pairs, tiles)
    num_known = num_rows - sum(map(len, tiles))
    disable = bar_disabled(progress) if tiles else True  # None: tqdm shows the bar on a terminal only
    bar = tqdm(total=num_rows, initial=num_known, unit="row", desc="scores", disable=disable)
    buffers = [torch.empty(min(step, num_rows), scorer.num_targets) for _ in range(NUM_TILES_HELD if tiles else 0)]
    # Syncing a tile to the disk takes as long as computing one, so a thread does it while the next one is computed.
    with bar, ThreadPoolExecutor(1, "tracer-scores") as writer:
        writes: deque[Future[None]] = deque()
        for number, tile in enumerate(tiles):
            if len(writes) == NUM_TILES_HELD:
                writes.popleft().result()  # which frees a buffer, and raises what failed
            out = buffers[number % NUM_TILES_HELD][: len(tile)]
            if scorer.device.type == "cpu":
                scorer.score(tile, out, ahead)
            else:
                on_device = torch.empty(out.shape, device=scorer.device)
                scorer.score(tile, on_device, ahead)
                out.copy_(on_device)
            writes.append(writer.submit(_write, scores, tile.start, out.numpy()))
            bar.update(len(tile))
        for write in writes:
            write.result()
    scores.flush()
    return scores.matrix()


def _write(scores: ScoreArray, start: int, tile: np.ndarray) -> None:
    scores.write(start, tile)
    if not scores.uploads:  # an object cannot be written in part, so it goes when it is full
        scores.flush()


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
