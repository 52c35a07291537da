"""Scores and top-k selections from stored features, tile by tile, in bounded memory.

Layout: train features ``[N, k]`` and target features ``[M, k]`` of each checkpoint, scores ``[N, M]``. A *tile* is some
rows of the score matrix. Its train features are read ahead, then converted block by block, multiplied while the block
is in the cache, weighted, and added up over checkpoints. A finished tile is written to the store, or goes through a
running top-k selection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float32, Float64
from torch import Tensor

from tracer._core.progress import tqdm
from tracer._core.validation import bar_disabled
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import (
    CheckpointPair,
    TrainIndices,
    column_at,
    index_array,
    is_contiguous,
    joined_views,
    raw_features_at,
)
from tracer.scoring.matmul import MemoryPlan, Multiplier
from tracer.scoring.read_ahead import ReadAhead
from tracer.scoring.read_checks import ReadCheck
from tracer.scoring.topk import RunningTopK
from tracer.store.score_array import TILE_BYTES
from tracer.types import TopK

MEMORY_BYTES = 1 << 30
"""The approximate memory of scoring by default, whatever the numbers of training examples and targets."""

NUM_TILES_HELD = 2
"""One tile is computed while the one before is written."""

_MAX_TILE_ROWS = 16384


class TileScorer:
    """Computes tiles of the score matrix; targets of the pairs are already transformed if the estimator does that.

    Attributes:
        tile_rows: The most rows of a tile that fit the memory, a multiple of ``block_rows``.
        block_rows: The train rows that are multiplied at once.
        stored_tile_rows: The best number of rows for the store's tiles.
    """

    def __init__(
        self, pairs: Sequence[CheckpointPair], estimate: Estimate, device: torch.device, memory_bytes: int
    ) -> None:
        self.pairs, self.estimate, self.device = pairs, estimate, device
        num_columns, groups = pairs[0].targets.num_rows, pairs[0].groups
        self.num_rows, self.num_targets = pairs[0].train.num_rows, num_columns
        if groups is not None:
            self.num_targets = int(groups.max()) + 1
        dim = max(1, pairs[0].train.dim)
        self._checks = [ReadCheck(pair.train, self.num_targets) for pair in pairs]
        self._plan = MemoryPlan.of(memory_bytes, dim, num_columns)
        storage = "float32" if estimate.transforms_targets else pairs[0].train.storage
        self._multiplier = Multiplier(self._plan, device, storage)
        size = self._multiplier.target_bytes(self.num_targets, dim)
        self._resident: list[Tensor | None] = [None] * len(pairs)
        self._num_resident = min(len(pairs), self._plan.resident_bytes // size)
        # targets that are converted again for each tile leave their memory to larger and therefore fewer tiles
        tile_bytes = self._plan.tile_bytes if self._num_resident else self._plan.resident_bytes // NUM_TILES_HELD
        tile_rows = int(max(1, min(_MAX_TILE_ROWS, tile_bytes // (4 * self.num_targets))))
        self.block_rows = min(self._plan.rows, tile_rows)
        self.tile_rows = tile_rows // self.block_rows * self.block_rows
        stored_rows = min(TILE_BYTES // (4 * self.num_targets), self.tile_rows)
        self.stored_tile_rows = max(1, stored_rows // self.block_rows) * self.block_rows

    def score(
        self, tile: TrainIndices, out: Float32[Tensor, "n M"], ahead: ReadAhead | None = None, *, aligned: bool = True
    ) -> None:
        """Compute the scores of some training examples into ``out``; see `_blocks` for ``aligned``."""
        indices = index_array(tile)
        out.zero_()
        loss_grads = self._train_loss_grads(indices)
        for position, pair in enumerate(self.pairs):
            weights = self._train_weights(pair, indices, loss_grads[position]), self.target_weights(pair)
            left, right = (torch.from_numpy(side).to(self.device, torch.float32) for side in weights)
            for block, wanted, place in self._blocks(indices, aligned):
                rows, row_weights = out[place], left[place].unsqueeze(1)
                for columns, products in self._products(position, pair, block):
                    # Weights may be 1e-15 or 1e15 and stored features are of the order of 1, so products are taken of
                    # stored features. Weights follow one after the other: their product could leave float32's range.
                    weighted = products[wanted].mul_(row_weights).mul_(right[columns])
                    if pair.groups is None:
                        rows[:, columns].add_(weighted, alpha=pair.weight)
                    else:
                        groups = torch.from_numpy(pair.groups[columns]).to(self.device)
                        rows.index_add_(1, groups[groups >= 0], weighted[:, groups >= 0], alpha=pair.weight)
                if ahead is not None:
                    ahead.advance(len(rows))

    def _train_loss_grads(self, indices: np.ndarray) -> list[Float64[np.ndarray, " n"]]:
        """Return Q of training examples at each checkpoint, or for each their mean."""
        loss_grads = [column_at(pair.train, "loss_grad", indices).astype(np.float64) for pair in self.pairs]
        return [np.mean(loss_grads, axis=0)] * len(loss_grads) if self.estimate.is_newton_step else loss_grads

    def _train_weights(
        self, pair: CheckpointPair, indices: np.ndarray, loss_grad: Float64[np.ndarray, " n"]
    ) -> Float64[np.ndarray, " n"]:
        """Return the factor of each training example's products."""
        norm = column_at(pair.train, "gradient_norm", indices)
        size = norm if pair.sizes is None else pair.sizes[indices]
        unit = norm if pair.cosines is not None else column_at(pair.train, "scale", indices)
        return self.estimate.train_weights(loss_grad, size) * unit

    def target_weights(self, pair: CheckpointPair) -> Float64[np.ndarray, " M"]:
        """Return the factor of each target's products."""
        if self.estimate.transforms_targets and pair.cosines is None:  # which has applied the estimator's weights
            return pair.targets.column("scale").astype(np.float64)
        norm = pair.targets.column("gradient_norm")
        weights = self.estimate.target_weights(pair.targets.column("loss_grad"), norm)
        return weights * (norm if pair.cosines is not None else pair.targets.column("scale"))

    def _blocks(self, indices: np.ndarray, aligned: bool) -> Iterator[tuple[np.ndarray, slice, slice]]:
        """Yield blocks to multiply, the slice of each that is wanted, and its place in the tile."""
        step, first, last = self.block_rows, int(indices[0]), int(indices[-1]) + 1
        if not aligned or not is_contiguous(indices):
            for start in range(0, len(indices), step):
                yield indices[start : start + step], slice(None), slice(start, start + step)
            return
        # The last bits of a matrix product depend on its shape. With blocks that begin at multiples of block_rows,
        # even if one reaches beyond the tile, scores have the same bits however tiles and processes divide examples.
        for start in range(first // step * step, last, step):
            low, high = max(start, first), min(start + step, last)
            block = np.arange(start, min(start + step, self.num_rows))
            yield block, slice(low - start, high - start), slice(low - first, high - first)

    def _products(
        self, position: int, pair: CheckpointPair, block: np.ndarray
    ) -> Iterator[tuple[slice, Float32[Tensor, "n m"]]]:
        """Yield slices of targets and the block's products with them, in memory that is used again."""
        self._checks[position].check(block)
        if pair.cosines is not None:
            for first, stored in pair.cosines:
                matrix = stored.matrix()
                chosen = matrix[block[0] : block[-1] + 1] if is_contiguous(block) else matrix[block]
                yield slice(first, first + stored.shape[1]), torch.from_numpy(np.array(chosen)).to(self.device)
            return
        raw = raw_features_at(pair.train, block)
        for first in range(0, self.num_targets, self._plan.targets):
            last = min(first + self._plan.targets, self.num_targets)
            yield slice(first, last), self._multiplier.multiply(raw, self._targets(position, first, last))

    def _targets(self, position: int, first: int, last: int) -> Tensor | np.ndarray:
        """Return target features as stored, or converted if they stay in memory."""
        targets = self.pairs[position].targets
        if position >= self._num_resident:
            return joined_views(targets.raw_features(first, last))
        known = self._resident[position]
        if known is None:
            known = self._multiplier.convert(joined_views(targets.raw_features(0, self.num_targets)))
            self._resident[position] = known
        return known[first:last]


def stream_topk(
    scorer: TileScorer,
    indices: TrainIndices,
    k: int,
    progress: bool | None = None,
    *,
    begin: tuple[TopK, TopK] | None = None,
    aligned: bool = True,
) -> Iterator[tuple[int, RunningTopK, RunningTopK]]:
    """Yield the number of examples seen and the running proponents and opponents, the same objects, after each tile.

    Args:
        scorer: Computes tiles.
        indices: The training examples to select from.
        k: The number of training examples for each target.
        progress: Show a progress bar. None: only on a terminal.
        begin: Proponents and opponents among other training examples, to begin with.
        aligned: False if no examples besides ``indices`` may be read.
    """
    # both ends come from one pass, since reading is what costs
    proponents, opponents = (RunningTopK(scorer.num_targets, k, largest) for largest in (True, False))
    for running, found in zip((proponents, opponents), begin or (), strict=False):
        running.merge(found)
    for seen, tile in stream_tiles(scorer, indices, progress, aligned=aligned):
        for running in (proponents, opponents):
            running.update(index_array(indices[seen : seen + len(tile)]), tile)
        yield seen + len(tile), proponents, opponents


def stream_tiles(
    scorer: TileScorer, indices: TrainIndices, progress: bool | None = None, *, aligned: bool = True
) -> Iterator[tuple[int, Float32[Tensor, "n M"]]]:
    """Yield scores tile by tile, in memory that is used again, each with the number of examples before it."""
    step = scorer.tile_rows
    tiles = [indices[first : first + step] for first in range(0, len(indices), step)]
    ahead = ReadAhead(scorer.pairs, tiles)
    memory = torch.empty(min(step, len(indices)), scorer.num_targets, device=scorer.device)
    with tqdm(total=len(indices), unit="row", desc="top", disable=bar_disabled(progress)) as bar:
        seen = 0
        for tile in tiles:
            scores = memory[: len(tile)]
            scorer.score(tile, scores, ahead, aligned=aligned)
            yield seen, scores
            seen += len(tile)
            bar.update(len(tile))
