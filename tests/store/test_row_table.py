"""Tables: rows are done only when durable, whatever order and size their batches have."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from store_cases import DIM, N, batch, manifest, stored_features

from tracer.errors import (
    CallOrderError,
    InputError,
    InputTypeError,
    MismatchError,
    NonFiniteError,
    StoreError,
    TracerError,
)
from tracer.store import RowTable, Store
from tracer.store.table_schema import COLUMNS, Writable


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(tmp_path / "run", manifest())


@pytest.fixture
def table(store) -> RowTable:
    return store.create_checkpoint(0, "abc", 0.1, flush_seconds=1e9)


def test_attributes_change_atomically_and_flush_first(store, table):
    table.write(**batch(np.arange(3)))
    table.set_attributes(learning_rate=0.25, finalized=True)
    assert table.pending == 0 and table.num_done == 3
    assert store.checkpoint(0).attributes == {
        "revision": table.attributes["revision"],
        "unmarked": table.attributes["unmarked"],
        "learning_rate": 0.25,
        "weights_fingerprint": "abc",
        "finalized": True,
        "num_rows": N,
        "storage": "float32",
        "chunk_rows": N,
    }
    with pytest.raises(InputTypeError, match=r"attributes\.learning_rate is of type object"):
        table.set_attributes(learning_rate=object())
    assert table.attributes["learning_rate"] == 0.25


def test_rows_are_done_only_after_a_flush(store, table):
    table.write(**batch(np.array([3, 1])))
    assert table.pending == 2 and table.num_done == 0 and not table.done.any()
    table.flush()
    assert table.pending == 0 and np.flatnonzero(table.done).tolist() == [1, 3]
    assert store.checkpoint(0).remaining().tolist() == [row for row in range(N) if row not in (1, 3)]


@pytest.mark.parametrize("pending", [True, False], ids=["written before", "written after"])
def test_rows_that_another_process_replaced_are_not_marked_by_one_that_had_them_before(store, table, pending):
    table.write(**batch(np.arange(5)))
    table.flush()
    rows = np.arange(4, 8)
    if pending:
        table.write(**batch(rows))
    Store.open_existing(store.path).invalidate_rows(np.array([1, 4, 6]))
    with pytest.raises(StoreError, match=r"replaced .* load the checkpoint again"):
        table.flush() if pending else table.write(**batch(rows))
    assert np.flatnonzero(store.checkpoint(0).done).tolist() == [0, 2, 3]
    with store.checkpoint(0) as again:
        again.write(**batch(again.remaining(), seed=1))
    found = stored_features(store.checkpoint(0), 0, N)
    np.testing.assert_array_equal(found[[1, 4, 6]], batch(np.array([1, 4, 6]), seed=1)["features"])
    np.testing.assert_array_equal(found[[0, 2, 3]], batch(np.array([0, 2, 3]))["features"])


def test_marks_that_are_removed_while_others_are_set_stay_removed(store, table, monkeypatch):
    table.write(**batch(np.arange(5)))
    checks, check = [], Writable.check

    def overtaken(self, attributes=None):
        check(self, attributes)
        if not checks:  # after the first check, and before the marks
            checks.append(Store.open_existing(store.path).invalidate_rows(np.array([1])))

    monkeypatch.setattr(table._mask, "_check", overtaken.__get__(table._writable))
    with pytest.raises(StoreError, match="load the checkpoint again"):
        table.flush()
    assert checks and not store.checkpoint(0).done.any()


def test_a_table_that_grows_takes_the_rows_of_a_process_that_had_it_open(store, table):
    table.write(**batch(np.arange(5)))
    other = Store.open_existing(store.path)
    other.grow(N + 4)
    assert len(other.checkpoint(0).remaining()) == N + 4
    table.close()
    assert other.checkpoint(0).num_done == 5


def test_remaining_and_close_flush(store, table):
    table.write(**batch(np.array([0])))
    remaining = table.remaining()
    assert remaining.dtype == np.int64 and remaining.tolist() == list(range(1, N))
    with table:
        table.write(**batch(np.array([1])))
    assert store.checkpoint(0).num_done == 2
    table.close()


def test_time_flushes(store):
    table = store.create_checkpoint(0, "abc", 0.1, flush_seconds=0)
    table.write(**batch(np.array([0])))
    assert table.num_done == 1


def test_done_is_a_copy(table):
    table.done[:] = True
    assert table.num_done == 0


def test_an_empty_batch_changes_nothing(table):
    table.write(**batch(np.array([], dtype=np.int64)))
    assert table.pending == 0
    assert table.check_rows(np.array([], np.int64), np.array([], np.uint64)).shape == (0,)


def test_a_done_row_can_be_written_again(store, table):
    table.write(**batch(np.arange(4)))
    table.flush()
    table.write(**batch(np.array([2]), seed=1))
    assert np.flatnonzero(table.done).tolist() == [0, 1, 3]
    table.flush()
    np.testing.assert_array_equal(stored_features(table, 2, 3), batch(np.array([2]), seed=1)["features"])


def test_a_finalized_or_closed_table_takes_no_rows(table):
    table.set_attributes(finalized=True)
    with pytest.raises(CallOrderError, match="is finalized, got rows 0, 1 to write"):
        table.write(**batch(np.arange(2)))
    table.write(**batch(np.arange(0)))
    table.close()
    with pytest.raises(CallOrderError, match="is closed"):
        table.write(**batch(np.arange(2)))


def test_batches_may_come_in_any_order_and_size(store):
    order = np.random.default_rng(0).permutation(N)
    whole, pieces = store.create_checkpoint(0, "a", None), store.create_checkpoint(1, "a", None)
    whole.write(**batch(np.arange(N)))
    for part in np.array_split(order, 7):
        pieces.write(**batch(part))
    for name in COLUMNS:
        np.testing.assert_array_equal(whole.column(name), pieces.column(name))
    np.testing.assert_array_equal(stored_features(whole, 0, N), stored_features(pieces, 0, N))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"rows": np.array([0, N])}, InputError, f"rows {N} are outside 0 to {N - 1}"),
        ({"rows": np.array([-1, 0])}, InputError, "rows -1 are outside"),
        ({"rows": np.array([3, 3])}, InputError, "rows 3 are more than once in a batch"),
        ({"rows": np.array([0.0, 1.0])}, InputTypeError, "expected .n. integers"),
        ({"rows": np.zeros((1, 2), np.int64)}, InputTypeError, "expected .n. integers"),
        ({"features": np.ones((2, DIM + 1), np.float32)}, InputTypeError, r"features is float32 of shape \(2, 6\)"),
        ({"features": np.ones((2, DIM), np.int64)}, InputTypeError, "features is int64"),
        ({"loss_grad": np.ones(3, np.float32)}, InputTypeError, r"loss_grad is float32 of shape \(3,\)"),
        ({"fingerprint": np.ones(2, np.int64)}, InputTypeError, r"fingerprint is int64 of shape \(2,\)"),
        ({"loss": np.array([1, np.nan], np.float32)}, NonFiniteError, "loss of rows 1 is NaN or infinite"),
        ({"features": np.full((2, DIM), 1e300)}, NonFiniteError, "features of rows 0, 1 is NaN or infinite"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused_and_nothing_is_written(table, change, error, text):
    with pytest.raises(error, match=text) as caught:
        table.write(**{**batch(np.arange(2)), **change})
    assert isinstance(caught.value, TracerError)
    assert table.pending == 0 and len(table.remaining()) == N


def test_known_rows_are_recognised_done_or_pending(table):
    table.write(**batch(np.array([1, 2])))
    table.flush()
    table.write(**batch(np.array([5])))
    rows = np.array([5, 0, 2])
    assert table.check_rows(rows, batch(rows)["fingerprint"]).tolist() == [True, False, True]


def test_other_rows_under_known_indices_are_named(table):
    table.write(**batch(np.arange(12)))
    wrong = batch(np.arange(12))["fingerprint"].copy()
    wrong[2:10] += np.uint64(1)
    with pytest.raises(MismatchError, match=r"8 rows hold other data .*: 2, 3, 4, 5, 6, … \(3 more\)\. Expected"):
        table.check_rows(np.arange(12), wrong)
    assert table.check_rows(np.array([20]), np.array([1], np.uint64)).tolist() == [False]


def test_damaged_fingerprints_are_blamed_and_not_the_data(table):
    table.write(**batch(np.arange(4)))
    table.flush()
    table._arrays["integers"].assign(np.array([1, 2]), np.zeros((2, 5), np.int64))
    with pytest.raises(StoreError, match=r"rows 1, 2 of .* do not match the checksum .*: run tracer\.verify"):
        table.check_rows(np.arange(4), batch(np.arange(4))["fingerprint"])


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_float16_keeps_relative_precision_at_any_magnitude(tmp_path, magnitude):
    store = Store.open(tmp_path, manifest(storage="float16"))
    table = store.create_checkpoint(0, "a", None)
    data = batch(np.arange(N))
    data["features"] = (data["features"] * magnitude).astype(np.float32)
    table.write(**data)
    largest = np.abs(data["features"]).max(axis=1, keepdims=True)
    assert (np.abs(stored_features(table, 0, N) - data["features"]) <= largest * 2.0**-11).all()
    np.testing.assert_array_equal(np.abs(stored_features(table, 0, N)).max(axis=1, keepdims=True), largest)
    np.testing.assert_array_equal(table.column("scale"), np.where(largest == 0, 1, largest)[:, 0])
    assert table.raw_features(0, N)[0][1].dtype == np.float16


@pytest.fixture
def chunked(tmp_path, monkeypatch) -> RowTable:
    """A table whose arrays lie in files of 4 rows."""
    monkeypatch.setattr("tracer.store.arrays.local_path.LocalPath.feature_chunk_bytes", 4 * DIM * 4)
    table = Store.open(tmp_path / "chunked", manifest()).create_checkpoint(0, "a", None)
    table.write(**batch(np.arange(N)))
    return table


def test_raw_features_cover_all_rows_without_copies(chunked):
    features = batch(np.arange(N))["features"]
    views = chunked.raw_features(0, N)
    assert [(start, len(raw)) for start, raw in views] == [(0, 4), (4, 4), (8, 4), (12, 4), (16, 4), (20, 3)]
    assert all(isinstance(raw, np.memmap) and raw.base is not None for _, raw in views)
    np.testing.assert_array_equal(np.concatenate([raw for _, raw in views]), features)  # float32 has scale 1
    assert (chunked.column("scale") == 1).all()
    assert [(start, len(raw)) for start, raw in chunked.raw_features(6, 9)] == [(6, 2), (8, 1)]
    np.testing.assert_array_equal(stored_features(chunked, 6, 22), features[6:22])
    assert [start for start, _ in chunked.raw_features(2, 13)] == [2, 4, 8, 12]
    assert stored_features(chunked, 5, 5).shape == (0, DIM) and chunked.raw_features(5, 5) == []


def test_chunked_features_are_what_zarr_reads(chunked):
    chunked.close()
    read = zarr.open_array(str(chunked.path / "features"), mode="r")
    assert read.chunks == (4, DIM)
    np.testing.assert_array_equal(read[:], batch(np.arange(N))["features"])


def test_ranges_and_columns_that_are_not_there_are_refused(table):
    for start, stop in ((-1, 3), (3, 2), (0, N + 1)):
        with pytest.raises(InputError, match=f"expected 0 <= start <= stop <= {N}"):
            table.raw_features(start, stop)
        with pytest.raises(InputError, match=f"expected 0 <= start <= stop <= {N}"):
            table.column("loss", start, stop)
    with pytest.raises(InputError, match="column is 'norm': expected one of"):
        table.column("norm")


def test_columns_are_maps_that_cannot_be_written(table):
    assert (table.column("loss") == 0).all() and table.column("loss").shape == (N,)
    table.write(**batch(np.arange(N)))
    column = table.column("loss")
    assert isinstance(column, np.memmap) and column.dtype == np.float32
    for array in (column, table.raw_features(0, N)[0][1]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
