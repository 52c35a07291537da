"""Scores: one matrix that zarr reads too, tiles that are done only for the inputs they come from."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import zarr
from store_cases import manifest

from tracer._core.files import PARTIAL
from tracer.errors import CallOrderError, IncompleteError, InputError, InputTypeError, StoreError
from tracer.store import Store
from tracer.store.arrays.metadata import NODE
from tracer.store.lazy_matrix import ScoreMatrix
from tracer.store.score_array import ScoreArray, open_scores


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(tmp_path / "run", manifest())


SHAPE = (10, 3)
INPUTS = {"model_ids": [0, 1], "learning_rates": [0.1, None], "options": {"lambda": 1e-3}}


def matrix() -> np.ndarray:
    return np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)


def test_scores_are_one_matrix_and_a_zarr_array(store):
    values = matrix()
    with store.results.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4) as scores:
        assert (scores.num_tiles, scores.tile_rows, scores.shape) == (3, 4, SHAPE)
        scores.write(4, values[4:8])
        scores.write(0, values[:4])
        scores.write(8, values[8:])
    seen = scores.matrix()
    assert isinstance(seen, np.memmap) and seen.dtype == np.float32 and seen.shape == SHAPE
    assert not seen.flags.writeable and seen.flags.c_contiguous
    np.testing.assert_array_equal(seen, values)
    read = zarr.open_array(str(scores.path / "scores"), mode="r")
    assert read.chunks == (4, 3)
    np.testing.assert_array_equal(read[:], values)
    for row in range(10):
        np.testing.assert_array_equal(read[row : row + 1], values[row : row + 1])
    assert zarr.open_array(str(scores.path / "done"), mode="r")[:].all()


def test_tiles_of_scores_are_done_only_after_a_flush(store):
    scores = store.results.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4)
    assert scores.remaining() == [(0, 4), (4, 8), (8, 10)]
    scores.write(4, matrix()[4:])
    assert scores.pending == 2 and not scores.tile_done.any()
    scores.flush()
    assert scores.tile_done.tolist() == [False, True, True] and not scores.complete
    assert scores.remaining() == [(0, 4)]


def test_scores_of_the_same_inputs_are_continued(store):
    with store.results.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4) as scores:
        scores.write(0, matrix()[:4])
    again = store.results.scores("test", "tracin", SHAPE, json.loads(json.dumps(INPUTS)))
    assert again.tile_done.tolist() == [True, False, False] and again.tile_rows == 4
    np.testing.assert_array_equal(again.matrix()[:4], matrix()[:4])
    assert store.catalog.score_names("test") == ["tracin"]
    assert store.results.read_scores("test", "tracin").inputs == INPUTS


@pytest.mark.parametrize(
    ("shape", "inputs", "tile_rows"),
    [(SHAPE, {"model_ids": [0]}, None), ((9, 3), INPUTS, None), ((10, 4), INPUTS, None)],
)
def test_scores_of_other_inputs_begin_anew_and_held_matrices_stay(store, shape, inputs, tile_rows):
    with store.results.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4) as scores:
        scores.write(0, matrix())
    held = scores.matrix()
    new = store.results.scores("test", "tracin", shape, inputs, tile_rows=tile_rows)
    assert not new.tile_done.any() and new.shape == shape and (new.matrix() == 0).all() and new.inputs == inputs
    np.testing.assert_array_equal(held, matrix())
    assert not list(store.path.glob(PARTIAL + "*"))
    assert (zarr.open_array(str(new.path / "scores"), mode="r")[:] == 0).all()
    assert store.results.scores("test", "tracin", SHAPE, INPUTS).complete


@pytest.mark.parametrize(
    "damage",
    ["mask gone", "array gone", "all gone", "document cut", "file gone", "other mask", "file short", "checksums short"],
)
def test_half_made_or_damaged_scores_begin_anew(store, damage):
    with store.results.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4) as scores:
        scores.write(0, matrix())
    if damage == "mask gone":
        shutil.rmtree(scores.path / "done")
    if damage == "other mask":
        (scores.path / "done" / NODE).write_bytes((scores.path / "checksum" / NODE).read_bytes())
    if damage == "array gone":
        shutil.rmtree(scores.path / "scores")
    if damage == "all gone":
        shutil.rmtree(scores.path)
    if damage == "document cut":
        os.truncate(scores.path / NODE, 20)
    if damage == "file gone":
        (scores.path / "scores" / "c" / "0" / "0").unlink()
    if damage == "file short":
        os.truncate(scores.path / "scores" / "c" / "0" / "0", 40)
    if damage == "checksums short":
        os.truncate(scores.path / "checksum" / "c" / "0", 1)
    if damage != "all gone":
        with pytest.raises(StoreError):
            store.results.read_scores("test", "tracin")
    assert not store.results.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4).tile_done.any()


def test_a_rewritten_tile_is_not_done_until_flushed(store):
    scores = store.results.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4)
    scores.write(0, matrix())
    scores.flush()
    scores.write(4, np.zeros((4, 3), np.float32))
    assert scores.tile_done.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("start", "rows", "error", "text"),
    [
        (1, np.ones((4, 3), np.float32), InputError, "rows 1 to 5: expected whole tiles"),
        (0, np.ones((3, 3), np.float32), InputError, "rows 0 to 3: expected whole tiles"),
        (8, np.ones((4, 3), np.float32), InputError, "rows 8 to 12: expected whole tiles"),
        (-4, np.ones((4, 3), np.float32), InputError, "rows -4 to 0: expected whole tiles"),
        (0, np.ones((0, 3), np.float32), InputError, "rows 0 to 0: expected whole tiles"),
        (0, np.ones((4, 2), np.float32), InputTypeError, r"shape \(4, 2\): expected float32 \[n, 3\]"),
        (0, np.ones((4, 3), np.int32), InputTypeError, "scores are int32"),
    ],
)
def test_only_whole_tiles_are_written(store, start, rows, error, text):
    scores = store.results.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4)
    with pytest.raises(error, match=text):
        scores.write(start, rows)
    assert scores.pending == 0


def test_scores_at_the_edges(store):
    with store.results.scores("test", "one", (1, 1), {}) as scores:
        scores.write(0, np.full((1, 1), 2, np.float32))
    assert scores.matrix().tolist() == [[2.0]] and scores.complete
    assert store.results.scores("test", "few", (3, 2), {}, tile_rows=100).tile_rows == 3
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(InputError, match="expected at least one training row and one target"):
            store.results.scores("test", "none", shape, {})
    with pytest.raises(InputError, match="tile_rows is 0"):
        store.results.scores("test", "none", (1, 1), {}, tile_rows=0)
    with pytest.raises(InputTypeError, match=r"inputs\.x is of type set"):
        store.results.scores("test", "none", (1, 1), {"x": {1}})
    with pytest.raises(CallOrderError, match=r"no 'none' scores of 'test', only \['few', 'one'\]"):
        store.results.read_scores("test", "none")
    with pytest.raises(CallOrderError, match="is closed"):
        scores.write(0, np.ones((1, 1), np.float32))


def divided(tmp_path) -> Store:
    """A store whose scores lie in files of a block of rows each, for two processes."""
    return Store.open(tmp_path / "divided", manifest(), processes=2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_processes_write_files_of_their_own(tmp_path, dtype):
    store = divided(tmp_path)
    values = np.random.default_rng(1).standard_normal((23, 3)).astype(np.float32) * 10.0 ** np.arange(-11, 12)[:, None]
    seen = []
    for rank in (1, 0):
        with store.results.scores("test", "tracin", (23, 3), INPUTS, tile_rows=4, dtype=dtype) as scores:
            mine = scores.remaining((rank, 2))
            seen.append(mine)
            for start, stop in mine:
                scores.write(start, values[start:stop].astype(np.float32))
    files = [{start // (3 * 4) for start, _ in mine} for mine in seen]
    assert not files[0] & files[1] and files[0] | files[1] == {0, 1}
    again = store.results.read_scores("test", "tracin")
    found = again.matrix()
    assert isinstance(found, ScoreMatrix) and again.complete and found.shape == (23, 3) and found.dtype == np.float32
    if dtype == "float32":
        np.testing.assert_array_equal(np.asarray(found), values.astype(np.float32))
    else:  # relative to the largest of a row, whatever the row's size
        assert (np.abs(found - values) <= np.abs(values).max(1, keepdims=True) * 2.0**-11).all()
    assert (zarr.open_array(str(again.path / "scores"), mode="r")[:] != 0).all()


def test_scores_that_are_not_there_yet_are_refused_when_read(tmp_path):
    scores = divided(tmp_path).results.scores("test", "tracin", (23, 3), INPUTS, tile_rows=4)
    scores.write(0, np.ones((12, 3), np.float32))
    found = scores.matrix()
    assert (found[:12] == 1).all()
    with pytest.raises(IncompleteError, match="rows 0 to 22 .* are not computed"):
        np.asarray(found)


def test_scores_of_different_inputs_share_no_path(store):
    first = store.results.scores("test", "tracin", SHAPE, {"question": 1})
    second = store.results.scores("test", "tracin", SHAPE, {"question": 2})
    first.write(0, np.full(SHAPE, 1, np.float32))
    first.flush()
    assert not second.tile_done.any() and first.complete and (first.matrix() == 1).all()
    second.write(0, np.full(SHAPE, 2, np.float32))
    second.flush()
    for question in (1, 2):
        again = Store.open_existing(store.path).results.scores("test", "tracin", SHAPE, {"question": question})
        assert again.complete and (again.matrix() == question).all()


@pytest.mark.parametrize(
    "key",
    [
        3,
        -1,
        slice(2, 9),
        slice(None, None, -3),
        slice(9, 2),
        [5, 1, 5],
        np.array([[0, 1], [2, 3]]),
        (slice(None), 1),
        (4, 2),
        (-1, slice(None, None, 2)),
        ([1, 8, 3], [0, 2, 1]),
        ([1, 8, 3], 2),
        (slice(1, 20, 4), [2, 0]),
        (np.array([[3], [7]]), np.array([0, 2])),
        (..., 1),
        ...,
        (),
        [],
        np.arange(23) % 3 == 0,
        (np.arange(23) % 3 == 0, 1),
    ],
)
def test_a_score_matrix_is_indexed_as_a_numpy_matrix(key):
    values = np.random.default_rng(0).standard_normal((23, 3)).astype(np.float32)
    found = ScoreMatrix((23, 3), lambda start, stop: values[start:stop])
    np.testing.assert_array_equal(found[key], values[key])


def test_a_score_matrix_takes_part_in_arithmetic_and_refuses_what_no_matrix_has():
    values = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    found = ScoreMatrix((5, 3), lambda start, stop: values[start:stop])
    np.testing.assert_array_equal((2 * found + 1) @ np.ones(3), (2 * values + 1) @ np.ones(3))
    np.testing.assert_array_equal(np.sort(found, axis=0)[::-1], np.sort(values, axis=0)[::-1])
    np.testing.assert_array_equal(found.T, values.T)
    assert (len(found), found.size, found.nbytes, found.ndim) == (5, 15, 60, 2)
    np.testing.assert_array_equal(np.asarray(found, np.float64), values.astype(np.float64))
    for key in (5, (0, 3), (0, 0, 0), (None, 0), [7]):
        with pytest.raises(IndexError):
            found[key]
    with pytest.raises(TypeError):
        found[0] = 1


def test_a_changed_tile_is_found(store):
    with store.results.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4) as scores:
        scores.write(0, matrix())
    assert store.results.read_scores("test", "tracin").damaged_tiles().tolist() == []
    file = scores.path / "scores" / "c" / "0" / "0"
    data = bytearray(file.read_bytes())
    data[5 * 3 * 4] ^= 1
    file.write_bytes(data)
    assert store.results.read_scores("test", "tracin").damaged_tiles().tolist() == [1]


@pytest.mark.parametrize(
    ("file", "dtype"), [("scale/c/1", "float16"), ("scores/c/1/0", "float16"), ("scores/c/1/0", "float32")]
)
def test_a_file_of_scores_that_has_another_size_is_made_again(store, file, dtype):
    def opened() -> ScoreArray:
        return open_scores(store.path / "scores", SHAPE, INPUTS, tile_rows=2, chunk_rows=4, dtype=dtype)

    with opened() as scores:
        scores.write(0, matrix())
    os.truncate(scores.path / file, 5)
    with opened() as again:
        assert again.remaining() == [(4, 6), (6, 8)]
        again.write(4, matrix()[4:8])
    np.testing.assert_allclose(np.asarray(opened().matrix()), matrix(), rtol=1e-2)


def test_a_score_beyond_float32_leaves_the_others_of_its_row(tmp_path):
    rows = np.array([[np.inf, 1, -2], [0, 0, 0], [-np.inf, 1e-42, np.nan], [3e38, 0, 1e37]], np.float32)
    with divided(tmp_path).results.scores("a", "tracin", rows.shape, {}, dtype="float16") as scores:
        scores.write(0, rows)
        np.testing.assert_allclose(scores.read(0, 4), rows, rtol=1e-3)
