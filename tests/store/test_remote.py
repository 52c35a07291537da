"""Stores that do not lie on a local disk: in memory, and on a real S3 server on this machine."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
import uuid

import fsspec
import numpy as np
import pytest
import zarr
from store_cases import DIM, N, batch, manifest, stored_features

from tracer import Tracer, attribute
from tracer.errors import MismatchError, MissingDependencyError, StoreError
from tracer.store import RowTable, Store
from tracer.store.arrays import remote, remote_path
from tracer.store.arrays.remote_path import RemotePath

processes = multiprocessing.get_context("spawn")


@pytest.fixture(scope="module")
def s3_server():
    """A bucket of moto's server, in a process of its own."""
    pytest.importorskip("moto.server", reason="moto's server is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    keys = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
    }
    before = {name: os.environ.get(name) for name in keys}
    os.environ.update(keys)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            pytest.fail("the S3 server did not start within 20 seconds")
        fsspec.filesystem("s3").mkdir("runs")
        yield
    finally:
        server.kill()
        server.wait(10)
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


@pytest.fixture(params=["memory", "s3"])
def url(request) -> str:
    """The URL of a place where nothing is."""
    if request.param == "s3":
        request.getfixturevalue("s3_server")
    return f"{request.param}://runs/{uuid.uuid4().hex}"


def small_chunks(monkeypatch) -> None:
    monkeypatch.setattr("tracer.store.arrays.remote_path.RemotePath.feature_chunk_bytes", 4 * DIM * 4)


def test_a_store_is_made_and_opened_anywhere(url):
    store = Store.open(url, manifest())
    assert Store.open(url, manifest()).manifest == store.manifest and str(store.path) == url
    with pytest.raises(MismatchError, match="seed: stored 0, asked 1"):
        Store.open(url, manifest(seed=1))
    with pytest.raises(StoreError, match="holds no store"):
        Store.open_existing(url + "x")
    (RemotePath.of(url + "y") / "thesis.tex").write_whole(b"mine")
    with pytest.raises(StoreError, match=r"not empty \(it holds thesis.tex\)"):
        Store.open(url + "y", manifest())


def test_rows_are_uploaded_in_whole_chunks_and_done_after_that(url, monkeypatch):
    small_chunks(monkeypatch)
    store = Store.open(url, manifest())
    table = store.create_checkpoint(0, "abc", 0.1)
    assert table.chunk_rows == 4
    table.write(**batch(np.arange(6)))
    remote = RemotePath.of(url) / "checkpoints" / "0" / "features" / "c"
    assert remote.children() == ["0"]
    assert store.checkpoint(0).done.tolist() == [True] * 4 + [False] * (N - 4) and table.pending == 2
    table.write(**batch(np.array([7])))
    assert remote.children() == ["0"]
    table.write(**batch(np.array([6])))
    assert remote.children() == ["0", "1"] and table.pending == 0
    table.write(**batch(np.array([20])))
    table.flush()  # a chunk that is not full
    assert np.flatnonzero(store.checkpoint(0).done).tolist() == [*range(8), 20]
    with store.checkpoint(0) as again:
        rows = again.remaining()
        for part in np.array_split(np.random.default_rng(0).permutation(rows), 4):
            again.write(**batch(part))
    table = store.checkpoint(0)
    assert table.done.all()
    np.testing.assert_array_equal(stored_features(table, 0, N), batch(np.arange(N))["features"])
    for name in ("loss", "loss_grad", "fingerprint"):
        np.testing.assert_array_equal(table.column(name), batch(np.arange(N))[name])


def test_any_zarr_reader_sees_a_remote_store(url):
    store = Store.open(url, manifest())
    with store.create_checkpoint(0, "abc", 0.1) as table:
        table.write(**batch(np.arange(N)))
    with store.results.scores("test", "tracin", (N, 3), {}) as scores:
        scores.write(0, np.ones((N, 3), np.float32))
    root = zarr.open_group(url, mode="r")
    np.testing.assert_array_equal(root["checkpoints/0/features"][:], batch(np.arange(N))["features"])
    ((_, found),) = root["scores/test/tracin"].groups()
    assert (found["scores"][:] == 1).all() and found["done"][:].all()


def test_an_object_that_went_missing_or_short_is_named(url, monkeypatch):
    small_chunks(monkeypatch)
    store = Store.open(url, manifest())
    with store.create_checkpoint(0, "abc", 0.1) as table:
        table.write(**batch(np.arange(N)))
    chunk = RemotePath.of(url) / "checkpoints" / "0" / "features" / "c" / "1" / "0"
    chunk.write_whole(chunk.read_bytes()[:-1])
    with pytest.raises(StoreError, match="expected 80 bytes, found 79"):
        stored_features(store.checkpoint(0), 0, N)
    chunk.remove()
    with pytest.raises(StoreError, match="c/1/0 is missing although rows in it are done"):
        store.checkpoint(0)


def test_of_two_that_create_at_once_one_wins(url):
    first, second = RemotePath.of(url) / "x", RemotePath.of(url) / "x"
    first.write_whole(b"first", replace=False)
    second.write_whole(b"second", replace=False)
    assert first.read_bytes() == b"first"


def test_prefetched_chunks_are_those_that_are_read(url, monkeypatch):
    small_chunks(monkeypatch)
    store = Store.open(url, manifest())
    with store.create_checkpoint(0, "abc", 0.1) as table:
        table.write(**batch(np.arange(N)))
    table = store.checkpoint(0)
    reads = []
    whole = RemotePath.read_bytes
    monkeypatch.setattr(RemotePath, "read_bytes", lambda self: (reads.append(str(self)), whole(self))[1])
    table.prefetch([(4, 12)])
    found = [raw for _, raw in table.raw_features(4, 12)]
    np.testing.assert_array_equal(np.concatenate(found), batch(np.arange(4, 12))["features"])
    assert len([path for path in reads if "/features/c/" in path]) == 2  # each was read once


class Flaky:
    """A file system that fails before it works."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.failures, self.error, self.calls = failures, error, 0

    def cat_file(self, key: str) -> bytes:
        self.calls += 1
        if self.calls <= self.failures:
            raise self.error
        return b"here"


def test_failures_that_pass_are_tried_again(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(remote_path.time, "sleep", pauses.append)
    flaky = Flaky(3, ConnectionResetError("reset"))
    assert RemotePath(flaky, "a/b", "s3://a/b").read_bytes() == b"here" and flaky.calls == 4
    assert pauses == [0.2, 0.4, 0.8]
    lasting = Flaky(100, TimeoutError("slow"))
    with pytest.raises(StoreError, match="cat_file of s3://a/b failed 6 times, last with TimeoutError: slow"):
        RemotePath(lasting, "a/b", "s3://a/b").read_bytes()
    absent = Flaky(100, FileNotFoundError("a/b"))
    with pytest.raises(FileNotFoundError):
        RemotePath(absent, "a/b", "s3://a/b").read_bytes()
    assert absent.calls == 1


def test_an_upload_that_fails_marks_nothing_done(url, monkeypatch):
    store = Store.open(url, manifest())
    table = store.create_checkpoint(0, "abc", 0.1)

    def broken(*_, **__):
        raise StoreError("pipe_file failed 6 times")

    with monkeypatch.context() as patch:
        patch.setattr(RemotePath, "write_whole", broken)
        with pytest.raises(StoreError, match="failed 6 times"):
            table.write(**batch(np.arange(N)))
    assert table.pending == 0 and not store.checkpoint(0).done.any()
    with store.checkpoint(0) as again:
        again.write(**batch(again.remaining()))
    assert store.checkpoint(0).done.all()


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(MissingDependencyError, match=r"pip install 'tracin\[s3\]'"):
        Store.open("s3://bucket/run", manifest())


def test_scores_of_a_remote_store_equal_those_of_a_local_one(url, run, tmp_path):
    options = {"proj_dim": 64, "storage": "float32"}
    task = "image_classification"
    local = attribute(
        run.model, task, run.train, run.targets, run.checkpoints[:2], save_dir=tmp_path, batch_size=7, **options
    )
    there = attribute(
        run.model, task, run.train, run.targets, run.checkpoints[:2], save_dir=url, batch_size=7, **options
    )
    np.testing.assert_array_equal(np.asarray(there.scores), local.scores)
    np.testing.assert_array_equal(there.top(3).indices, local.top(3).indices)
    np.testing.assert_array_equal(there.self_influence(), local.self_influence())
    if url.startswith("s3"):
        return  # the same calls again
    exact = {"projector": "none"}
    local = attribute(run.model, task, run.train, run.targets, run.checkpoints, save_dir=tmp_path / "e", **exact)
    there = attribute(run.model, task, run.train, run.targets, run.checkpoints, save_dir=url + "e", **exact)
    np.testing.assert_array_equal(np.asarray(there.scores), local.scores)


def write_rows(url: str, reports: multiprocessing.Queue) -> None:
    store = Store.open_existing(url)
    with store.checkpoint(0) as table:
        for row in table.remaining().tolist():
            table.write(**batch(np.array([row])))
            if row % 4 == 3:
                reports.put(row)
                time.sleep(0.02)
    reports.put(-1)


def test_what_a_killed_process_had_uploaded_stays(s3_server, monkeypatch):
    small_chunks(monkeypatch)
    url = f"s3://runs/{uuid.uuid4().hex}"
    store = Store.open(url, manifest())
    store.create_checkpoint(0, "abc", 0.1).close()
    reports = processes.Queue()
    child = processes.Process(target=write_rows, args=(url, reports))
    child.start()
    seen = [reports.get(timeout=60), reports.get(timeout=60)]
    child.kill()
    child.join(10)
    assert child.exitcode == -9 and seen == [3, 7]
    table: RowTable = store.checkpoint(0)
    done = np.flatnonzero(table.done)
    assert set(range(8)) <= set(done.tolist()) and not table.done.all()
    np.testing.assert_array_equal(stored_features(table, 0, N)[done], batch(np.arange(N))["features"][done])
    with table:
        table.write(**batch(table.remaining()))
    np.testing.assert_array_equal(stored_features(store.checkpoint(0), 0, N), batch(np.arange(N))["features"])


def test_a_tracer_resumes_on_s3(s3_server, run):
    url = f"s3://runs/{uuid.uuid4().hex}"
    checkpoint, rate = run.checkpoints[0]
    with Tracer(run.model, "image_classification", 23, url, proj_dim=32) as tracing:
        tracing.load_checkpoint(checkpoint, 0, rate)
        tracing.featurize((run.x[:9], run.y[:9]), num_samples=9)
    with Tracer(run.model, "image_classification", 23, url, proj_dim=32) as tracing:
        tracing.load_checkpoint(checkpoint, 0, rate)
        assert tracing.remaining(0).tolist() == list(range(9, 23))


def test_what_is_kept_of_reading_is_bounded(monkeypatch):
    monkeypatch.setattr("tracer.store.arrays.remote_path.RemotePath.feature_chunk_bytes", 4 * DIM * 4)
    monkeypatch.setattr(remote, "CACHE_BYTES", 3 * 4 * DIM * 4)
    store = Store.open(f"memory://runs/{uuid.uuid4().hex}", manifest())
    with store.create_checkpoint(0, "abc", 0.1) as table:
        table.write(**batch(np.arange(N)))
    table = store.checkpoint(0)
    for _ in range(2):
        np.testing.assert_array_equal(stored_features(table, 0, N), batch(np.arange(N))["features"])
        assert 0 < remote._cache.size <= remote.CACHE_BYTES
    kept = remote._cache.size
    del table
    gc.collect()
    assert remote._cache.size < kept


def test_many_rows_are_downloaded_several_chunks_at_a_time(monkeypatch):
    monkeypatch.setattr("tracer.store.arrays.remote_path.RemotePath.feature_chunk_bytes", DIM * 4)  # a row a chunk
    store = Store.open(f"memory://{uuid.uuid4().hex}", manifest())
    with store.create_checkpoint(0, "5f", 0.1) as table:
        table.write(**batch(np.arange(N)))
    gate, whole = threading.Barrier(2, timeout=20), remote.RemoteArray._download
    table = store.checkpoint(0)

    def together(self, chunk):
        if chunk in (1, 2):
            gate.wait()  # one after the other they would wait for ever
        return whole(self, chunk)

    monkeypatch.setattr(remote.RemoteArray, "_download", together)
    np.testing.assert_array_equal(table.column("loss"), batch(np.arange(N))["loss"])


def test_an_object_of_scores_is_bounded_however_many_targets_there_are():
    store = Store.open(f"memory://{uuid.uuid4().hex}", manifest())
    with store.results.scores("test", "tracin", (N, 4_000_000), {}) as scores:
        assert scores._scores.layout.data_bytes <= 32 << 20


UNCLOSED = """
import sys
import numpy as np
sys.path.insert(0, sys.argv[2])
from store_cases import batch, manifest
from tracer.store import Store
table = Store.open(sys.argv[1], manifest()).create_checkpoint(0, "a", 0.1)
table.write(**batch(np.arange(4)))
"""


def test_rows_that_wait_are_uploaded_when_the_process_ends(s3_server):
    url = f"s3://runs/{uuid.uuid4().hex}"
    subprocess.run([sys.executable, "-c", UNCLOSED, url, os.path.dirname(os.path.dirname(__file__))], check=True)
    assert Store.open_existing(url).checkpoint(0).num_done == 4
