"""Rows of features and what belongs to them, for one checkpoint: written in any order, done only once on the disk.

Layout: ``N`` rows of ``dim`` values. A float16 row is stored divided by its largest absolute value, which is its
``scale``: gradients of norm 1e-12 and 1e12 keep the same relative precision. An int8 row is stored in units of its
``scale``, the largest over 127 (`tracer.store.rounding`). A float32 row has scale 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import numpy as np
import torch

from tracer._core.files import disk_errors
from tracer._core.text import listing
from tracer.errors import CallOrderError, InputError, InputTypeError, MismatchError, NonFiniteError, StoreError
from tracer.store.arrays.completion_mask import FLUSH_SECONDS, Completion
from tracer.store.manifest import json_value
from tracer.store.metadata import NODE, StorePath, write_group
from tracer.store.paths import open_arrays
from tracer.store.quantization import RELATIVE, relative_rows, row_scale
from tracer.store.remote_path import RemotePath
from tracer.store.table_schema import COLUMNS, NO_LABEL, read_attributes, row_checksums, table_layouts

_MAX_NAMED = 5


class RowTable:
    """The rows of one checkpoint: train rows, or target rows.

    One process writes a table, or several of which no two write the same row; any number may read it meanwhile. Rows
    that were written count as done only after `flush`, which also runs by itself every ``flush_seconds`` of writing,
    and when the table is closed. A process that is killed loses the rows since then and no others. Views and copies
    stay valid after `close`.

    Args:
        path: The table's directory.
        flush_seconds: How long written rows may wait for a flush; 0 flushes with every write.

    Attributes:
        num_rows: N.
        dim: The values of a row; 0 without features.
        storage: The dtype they are stored in; ``"none"`` without features.
        block_rows: The rows of one file: processes that write at the same time write different blocks.

    Raises:
        StoreError: The table is damaged.
    """

    def __init__(self, path: StorePath, *, flush_seconds: float = FLUSH_SECONDS) -> None:
        self.path = path
        self._closed = False
        self._scaled, self._half = torch.empty(0, 0), torch.empty(0, 0, dtype=torch.float16)
        self._finalized_at: tuple[object, bool] = (None, False)
        described = self.attributes
        try:
            self.num_rows, self.storage = int(described["num_rows"]), str(described["storage"])
            self.block_rows = int(described["block_rows"])
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path / NODE} is damaged ({error!r}): restore it, or remove {path}") from error
        names = [*COLUMNS, *([] if self.storage == "none" else ["features"])]
        self._arrays = open_arrays(path, names)
        self.dim = self._arrays["features"].layout.shape[-1] if "features" in self._arrays else 0
        expected = table_layouts(self.num_rows, self.dim, self.storage, self.block_rows)
        for name, array in self._arrays.items():
            if array.layout != expected[name]:
                raise StoreError(
                    f"{array.path} is damaged: expected {expected[name]}, found {array.layout}; remove {path} to "
                    "compute it again"
                )
        self._features = self._arrays.get("features")
        self._pool = "targets" if described.get("rounding") == "targets" else "train"
        data = [array for name, array in self._arrays.items() if name != "done"]
        self._completion = Completion(self._arrays["done"], data, flush_seconds)
        self._check_files()

    def _check_files(self) -> None:
        """Check that every file that holds a done row is there.

        Raises:
            StoreError: One is missing.
        """
        needed = set((np.flatnonzero(self.done) // self.block_rows).tolist())
        if not needed:
            return
        for array in self._arrays.values():
            missing = sorted(needed - array.stored_chunks())
            if missing:
                raise StoreError(
                    f"{array.chunk_path(missing[0])} is missing although rows in it are done: restore it, or run "
                    "tracer.verify to have its rows computed again"
                )

    @property
    def attributes(self) -> dict[str, Any]:
        """What is recorded of the table, as it stands on the disk: a copy; change it with `set_attributes`."""
        return read_attributes(self.path)

    def set_attributes(self, **changes: Any) -> None:
        """Flush, then change attributes on the disk, all of them or none.

        Args:
            **changes: JSON values by name, for example ``learning_rate=0.1`` or ``finalized=True``.
        """
        self.flush()
        with disk_errors(self.path):
            write_group(self.path, {**self.attributes, **json_value(changes, "attributes")})

    @property
    def done(self) -> np.ndarray:
        """``[N]``, bool, a copy: which rows are durably done; pending ones are not."""
        return self._completion.done

    @property
    def num_done(self) -> int:
        """How many rows are durably done."""
        return int(np.count_nonzero(self.done))

    @property
    def pending(self) -> int:
        """How many rows were written since the last flush."""
        return int(np.count_nonzero(self._completion.pending))

    def remaining(self) -> np.ndarray:
        """Flush and return the indices of the rows that are not done: ``[n]``, int64, ascending."""
        self.flush()
        return np.flatnonzero(~self.done)

    def check_rows(self, rows: np.ndarray, fingerprint: np.ndarray) -> np.ndarray:
        """Tell which rows are there already, and check that they are the same rows.

        Args:
            rows: ``[n]``, int64, row indices.
            fingerprint: ``[n]``, uint64, a hash of each row's inputs.

        Returns:
            ``[n]``, bool: done or pending.

        Raises:
            MismatchError: A row that is there has another fingerprint.
        """
        rows = self.checked_rows(rows)
        fingerprint = self._checked_fingerprint(fingerprint, len(rows))
        there = self._completion.written(rows)
        other = there & (self._arrays["fingerprint"].take(rows) != fingerprint)
        if other.any():
            wrong = rows[other]
            raise MismatchError(
                f"{len(wrong)} rows hold other data than what came under their index in {self.path}: "
                f"{_named(wrong)}. Expected the same data set in the same order (no shuffling that changes indices, no "
                "random augmentation); pass the same rows, or choose another save_dir"
            )
        return np.asarray(there)

    def write(
        self,
        rows: np.ndarray,
        features: np.ndarray | None,
        *,
        loss: np.ndarray,
        loss_grad: np.ndarray,
        loss_hess: np.ndarray,
        gradient_norm: np.ndarray,
        fingerprint: np.ndarray,
        output_change: np.ndarray | None = None,
        label: np.ndarray | None = None,
    ) -> None:
        """Write rows, each at most once in a call; they are pending until the next flush.

        A row that is done loses its mark, durably, before it is written again.

        Args:
            rows: ``[n]``, int64, row indices in any order; consecutive ones are fastest.
            features: ``[n, dim]``, float32; None for a table without features.
            loss: ``[n]``, float32, L.
            loss_grad: ``[n]``, float32, Q = dL/df.
            loss_hess: ``[n]``, float32, w = d²L/df².
            gradient_norm: ``[n]``, float32, the exact norm of the gradient of f.
            fingerprint: ``[n]``, uint64, a hash of each row's inputs.
            output_change: ``[n]``, float32, f minus the f of a model that has learned nothing; None if not known.
            label: ``[n]``, int64, each row's class; None where rows have none.

        Raises:
            CallOrderError: The table is closed or finalized.
            InputTypeError: An array has another shape or type, or features came for a table without.
            NonFiniteError: A value is NaN or infinite; nothing was written.
        """
        self._check_open()
        rows = self.checked_rows(rows, unique=True)
        columns = {"loss": loss, "loss_grad": loss_grad, "loss_hess": loss_hess, "gradient_norm": gradient_norm}
        columns["output_change"] = np.zeros(len(rows), np.float32) if output_change is None else output_change
        checked = {name: self._checked_floats(name, values, rows, (len(rows),)) for name, values in columns.items()}
        checked["fingerprint"] = self._checked_fingerprint(fingerprint, len(rows))
        checked["label"] = np.full(len(rows), NO_LABEL) if label is None else np.asarray(label, np.int64)
        if checked["label"].shape != (len(rows),):
            raise InputTypeError(f"label is of shape {checked['label'].shape}: expected ({len(rows)},)")
        if (features is None) != (self._features is None):
            raise InputTypeError(f"features came as {type(features).__name__} for a table of storage={self.storage!r}")
        largest = np.ones(len(rows), np.float32)
        if features is not None:
            features = self._floats("features", features, (len(rows), self.dim))
            largest = self._largest(features)
            self._check_finite("features", largest, rows)
        if not len(rows):
            return
        if self._finalized():
            raise CallOrderError(
                f"{self.path} is finalized and rows {_named(rows)} came to be written: write them before finalizing, "
                "call set_attributes(finalized=False) first, or choose another save_dir"
            )
        checked["scale"] = row_scale(largest, self.storage)
        raw = None if features is None else self._raw(features, checked["scale"], rows)
        checked["checksum"] = row_checksums(raw, checked)
        with self._completion.writing(rows):
            if self._features is not None and raw is not None:
                self._features.assign(rows, raw)
            for name, values in checked.items():
                self._arrays[name].assign(rows, values)

    def flush(self) -> None:
        """Make pending rows durable, then mark them done.

        When that fails nothing is marked done and the pending rows have to be written again.
        """
        if self._completion.pending.any():
            self._check_open()
            self._completion.flush()

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a column, or some rows of it: a view that cannot be written where they lie in one file, else a copy.

        Args:
            name: ``loss``, ``loss_grad``, ``loss_hess``, ``gradient_norm``, ``output_change`` or ``scale`` (float32),
                ``label`` (int64, `NO_LABEL` where there is none), ``fingerprint`` or ``checksum`` (uint64), or ``done``
                (bool, where pending rows may already show).
            start: The first row.
            stop: One past the last row; None is N.

        Returns:
            ``[stop - start]``; zeros where no row has ever been written.

        Raises:
            InputError: There is no such column, or the range is not within the table.
        """
        if name not in COLUMNS:
            raise InputError(f"column is {name!r}: expected one of {sorted(COLUMNS)}")
        stop = self.num_rows if stop is None else stop
        self._check_range(start, stop)
        return self._arrays[name].read(start, stop)

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to read the features of rows in the background, for when they are asked for.

        Args:
            start: The first row.
            stop: One past the last row.
        """
        self._check_range(start, stop)
        if self._features is not None:
            self._features.prefetch(start, stop)

    def raw_features(self, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """Return rows as they are stored, without copying: one view for each file they lie in.

        Args:
            start: The first row.
            stop: One past the last row.

        Returns:
            Pairs of the first row's index and ``[n, dim]`` in the storage dtype; times ``scale`` they are features.

        Raises:
            CallOrderError: The table has no features.
        """
        self._check_range(start, stop)
        if self._features is None:
            raise CallOrderError(f"{self.path} has no features: its store was made with storage='none'")
        return list(self._features.rows(start, stop))

    def tiles(
        self, max_rows: int, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Yield rows in order, tile by tile, without copying.

        Args:
            max_rows: The most rows of a tile; a tile also ends where a file ends.
            start: The first row.
            stop: One past the last row; None is N.

        Yields:
            ``(first row, one past the last, raw [n, dim] in the storage dtype, scale [n] float32)``.

        Raises:
            InputError: ``max_rows`` is below 1, or the range is not within the table.
        """
        stop = self.num_rows if stop is None else stop
        self._check_range(start, stop)
        if max_rows < 1:
            raise InputError(f"max_rows is {max_rows}: expected at least 1")
        for first, view in self.raw_features(start, stop):
            for offset in range(0, len(view), max_rows):
                tile = view[offset : offset + max_rows]
                begin = first + offset
                yield begin, begin + len(tile), tile, self.column("scale", begin, begin + len(tile))

    def features(self, start: int, stop: int) -> np.ndarray:
        """Return features in true units: ``[stop - start, dim]``, float32, a copy."""
        self._check_range(start, stop)
        tile = np.empty((stop - start, self.dim), dtype=np.float32)
        for begin, end, raw, scale in self.tiles(max(1, stop - start), start, stop):
            part = tile[begin - start : end - start]
            # torch converts float16 and int8 fifty times faster than numpy; it wants memory of its own
            part[:] = raw if self.storage == "float32" else torch.from_numpy(np.array(raw)).float().numpy()
            part *= scale[:, None]
        return tile

    def close(self) -> None:
        """Flush and let go of the files; a second call does nothing."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._closed = True
            for array in self._arrays.values():
                array.close()

    def __enter__(self) -> RowTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CallOrderError(f"{self.path} is closed: open the table again through the store")

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_rows:
            raise InputError(f"rows {start} to {stop} were asked for: expected 0 <= start <= stop <= {self.num_rows}")

    def checked_rows(self, rows: np.ndarray, unique: bool = False) -> np.ndarray:
        """Return row indices as int64 after checking them."""
        rows = np.asarray(rows)
        if rows.ndim != 1 or (rows.dtype.kind not in "iu" and rows.size):
            raise InputTypeError(f"rows are {rows.dtype} of shape {rows.shape}: expected [n] integers")
        outside = rows[(rows < 0) | (rows >= self.num_rows)]
        if len(outside):
            raise InputError(f"rows {_named(outside)} are outside 0 to {self.num_rows - 1} of {self.path}")
        rows = rows.astype(np.int64)
        consecutive = bool((np.diff(rows) == 1).all())
        if unique and not consecutive and len(np.unique(rows)) != len(rows):
            values, counts = np.unique(rows, return_counts=True)
            raise InputError(f"rows {_named(values[counts > 1])} come more than once in a batch: pass each row once")
        return rows

    def _checked_fingerprint(self, fingerprint: np.ndarray, num_rows: int) -> np.ndarray:
        """Return fingerprints after checking them."""
        fingerprint = np.asarray(fingerprint)
        if fingerprint.dtype != np.uint64 or fingerprint.shape != (num_rows,):
            raise InputTypeError(
                f"fingerprint is {fingerprint.dtype} of shape {fingerprint.shape}: expected uint64 ({num_rows},)"
            )
        return fingerprint

    def _checked_floats(self, name: str, values: np.ndarray, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Return values as float32 after checking their shape and that they are finite."""
        values = self._floats(name, values, shape)
        self._check_finite(name, values, rows)
        return values

    def _floats(self, name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        values = np.asarray(values)
        if values.shape != shape or values.dtype.kind != "f":
            raise InputTypeError(f"{name} is {values.dtype} of shape {values.shape}: expected float32 {shape}")
        with np.errstate(over="ignore"):
            return values.astype(np.float32, copy=False)

    def _check_finite(self, name: str, values: np.ndarray, rows: np.ndarray) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            raise NonFiniteError(
                f"{name} of rows {_named(rows[~finite])} is NaN or infinite in float32: nothing of the batch was "
                "written; check these rows' inputs and the checkpoint, or drop them from the data set"
            )

    def _raw(self, features: np.ndarray, scale: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return float32 features ``[n, dim]`` as they are stored, in memory that is used again."""
        memory = self._memory(features.shape) if self.storage in RELATIVE else None
        relative = relative_rows(features, scale, rows, self.storage, self._pool, memory)
        if self.storage != "float16":
            return np.ascontiguousarray(relative)
        if len(self._half) < len(features):
            with torch.inference_mode(False):
                self._half = torch.empty(features.shape, dtype=torch.float16)
        return self._half[: len(features)].copy_(torch.from_numpy(relative)).numpy()

    def _largest(self, features: np.ndarray) -> np.ndarray:
        """Return the largest absolute value of each row of float32 values, NaN where there is one: ``[n]``."""
        values = torch.from_numpy(features)
        return torch.maximum(values.amax(1), values.amin(1).neg_()).numpy()

    def _memory(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Return memory for a batch of features that is used again for the next; torch works on all cores."""
        if len(self._scaled) < shape[0]:
            with torch.inference_mode(False):
                self._scaled = torch.empty(shape)
        return self._scaled[: shape[0]]

    def unmark(self, rows: np.ndarray) -> None:
        """Say durably that rows are not done, so that they are computed again, and that the table is not finalized.

        Args:
            rows: ``[n]``, int64, row indices.
        """
        rows = self.checked_rows(rows)
        self.set_attributes(finalized=False)
        self._completion.unmark(rows)

    def _finalized(self) -> bool:
        """Tell whether the table is finalized, by any process; its document is read only when it may have changed."""
        if isinstance(self.path, RemotePath):
            key: object = time.monotonic() // FLUSH_SECONDS
        else:
            with disk_errors(self.path):
                found = (self.path / NODE).stat()
            key = found.st_ino, found.st_mtime_ns
        if key != self._finalized_at[0]:
            self._finalized_at = key, bool(self.attributes.get("finalized"))
        return self._finalized_at[1]


def _named(rows: np.ndarray) -> str:
    return listing(rows, _MAX_NAMED)
