"""Scores in several files, in a remote store or in half precision, indexed like a numpy matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64
from numpy.lib.mixins import NDArrayOperatorsMixin


class ScoreMatrix(NDArrayOperatorsMixin):
    """A float32 matrix ``[N, M]`` of which only the indexed rows are read from the store.

    It takes the keys of a numpy matrix: integers, slices, index lists, masks, and pairs of them. numpy functions accept
    it and read all of it.

    Args:
        shape: ``(N, M)``.
        read: Returns rows ``start`` to ``stop`` as ``[stop - start, M]``, float32.

    >>> matrix = ScoreMatrix((4, 2), lambda start, stop: np.arange(8, dtype=np.float32).reshape(4, 2)[start:stop])
    >>> matrix[1].tolist(), matrix[[3, 0], 1].tolist(), matrix[matrix[:, 0] > 2].tolist()
    ([2.0, 3.0], [7.0, 1.0], [[4.0, 5.0], [6.0, 7.0]])
    """

    def __init__(self, shape: tuple[int, int], read: Callable[[int, int], np.ndarray]) -> None:
        self.shape = shape
        self._read = read

    dtype = np.dtype(np.float32)
    ndim = 2

    @property
    def size(self) -> int:
        """The number of scores."""
        return self.shape[0] * self.shape[1]

    @property
    def nbytes(self) -> int:
        """The bytes that all scores take in memory."""
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> np.ndarray:  # noqa: N802 - numpy's name
        """All scores, targets first: ``[M, N]``, read into memory."""
        return np.asarray(self).T

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"ScoreMatrix(shape={self.shape}, dtype=float32, read from the store when it is indexed)"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("expected copy=True or None: an array of scores that are read from files is always a copy")
        return np.array(self._read(0, len(self)), dtype=dtype)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        plain = [np.asarray(value) if isinstance(value, ScoreMatrix) else value for value in inputs]
        return getattr(ufunc, method)(*plain, **options)

    def __getitem__(self, key: Any) -> Any:
        keys = key if isinstance(key, tuple) else (key,)
        if Ellipsis in [part for part in keys if part is Ellipsis]:
            place = [part is Ellipsis for part in keys].index(True)
            keys = (*keys[:place], *[slice(None)] * (3 - len(keys)), *keys[place + 1 :])
        if len(keys) > 2 or any(part is None for part in keys):
            raise IndexError(f"scores have the shape {self.shape}: expected one index for rows and one for targets")
        rows, columns = keys[0] if keys else slice(None), keys[1] if len(keys) == 2 else slice(None)
        if isinstance(rows, slice) and rows.step in (None, 1):
            start, stop, _ = rows.indices(len(self))
            return np.array(self._read(start, max(start, stop)))[:, columns]
        chosen = np.arange(len(self))[rows]
        if chosen.ndim == 0:
            return np.array(self._read(int(chosen), int(chosen) + 1))[0][columns]
        unique, places = np.unique(chosen, return_inverse=True)
        places = places.reshape(chosen.shape)
        block = self._take(unique)
        if isinstance(rows, slice) or isinstance(columns, slice):
            return block[places][..., columns]
        return block[places, np.arange(self.shape[1])[columns]]

    def _take(self, rows: Int64[np.ndarray, " n"]) -> Float32[np.ndarray, "n M"]:
        """Return ascending rows; consecutive ones are read together."""
        if not len(rows):
            return np.empty((0, self.shape[1]), np.float32)
        ends = np.flatnonzero(np.diff(rows) != 1) + 1
        blocks = np.split(rows, ends)
        return np.concatenate([self._read(int(block[0]), int(block[-1]) + 1) for block in blocks])
