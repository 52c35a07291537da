"""Verify finds what was changed behind the library's back, and only that is computed again."""

from __future__ import annotations

import errno
import os
import shutil

import numpy as np
import pytest
from scoring_cases import scorer
from store_cases import DIM, N, batch, manifest, stored_features

from tracer import Tracer, verify
from tracer.errors import IncompleteError, StoreError
from tracer.scoring.estimators import Estimate
from tracer.scoring.readiness import check_finalized, checkpoint_ids
from tracer.scoring.scorer import Scorer
from tracer.store import Store
from tracer.store.arrays.layout import Layout, create_array
from tracer.store.arrays.metadata import NODE
from tracer.store.revisions import Revisions
from tracer.store.table_schema import table_layouts


@pytest.fixture
def store(tmp_path, monkeypatch) -> Store:
    """Two checkpoints, targets and scores, in chunks of 4 rows, all done."""
    monkeypatch.setattr("tracer.store.arrays.local_path.LocalPath.feature_chunk_bytes", 4 * DIM * 4)
    store = Store.open(tmp_path / "run", manifest())
    for model_id in (0, 1):
        with store.create_checkpoint(model_id, "abc", 0.1) as table:
            table.write(**batch(np.arange(N)))
            table.set_attributes(finalized=True)
    with store.create_targets("test", 0, 6) as table:
        table.write(**batch(np.arange(6)))
    revisions = Revisions(store, [0], "test")
    with store.results.scores("test", "tracin", (N, 6), {}, tile_rows=5, revisions=revisions) as scores:
        scores.write(0, np.ones((N, 6), np.float32))
    return store


def flip(path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_a_store_as_it_was_written_is_fine(store):
    before = {path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file()}
    found = verify(store.path)
    assert found.ok and (found.num_rows, found.num_tiles) == (2 * N + 6, 5)
    assert "52 rows and 5 tiles of scores read, all as they were written" in str(found)
    assert before == {path: path.stat().st_mtime_ns for path in store.path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        ("flipped feature", [9]),
        ("flipped loss_grad", [9]),
        ("flipped fingerprint", [9]),
        ("flipped audited", [9]),
        ("features missing", [8, 9, 10, 11]),
        ("features short", [8, 9, 10, 11]),
        ("floats missing", [8, 9, 10, 11]),
        ("integers short", [8, 9, 10, 11]),
        ("marks short", [8, 9, 10, 11]),
    ],
)
def test_damaged_rows_are_named_and_marked_as_missing(store, damage, lost):
    table = store.path / "checkpoints" / "0"
    name, how = {
        "flipped feature": ("features/c/2/0", lambda path: flip(path, 1 * DIM * 4 + 2)),
        "flipped loss_grad": ("floats/c/2/0", lambda path: flip(path, 1 * 7 * 4 + 2 * 4 + 1)),
        "flipped fingerprint": ("integers/c/2/0", lambda path: flip(path, 1 * 5 * 8 + 2 * 8 + 4)),
        "flipped audited": ("integers/c/2/0", lambda path: flip(path, 1 * 5 * 8 + 4 * 8)),
        "features missing": ("features/c/2/0", os.unlink),
        "features short": ("features/c/2/0", lambda path: os.truncate(path, 7)),
        "floats missing": ("floats/c/2/0", os.unlink),
        "integers short": ("integers/c/2/0", lambda path: os.truncate(path, 7)),
        "marks short": ("done/c/2", lambda path: os.truncate(path, 1)),
    }[damage]
    how(table / name)
    looked = verify(store.path, repair=False)
    assert [found.rows.tolist() for found in looked.damage] == [lost] and "(not repaired)" in str(looked)
    found = verify(store.path)
    assert not found.ok and str(found.damage[0].rows.tolist()) == str(lost) and "checkpoints/0" in found.damage[0].path
    assert verify(store.path).ok
    again = store.checkpoint(0)
    assert again.remaining().tolist() == lost and not again.attributes["finalized"]
    assert store.checkpoint(1).remaining().tolist() == [] and store.checkpoint(1).attributes["finalized"]
    with again:  # rows that are computed again may or may not be audited; they are the same
        again.write(**batch(np.array(lost)), audited=np.ones(len(lost), bool))
    np.testing.assert_array_equal(stored_features(store.checkpoint(0), 0, N), batch(np.arange(N))["features"])
    again.set_attributes(finalized=True)
    revisions = Revisions(store, [0], "test")
    scores = store.results.scores("test", "tracin", (N, 6), {}, revisions=revisions)
    assert not scores.tile_done.any()
    store.results.adopt(scores)  # the rows are those that were there before, so are their scores
    assert scores.complete


def test_damaged_targets_take_their_scores_with_them(store):
    flip(store.path / "targets" / "test" / "0" / "features" / "c" / "1" / "0", 0)
    assert [found.rows.tolist() for found in verify(store.path).damage] == [[3]]
    assert store.targets("test", 0).remaining().tolist() == [3]
    scores = store.results.scores("test", "tracin", (N, 6), {}, revisions=Revisions(store, [0], "test"))
    store.results.adopt(scores)
    assert not scores.tile_done.any()


def test_metadata_that_follows_from_the_tables_own_is_written_again(store):
    (store.path / "checkpoints" / "0" / "floats" / NODE).write_text("{")
    shutil.copy(*(store.path / "checkpoints" / "0" / name / NODE for name in ("integers", "done")))
    assert len(verify(store.path).damage) == 2
    assert verify(store.path).ok and store.checkpoint(0).done.all()


@pytest.mark.parametrize("damage", ["gone", "cut", "another learning rate"])
def test_a_table_that_lost_its_document_is_named_and_its_rows_are_written_again(store, damage):
    node = store.path / "checkpoints" / "1" / NODE
    if damage == "gone":
        node.unlink()
    elif damage == "cut":
        os.truncate(node, 20)
    else:
        node.write_text(node.read_text().replace('"learning_rate": 0.1', '"learning_rate": 0.3'))
        with pytest.raises(StoreError, match="does not match its checksum"):
            store.checkpoint(1)
    (found,) = verify(store.path).damage
    assert "checkpoints/1" in found.path and "featurize this checkpoint again" in found.what
    assert (store.path / "checkpoints" / "1" / "features" / "c" / "0" / "0").exists()
    with store.create_checkpoint(1, "other", 0.1) as table:
        assert table.remaining().tolist() == list(range(N))  # nobody knows that they are of these weights
        table.write(**batch(np.arange(N)))
    assert verify(store.path).ok


def test_what_a_killed_process_was_about_to_make_is_no_damage(store):
    for path in ("checkpoints/7", "targets/more/0"):
        create_array(store.path / path / "floats", Layout((N, 7), "float32", N))
    scores = store.results.scores("test", "tracin", (N, 6), {"other": 1})
    (scores.path / "done" / NODE).unlink()
    (store.path / "kernels" / "0").mkdir(parents=True)
    store.grow(N + 9)
    for name, layout in table_layouts(N + 9, DIM, "float32", 4).items():
        create_array(store.path / "checkpoints" / "0" / name, layout)
    assert verify(store.path, repair=False).ok


def test_a_short_file_without_rows_is_removed_and_is_no_damage(store):
    with store.create_checkpoint(2, "abc", 0.1) as table:
        table.write(**batch(np.arange(4)))
    file = store.path / "checkpoints" / "2" / "floats" / "c" / "3" / "0"
    file.parent.mkdir()
    file.write_bytes(b"")
    assert verify(store.path, repair=False).ok
    with store.checkpoint(2) as table, pytest.raises(StoreError, match="expected 112 bytes, found 0"):
        table.write(**batch(table.remaining()))
    assert verify(store.path).ok
    with store.checkpoint(2) as table:
        table.write(**batch(table.remaining()))


def test_a_checkpoint_that_lost_its_document_is_not_left_out_of_all_checkpoints(store):
    (store.path / "checkpoints" / "1" / NODE).unlink()
    with pytest.raises(StoreError, match=r"checkpoints/1/zarr\.json is missing although the checkpoint has rows"):
        checkpoint_ids(store, None)
    assert checkpoint_ids(store, [0]) == [0]
    shutil.rmtree(store.path / "checkpoints" / "1")
    assert checkpoint_ids(store, None) == [0]


def test_files_of_a_table_without_document_and_finished_rows_are_no_damage(store):
    with store.create_checkpoint(2, "abc", 0.1) as table:
        table.write(**batch(np.arange(4)))
    path = store.path / "checkpoints" / "2"
    shutil.rmtree(path / "done" / "c")  # power failed before the marks, and the document's name, were on the disk
    (path / NODE).unlink()
    assert verify(store.path).ok and checkpoint_ids(store, None) == [0, 1]
    with store.create_checkpoint(2, "abc", 0.1) as table:
        table.write(**batch(np.arange(8)))
    assert verify(store.path).ok and store.checkpoint(2).num_done == 8


@pytest.mark.parametrize("kind", ["targets/test", "scores", "scores/test/tracin"])
def test_a_group_that_lost_its_document_hides_nothing(store, kind):
    (store.path / kind / NODE).unlink()
    assert [found.what for found in verify(store.path).damage] == ["its zarr.json is missing"]
    assert verify(store.path).ok and store.catalog.exp_names() == ["test"]
    assert store.catalog.score_names("test") == ["tracin"]


def test_damaged_kernels_and_parts_are_found(tmp_path):
    found = scorer(tmp_path, 40, 3, 8)
    found.top("test", 5, "proponents", Estimate(), None)
    found.self_influence(None, Estimate("influence"))
    for pattern in ("kernels/0/loss_hess/*/matrix/c/0/0", "top/test/tracin/*/0-40/opponents_rows/c/0/0"):
        (path,) = tmp_path.glob(pattern)
        flip(path, 3)
    names = [str(each.path).split("/")[-4] for each in verify(tmp_path, repair=False).damage]
    assert len(names) == 2 and "kernels" in names and not verify(tmp_path).ok and verify(tmp_path).ok
    found.top("test", 5, "proponents", Estimate(), None)
    assert Scorer(found.store, found.device, False).self_influence(None, Estimate("influence")).shape == (40,)


def test_a_kernel_is_written_again_in_place_of_one_whose_file_has_another_size(tmp_path):
    found = scorer(tmp_path, 40, 3, 8)
    expected = found.self_influence(None, Estimate("influence"))
    (path,) = tmp_path.glob("kernels/0/loss_hess/*/matrix/c/0/0")
    path.write_bytes(path.read_bytes() + b"more")
    again = Scorer(found.store, found.device, False).self_influence(None, Estimate("influence"))
    np.testing.assert_array_equal(again, expected)
    assert verify(tmp_path).ok


def test_damaged_scores_are_computed_again(store):
    (chunk,) = (store.path / "scores" / "test" / "tracin").glob("*/scores/c/0/0")
    flip(chunk, 6 * 6 * 4)
    (damage,) = verify(store.path).damage
    assert damage.rows.tolist() == [5, 6, 7, 8, 9]
    assert store.results.read_scores("test", "tracin").remaining() == [(5, 10)]
    os.truncate(chunk, 6)
    assert "computed again" in verify(store.path).damage[0].what
    assert store.catalog.score_names("test") == [] and verify(store.path).ok


def test_rows_that_were_never_done_are_no_damage(store):
    with store.create_checkpoint(2, "abc", 0.1) as table:
        table.write(**batch(np.array([3])))
    table = store.checkpoint(2)
    table.write(**batch(np.array([9])))  # written, and the process ends without a flush
    assert verify(store.path).ok


@pytest.mark.parametrize("harm", ["checkpoints/0/done/zarr.json", "targets/zarr.json", "checkpoints/0/features/c/1/0"])
def test_a_full_disk_is_said_when_damage_is_repaired(store, monkeypatch, harm):
    (store.path / harm).write_bytes(b"{")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StoreError, match="No space left .* Free space"):
            verify(store.path)
    assert not verify(store.path).ok and verify(store.path).ok


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(StoreError, match="holds no store"):
        verify(tmp_path)


def test_only_damaged_rows_are_featurized_again(run, tmp_path):
    checkpoint, rate = run.checkpoints[0]
    with Tracer(run.model, "image_classification", 23, tmp_path, proj_dim=32) as tracing:
        tracing.load_checkpoint(checkpoint, 0, rate)
        tracing.featurize(run.train, num_samples=23)
    flip(tmp_path / "checkpoints" / "0" / "features" / "c" / "0" / "0", 3 * 32 * 2)
    before = stored_features(Store.open_existing(tmp_path).checkpoint(0), 0, 23)
    assert [found.rows.tolist() for found in verify(tmp_path).damage] == [[3]]
    with Tracer(run.model, "image_classification", 23, tmp_path, proj_dim=32) as tracing:
        tracing.load_checkpoint(checkpoint, 0, rate)
        assert tracing.remaining(0).tolist() == [3]
        tracing.featurize(run.train, num_samples=23)
        tracing.finalize_features()
    after = stored_features(Store.open_existing(tmp_path).checkpoint(0), 0, 23)
    others = np.arange(23) != 3
    np.testing.assert_array_equal(after[others], before[others])
    assert verify(tmp_path).ok and (after[3] != before[3]).any()


def test_a_chunk_that_is_gone_with_its_marks_is_missed(store):
    for path in (store.path / "checkpoints" / "0").glob("*/c/2"):
        path.unlink() if path.is_file() else shutil.rmtree(path)
    with pytest.raises(IncompleteError, match="lacks 4 of"):
        check_finalized(store, 0)
    found = verify(store.path)
    assert [damage.rows.tolist() for damage in found.damage] == [[8, 9, 10, 11]]
    with store.checkpoint(0) as table:
        assert not table.attributes["finalized"]
        missing = batch(np.arange(8, 12))
        missing["features"] += 1
        table.write(**missing)
        table.set_attributes(finalized=True)
    with store.results.scores("test", "tracin", (N, 6), {}, revisions=Revisions(store, [0], "test")) as scores:
        store.results.adopt(scores)
        assert scores.tile_done.tolist() == [True, False, False, True, True]
    assert verify(store.path).ok
