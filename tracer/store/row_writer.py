"""The writing side of a table: rows are checked, stored with checksums, and marked done once they are durable."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float32, Int64

from tracer._core.files import disk_errors
from tracer._core.text import listing
from tracer.errors import CallOrderError, InputError, InputTypeError, NonFiniteError
from tracer.store.arrays.chunked import ChunkedArray, is_consecutive
from tracer.store.arrays.completion_mask import CompletionMask
from tracer.store.arrays.metadata import NODE
from tracer.store.arrays.store_path import StorePath
from tracer.store.feature_storage import FeatureStorage
from tracer.store.quantization import RELATIVE, binary_scale, relative_rows, row_scale
from tracer.store.table_schema import ARRAYS, NO_LABEL, Writable, join_columns, read_attributes, row_checksums

_MAX_NAMED = 5


class RowWriter:
    """The writing side of a `RowTable`.

    Args:
        path: The table's directory.
        arrays: Its arrays by name.
        mask: Marks which rows are done.
        storage: The dtype of features, or ``"none"``.
        pool: The random numbers that round int8 rows: ``"train"`` or ``"targets"``.
        writable: Whether rows may be written.
    """

    def __init__(
        self,
        path: StorePath,
        arrays: Mapping[str, ChunkedArray],
        mask: CompletionMask,
        storage: str,
        pool: str,
        writable: Writable,
    ) -> None:
        self.path, self._arrays, self._mask = path, arrays, mask
        self._storage, self._pool, self._writable = storage, pool, writable
        self._features = arrays.get("features")
        # Memory for a batch of features, used again for the next batch instead of being allocated again.
        self._scaled, self._half = torch.empty(0, 0), torch.empty(0, 0, dtype=torch.float16)
        self.named: Callable[[np.ndarray], str] = named_rows
        self._finalized_at: tuple[object, bool] = (None, False)

    def write(
        self,
        rows: np.ndarray,
        features: np.ndarray | None,
        floats: Mapping[str, np.ndarray],
        fingerprint: np.ndarray,
        classes: Mapping[str, np.ndarray | None],
        audited: np.ndarray | None,
    ) -> None:
        """Check a batch, then write it; its rows are pending until the next flush."""
        columns = {name: self._checked_floats(name, values, rows) for name, values in floats.items()}
        columns["fingerprint"] = checked_fingerprint(fingerprint, len(rows))
        for name, values in classes.items():
            columns[name] = np.full(len(rows), NO_LABEL) if values is None else np.asarray(values, np.int64)
            if columns[name].shape != (len(rows),):
                raise InputTypeError(f"{name} is of shape {columns[name].shape}: expected ({len(rows)},)")
        columns["audited"] = np.zeros(len(rows), bool) if audited is None else np.asarray(audited, bool)
        if (features is None) != (self._features is None):
            raise InputTypeError(f"features is {type(features).__name__} for a table of storage={self._storage!r}")
        largest = np.ones(len(rows), np.float32)
        if features is not None and self._features is not None:
            dim = FeatureStorage(self._storage).dim(self._features.layout.shape[-1])
            features = _floats("features", features, (len(rows), dim))
            largest = _largest(features)  # NaN or infinite if any of the row's values is
            self._check_finite("features", largest, rows)
        if not len(rows):
            return
        if self._finalized():
            raise CallOrderError(
                f"{self.path} is finalized, got rows {self.named(rows)} to write: write them before finalizing; "
                "if their marks are lost, run tracer.verify first; else choose another save_dir"
            )
        columns["scale"] = row_scale(largest, self._storage)
        if features is not None and self._storage == "binary":
            columns["scale"] = binary_scale(features, largest)
        raw = None if features is None else self._raw(features, columns["scale"], rows)
        columns["checksum"] = row_checksums(raw, columns)
        with self._mask.writing(rows):
            if self._features is not None and raw is not None:
                self._features.assign(rows, raw)
            for name in ARRAYS:
                self._arrays[name].assign(rows, join_columns(name, columns))

    def _checked_floats(self, name: str, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
        values = _floats(name, values, (len(rows),))
        self._check_finite(name, values, rows)
        return values

    def _check_finite(self, name: str, values: np.ndarray, rows: np.ndarray) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            raise NonFiniteError(
                f"{name} of rows {self.named(rows[~finite])} is NaN or infinite in float32: nothing of the batch was "
                "written; check these examples' inputs and the checkpoint, or drop them from the data set"
            )

    def _raw(
        self, features: Float32[np.ndarray, "n k"], scale: Float32[np.ndarray, " n"], rows: Int64[np.ndarray, " n"]
    ) -> np.ndarray:
        """Return features ``[n, k]`` in the storage dtype, in memory that is used again."""
        memory = self._memory(features.shape) if self._storage in RELATIVE else None
        relative = relative_rows(features, scale, rows, self._storage, self._pool, memory)
        if self._storage != "float16":
            return np.ascontiguousarray(relative)
        if len(self._half) < len(features):
            with torch.inference_mode(False):
                self._half = torch.empty(features.shape, dtype=torch.float16)
        return self._half[: len(features)].copy_(torch.from_numpy(relative)).numpy()

    def _memory(self, shape: tuple[int, ...]) -> torch.Tensor:
        if len(self._scaled) < shape[0]:
            with torch.inference_mode(False):
                self._scaled = torch.empty(shape)
        return self._scaled[: shape[0]]

    def _finalized(self) -> bool:
        """Return whether any process finalized the table; its document is read only if it may have changed.

        It also raises `StoreError` if the table is not `Writable`.
        """
        with disk_errors(self.path):
            stamp = (self.path / NODE).change_stamp()
        if stamp != self._finalized_at[0]:
            attributes = read_attributes(self.path)
            self._writable.check(attributes)
            self._finalized_at = stamp, bool(attributes.get("finalized"))
        return self._finalized_at[1]


def checked_rows(rows: np.ndarray, num_rows: int, path: StorePath, unique: bool = False) -> np.ndarray:
    """Return row indices as int64 after checking that they are within a table, and different if that is needed."""
    rows = np.asarray(rows)
    if rows.ndim != 1 or (rows.dtype.kind not in "iu" and rows.size):
        raise InputTypeError(f"rows are {rows.dtype} of shape {rows.shape}: expected [n] integers")
    outside = rows[(rows < 0) | (rows >= num_rows)]
    if len(outside):
        raise InputError(f"rows {named_rows(outside)} are outside 0 to {num_rows - 1} of {path}")
    rows = rows.astype(np.int64)
    if unique and not is_consecutive(rows) and len(np.unique(rows)) != len(rows):
        values, counts = np.unique(rows, return_counts=True)
        repeated = named_rows(values[counts > 1])
        raise InputError(f"rows {repeated} are more than once in a batch: pass each row once")
    return rows


def checked_fingerprint(fingerprint: np.ndarray, num_rows: int) -> np.ndarray:
    """Return fingerprints after checking their dtype and shape."""
    fingerprint = np.asarray(fingerprint)
    if fingerprint.dtype != np.uint64 or fingerprint.shape != (num_rows,):
        raise InputTypeError(
            f"fingerprint is {fingerprint.dtype} of shape {fingerprint.shape}: expected uint64 ({num_rows},)"
        )
    return fingerprint


def named_rows(rows: np.ndarray) -> str:
    """Return the first row indices and how many more there are, for errors."""
    return listing(rows, _MAX_NAMED)


def _floats(name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    values = np.asarray(values)
    if values.shape != shape or values.dtype.kind != "f":
        raise InputTypeError(f"{name} is {values.dtype} of shape {values.shape}: expected float32 {shape}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is refused by its name
        return values.astype(np.float32, copy=False)


def _largest(features: Float32[np.ndarray, "n k"]) -> Float32[np.ndarray, " n"]:
    """Return the largest absolute value of each row; without a temporary as large as the features, as abs needs."""
    values = torch.from_numpy(features)
    return torch.maximum(values.amax(1), values.amin(1).neg_()).numpy()
