"""Scores: one matrix that zarr reads too, tiles that are done only for the inputs they come from."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
import zarr
from store_cases import manifest

from tracer.errors import CallOrderError, InputError, InputTypeError, StoreError
from tracer.store import Store
from tracer.store.documents import PARTIAL


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(tmp_path / "run", manifest())


SHAPE = (10, 3)
INPUTS = {"model_ids": [0, 1], "learning_rates": [0.1, None], "options": {"lambda": 1e-3}}


def matrix() -> np.ndarray:
    return np.random.default_rng(5).standard_normal(SHAPE).astype(np.float32)


def test_scores_are_one_matrix_and_a_zarr_array(store):
    values = matrix()
    with store.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4) as scores:
        assert (scores.num_tiles, scores.tile_rows, scores.shape) == (3, 4, SHAPE)
        scores.write(4, values[4:8])
        scores.write(0, values[:4])
        scores.write(8, values[8:])
    seen = scores.matrix()
    assert isinstance(seen, np.memmap) and seen.dtype == np.float32 and seen.shape == SHAPE
    assert not seen.flags.writeable and seen.flags.c_contiguous
    np.testing.assert_array_equal(seen, values)
    read = zarr.open_array(str(scores.path), mode="r")
    assert read.chunks == (4, 3)
    np.testing.assert_array_equal(read[:], values)
    for row in range(10):
        np.testing.assert_array_equal(read[row : row + 1], values[row : row + 1])
    assert zarr.open_array(str(scores.path) + "_done", mode="r")[:].all()


def test_tiles_of_scores_are_done_only_after_a_flush(store):
    scores = store.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4)
    assert scores.remaining() == [(0, 4), (4, 8), (8, 10)]
    scores.write(4, matrix()[4:])
    assert scores.pending == 2 and not scores.tile_done.any()
    scores.flush()
    assert scores.tile_done.tolist() == [False, True, True] and not scores.complete
    assert scores.remaining() == [(0, 4)]


def test_scores_of_the_same_inputs_are_continued(store):
    with store.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4) as scores:
        scores.write(0, matrix()[:4])
    again = store.scores("test", "tracin", SHAPE, json.loads(json.dumps(INPUTS)))
    assert again.tile_done.tolist() == [True, False, False] and again.tile_rows == 4
    np.testing.assert_array_equal(again.matrix()[:4], matrix()[:4])
    assert store.score_names("test") == ["tracin"] and store.read_scores("test", "tracin").inputs == INPUTS


@pytest.mark.parametrize(
    ("shape", "inputs", "tile_rows"),
    [(SHAPE, {"model_ids": [0]}, None), ((11, 3), INPUTS, None), ((10, 4), INPUTS, None), (SHAPE, INPUTS, 5)],
)
def test_scores_of_other_inputs_begin_anew_and_held_matrices_stay(store, shape, inputs, tile_rows):
    with store.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4) as scores:
        scores.write(0, matrix())
    held = scores.matrix()
    new = store.scores("test", "tracin", shape, inputs, tile_rows=tile_rows)
    assert not new.tile_done.any() and new.shape == shape and (new.matrix() == 0).all() and new.inputs == inputs
    np.testing.assert_array_equal(held, matrix())
    assert not list(store.path.glob(PARTIAL + "*"))
    assert (zarr.open_array(str(new.path), mode="r")[:] == 0).all()


@pytest.mark.parametrize("damage", ["mask gone", "array gone", "file gone", "other mask", "file short"])
def test_a_half_replaced_or_damaged_score_array_begins_anew(store, damage):
    with store.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4) as scores:
        scores.write(0, matrix())
    with store.scores("test", "other", SHAPE, INPUTS, tile_rows=4) as other:
        other.write(0, matrix())
    mask = scores.path.with_name("tracin_done")
    if damage in ("mask gone", "other mask"):
        shutil.rmtree(mask)
    if damage == "other mask":
        shutil.copytree(scores.path.with_name("other_done"), mask)
    if damage == "array gone":
        shutil.rmtree(scores.path)
    if damage == "file gone":
        (scores.path / "c" / "0" / "0").unlink()
    if damage == "file short":
        os.truncate(scores.path / "c" / "0" / "0", 40)
    if damage != "array gone" and damage != "mask gone":
        with pytest.raises(StoreError):
            store.read_scores("test", "tracin")
    assert not store.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4).tile_done.any()


def test_a_rewritten_tile_is_not_done_until_flushed(store):
    scores = store.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4)
    scores.write(0, matrix())
    scores.flush()
    scores.write(4, np.zeros((4, 3), np.float32))
    assert scores.tile_done.tolist() == [True, False, True]


@pytest.mark.parametrize(
    ("start", "rows", "error", "text"),
    [
        (1, np.ones((4, 3), np.float32), InputError, "rows 1 to 5 are no whole tiles"),
        (0, np.ones((3, 3), np.float32), InputError, "rows 0 to 3 are no whole tiles"),
        (8, np.ones((4, 3), np.float32), InputError, "rows 8 to 12 are no whole tiles"),
        (-4, np.ones((4, 3), np.float32), InputError, "rows -4 to 0 are no whole tiles"),
        (0, np.ones((0, 3), np.float32), InputError, "rows 0 to 0 are no whole tiles"),
        (0, np.ones((4, 2), np.float32), InputTypeError, r"shape \(4, 2\): expected float32 \[n, 3\]"),
        (0, np.ones((4, 3), np.int32), InputTypeError, "scores are int32"),
    ],
)
def test_only_whole_tiles_are_written(store, start, rows, error, text):
    scores = store.scores("test", "tracin", SHAPE, INPUTS, tile_rows=4)
    with pytest.raises(error, match=text):
        scores.write(start, rows)
    assert scores.pending == 0


def test_scores_at_the_edges(store):
    with store.scores("test", "one", (1, 1), {}) as scores:
        scores.write(0, np.full((1, 1), 2, np.float32))
    assert scores.matrix().tolist() == [[2.0]] and scores.complete
    assert store.scores("test", "few", (3, 2), {}, tile_rows=100).tile_rows == 3
    for shape in ((0, 3), (3, 0)):
        with pytest.raises(InputError, match="expected at least one train row and one target"):
            store.scores("test", "none", shape, {})
    with pytest.raises(InputError, match="tile_rows is 0"):
        store.scores("test", "none", (1, 1), {}, tile_rows=0)
    with pytest.raises(InputError, match="are taken by tile marks"):
        store.scores("test", "tracin_done", (1, 1), {})
    with pytest.raises(InputTypeError, match=r"inputs\.x is of type set"):
        store.scores("test", "none", (1, 1), {"x": {1}})
    with pytest.raises(CallOrderError, match=r"no 'none' scores of 'test', only \['few', 'one'\]"):
        store.read_scores("test", "none")
    with pytest.raises(CallOrderError, match="is closed"):
        scores.write(0, np.ones((1, 1), np.float32))
