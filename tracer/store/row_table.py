"""A table of features and the columns that belong to them, for one checkpoint.

Layout: ``N`` rows of ``dim`` values, one row for each example. A float16 row is stored divided by its largest absolute
value, its ``scale``: gradients of norm 1e-12 and 1e12 have the same relative precision. An int8 row is stored in units
of its ``scale``, the largest absolute value over 127 (`tracer.store.quantization`). A float32 row has scale 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from tracer._core.files import disk_errors
from tracer.errors import CallOrderError, InputError, InputTypeError, MismatchError, StoreError
from tracer.store.arrays.completion_mask import FLUSH_SECONDS, CompletionMask
from tracer.store.arrays.layout import Layout
from tracer.store.arrays.metadata import NODE, write_group
from tracer.store.arrays.opening import open_arrays
from tracer.store.arrays.store_path import StorePath
from tracer.store.feature_storage import FeatureStorage
from tracer.store.manifest import json_value
from tracer.store.quantization import signs
from tracer.store.row_writer import RowWriter, checked_fingerprint, checked_rows, named_rows
from tracer.store.table_schema import (
    ARRAYS,
    COLUMNS,
    OPTIONAL_VALUES,
    VALUES,
    Writable,
    changing,
    damaged_rows,
    read_attributes,
    read_column,
    table_layouts,
    take_column,
)

KnownTables = dict[StorePath, tuple[tuple[Any, ...], Mapping[str, Layout]]]
"""What the documents of tables said, by path: what changes with the arrays, and the arrays' layouts."""


_ROUNDING = 256 * float(np.finfo(np.float32).eps)
"""The difference of losses, which cancel, that rounding can explain."""


class RowTable:
    """The table of one checkpoint: training examples, or targets.

    One process writes a table, or several of which no two write the same row; any number may read it meanwhile. Written
    rows count as done only after `flush`, which also runs by itself every ``flush_seconds`` of writing, and when the
    table is closed. A process that is killed loses the rows since then and no others. Views and copies stay valid after
    `close`.

    Args:
        path: The table's directory.
        flush_seconds: The time that written rows may wait for a flush; 0 flushes with every write.
        known: What documents said of tables that were opened before, which is filled in: those of arrays, one for each
            column, are read once for each revision of a table.

    Attributes:
        num_rows: N.
        dim: The values of a row; 0 without features.
        storage: The dtype of stored features; ``"none"`` without features.
        chunk_rows: The rows of one file: processes that write at the same time write different chunks.
        has_fingerprints: Whether examples can be recognized: not those collected in a training, whose inputs may be
            augmented.

    Raises:
        StoreError: If the table is damaged.
    """

    def __init__(
        self, path: StorePath, *, flush_seconds: float = FLUSH_SECONDS, known: KnownTables | None = None
    ) -> None:
        self.path = path
        self._closed = False
        described = self.attributes
        try:
            self.num_rows, self.storage = described["num_rows"], described["storage"]
            self.chunk_rows, self.has_fingerprints = described["chunk_rows"], "collected" not in described
            self._feature_storage = FeatureStorage(self.storage)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path / NODE} is damaged ({error!r}): restore it, or remove {path}") from error
        said = self.num_rows, self.storage, self.chunk_rows, described["revision"]
        before, layouts = (known or {}).get(path, (None, None))
        names = [*ARRAYS, "done", *(["features"] if self._feature_storage.stores_features else [])]
        self._arrays = open_arrays(path, names, layouts if before == said else None)
        self._features = self._arrays.get("features")
        self.dim = 0 if self._features is None else self._feature_storage.dim(self._features.layout.shape[-1])
        expected = table_layouts(self.num_rows, self.dim, self.storage, self.chunk_rows)
        for name, array in self._arrays.items():
            if array.layout != expected[name]:
                raise StoreError(
                    f"{array.path} is damaged: expected {expected[name]}, found {array.layout}; remove {path} to "
                    "compute it again"
                )
        if known is not None:
            known[path] = said, expected
        data = [array for name, array in self._arrays.items() if name != "done"]
        self._writable = Writable(path, described)
        self._mask = CompletionMask(self._arrays["done"], data, flush_seconds, self._writable.check)
        pool = "targets" if described.get("rounding") == "targets" else "train"
        self._writer = RowWriter(path, self._arrays, self._mask, self.storage, pool, self._writable)
        self._check_files()

    def _check_files(self) -> None:
        """Check that every file with a done row exists: a missing one would read as zeros."""
        needed = set((np.flatnonzero(self.done) // self.chunk_rows).tolist())
        if not needed:
            return
        for array in self._arrays.values():
            missing = array.missing_chunks(needed)
            if missing:
                raise StoreError(
                    f"{array.chunk_path(missing[0])} is missing although rows in it are done: restore it, or run "
                    "tracer.verify to have its rows computed again"
                )

    def name_rows(self, named: Callable[[np.ndarray], str]) -> None:
        """Name rows in errors by what a function returns for their indices, for example with their ids."""
        self._writer.named = named

    def named(self, rows: np.ndarray) -> str:
        """Return the first of some row indices, with what is known of them, and how many more there are."""
        return self._writer.named(rows)

    @property
    def attributes(self) -> dict[str, Any]:
        """A copy of the table's attributes as they are on the disk; change them with `set_attributes`."""
        return read_attributes(self.path)

    def set_attributes(self, **changes: Any) -> None:
        """Flush, then change attributes on the disk, all of them or none, for example ``learning_rate=0.1``.

        ``finalized=False``, after which rows may change, gives the table another revision, so that no result that was
        computed from it is taken for one of the changed rows.
        """
        # A table must not be finalized on the disk while rows that count are still pending in memory.
        self.flush()
        with disk_errors(self.path):
            described = {**self.attributes, **json_value(changes, "attributes")}
            if not changes.get("finalized", True):
                described = changing(described)
                self._writable.renew(described)
            write_group(self.path, described)

    @property
    def done(self) -> np.ndarray:
        """``[N]``, bool, a copy of the marks of durably done rows; pending ones are not."""
        return self._mask.done

    @property
    def num_done(self) -> int:
        """The number of durably done rows."""
        return int(np.count_nonzero(self.done))

    @property
    def pending(self) -> int:
        """The number of rows written since the last flush."""
        return int(np.count_nonzero(self._mask.pending))

    def remaining(self) -> np.ndarray:
        """Flush and return the indices of rows that are not done: ``[n]``, int64, ascending."""
        self.flush()
        return np.flatnonzero(~self.done)

    def checked_rows(self, rows: np.ndarray) -> np.ndarray:
        """Return row indices as int64 after checking that they are within the table."""
        return checked_rows(rows, self.num_rows, self.path)

    def check_rows(self, rows: np.ndarray, fingerprint: np.ndarray) -> np.ndarray:
        """Return which rows are written, ``[n]``.

        Raises:
            MismatchError: If a row is written with another ``fingerprint [n]``.
            CallOrderError: If rows were collected in a training, which cannot be computed again.
        """
        rows = self.checked_rows(rows)
        if not self.has_fingerprints:
            raise CallOrderError(
                f"expected no training examples for {self.path}, whose rows GradientCollector collected in a training; "
                f"featurize into another save_dir"
            )
        fingerprint = checked_fingerprint(fingerprint, len(rows))
        written = self._mask.written(rows)
        other = written & (take_column(self._arrays, "fingerprint", rows) != fingerprint)
        if other.any():
            wrong = rows[other]
            self.check_content(np.sort(wrong))  # else the data would be blamed for a damaged fingerprint
            raise MismatchError(
                f"{len(wrong)} rows hold other data than was passed for their index in {self.path}: "
                f"{self._writer.named(wrong)}. Expected the same data set in the same order (no shuffling that changes "
                "indices, no random augmentation); pass the same rows, or choose another save_dir"
            )
        return np.asarray(written)

    def check_values(self, rows: np.ndarray, share: float, **values: np.ndarray) -> None:
        """Check that written rows ``[n]`` have the values that are computed now.

        Args:
            rows: The rows.
            share: The largest difference, as a share of the largest value.
            **values: What is computed now, ``[n]`` each.

        Raises:
            MismatchError: If they have others: they were computed by another function.
        """
        for name, found in values.items():
            stored = take_column(self._arrays, name, rows)
            scale = float(np.maximum(np.abs(stored), np.abs(found)).max())
            difference = np.abs(found - stored)
            if difference.max() <= max(share * scale, _ROUNDING if name != "gradient_norm" else 0.0):
                continue
            self.check_content(np.sort(rows))
            worst = int(difference.argmax())
            raise MismatchError(
                f"expected the model and task that {self.path} was made with, but row {self.named(rows[[worst]])}, "
                f"computed again, has {name} {found[worst]:.4g} in place of {stored[worst]:.4g}: code, options of "
                f"layers or of the loss, or the batches' preparation are others. Pass those that were used, or another "
                f"save_dir"
            )

    def write(
        self,
        rows: np.ndarray,
        features: np.ndarray | None,
        *,
        fingerprint: np.ndarray,
        label: np.ndarray | None = None,
        rival: np.ndarray | None = None,
        audited: np.ndarray | None = None,
        **values: np.ndarray,
    ) -> None:
        """Write rows, each at most once in a call; they are pending until the next flush.

        Args:
            rows: ``[n]``, int64, row indices in any order; consecutive ones are fastest.
            features: ``[n, dim]``, float32; None for a table without features.
            fingerprint: ``[n]``, uint64, a hash of each example's inputs.
            label: ``[n]``, int64, the class of each example; None if examples have no class.
            rival: ``[n]``, int64, the class other than the label that the model prefers; None if unknown.
            audited: ``[n]``, bool, whether the example was run alone with the same result; None: none was.
            **values: ``[n]``, float32, each of `VALUES`: L, Q = ∂L/∂f, w = ∂²L/∂f², the exact norm of the gradient of
                f, and 0 by default: f minus the f of an untrained model, and the rival's share of the probability of
                all classes other than the label.

        Raises:
            CallOrderError: If the table is closed or finalized.
            InputTypeError: If an array has an invalid shape or type, is missing or unknown, or features were passed
                for a table without.
            NonFiniteError: If a value is NaN or infinite; nothing was written.
        """
        self._check_open()
        rows = checked_rows(rows, self.num_rows, self.path, unique=True)
        floats = {name: np.zeros(len(rows), np.float32) for name in OPTIONAL_VALUES} | values
        if set(floats) != set(VALUES):
            raise InputTypeError(f"write() got {sorted(values)}: expected the values {sorted(VALUES)}")
        self._writer.write(rows, features, floats, fingerprint, {"label": label, "rival": rival}, audited)

    def flush(self) -> None:
        """Make pending rows durable, then mark them done; after an error they have to be written again."""
        if self._mask.pending.any():
            self._check_open()
            self._mask.flush()

    def unmark(self, rows: np.ndarray) -> None:
        """Mark rows ``[n]`` durably as not done, so that they are computed again, and the table as not finalized."""
        rows = self.checked_rows(rows)
        self.set_attributes(finalized=False)
        self._mask.unmark(rows)

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return a column, or some rows of it: a read-only view if they are in one file, else a copy.

        Args:
            name: ``loss``, ``loss_grad``, ``loss_hess``, ``gradient_norm``, ``output_change``, ``rival_share`` or
                ``scale`` (float32), ``label`` or ``rival`` (int64, `NO_LABEL` if there is none), ``fingerprint`` or
                ``checksum`` (uint64), ``audited`` (bool), or ``done`` (bool, which may already include pending rows).
            start: The first row.
            stop: One past the last row; None is N.

        Returns:
            ``[stop - start]``; zeros for rows that were never written.

        Raises:
            InputError: If there is no such column, or the range is not within the table.
        """
        if name not in COLUMNS:
            raise InputError(f"column is {name!r}: expected one of {sorted(COLUMNS)}")
        stop = self.num_rows if stop is None else stop
        self._check_range(start, stop)
        return read_column(self._arrays, name, start, stop)

    @property
    def row_bytes(self) -> int:
        """The bytes of a stored row, without the marks."""
        return sum(array.layout.data_bytes // array.layout.chunk_rows for array in self._arrays.values())

    def check_content(self, rows: np.ndarray) -> None:
        """Raise `StoreError` if a done row among ``rows [n]``, ascending, is not as it was written."""
        bad = damaged_rows(self._arrays, rows)
        if len(bad) and len(bad := bad[self._arrays["done"].take(bad)]):
            raise StoreError(
                f"rows {named_rows(bad)} of {self.path} do not match the checksum that they were written with: run "
                "tracer.verify, which marks damaged rows as missing, and compute these again"
            )

    def prefetch(self, pieces: Sequence[tuple[int, int]]) -> None:
        """Start to read the features of ranges ``(start, stop)`` of rows, ascending, in the background."""
        for start, stop in pieces:
            self._check_range(start, stop)
        if self._features is not None:
            self._features.prefetch_all(pieces)

    def scattered_features(self, rows: Int64[np.ndarray, " n"]) -> Shaped[np.ndarray, "n k"]:
        """Return a copy of stored features of single rows, as `raw_features` has them."""
        self.checked_rows(rows)
        assert self._features is not None
        found = self._features.take(rows)
        return signs(found) if self._feature_storage.is_binary else found

    def raw_features(self, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """Return stored features of rows ``start`` to ``stop``: for each file its first row and a view ``[n, dim]``.

        Of binary rows, copies with 1 and -1, int8, are returned.
        """
        self._check_range(start, stop)
        if self._features is None:
            self._feature_storage.require_features(f"reading features of {self.path}")
            return []
        found = list(self._features.rows(start, stop))
        return [(first, signs(view)) for first, view in found] if self._feature_storage.is_binary else found

    def close(self) -> None:
        """Flush and release the files; a second call does nothing."""
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
            raise InputError(f"got rows {start} to {stop}: expected 0 <= start <= stop <= {self.num_rows}")
