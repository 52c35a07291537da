"""int8 rows: rounded without bias, the same whatever the batches, with errors far below the projection's."""

from __future__ import annotations

import numpy as np
import pytest
import zarr
from store_cases import N, batch, manifest, stored_features

from tracer.store import Store
from tracer.store.quantization import relative_rows, row_scale

ROWS = np.arange(20_000)


def rounded(features, rows, pool="train"):
    """Scales and int8 rows, as a table stores them."""
    scale = row_scale(np.abs(features).max(1), "int8")
    return scale, relative_rows(features, scale, rows, "int8", pool)


def test_rounding_has_no_bias():
    values = np.float32([[127.0, 2.25, -0.1, 0.9, -126.5, 0.0, 3.0]])
    scale, stored = rounded(values.repeat(len(ROWS), 0), ROWS)
    assert (scale == 1).all()
    assert np.abs(stored - values).max() < 1
    np.testing.assert_allclose(stored.mean(0), values[0], atol=4 * 0.5 / len(ROWS) ** 0.5)
    assert set(stored[:, 1]) == {2, 3} and set(stored[:, 4]) == {-126, -127}
    assert (stored[:, [0, 5, 6]] == np.int8([127, 0, 3])).all()  # whole numbers stay what they are


def test_error_of_inner_products_is_below_a_tenth_of_the_sketchs():
    """At k = 4096 a sketch errs by 1/64 of the norms' product."""
    k, n = 4096, 200
    rng = np.random.default_rng(0)
    for features in (rng.normal(size=(2 * n, k)), rng.laplace(size=(2 * n, k)), rng.standard_t(4, size=(2 * n, k))):
        train, target = features.astype(np.float32)[:n], features.astype(np.float32)[n:]
        parts = [rounded(rows, ROWS[:n], pool) for rows, pool in ((train, "train"), (target, "targets"))]
        left, right = (scale[:, None].astype(np.float64) * stored for scale, stored in parts)
        norms = np.linalg.norm(train, axis=1)[:, None] * np.linalg.norm(target, axis=1)
        error = (left @ right.T - train.astype(np.float64) @ target.T) / norms
        assert np.sqrt(np.square(error).mean()) < 0.1 / k**0.5
        assert abs(error.mean()) < 4 * error.std() / error.size**0.5
        own = np.diag(error)  # the same index on both sides: their rounding errors are independent as well
        assert abs(own.mean()) < 4 * own.std() / n**0.5


def test_train_and_target_rows_of_one_index_round_differently():
    features = np.full((50, 300), 0.37, np.float32)
    features[:, 0] = 1
    assert (rounded(features, ROWS[:50])[1] != rounded(features, ROWS[:50], "targets")[1]).any()


@pytest.mark.parametrize("dim", [1, 5, 70_000])
@pytest.mark.parametrize("magnitude", [1e-45, 3e-44, 1e-38, 1e-12, 1.0, 1e12, 3e38])
def test_every_magnitude_keeps_its_relative_precision(dim, magnitude):
    features = np.random.default_rng(0).uniform(-1, 1, (3, dim)) * magnitude
    features = features.astype(np.float32)
    features[0], features[1, 0] = 0, magnitude
    scale, stored = rounded(features, ROWS[:3])
    assert (scale > 0).all() and np.isfinite(scale).all()
    assert np.abs(stored.astype(np.int64)).max() <= 127
    assert (stored[0] == 0).all() and scale[0] == 1
    back = stored.astype(np.float64) * scale[:, None]
    assert (np.abs(back - features) <= scale[:, None] * (1 + 1e-4)).all()
    assert (scale <= np.maximum(np.abs(features).max(1) / 126.9, 1.5e-45) + (scale == 1)).all()


def test_one_huge_entry_leaves_the_rest_right_on_average():
    features = np.full((len(ROWS), 2), 1e-3, np.float32)
    features[:, 0] = 1.0
    scale, stored = rounded(features, ROWS)
    assert (stored[:, 0] == 127).all()
    np.testing.assert_allclose((stored[:, 1] * scale).mean(), 1e-3, rtol=0.1)


@pytest.fixture
def table(tmp_path):
    return Store.open(tmp_path, manifest(storage="int8")).create_checkpoint(0, "a", None)


def test_a_table_of_int8_rows(table):
    data = batch(np.arange(N))
    table.write(**data)
    table.flush()
    raw = table.raw_features(0, N)[0][1]
    scale = table.column("scale")
    assert raw.dtype == np.int8 and scale.dtype == np.float32
    features = stored_features(table, 0, N)
    np.testing.assert_array_equal(features, raw.astype(np.float32) * scale[:, None])
    np.testing.assert_array_equal(np.abs(raw.astype(int)).max(1), 127)
    assert (np.abs(features - data["features"]) <= scale[:, None] * 1.0001).all()
    np.testing.assert_array_equal(
        np.concatenate([table.raw_features(row, min(row + 4, N))[0][1] for row in range(0, N, 4)]), raw
    )
    np.testing.assert_array_equal(zarr.open_array(str(table.path / "features"), mode="r")[:], raw)


def test_int8_rows_do_not_depend_on_batches(table, tmp_path):
    other = Store.open(tmp_path / "other", manifest(storage="int8")).create_checkpoint(0, "a", None)
    table.write(**batch(np.arange(N)))
    for rows in np.array_split(np.random.default_rng(0).permutation(N), 5):
        other.write(**batch(rows))
    np.testing.assert_array_equal(table.raw_features(0, N)[0][1], other.raw_features(0, N)[0][1])


def test_int8_rows_are_pinned():
    """What is stored must not change between versions: a resumed store would mix two roundings."""
    features = np.linspace(-1, 1, 12, dtype=np.float32).reshape(2, 6)
    assert rounded(features, np.array([0, 70_000]))[1].tolist() == [
        [-127, -104, -80, -58, -34, -11],
        [11, 35, 58, 81, 104, 127],
    ]
    assert rounded(features, np.array([0, 70_000]), "targets")[1].tolist() == [
        [-127, -104, -81, -58, -35, -12],
        [11, 35, 58, 81, 104, 127],
    ]
