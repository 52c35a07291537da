"""Rank: scores and top rows from the tables of a store, tile by tile, in bounded memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tracer.arguments import bar_disabled
from tracer.scoring import RunningTopK, add_dot_products, row_weights, self_influence
from tracer.store import RowTable, ScoreArray
from tracer.types import TopK

MEMORY_BYTES = 256 << 20
"""How many bytes scoring holds at once, about; independent of the numbers of rows and targets."""

_TRAIN_ROWS, _TARGET_ROWS = 2048, 4096


@dataclass(frozen=True)
class CheckpointPair:
    """The tables of one checkpoint.

    Attributes:
        learning_rate: The weight of its dot products.
        train: The table of train rows.
        targets: The table of target rows.
        cosines: In place of features: exact cosines of all train rows with blocks of targets, each with its first.
    """

    learning_rate: float
    train: RowTable
    targets: RowTable
    cosines: Sequence[tuple[int, ScoreArray]] | None = None


@dataclass(frozen=True)
class _Side:
    """The rows of one table that enter a dot product: raw values ``[n, k]`` and the factor of each row."""

    raw: np.ndarray
    weight: np.ndarray


def tile_rows(dim: int, num_columns: int) -> int:
    """Return how many train rows are scored at once, with this many of their scores held."""
    per_row = 4 * (_columns(dim) + num_columns)
    return int(max(1, min(_TRAIN_ROWS, MEMORY_BYTES // 4 // per_row)))


def _columns(dim: int) -> int:
    """Return how many of a row's values are multiplied at once; wide exact gradients are split."""
    return min(dim, max(1024, MEMORY_BYTES // 4 // (4 * (_TRAIN_ROWS + _TARGET_ROWS))))


def score_tiles(
    pairs: Sequence[CheckpointPair], estimator: str, device: torch.device, step: int, skip: np.ndarray | None = None
) -> Iterator[tuple[int, int, int, Tensor]]:
    """Compute scores tile by tile.

    Args:
        pairs: The tables of each checkpoint; the same numbers of rows in all.
        estimator: ``"tracin"`` or ``"cosine"``.
        device: Where to multiply.
        step: How many train rows a tile has.
        skip: ``[number of row tiles]``, bool: row tiles that need not be computed.

    Yields:
        First train row, first target, number of row tiles finished with this one, and a tile of scores ``[n, m]``,
        float32 on ``device``.
    """
    num_targets = pairs[0].targets.num_rows
    for number, start in enumerate(range(0, pairs[0].train.num_rows, step)):
        if skip is not None and skip[number]:
            continue
        for first in range(0, num_targets, _TARGET_ROWS):
            last = min(first + _TARGET_ROWS, num_targets)
            stop = min(start + step, pairs[0].train.num_rows)
            tile = torch.zeros(stop - start, last - first, device=device)
            for pair in pairs:
                if pair.cosines is None:
                    train = _side(pair.train, start, stop, estimator)
                    target = _side(pair.targets, first, last, estimator)
                    tile += pair.learning_rate * _dot_products(train, target, device)
                else:
                    tile += pair.learning_rate * _of_cosines(pair, start, stop, first, last, estimator).to(device)
            yield start, first, int(last == num_targets), tile


def _side(table: RowTable, start: int, stop: int, estimator: str) -> _Side:
    slope, norm = table.column("slope")[start:stop], table.column("gradient_norm")[start:stop]
    weight = row_weights(estimator, slope, norm) * table.column("scale")[start:stop]
    views = [view for _, view in table.raw_features(start, stop)]
    return _Side(views[0] if len(views) == 1 else np.concatenate(views), weight)


def _dot_products(train: _Side, target: _Side, device: torch.device) -> Tensor:
    """Return weighted dot products ``[n, m]``; the weights are applied after the product, in stored units."""
    dim = train.raw.shape[1]
    step = _columns(dim)
    products = torch.zeros(len(train.weight), len(target.weight), device=device)
    for start in range(0, dim, step):
        left = _as_float32(train.raw[:, start : start + step], device)
        right = _as_float32(target.raw[:, start : start + step], device)
        add_dot_products(products, left, right)
    products *= torch.from_numpy(train.weight).to(device, torch.float32).unsqueeze(1)
    return products.mul_(torch.from_numpy(target.weight).to(device, torch.float32))


def _of_cosines(pair: CheckpointPair, start: int, stop: int, first: int, last: int, estimator: str) -> Tensor:
    """Return weighted dot products ``[n, m]`` from cosines."""
    blocks = []
    for begin, block in pair.cosines or ():
        low, high = max(first, begin), min(last, begin + block.shape[1])
        if low < high:
            blocks.append(torch.from_numpy(np.array(block.matrix()[start:stop, low - begin : high - begin])))
    products = torch.cat(blocks, dim=1)
    for dim, (table, rows) in enumerate(((pair.train, slice(start, stop)), (pair.targets, slice(first, last)))):
        norm = table.column("gradient_norm")[rows]
        weight = row_weights(estimator, table.column("slope")[rows], norm) * norm
        products *= torch.from_numpy(weight).float().unsqueeze(1 - dim)
    return products


def _as_float32(raw: np.ndarray, device: torch.device) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # it is only read
        return torch.from_numpy(raw).to(device, torch.float32)


def write_scores(
    pairs: Sequence[CheckpointPair],
    estimator: str,
    scores: ScoreArray,
    device: torch.device,
    progress: bool | None = None,
) -> np.ndarray:
    """Compute all scores that are not in the store yet.

    Args:
        pairs: The tables of each checkpoint.
        estimator: ``"tracin"`` or ``"cosine"``.
        scores: Where they go; tiles that are done are kept.
        device: Where to multiply.
        progress: Show a bar; None: on a terminal only.

    Returns:
        ``[N, M]``, float32, read-only and mapped from the store.
    """
    num_rows, num_targets = pairs[0].train.num_rows, pairs[0].targets.num_rows
    step = scores.tile_rows
    with tqdm(total=num_rows, unit="row", desc="scores", disable=bar_disabled(progress)) as bar:
        band = np.zeros((0, num_targets), np.float32)
        for start, first, last, tile in score_tiles(pairs, estimator, device, step, scores.tile_done):
            if first == 0:
                band = np.zeros((len(tile), num_targets), np.float32)
                bar.update(start - bar.n)
            band[:, first : first + tile.shape[1]] = tile.cpu().numpy()
            if last:
                scores.write(start, band)
                bar.update(min(step, num_rows - start))
        scores.flush()
        bar.update(num_rows - bar.n)
    return scores.matrix()


def top_rows(
    pairs: Sequence[CheckpointPair],
    estimator: str,
    k: int,
    *,
    largest: bool,
    device: torch.device,
    progress: bool | None = None,
) -> TopK:
    """Return the strongest train rows of each target without holding or storing all scores.

    Args:
        pairs: The tables of each checkpoint.
        estimator: ``"tracin"`` or ``"cosine"``.
        k: How many rows for each target.
        largest: Proponents (largest scores), else opponents (smallest).
        device: Where to multiply.
        progress: Show a bar; None: on a terminal only.

    Returns:
        Indices and scores, ``[M, k]`` each.
    """
    num_rows, num_targets = pairs[0].train.num_rows, pairs[0].targets.num_rows
    running = [
        RunningTopK(min(_TARGET_ROWS, num_targets - first), k, largest) for first in range(0, num_targets, _TARGET_ROWS)
    ]
    with tqdm(total=num_rows, unit="row", desc="top", disable=bar_disabled(progress)) as bar:
        step = tile_rows(pairs[0].train.dim, min(num_targets, _TARGET_ROWS))
        for start, first, last, tile in score_tiles(pairs, estimator, device, step):
            running[first // _TARGET_ROWS].update(start, tile)
            if last:
                bar.update(len(tile))
    found = [part.result() for part in running]
    return TopK(np.concatenate([part.indices for part in found]), np.concatenate([part.scores for part in found]))


def summed_self_influence(tables: Sequence[tuple[float, RowTable]]) -> np.ndarray:
    """Return ``sum_c lr_c ‖gradient of the loss‖²`` of each train row, from exact norms.

    Args:
        tables: Learning rate and train table of each checkpoint.

    Returns:
        ``[N]``, float64.
    """
    total = np.zeros(tables[0][1].num_rows)
    for learning_rate, table in tables:
        total += learning_rate * self_influence(table.column("slope")[:], table.column("gradient_norm")[:])
    return total
