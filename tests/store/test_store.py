"""The store: a plain zarr hierarchy that is created whole or not at all, and never wipes anything."""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings

import numpy as np
import pytest
import zarr
from store_cases import DIM, N, batch, manifest, stored_features

from tracer._core.files import PARTIAL
from tracer.errors import CallOrderError, InputError, InputTypeError, MismatchError, StoreError
from tracer.store import RowTable, Store
from tracer.store import store as store_module
from tracer.store.arrays.layout import Layout
from tracer.store.arrays.local import LocalArray
from tracer.store.arrays.metadata import NODE
from tracer.store.manifest import FORMAT_VERSION
from tracer.store.table_schema import ARRAYS, VALUES


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(tmp_path / "run", manifest())


@pytest.fixture
def table(store) -> RowTable:
    return store.create_checkpoint(0, "abc", 0.1, flush_seconds=1e9)


def test_any_zarr_reader_sees_the_layout(store, table):
    data = batch(np.arange(N))
    table.write(**data)
    table.close()
    store.create_targets("test", 0, 4, weights_fingerprint="abc").close()
    with store.results.scores("test", "tracin", (N, 4), {}) as scores:
        scores.write(0, np.ones((N, 4), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # zarr warns about anything that does not belong to the hierarchy
        root = zarr.open_group(str(store.path), mode="r")
        names = {name for name, _ in root.members(max_depth=None)}
    columns = {*ARRAYS, "features", "done"}
    expected = {"checkpoints", "checkpoints/0", "targets", "targets/test", "targets/test/0"}
    expected |= {"scores", "scores/test", "scores/test/tracin", (result := f"scores/test/tracin/{scores.path.name}")}
    expected |= {f"{result}/{name}" for name in ("scores", "rows", "checksum", "done")}
    expected |= {f"{group}/{name}" for group in ("checkpoints/0", "targets/test/0") for name in columns}
    assert names == expected
    assert root.attrs["settings"]["train_set_size"] == N and root.attrs["format"] == "tracer"
    group = root["checkpoints/0"]
    attributes = dict(group.attrs)
    assert attributes.pop("unmarked") == attributes["revision"]
    assert len(attributes.pop("revision")) == 32 and attributes.pop("document_crc32c") > 0
    assert attributes == {
        "learning_rate": 0.1,
        "weights_fingerprint": "abc",
        "finalized": False,
        "num_rows": N,
        "storage": "float32",
        "chunk_rows": N,
    }
    np.testing.assert_array_equal(group["features"][:], data["features"])
    np.testing.assert_array_equal(group["floats"][:, 1:], np.stack([data[name] for name in VALUES], 1))
    np.testing.assert_array_equal(group["integers"][:, 2].view("uint64"), data["fingerprint"])
    assert group["done"][:].all() and (group["floats"][:, 0] == 1).all()
    assert not root["targets/test/0/done"][:].any() and root["targets/test/0/features"].shape == (4, DIM)


def test_a_store_opens_again_with_the_same_settings(store):
    assert Store.open(store.path, manifest()).manifest == store.manifest
    assert Store.open_existing(str(store.path)).manifest == store.manifest


def test_the_path_of_a_store_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store.open("run", manifest()).path == tmp_path / "run"


def test_an_empty_directory_becomes_a_store_also_after_a_crash(tmp_path):
    (tmp_path / (PARTIAL + "0" * 32)).write_text("{")
    assert Store.open(tmp_path, manifest()).catalog.checkpoint_ids() == []
    assert (tmp_path / (PARTIAL + "0" * 32)).exists()  # too young to be swept


def test_leftovers_of_crashes_are_swept_after_a_while(store):
    old = store.path / (PARTIAL + "0" * 32)
    old.mkdir()
    os.utime(old, (time.time() - 3600,) * 2)
    Store.open_existing(store.path)
    assert not old.exists()


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match="is a file: expected a directory"):
        Store.open(tmp_path / "file", manifest())
    with pytest.raises(StoreError, match="cannot be read"):
        Store.open_existing(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_directory_of_something_else_stays_as_it_is(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StoreError, match=r"is not a store and not empty \(it holds thesis.tex\): nothing was changed"):
        Store.open(tmp_path, manifest())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_store_that_another_process_makes_meanwhile_is_opened(tmp_path, monkeypatch):
    check = store_module._check_empty

    def overtaken(path):
        monkeypatch.setattr(store_module, "_check_empty", check)
        Store.open(tmp_path, manifest()).create_checkpoint(0, "5f", 0.1).close()
        check(path)

    monkeypatch.setattr(store_module, "_check_empty", overtaken)
    assert Store.open(tmp_path, manifest()).catalog.checkpoint_ids() == [0]


def test_a_zarr_group_of_something_else_stays_as_it_is(tmp_path):
    zarr.open_group(str(tmp_path / "g"), mode="w").create_array("x", shape=(3,), dtype="int32")
    before = (tmp_path / "g" / NODE).read_bytes()
    with pytest.raises(StoreError, match="did not write"):
        Store.open(tmp_path / "g", manifest())
    assert (tmp_path / "g" / NODE).read_bytes() == before


def test_an_absent_store_is_named(tmp_path):
    with pytest.raises(StoreError, match="holds no store"):
        Store.open_existing(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_damaged_root_is_named_and_kept(store):
    (store.path / NODE).write_text('{"zarr_format": 3,')
    with pytest.raises(StoreError, match="cannot be read"):
        Store.open(store.path, manifest())
    assert (store.path / NODE).read_text() == '{"zarr_format": 3,'


def test_a_newer_format_asks_for_an_upgrade(store):
    document = json.loads((store.path / NODE).read_text())
    document["attributes"]["format_version"] = FORMAT_VERSION + 1
    (store.path / NODE).write_text(json.dumps(document))
    with pytest.raises(StoreError, match="upgrade the package"):
        Store.open(store.path, manifest())


def test_without_resume_a_store_must_be_new(tmp_path):
    Store.open(tmp_path / "run", manifest(), resume=False)
    with pytest.raises(InputError, match="choose another save_dir, or pass resume=True"):
        Store.open(tmp_path / "run", manifest(), resume=False)
    Store.open(tmp_path / "run", manifest())


def test_other_settings_are_listed_and_the_store_stays_usable(store, table):
    with pytest.raises(MismatchError, match="seed: stored 0, asked 1"):
        Store.open(store.path, manifest(seed=1))
    assert Store.open(store.path, manifest()).catalog.checkpoint_ids() == [0]


def test_a_save_dir_of_another_type_or_protocol_is_refused():
    with pytest.raises(InputError, match="fsspec knows no protocol 'nowhere'"):
        Store.open("nowhere://run", manifest())
    with pytest.raises(InputTypeError, match="expected a str or a path"):
        Store.open(b"run", manifest())  # type: ignore[arg-type]


def test_a_directory_that_cannot_be_made_is_a_store_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="failed"):
        Store.open(tmp_path / "file" / "run", manifest())


def test_checkpoints_are_listed_and_opened(store, table):
    store.create_checkpoint(np.int64(10), "def", None)
    store.create_checkpoint(2, "def", None)
    assert store.catalog.checkpoint_ids() == [0, 2, 10]
    assert store.catalog.has_checkpoint(10) and not store.catalog.has_checkpoint(1)
    assert store.checkpoint(10).attributes["learning_rate"] is None
    assert (table.num_rows, table.dim, table.storage) == (N, DIM, "float32")


def test_a_checkpoint_that_is_not_there_is_named(store, table):
    with pytest.raises(CallOrderError, match=r"no checkpoint 7, only \[0\]: featurize it first"):
        store.checkpoint(7)
    with pytest.raises(MismatchError, match="exists already: expected its weights abc, got def"):
        store.create_checkpoint(0, "def", 0.1)
    assert store.create_checkpoint(0, "abc", 0.2).attributes["learning_rate"] == 0.1
    assert not list(store.path.glob(PARTIAL + "*"))


@pytest.mark.parametrize(
    ("model_id", "error"), [(-1, InputError), (1.0, InputTypeError), ("1", InputTypeError), (True, InputTypeError)]
)
def test_model_ids_are_integers_from_zero(store, model_id, error):
    with pytest.raises(error, match="model_id is"):
        store.catalog.has_checkpoint(model_id)


def test_a_learning_rate_that_is_not_finite_is_refused(store):
    with pytest.raises(InputError, match=r"attributes\.learning_rate is nan"):
        store.create_checkpoint(0, "abc", float("nan"))
    assert store.catalog.checkpoint_ids() == []


def test_targets_are_listed_and_opened(store):
    store.create_targets("test-1.b", 3, 2)
    store.create_targets("a_b", 3, 1, learning_rate=0.5)
    assert store.catalog.exp_names() == ["a_b", "test-1.b"] and store.catalog.target_ids("a_b") == [3]
    known = store.catalog.has_targets
    assert known("a_b", 3) and not known("a_b", 4) and not known("none", 3)
    assert store.targets("test-1.b", 3).num_rows == 2
    with pytest.raises(CallOrderError, match=r"no targets 'a_b' of checkpoint 4: it has \[3\]"):
        store.targets("a_b", 4)
    with pytest.raises(InputError, match="num_targets is 0"):
        store.create_targets("a_b", 5, 0)


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".hidden", "__x", "a/b", "a\\b", "zarr.json", "ZARR.json", "a b", "é", "a\n", "x" * 129]
)
def test_names_are_safe_path_components(store, name):
    for call in (
        lambda: store.create_targets(name, 0, 1),
        lambda: store.targets(name, 0),
        lambda: store.results.scores(name, "tracin", (1, 1), {}),
        lambda: store.results.scores("test", name, (1, 1), {}),
    ):
        with pytest.raises(InputError, match="letters, digits"):
            call()
    assert store.catalog.exp_names() == []


def test_names_of_other_types_are_refused(store):
    with pytest.raises(InputTypeError, match="exp_name is of type int"):
        store.catalog.has_targets(3, 0)
    with pytest.raises(InputTypeError, match="estimator is of type NoneType"):
        store.results.scores("test", None, (1, 1), {})


def test_a_table_that_does_not_fit_the_store_is_damaged(store, tmp_path):
    other = Store.open(tmp_path / "other", manifest(feature_dim=DIM + 1))
    other.create_checkpoint(0, "abc", 0.1)
    store.create_checkpoint(1, "abc", 0.1)
    shutil.copytree(other.path / "checkpoints" / "0", store.path / "checkpoints" / "0")
    with pytest.raises(StoreError, match=r"expected \(rows, dim, storage\) \(23, 5, 'float32'\)"):
        store.checkpoint(0)
    assert store.checkpoint(1).num_rows == N


@pytest.mark.parametrize("damage", ["metadata", "array", "file", "short"])
def test_a_damaged_table_is_named_and_the_store_still_opens(store, table, damage):
    table.write(**batch(np.arange(N)))
    table.close()
    path = table.path / "floats"
    if damage == "metadata":
        (path / NODE).write_text("")
    elif damage == "array":
        shutil.rmtree(path)
    elif damage == "file":
        (path / "c" / "0" / "0").unlink()
    else:
        os.truncate(table.path / "done" / "c" / "0", 3)
    with pytest.raises(StoreError):
        Store.open(store.path, manifest()).checkpoint(0)
    assert Store.open(store.path, manifest()).create_checkpoint(1, "abc", 0.1).num_done == 0


def test_a_removed_table_is_named(table):
    shutil.rmtree(table.path)
    with pytest.raises(StoreError, match="has been removed"):
        _ = table.attributes


def test_a_full_disk_marks_nothing_and_the_table_still_works(store, table, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    table.write(**batch(np.arange(3)))
    table.flush()
    with monkeypatch.context() as patch:
        patch.setattr(LocalArray, "_take_written", lambda *_: (_ for _ in ()).throw(StoreError("msync failed")))
        table.write(**batch(np.arange(3, 6)))
        with pytest.raises(StoreError, match="msync failed"):
            table.flush()
    assert table.num_done == 3 and table.pending == 0
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(StoreError, match="No space left"):
            store.create_checkpoint(1, "a", None).write(**batch(np.arange(2)))
        with pytest.raises(StoreError, match="No space left"):
            store.results.scores("test", "tracin", (N, 3), {}).write(0, np.ones((N, 3), np.float32))
    again = Store.open(store.path, manifest())
    assert not again.results.read_scores("test", "tracin").tile_done.any() and again.checkpoint(1).num_done == 0
    with again.checkpoint(0) as resumed:
        resumed.write(**batch(resumed.remaining()))
        assert resumed.remaining().size == 0
        np.testing.assert_array_equal(stored_features(resumed, 0, N), batch(np.arange(N))["features"])


def test_documents_of_arrays_are_read_once_for_each_revision_of_a_table(store, monkeypatch):
    with store.create_checkpoint(0, "a", 0.1) as table:
        table.write(**batch(np.arange(N)))
    read, read_layout = [], Layout.read
    monkeypatch.setattr(Layout, "read", lambda path: read.append(path.name) or read_layout(path))
    np.testing.assert_array_equal(stored_features(store.checkpoint(0), 0, N), batch(np.arange(N))["features"])
    assert not read
    Store.open_existing(store.path).invalidate_rows(np.array([1]))
    arrays, read[:] = {*ARRAYS, "features", "done"}, []
    assert store.checkpoint(0).remaining().tolist() == [1]
    assert set(read) == arrays
    read.clear()
    Store.open_existing(store.path).checkpoint(0)
    assert arrays <= set(read)


def test_tables_to_compare_with_are_found_without_opening_all(store, monkeypatch):
    for model_id in range(30):
        with store.create_checkpoint(model_id, f"a{model_id}", 0.1) as table:
            table.write(**batch(np.arange(1 + (model_id == 3))))
    opened = []
    monkeypatch.setattr("tracer.store.store.RowTable", lambda path, **kw: opened.append(path) or RowTable(path, **kw))
    again = Store.open_existing(store.path)
    assert again.other_checkpoint(20).path.name == "3" and len(opened) <= 8
    opened.clear()
    with again.checkpoint(20) as table:
        table.write(**batch(np.arange(N)))
    assert again.other_checkpoint(21).path.name == "20" and len(opened) <= 3
    opened.clear()
    assert [again.other_checkpoint(model_id).path.name for model_id in (22, 23, 20)] == ["20", "20", "23"]
    assert len(opened) <= 4
    shutil.rmtree(store.path / "checkpoints" / "20")
    assert again.other_checkpoint(5).path.name != "20"
