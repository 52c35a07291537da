"""Stored features as scoring reads them: tables on disk or in memory, and chosen rows of them.

Layout: a table has rows ``[n, k]`` as stored (float32, float16 or int8) and a ``scale [n]``, by which a row is
multiplied to get its features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, Shaped
from torch import Tensor

from tracer._core.blocks import row_blocks
from tracer.errors import NonFiniteError
from tracer.store import RowTable, ScoreArray
from tracer.store.quantization import relative_rows, row_scale

DEQUANTIZED_BYTES = 32 << 20
"""The most bytes of a block of float64 features."""

_MAX_GAP = 64
_MAX_PIECES = 16

TrainIndices = range | np.ndarray
"""Ascending indices of training examples."""


class FeatureTable(Protocol):
    """The part of `tracer.store.RowTable` that scoring reads."""

    num_rows: int
    dim: int
    storage: str

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return one value for each example from ``start`` to ``stop``."""

    def raw_features(self, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """Return stored features as views, each with its first index."""


@dataclass(frozen=True)
class CheckpointPair:
    """The train and target features of one checkpoint, a term of the sum over checkpoints."""

    weight: float
    train: RowTable
    targets: FeatureTable  # as stored, or preconditioned
    # in place of features: exact cosines with blocks of targets, each with the index of its first target
    cosines: Sequence[tuple[int, ScoreArray]] | None = None
    groups: np.ndarray | None = (
        None  # [M], the group of each target over which products of cosines are summed; -1: none
    )
    sizes: np.ndarray | None = None  # [N], the size of each training example's effect, by which scores are divided


class InMemoryTable:
    """Target features that are not in a store, rounded as a store with this storage dtype rounds them.

    Args:
        features: ``[m, k]``.
        loss_grad: ``[m]``.
        gradient_norm: ``[m]``.
        storage: The storage dtype.
        rows: ``[m]``, the indices that rounding depends on; equal ones round equal features alike. Default: as stored.

    Raises:
        NonFiniteError: A value is NaN or infinite.
    """

    def __init__(
        self,
        features: Float32[np.ndarray, "m k"],
        loss_grad: Shaped[np.ndarray, " m"],
        gradient_norm: Shaped[np.ndarray, " m"],
        storage: str,
        rows: Int64[np.ndarray, " m"] | None = None,
    ) -> None:
        largest = np.abs(features).max(1)
        bad = np.flatnonzero(~np.isfinite(largest) | ~np.isfinite(loss_grad) | ~np.isfinite(gradient_norm))
        if len(bad):
            raise NonFiniteError(
                f"The gradient or ∂L/∂f of examples {bad[:5].tolist()} of the batch is NaN or infinite (in float32). "
                f"Check the inputs and labels of these examples; if all are affected, the checkpoint's weights."
            )
        scale = row_scale(largest, storage)
        self.num_rows, self.dim = features.shape
        self.storage = storage
        rows = np.arange(len(features)) if rows is None else rows
        self._raw = relative_rows(features, scale, rows, storage, "targets").astype(storage)
        self._columns = {"loss_grad": loss_grad, "gradient_norm": gradient_norm, "scale": scale}

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return one value for each example from ``start`` to ``stop``."""
        return self._columns[name][start:stop]

    def raw_features(self, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """Return stored features as one view, with its first index."""
        return [(start, self._raw[start:stop])]


def index_array(indices: TrainIndices) -> np.ndarray:
    """Return indices as an array."""
    return np.arange(indices.start, indices.stop) if isinstance(indices, range) else indices


def is_contiguous(indices: np.ndarray) -> bool:
    """Tell whether ascending indices have no gaps."""
    return bool(indices[-1] - indices[0] + 1 == len(indices))


def split_at_gaps(indices: np.ndarray) -> list[np.ndarray]:
    """Split ascending indices where reading the examples in between would cost more than reading twice."""
    if is_contiguous(indices):
        return [indices]
    return np.split(indices, np.flatnonzero(np.diff(indices) > _MAX_GAP) + 1)


def column_at(table: FeatureTable, name: str, indices: np.ndarray) -> np.ndarray:
    """Return a column's values at ascending indices."""
    return table.column(name, int(indices[0]), int(indices[-1]) + 1)[indices - indices[0]]


def joined_views(views: list[tuple[int, np.ndarray]]) -> np.ndarray:
    """Return one array of what `FeatureTable.raw_features` returns, without a copy if it is one view."""
    return views[0][1] if len(views) == 1 else np.concatenate([view for _, view in views])


def raw_features_at(table: FeatureTable, indices: np.ndarray) -> Shaped[np.ndarray, "n k"]:
    """Return stored features at ascending indices, without a copy if they are consecutive in one file."""
    found, pieces = [], split_at_gaps(indices)
    if len(pieces) > _MAX_PIECES and isinstance(table, RowTable):
        return table.scattered_features(indices)
    for near in pieces:
        view = joined_views(table.raw_features(int(near[0]), int(near[-1]) + 1))
        found.append(view if len(view) == len(near) else view[near - near[0]])
    return found[0] if len(found) == 1 else np.concatenate(found)


def dequantized_blocks(
    table: FeatureTable, indices: range, device: torch.device
) -> Iterator[tuple[int, Float64[Tensor, "n k"]]]:
    """Yield copies of the features of consecutive examples, block by block, each with its first index."""
    for low, high in row_blocks(len(indices), 8 * table.dim, DEQUANTIZED_BYTES):
        start, stop = indices.start + low, indices.start + high
        views = [torch.from_numpy(np.array(view)).to(device) for _, view in table.raw_features(start, stop)]
        scale = torch.from_numpy(table.column("scale", start, stop).astype(np.float64)).to(device)
        yield start, torch.cat(views).to(torch.float64).mul_(scale.unsqueeze(1))


def dequantized_features(table: FeatureTable, indices: np.ndarray, device: torch.device) -> Float64[Tensor, "n k"]:
    """Return a copy of the features at ascending indices."""
    found = [
        torch.from_numpy(view[indices[(indices >= start) & (indices < start + len(view))] - start].astype(np.float64))
        for start, view in table.raw_features(0, table.num_rows)
    ]
    scale = torch.from_numpy(table.column("scale").astype(np.float64)[indices]).to(device)
    return torch.cat(found).to(device).mul_(scale.unsqueeze(1))
