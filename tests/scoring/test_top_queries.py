"""Top-k queries: both ends, filters, ties; stored, resumed after a kill, divided over processes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from scoring_cases import expected, scorer, strongest

from tracer import StoreError, verify
from tracer.data.indices import resolve_selection
from tracer.errors import InputError, InputTypeError
from tracer.scoring import streaming, top_queries
from tracer.scoring.estimators import Estimate
from tracer.scoring.scorer import KINDS, Scorer
from tracer.store import Store
from tracer.store.arrays.metadata import NODE
from tracer.store.result_group import load_group, save_group
from tracer.store.topk_parts import list_parts, load_part, read_part

N, M, DIM, K = 300, 4, 16, 7


@pytest.fixture
def found(tmp_path):
    return scorer(tmp_path / "store", N, M, DIM, memory_bytes=1 << 14)


def top(found, k=K, kind="proponents", rows=None):
    return found.top("test", k, kind, Estimate(), None, rows)


def parts(found):
    return list_parts(found.store.results.top_path("test", "tracin"))


def ranges(found):
    return [(part.start, part.stop) for part in parts(found)]


@pytest.fixture
def counted(monkeypatch):
    """The training examples that were scored."""
    seen = []
    score = streaming.TileScorer.score

    def counting(self, tile, *args, **options):
        seen.extend(tile)
        score(self, tile, *args, **options)

    monkeypatch.setattr(streaming.TileScorer, "score", counting)
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_top_is_that_of_all_scores(found, kind):
    scores = np.array(found.scores("test", Estimate(), None))
    answer = top(found, kind=kind)
    np.testing.assert_array_equal(answer.indices, strongest(scores, K, kind))
    np.testing.assert_allclose(answer.scores, np.take_along_axis(scores.T, answer.indices, 1), rtol=1e-5)
    assert answer.indices.dtype == np.int64 and answer.scores.dtype == np.float32


def test_every_row_can_be_asked_for(found):
    answer = top(found, k=N)
    np.testing.assert_array_equal(np.sort(answer.indices), np.tile(np.arange(N), (M, 1)))
    with pytest.raises(InputError, match=f"k={N + 1} is more than train_set_size={N}"):
        top(found, k=N + 1)


@pytest.mark.parametrize(
    "rows",
    [
        range(20, 90),
        range(0, N, 17),
        slice(-40, None),
        [250, 3, 3, 77, 12, 13, 299, 0, 140],
        np.arange(0, N, 2),
        torch.arange(10, 30),
        np.random.default_rng(0).random(N) < 0.2,
        (torch.arange(N) % 9 == 0),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_only_chosen_rows_count(found, counted, rows, kind):
    scores = expected(found)
    chosen = np.asarray(resolve_selection(rows, N))
    answer = top(found, kind=kind, rows=rows)
    np.testing.assert_array_equal(answer.indices, strongest(scores, K, kind, chosen))
    assert counted == chosen.tolist()


def test_files_without_chosen_rows_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("tracer.store.arrays.local_path.LocalPath.feature_chunk_bytes", 10 * DIM * 4)
    found = scorer(tmp_path, N, M, DIM)
    scores = expected(found)
    for model_id in (0, 1):
        table = found.store.checkpoint(model_id)
        assert table.chunk_rows == 10
        for chunk in set(range(N // 10)) - {2, 25}:
            table._features.chunk_path(chunk).write_bytes(b"damaged")
    for rows in ([25, 29, 253], range(20, 30), np.isin(np.arange(N), [20, 255, 259])):
        answer = top(found, k=3, rows=rows)
        np.testing.assert_array_equal(answer.indices, strongest(scores, 3, "proponents", resolve_selection(rows, N)))


@pytest.mark.parametrize(
    ("rows", "error", "text"),
    [
        (range(5), InputError, "k=7 is more than the 5 training examples that were chosen"),
        ([], InputError, "k=7 is more than the 0 training examples"),
        (np.ones(N + 1, bool), InputError, f"rows is a mask of {N + 1} values; expected {N}, one a training example"),
        ([0, N], InputError, rf"rows has \[{N}\], outside the {N} training examples, 0 to {N - 1}"),
        ([-1, 3], InputError, r"rows has \[-1\], outside"),
        (range(N - 3, N + 9), InputError, "is outside the 300 training examples"),
        ("first", InputTypeError, "rows is str of shape"),
        ([0.5], InputTypeError, "expected a slice or range, indices, or a bool"),
        (np.zeros((2, 2), int), InputTypeError, r"of shape \(2, 2\)"),
    ],
)
def test_choices_of_rows_that_cannot_be_used_are_refused(found, rows, error, text):
    with pytest.raises(error, match=text):
        top(found, rows=rows)


def test_an_answer_is_read_and_not_computed_again(found, counted):
    answer = top(found)
    assert len(counted) == N
    counted.clear()
    for k in (K, 3, 1):
        for kind in KINDS:
            again = Scorer(Store.open_existing(found.store.path), torch.device("cpu"), False)
            read = again.top("test", k, kind, Estimate(), None)
            assert read.indices.shape == (M, k)
            if kind == "proponents":
                np.testing.assert_array_equal(read.indices, answer.indices[:, :k])
                np.testing.assert_array_equal(read.scores, answer.scores[:, :k])
    assert counted == [] and ranges(found) == [(0, N)]
    found.top("test", K, "opponents", Estimate("cosine"), None)
    top(found, k=K + 1)
    assert len(counted) == 2 * N
    assert [part.inputs["k"] for part in parts(found)] == [K + 1]  # which answers for smaller ones as well


@pytest.mark.parametrize("change", ["learning rate", "targets", "checkpoints", "rows"])
def test_other_inputs_are_another_query(found, counted, change):
    top(found)
    counted.clear()
    if change == "learning rate":
        found.store.checkpoint(1).set_attributes(learning_rate=2.0)
    elif change == "targets":
        shutil.rmtree(found.store.path / "targets")
        other = scorer(found.store.path.parent / "other", N, M, DIM)
        shutil.copytree(other.store.path / "targets", found.store.path / "targets")
    answer = found.top(
        "test",
        K,
        "proponents",
        Estimate(),
        [1] if change == "checkpoints" else None,
        [*range(50)] if change == "rows" else None,
    )
    assert len(counted) == (50 if change == "rows" else N)
    if change in ("learning rate", "checkpoints"):
        scores = found.scores("test", Estimate(), [1] if change == "checkpoints" else None)
        np.testing.assert_array_equal(answer.indices, strongest(np.array(scores), K, "proponents"))
    assert len(parts(found)) == (1 if change == "targets" else 2)  # of tables that are gone nothing is kept


def test_any_zarr_reader_opens_a_part(found):
    answer = top(found)
    (part,) = parts(found)
    group = zarr.open_group(str(found.store.path), mode="r")[str(part.path.relative_to(found.store.path))]
    np.testing.assert_array_equal(group["proponents_rows"][:], answer.indices)
    np.testing.assert_array_equal(group["opponents_scores"][:], top(found, kind="opponents").scores)
    assert group.attrs["inputs"]["model_ids"] == [0, 1] and group.attrs["inputs"]["k"] == K


def test_shares_of_the_work_are_merged(found, counted):
    for share in ([(100, 200)], [(0, 50), (250, N)], [(190, 210)]):
        found.top_query("test", K, Estimate(), None, range(N)).compute(share)
    assert sorted(counted) == [*range(50), *range(100, 210), *range(250, N)]
    counted.clear()
    answer = top(found)
    assert sorted(counted) == [*range(50, 100), *range(210, 250)]
    np.testing.assert_array_equal(answer.indices, strongest(expected(found), K, "proponents"))
    assert ranges(found) == [(0, N)]


def test_parts_are_saved_now_and_then_and_do_not_pile_up(found, monkeypatch):
    monkeypatch.setattr(top_queries, "SAVE_SECONDS", 0.0)
    saved, most = [], []
    save = top_queries.save_part

    def saving(directory, start, stop, *rest):
        saved.append((start, stop))
        part = save(directory, start, stop, *rest)
        most.append(len(list_parts(directory)))
        return part

    monkeypatch.setattr(top_queries, "save_part", saving)
    answer = top(found)
    assert len(saved) > 3 and {start for start, _ in saved} == {0} and max(most) <= 2
    np.testing.assert_array_equal(answer.indices, strongest(expected(found), K, "proponents"))
    assert ranges(found) == [(0, N)]


def test_equal_scores_come_by_row_index_also_across_parts(tmp_path):
    found = scorer(tmp_path, N, M, DIM)
    for model_id in (0, 1):  # no gradient at all: every score is 0
        table = found.store.targets("test", model_id)
        table.set_attributes(finalized=False)
        table.write(
            np.arange(M),
            np.zeros((M, DIM), np.float32),
            **{name: np.zeros(M, np.float32) for name in ("loss", "loss_grad", "loss_hess", "gradient_norm")},
            fingerprint=np.zeros(M, np.uint64),
        )
        table.flush()
    for share in ((200, 300), (3, 50)):
        found.top_query("test", K, Estimate(), None, range(N)).compute([share])
    for kind in KINDS:
        np.testing.assert_array_equal(top(found, kind=kind).indices, np.tile(np.arange(K), (M, 1)))
    np.testing.assert_array_equal(top(found, rows=slice(100, None)).indices, np.tile(100 + np.arange(K), (M, 1)))


@pytest.mark.parametrize("damage", ["short file", "flipped bit", "cut document", "no array"])
def test_a_damaged_part_is_computed_again(found, damage):
    answer = top(found)
    (part,) = parts(found)
    file = part.path / "proponents_scores" / "c" / "0" / "0"
    if damage == "short file":
        file.write_bytes(b"12")
    elif damage == "flipped bit":
        data = bytearray(file.read_bytes())
        data[3] ^= 1
        file.write_bytes(data)
    elif damage == "cut document":
        os.truncate(part.path / NODE, 20)
    else:
        shutil.rmtree(part.path / "proponents_scores")
    for _ in range(2):
        np.testing.assert_array_equal(top(found).scores, answer.scores)
    assert ranges(found) == [(0, N)]


@pytest.mark.parametrize("harm", ["beyond N", "negative", "beyond the part", "fewer", "other targets", "no integers"])
def test_a_part_that_no_selection_can_be_is_computed_again(found, harm):
    answer = top(found)
    (part,) = parts(found)
    attributes, arrays = load_group(part.path)
    rows = arrays["proponents_rows"]
    if harm in ("fewer", "other targets"):
        arrays = {name: each[:, 1:] if harm == "fewer" else each[1:] for name, each in arrays.items()}
    elif harm == "no integers":
        arrays["proponents_rows"] = rows.astype(np.float64)
    else:
        rows[1, 2] = {"beyond N": N, "negative": -1, "beyond the part": 250}[harm]
    path = part.path.with_name("0-200") if harm == "beyond the part" else part.path
    save_group(path, attributes, arrays)
    if harm in ("fewer", "other targets"):  # which verify cannot know
        assert verify(found.store.path, repair=False).ok
    else:
        assert [str(path)] == [each.path for each in verify(found.store.path, repair=False).damage]
        with pytest.raises(StoreError, match=r"is damaged: expected proponents_rows .* compute it again"):
            load_part(read_part(path))
    for kind in KINDS:
        assert (top(found, kind=kind).indices < N).all()
    np.testing.assert_array_equal(top(found).indices, answer.indices)
    assert ranges(found) == [(0, N)] or harm == "beyond the part"


CHILD = """
import sys, time
sys.path.insert(0, sys.argv[2])
import torch
from tracer.scoring import streaming, top_queries
from tracer.scoring.scorer import Scorer
from tracer.scoring.estimators import Estimate
from tracer.store import Store
from tracer.store.arrays.metadata import NODE
top_queries.SAVE_SECONDS = 0.0
save = top_queries.save_part

def saving(*args):
    part = save(*args)
    print(part.stop, flush=True)
    return part

top_queries.save_part = saving
found = Scorer(Store.open_existing(sys.argv[1]), torch.device("cpu"), False, 1 << 14)
found.top("test", 7, "proponents", Estimate(), None)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_run_is_continued(found, counted):
    command = [sys.executable, "-c", CHILD, str(found.store.path), str(Path(__file__).parents[1])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        child.stdout.readline()
        time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        reported = [int(line) for line in child.stdout if line.endswith("\n")]
    known = max(part.stop for part in parts(found))
    assert known >= max(reported, default=1)
    assert known < N, "the child was done before it was killed"
    answer = top(found)
    assert counted == list(range(known, N))
    np.testing.assert_array_equal(answer.indices, strongest(expected(found), K, "proponents"))
    assert ranges(found) == [(0, N)]
