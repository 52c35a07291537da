"""Results are those of the rows that are stored now, in whatever order rows change, processes run and power fails."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from scoring_cases import RATES, expected, scorer, strongest

from tracer import verify
from tracer.errors import StoreError
from tracer.scoring.estimators import Estimate
from tracer.scoring.scorer import Scorer
from tracer.scoring.streaming import TileScorer
from tracer.store import Store
from tracer.store.lazy_matrix import ScoreMatrix

N, M, DIM = 300, 4, 16
ROWS = np.array([3, 40])


@pytest.fixture
def found(tmp_path) -> Scorer:
    return scorer(tmp_path / "store", N, M, DIM, memory_bytes=1 << 14)


def replace(store: Store, seed: int, exp_name: str | None = None, rows: np.ndarray = ROWS) -> None:
    """Replace rows at all checkpoints by ones that depend on the seed."""
    store.invalidate_rows(rows, exp_name)
    write(store, seed, exp_name, rows)


def write(store: Store, seed: int, exp_name: str | None = None, rows: np.ndarray = ROWS) -> None:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((len(rows), DIM)).astype(np.float32)
    columns = {name: rng.uniform(0.1, 1, len(rows)).astype(np.float32) for name in ("loss", "loss_grad", "loss_hess")}
    norm = np.linalg.norm(features, axis=1)
    for model_id in range(len(RATES)):
        with store.checkpoint(model_id) if exp_name is None else store.targets(exp_name, model_id) as table:
            table.write(rows, features, gradient_norm=norm, fingerprint=np.zeros(len(rows), np.uint64), **columns)
            table.set_attributes(finalized=True)


def again(found: Scorer) -> Scorer:
    return Scorer(Store.open_existing(found.store.path), torch.device("cpu"), False, 1 << 14)


def ask(found: Scorer, what: str):
    if what == "scores":
        return np.array(found.scores("test", Estimate(), None))
    if what == "top":
        return found.top("test", N, "proponents", Estimate(), None)
    return found.self_influence(None, Estimate("influence"))


@pytest.mark.parametrize("what", ["scores", "top", "self-influence"])
@pytest.mark.parametrize("exp_name", [None, "test"])
def test_rows_that_are_replaced_while_results_are_computed(found, monkeypatch, what, exp_name, tmp_path):
    if (what, exp_name) == ("self-influence", "test"):
        return
    target, name = (TileScorer, "score") if what != "self-influence" else (Scorer, "_kernels")
    real, rows = getattr(target, name), ROWS if exp_name is None else np.array([1])

    def overtaken(self, *args, **options):
        computed = real(self, *args, **options)
        monkeypatch.setattr(target, name, real)
        found.store.invalidate_rows(rows, exp_name)  # by another process, before this one has written
        return computed

    monkeypatch.setattr(target, name, overtaken)
    with pytest.raises(StoreError, match="were replaced, added or found damaged while results were computed"):
        ask(found, what)
    write(found.store, 7, exp_name, rows)
    other = scorer(tmp_path / "fresh", N, M, DIM)
    replace(other.store, 7, exp_name, rows)
    if what == "scores":
        np.testing.assert_allclose(ask(again(found), what), expected(other), rtol=1e-4, atol=1e-4)
    elif what == "top":
        np.testing.assert_array_equal(ask(again(found), what).indices, strongest(expected(other), N, "proponents"))
    else:
        np.testing.assert_allclose(ask(again(found), what), ask(other, what), rtol=1e-6)


def test_no_result_comes_back_with_files_whose_removal_was_lost(found, tmp_path):
    for what in ("scores", "top", "self-influence"):
        ask(found, what)
    shutil.copytree(found.store.path, tmp_path / "old")
    replace(found.store, 7)
    for kind in ("scores", "top", "kernels"):
        shutil.rmtree(found.store.path / kind, ignore_errors=True)
        shutil.copytree(tmp_path / "old" / kind, found.store.path / kind)
    other = scorer(tmp_path / "fresh", N, M, DIM)
    replace(other.store, 7)
    np.testing.assert_allclose(ask(again(found), "scores"), expected(other), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ask(again(found), "self-influence"), ask(other, "self-influence"), rtol=1e-6)
    np.testing.assert_array_equal(ask(again(found), "top").indices, strongest(expected(other), N, "proponents"))
    assert verify(found.store.path, repair=False, progress=False).ok


def test_only_tiles_of_replaced_rows_are_computed_again(found, monkeypatch):
    ask(found, "scores")
    ask(found, "top")
    replace(found.store, 7)
    seen, real = [], TileScorer.score

    def counting(self, tile, *args, **options):
        seen.extend(tile)
        return real(self, tile, *args, **options)

    monkeypatch.setattr(TileScorer, "score", counting)
    scores = ask(again(found), "scores")
    tile_rows = found.store.results.read_scores("test", "tracin").tile_rows
    assert tile_rows < N // 2 and set(seen) == {row for row in range(N) if row // tile_rows in ROWS // tile_rows}
    np.testing.assert_allclose(scores, expected(found), rtol=1e-4, atol=1e-4)
    assert len(found.store.catalog.score_paths()) == 1  # scores of the rows that were there before are removed
    replace(found.store, 8, "test", np.array([0]))
    seen.clear()
    np.testing.assert_allclose(ask(again(found), "scores"), expected(found), rtol=1e-4, atol=1e-4)
    assert seen == [*range(N)]


def test_every_row_has_a_part_in_the_scores_of_a_kernel(found, tmp_path):
    estimate = Estimate("trak", regularization=1.0)
    found.scores("test", estimate, None)
    replace(found.store, 7)
    other = scorer(tmp_path / "fresh", N, M, DIM)
    replace(other.store, 7)
    wanted = np.array(other.scores("test", estimate, None))
    np.testing.assert_allclose(again(found).scores("test", estimate, None), wanted, rtol=1e-4, atol=1e-6)


def test_rows_that_come_back_do_not_bring_back_scores_of_those_in_between(found, monkeypatch):
    before, real = expected(found), TileScorer.score

    def overtaken(self, tile, *args, **options):
        if tile[0] <= ROWS[0] <= tile[-1]:
            replace(found.store, 7)
        return real(self, tile, *args, **options)

    replace(found.store, 9)
    before = expected(found)
    monkeypatch.setattr(TileScorer, "score", overtaken)
    with pytest.raises(StoreError):
        ask(found, "scores")
    monkeypatch.setattr(TileScorer, "score", real)
    replace(found.store, 9)
    np.testing.assert_allclose(ask(again(found), "scores"), before, rtol=1e-4, atol=1e-4)


def test_whoever_holds_scores_that_were_removed_keeps_them_or_is_told(tmp_path):
    found = scorer(tmp_path / "store", N, M, DIM, memory_bytes=1 << 14)
    held, wanted = found.scores("test", Estimate(), None), expected(found)
    divided = scorer(tmp_path / "divided", N, M, DIM, memory_bytes=1 << 14, processes=4)
    divided.scores("test", Estimate(), None)
    parts = again(divided).scores("test", Estimate(), None)
    assert isinstance(parts, ScoreMatrix)
    for each in (found, divided):
        replace(each.store, 7)
        ask(again(each), "scores")
        assert len(each.store.catalog.score_paths()) == 1
    np.testing.assert_allclose(held, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(StoreError, match="was removed, since its tables have changed"):
        np.asarray(parts)


@pytest.mark.parametrize("storage", ["float32", "float16"])
def test_tables_that_grow_keep_the_scores_and_parts_of_their_rows(tmp_path, monkeypatch, storage):
    found = scorer(tmp_path, N, M, DIM, storage, memory_bytes=1 << 14)
    before, best = ask(found, "scores"), found.top("test", 5, "proponents", Estimate(), None)
    found.store.grow(N + 30)
    grown = again(found)
    write(grown.store, 7, rows=np.arange(N, N + 30))
    seen, real = [], TileScorer.score

    def counting(self, tile, *args, **options):
        seen.extend(tile)
        return real(self, tile, *args, **options)

    monkeypatch.setattr(TileScorer, "score", counting)
    scores = ask(grown, "scores")
    np.testing.assert_array_equal(scores[: min(seen)], before[: min(seen)])
    assert 0 < min(seen) <= N and seen == [*range(min(seen), N + 30)]
    np.testing.assert_allclose(scores, expected(grown), rtol=1e-3, atol=1e-3)
    seen.clear()
    more = grown.top("test", 5, "proponents", Estimate(), None)
    assert seen == [*range(N, N + 30)] and (more.scores >= best.scores).all()
    np.testing.assert_array_equal(more.indices, strongest(scores, 5, "proponents"))
