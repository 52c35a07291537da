"""Asks the operating system to read train features in the background before they are multiplied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from tracer.scoring.feature_tables import CheckpointPair, FeatureTable, TrainIndices, index_array, split_at_gaps
from tracer.store import RowTable
from tracer.store.feature_storage import FeatureStorage

_AHEAD_BYTES = 64 << 20
"""How far reading is ahead of multiplying."""

_READ_BYTES = 4 << 20
"""The size of one request."""


class ReadAhead:
    """Prefetches train features in the order in which tiles of scores need them."""

    def __init__(self, pairs: Sequence[CheckpointPair], tiles: Iterable[TrainIndices]) -> None:
        self._requests = _requests([pair.train for pair in pairs if pair.cosines is None], tiles)
        self._rows_ahead = max((_AHEAD_BYTES // _row_bytes(pair.train) for pair in pairs if pair.train.dim), default=0)
        self._num_requested = 0
        self.advance(0)

    def advance(self, num_rows: int) -> None:
        """Request as many more rows as were multiplied."""
        self._num_requested -= num_rows
        while self._num_requested < self._rows_ahead and (request := next(self._requests, None)) is not None:
            table, indices = request
            table.prefetch([(int(near[0]), int(near[-1]) + 1) for near in split_at_gaps(indices)])
            self._num_requested += len(indices)


def _requests(tables: list[RowTable], tiles: Iterable[TrainIndices]) -> Iterator[tuple[RowTable, np.ndarray]]:
    for tile in tiles:
        indices = index_array(tile)
        for table in tables:
            step = max(1, _READ_BYTES // _row_bytes(table))
            for first in range(0, len(indices), step):
                yield table, indices[first : first + step]


def _row_bytes(table: FeatureTable) -> int:
    return max(1, FeatureStorage(table.storage).row_bytes(table.dim))
