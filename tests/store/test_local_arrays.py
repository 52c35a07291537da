"""Mapped arrays: what is written through maps is what zarr reads, and nothing is done before it is synced."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import zarr

from tracer._core import files
from tracer._core.files import PARTIAL, create_file, sweep
from tracer.errors import StoreError
from tracer.store.arrays import local
from tracer.store.arrays.completion_mask import CompletionMask
from tracer.store.arrays.layout import DTYPES, Layout, array_document, create_array, rows_per_chunk
from tracer.store.arrays.local import LocalArray
from tracer.store.arrays.local_path import LocalPath
from tracer.store.arrays.metadata import NODE


def make(path, shape=(10, 3), dtype="float32", chunk_rows=4, tile_rows=None) -> LocalArray:
    create_array(LocalPath(path), Layout(shape, dtype, chunk_rows, tile_rows))
    return LocalArray(LocalPath(path))


def fill(array: LocalArray) -> np.ndarray:
    values = np.arange(np.prod(array.layout.shape)).reshape(array.layout.shape).astype(array.layout.dtype)
    array.assign(np.arange(len(values)), values)
    array.flush()
    return values


@pytest.mark.parametrize("dtype", ["float16", "float32", "uint64", "bool"])
@pytest.mark.parametrize(
    ("shape", "chunk_rows", "tile_rows"),
    [((10, 3), 4, None), ((10, 3), 10, None), ((10,), 10, None), ((10,), 3, None), ((10, 3), 12, 4), ((1, 1), 1, 1)],
)
def test_zarr_reads_what_was_written_through_maps(tmp_path, dtype, shape, chunk_rows, tile_rows):
    array = make(tmp_path / "a", shape, dtype, chunk_rows, tile_rows)
    values = fill(array)
    read = zarr.open_array(str(tmp_path / "a"), mode="r")
    assert read.dtype == values.dtype and read.shape == shape
    np.testing.assert_array_equal(read[:], values)
    np.testing.assert_array_equal(read[2:9] if len(values) > 1 else read[:], values[2:9] if len(values) > 1 else values)


def test_maps_read_what_zarr_wrote(tmp_path):
    array = make(tmp_path / "a")
    values = np.random.default_rng(0).standard_normal((10, 3), dtype=np.float32)
    zarr.open_array(str(tmp_path / "a"), mode="r+")[:] = values
    np.testing.assert_array_equal(np.concatenate([view for _, view in array.rows(0, 10)]), values)


def test_missing_files_read_as_zeros_for_both(tmp_path):
    array = make(tmp_path / "a")
    array.assign(np.array([5]), np.ones((1, 3), np.float32))
    assert [path.name for path in sorted((tmp_path / "a" / "c").iterdir())] == ["1"]
    expected = np.zeros((10, 3), np.float32)
    expected[5] = 1
    np.testing.assert_array_equal(np.concatenate([view for _, view in array.rows(0, 10)]), expected)
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "a"), mode="r")[:], expected)


@pytest.mark.parametrize("order", ["up", "down", "shuffled", "gaps"])
def test_rows_go_where_they_belong_in_any_order(tmp_path, order):
    rows = {"up": np.arange(10), "down": np.arange(10)[::-1], "gaps": np.array([0, 3, 4, 9])}.get(
        order, np.random.default_rng(1).permutation(10)
    )
    array = make(tmp_path / "a")
    values = np.random.default_rng(0).standard_normal((10, 3), dtype=np.float32)
    array.assign(rows, values[rows])
    expected = np.zeros_like(values)
    expected[rows] = values[rows]
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "a"), mode="r")[:], expected)


def test_views_are_not_copies_and_cannot_be_written(tmp_path):
    array = make(tmp_path / "a")
    fill(array)
    ((first, view), (second, _), _) = array.rows(2, 9)
    assert (first, second) == (2, 4) and isinstance(view, np.memmap) and not view.flags.writeable
    array.assign(np.array([2]), np.full((1, 3), 7, np.float32))
    assert (view[0] == 7).all()
    array.close()
    assert (view[0] == 7).all()


def test_more_files_than_maps_are_kept_right(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_MAX_MAPS", 2)
    array = make(tmp_path / "a", chunk_rows=1)
    values = np.random.default_rng(0).standard_normal((10, 3), dtype=np.float32)
    array.assign(np.arange(10)[::-1], values[::-1])
    np.testing.assert_array_equal(np.concatenate([view for _, view in array.rows(0, 10)]), values)
    assert len(local._maps) <= 2
    array.flush()
    np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "a"), mode="r")[:], values)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts file descriptors as Linux lists them")
def test_file_descriptors_do_not_grow_with_chunks_or_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "_MAX_MAPS", 4)
    held, most = len(os.listdir("/proc/self/fd")), 0
    arrays = [make(tmp_path / str(number), (30,), chunk_rows=1) for number in range(3)]
    for row in range(30):
        for array in arrays:
            array.assign(np.array([row]), np.ones(1, np.float32))
            most = max(most, len(os.listdir("/proc/self/fd")))
    for array in arrays:
        assert array.read(0, 30).sum() == 30
        array.flush()
    assert max(most, len(os.listdir("/proc/self/fd"))) <= held + 8
    assert all(len(array.read(5, 5)) == 0 for array in arrays)


def test_chunks_have_at_most_the_bytes_asked_for_and_are_as_many_for_each_process():
    assert rows_per_chunk(1000, 8, chunk_bytes=100) == 12
    assert rows_per_chunk(5, 8, chunk_bytes=100) == 5
    assert rows_per_chunk(5, 1600, chunk_bytes=100) == 1
    assert rows_per_chunk(1 << 20, 8192) == 8192
    assert rows_per_chunk(50_000, 8192) == 4167  # 12 chunks, so that processes can share them later
    for processes in (1, 2, 3, 4, 7, 64):
        for rows in (1, 5, 64, 1000, 50_000):
            size = rows_per_chunk(rows, 8192, processes)
            assert 1 <= size <= 8192 and (rows < 20 * processes or -(-rows // size) >= processes)
    assert rows_per_chunk(10, 0, 4) == 3


def test_a_tiled_array_is_a_matrix_at_the_head_of_its_file(tmp_path):
    array = make(tmp_path / "a", (10, 3), chunk_rows=12, tile_rows=4)
    values = fill(array)
    (file,) = [path for path in (tmp_path / "a" / "c").rglob("*") if path.is_file()]
    assert file.stat().st_size == 12 * 3 * 4 + 3 * 16 + 4
    np.testing.assert_array_equal(np.fromfile(file, "<f4", 30).reshape(10, 3), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "chunk_rows", "tile_rows"), [((5,), 2, None), ((5, 3), 8, None), ((9, 2), 6, 3)])
def test_metadata_are_those_that_zarr_makes(dtype, shape, chunk_rows, tile_rows):
    made, chunks = {}, (chunk_rows, *shape[1:])
    zarr.create_array(
        zarr.storage.MemoryStore(made),
        shape=shape,
        dtype=dtype,
        chunks=(tile_rows, *shape[1:]) if tile_rows else chunks,
        shards=chunks if tile_rows else None,
        filters=None,
        compressors=None,
        fill_value=0,
        zarr_format=3,
    )
    assert array_document(Layout(shape, dtype, chunk_rows, tile_rows)) == json.loads(made[NODE].to_bytes())


def test_the_index_of_a_shard_is_the_one_that_zarr_writes(tmp_path):
    ours, theirs = make(tmp_path / "a", chunk_rows=12, tile_rows=4), make(tmp_path / "b", chunk_rows=12, tile_rows=4)
    values = fill(ours) + 1
    ours.assign(np.arange(10), values)
    zarr.open_array(str(tmp_path / "b"), mode="r+")[:] = values
    assert ours.chunk_path(0).read_bytes()[-52:] == theirs.chunk_path(0).read_bytes()[-52:]


@pytest.mark.parametrize("writable", [False, True])
def test_a_file_of_wrong_size_is_an_error_and_not_a_signal(tmp_path, writable):
    array = make(tmp_path / "a")
    fill(array)
    os.truncate(array.chunk_path(1), 5)
    with pytest.raises(StoreError, match="expected 48 bytes, found 5"):
        LocalArray(LocalPath(tmp_path / "a")).chunk(1, writable=writable)
    assert array.chunk_path(1).stat().st_size == 5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda meta: meta.pop("codecs"), "missing or damaged"),
        (
            lambda meta: meta.update(codecs=[{"name": "bytes", "configuration": {"endian": "big"}}]),
            "does not write",
        ),
        (lambda meta: meta["codecs"].append({"name": "zstd"}), "does not write"),
        (lambda meta: meta.update(data_type="complex64"), "does not write"),
        (lambda meta: meta.update(chunk_grid={"name": "regular"}), "missing or damaged"),
        (lambda meta: meta.update(zarr_format=2), "is not zarr version 3"),
    ],
)
def test_other_layouts_are_refused(tmp_path, change, text):
    make(tmp_path / "a")
    meta = json.loads((tmp_path / "a" / NODE).read_text())
    change(meta)
    (tmp_path / "a" / NODE).write_text(json.dumps(meta))
    with pytest.raises(StoreError, match=text):
        LocalArray(LocalPath(tmp_path / "a"))


def test_missing_metadata_is_named(tmp_path):
    with pytest.raises(StoreError, match="missing or damaged"):
        LocalArray(LocalPath(tmp_path))


def test_a_full_disk_is_an_error_when_a_file_is_created(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    array = make(tmp_path / "a")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(StoreError, match=r"No space left on device.*Free space"):
        array.assign(np.arange(2), np.ones((2, 3), np.float32))
    assert not list((tmp_path / "a").rglob(PARTIAL + "*")) and not array.chunk_path(0).exists()


@pytest.mark.parametrize("missing", [True, False])
def test_files_are_made_where_blocks_cannot_be_reserved(tmp_path, monkeypatch, missing):
    def unsupported(*_):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if missing:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    create_file(tmp_path / "c" / "0", 100, b"tail")
    assert (tmp_path / "c" / "0").read_bytes() == bytes(100) + b"tail"


@pytest.mark.skipif(not hasattr(os, "pwrite"), reason="needs pwrite")
@pytest.mark.parametrize("dtype", ["float16", "float32", "bool"])
def test_where_blocks_cannot_be_reserved_rows_are_not_written_through_maps(tmp_path, monkeypatch, dtype):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    array = make(tmp_path / "a", (3000, 3), dtype, 2500)
    values, rows = np.random.default_rng(0).random((3000, 3)).round().astype(np.float32), np.arange(3000)
    rows[3:2000:7] = rows[3:2000:7][::-1]  # across both files, some in ranges and some alone
    with monkeypatch.context() as patch:
        patch.setattr("tracer.store.arrays.chunked.copy_values", None)
        array.assign(rows, values[rows])
        array.flush()
        np.testing.assert_array_equal(zarr.open_array(str(tmp_path / "a"), mode="r")[:], values.astype(dtype))
        patch.setattr(os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(StoreError, match=r"No space left on device.*Free space"):
            make(tmp_path / "b", (3000, 3), dtype, 2500).assign(rows, values)


MANY_FILES = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np
from tracer.store.arrays.layout import Layout, create_array
from tracer.store.arrays.local import LocalArray
from tracer.store.arrays.local_path import LocalPath
arrays = []
for name in "abc":
    create_array(LocalPath(sys.argv[1]) / name, Layout((150, 2), "float32", 1))
    arrays.append(LocalArray(LocalPath(sys.argv[1]) / name))
    arrays[-1].assign(np.arange(150), np.ones((150, 2), np.float32))
    arrays[-1].flush()
held = [view for array in arrays for _, view in array.rows(0, 150)]
assert sum(view.sum() for view in held) == 900
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="sets the limit as Linux does")
def test_a_process_that_may_open_few_files_reads_and_writes_many(tmp_path):
    subprocess.run([sys.executable, "-c", MANY_FILES, str(tmp_path)], check=True)


def test_a_file_that_is_there_is_never_replaced(tmp_path, monkeypatch):
    create_file(tmp_path / "0", 4, b"mine")
    create_file(tmp_path / "0", 4, b"late")
    assert (tmp_path / "0").read_bytes() == bytes(4) + b"mine"

    def no_links(*_):
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    create_file(tmp_path / "1", 4, b"mine")
    create_file(tmp_path / "1", 4, b"late")
    assert (tmp_path / "1").read_bytes() == bytes(4) + b"mine" and not list(tmp_path.glob(PARTIAL + "*"))


def test_only_old_leftovers_of_this_package_are_swept(tmp_path):
    old, link = tmp_path / (PARTIAL + "0" * 32), tmp_path / (PARTIAL + "1" * 32)
    kept = [tmp_path / (PARTIAL + "2" * 32), tmp_path / f"{PARTIAL}mine", tmp_path / "other"]
    for directory in (old, *kept):
        directory.mkdir()
        (directory / "file").write_text("x")
    link.symlink_to(kept[-1])
    for path in (old, link, *kept[1:]):
        os.utime(path, (time.time() - 3600,) * 2, follow_symlinks=False)
    sweep(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept) and (kept[-1] / "file").exists()


class Recorded(LocalArray):
    """A mapped array that writes down when it is flushed, and can fail."""

    log: list[list[str]] = []
    fail = False

    @staticmethod
    def flush_together(arrays, chunks=None, group=None) -> None:
        failing = any(array.fail for array in arrays)
        for array in arrays:
            if failing:
                array._dirty.clear()
        if failing:
            raise StoreError("the disk failed")
        LocalArray.flush_together(arrays, chunks, group)
        Recorded.log.append([array.path.name for array in arrays])


@pytest.fixture
def completion(tmp_path):
    make(tmp_path / "data", chunk_rows=10)
    make(tmp_path / "mask", (10,), "bool", 10)
    Recorded.log.clear()
    data, mask = Recorded(LocalPath(tmp_path / "data")), Recorded(LocalPath(tmp_path / "mask"))
    return data, mask, CompletionMask(mask, [data], flush_seconds=1e9)


def write(data: LocalArray, completion: CompletionMask, rows: list[int]) -> None:
    with completion.writing(np.array(rows)):
        data.assign(np.array(rows), np.ones((len(rows), 3), np.float32))


def test_marks_are_set_only_after_the_data_is_synced(completion):
    data, mask, marks = completion
    write(data, marks, [1, 2])
    assert not marks.done.any() and np.flatnonzero(marks.pending).tolist() == [1, 2]
    marks.flush()
    assert np.flatnonzero(marks.done).tolist() == [1, 2] and not marks.pending.any()
    assert Recorded.log == [["data", "mask"], ["mask"]]


def test_rows_lose_their_mark_durably_before_they_change(completion):
    data, mask, marks = completion
    write(data, marks, [1, 2])
    marks.flush()
    Recorded.log.clear()
    with marks.writing(np.array([2, 3])):
        assert Recorded.log == [["mask"]] and np.flatnonzero(marks.done).tolist() == [1]


def test_nothing_is_marked_when_the_data_cannot_be_synced(completion):
    data, mask, marks = completion
    write(data, marks, [1, 2])
    data.fail = True
    with pytest.raises(StoreError, match="the disk failed"):
        marks.flush()
    data.fail = False
    marks.flush()  # a second try must not claim the rows: the system dropped their pages
    assert not marks.done.any() and not marks.pending.any()


def test_a_write_that_fails_leaves_nothing_pending(completion):
    data, mask, marks = completion
    write(data, marks, [1])
    with pytest.raises(RuntimeError), marks.writing(np.array([2])):
        raise RuntimeError
    assert not marks.pending.any()


def test_a_write_flushes_when_time_is_up(completion):
    data, mask, marks = completion
    marks.flush_seconds = 0
    write(data, marks, [4])
    assert np.flatnonzero(marks.done).tolist() == [4]


def test_a_failed_msync_is_a_store_error(tmp_path, monkeypatch):
    class Failing(np.memmap):
        def flush(self):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(local, "_FSYNC_HAS_MAPS", False)
    array = make(tmp_path / "a")
    array.assign(np.array([0]), np.ones((1, 3), np.float32))
    local._maps.put((array._number, 0, True), array.chunk(0, writable=True).view(Failing))
    with pytest.raises(StoreError, match="Input/output error"):
        array.flush()


def test_publishing_keeps_the_first(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
        files.publish(tmp_path / name, tmp_path / "final")
    assert (tmp_path / "final").read_text() == "a"
