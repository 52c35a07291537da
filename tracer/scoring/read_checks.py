"""Compares rows with their checksums as they are read: all of few rows, a random sample of many."""

from __future__ import annotations

import numpy as np

from tracer.store import RowTable

WHOLE_BYTES = 1 << 19
"""The bytes of a table that are checked whatever it costs; of a larger one not each time."""

OF_LARGER_TABLES = 0.25
"""How often `WHOLE_BYTES` of a larger table are checked: files of columns are opened for that, 2 ms of CPU."""

_LEAST_ROWS = 256  # a call for few rows costs as much as one for hundreds
_STEP_ROWS = 1024
_PRODUCTS_A_CHECK = 16384


class ReadCheck:
    """The check of one pass over a table.

    A checksum takes as long as some hundred products of the row. So if each row is multiplied by 16384 vectors or more,
    all rows are checked, else a share that costs about one percent of the products.

    Args:
        table: The table that is read.
        products: The number of vectors that each row is multiplied by.
    """

    def __init__(self, table: RowTable, products: int) -> None:
        self._table, self._share = table, min(1.0, products / _PRODUCTS_A_CHECK)
        self._owed, self._random = 0.0, np.random.default_rng()
        whole = WHOLE_BYTES // max(1, table.row_bytes)
        self._whole = whole if table.num_rows <= whole or self._random.random() < OF_LARGER_TABLES else 0

    def check(self, indices: np.ndarray) -> None:
        """Check some of the rows at ascending indices; raise `StoreError` if one is damaged."""
        self._owed += self._share * len(indices)
        count = min(max(self._whole, int(self._owed)), len(indices))
        if not self._whole and count < min(_LEAST_ROWS, len(indices)):
            return
        self._whole, self._owed = max(0, self._whole - count), max(0.0, self._owed - count)
        first = int(self._random.integers(len(indices) - count + 1))
        for start in range(first, first + count, _STEP_ROWS):
            self._table.check_content(indices[start : min(start + _STEP_ROWS, first + count)])
