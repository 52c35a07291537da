"""Processes that are really killed (SIGKILL), at random instants, while they write a store."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from store_cases import stored_features

from tracer.errors import MismatchError, StoreError
from tracer.store import RowTable, ScoreArray, Store
from tracer.store.manifest import Manifest
from tracer.store.table_schema import ARRAYS, COLUMNS

N, DIM = 3000, 96

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["tracer.store"])  # so that a process to be killed starts within milliseconds


def manifest(storage: str = "float16", seed: int = 0) -> Manifest:
    return Manifest({"train_set_size": N, "feature_dim": DIM, "storage": storage, "seed": seed})


def batch(rows: np.ndarray, version: int = 0) -> dict[str, np.ndarray]:
    """Rows whose content depends on their index and a version only, not on how they are batched."""
    wave = np.sin(rows[:, None] * 0.7 + np.arange(DIM) + version).astype(np.float32)
    columns = {name: (rows + version + shift).astype(np.float32) for shift, name in enumerate(COLUMNS)}
    return {
        "rows": rows,
        "features": wave * np.float32(10.0) ** (rows[:, None] % 25 - 12).astype(np.float32),
        "loss": np.full(len(rows), version, np.float32),
        "loss_grad": columns["loss_grad"],
        "loss_hess": columns["loss_hess"],
        "gradient_norm": columns["gradient_norm"],
        "fingerprint": rows.astype(np.uint64) * np.uint64(2**40) + np.uint64(version),
    }


@contextlib.contextmanager
def running(target: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """Run a function in a process of its own, which is killed when the block ends; yields what it sends."""
    receiver, sender = processes.Pipe(duplex=False)
    child = processes.Process(target=target, args=(sender, *args), daemon=True)
    child.start()
    sender.close()
    try:
        yield receiver
    finally:
        child.kill()
        child.join()
        assert child.exitcode in (0, -9), "the process failed by itself"


def wait_for(receiver: Connection, messages: int, rng: np.random.Generator) -> list[bytes]:
    """Receive so many messages, or all that come, then wait up to 30 ms: the instant to kill at."""
    came: list[bytes] = []
    with contextlib.suppress(EOFError):
        while len(came) < messages:
            assert receiver.poll(20), "the process hangs"
            came.append(receiver.recv_bytes())
    time.sleep(rng.uniform(0, 0.03))
    return came


def received(receiver: Connection) -> list[bytes]:
    """Receive everything whole that a dead process sent."""
    messages = []
    with contextlib.suppress(EOFError, OSError):
        while True:
            messages.append(receiver.recv_bytes())
    return messages


def write_rows(sender: Connection, path: Path, batch_size: int, seed: int) -> None:
    table = Store.open_existing(path).checkpoint(0)
    rng = np.random.default_rng(seed)
    sender.send_bytes(np.packbits(table.done).tobytes())
    order = rng.permutation(table.remaining()) if seed % 2 else table.remaining()
    for number, start in enumerate(range(0, len(order), batch_size)):
        table.write(**batch(order[start : start + batch_size]))
        if number % 3 == 0:
            missing = table.remaining()
            done = np.ones(N, bool)
            done[missing] = False
            sender.send_bytes(np.packbits(done).tobytes())


def assert_done_rows_are_right(table: RowTable, reference: RowTable) -> None:
    done = table.done
    for name in COLUMNS:
        np.testing.assert_array_equal(table.column(name)[done], reference.column(name)[done])
    np.testing.assert_array_equal(stored_features(table, 0, N)[done], stored_features(reference, 0, N)[done])


@pytest.mark.parametrize(("storage", "seed"), [("float16", 0), ("float16", 1), ("float32", 2), ("float32", 3)])
def test_a_killed_writer_loses_no_row_that_it_reported_done(tmp_path, monkeypatch, storage, seed):
    monkeypatch.setattr(
        "tracer.store.arrays.local_path.LocalPath.feature_chunk_bytes", 700 * DIM * np.dtype(storage).itemsize
    )
    rng = np.random.default_rng(seed)
    uninterrupted = Store.open(tmp_path / "whole", manifest(storage)).create_checkpoint(0, "a", 0.1)
    uninterrupted.write(**batch(np.arange(N)))
    uninterrupted.flush()
    store = Store.open(tmp_path / "killed", manifest(storage))
    store.create_checkpoint(0, "a", 0.1).close()
    for batch_size in (7, 31, 12):
        with running(write_rows, store.path, batch_size, seed) as receiver:
            messages = wait_for(receiver, rng.integers(1, 20), rng)
        reported = np.frombuffer([*messages, *received(receiver)][-1], np.uint8)
        table = Store.open(store.path, manifest(storage)).checkpoint(0)
        assert table.done[np.unpackbits(reported, count=N).astype(bool)].all()
        assert_done_rows_are_right(table, uninterrupted)
    rows = table.remaining()
    for start in range(0, len(rows), 501):
        table.write(**batch(rows[start : start + 501]))
    table.close()
    assert table.done.all()
    for name in (*ARRAYS, "done", "features"):
        left, right = (zarr.open_array(str(at.path / name), mode="r")[:] for at in (table, uninterrupted))
        assert left.tobytes() == right.tobytes(), name


PARTS = 4


def rewrite_rows(sender: Connection, path: Path, first: int) -> None:
    table = Store.open_existing(path).checkpoint(0)
    for version in range(first, 256):
        for part, rows in enumerate(np.array_split(np.arange(N), PARTS)):
            table.write(**batch(rows, version))
            sender.send_bytes(bytes([version, part]))
        table.flush()


def test_a_done_row_is_of_one_version_also_when_rewriting_is_killed(tmp_path):
    store = Store.open(tmp_path, manifest("float32"))
    with store.create_checkpoint(0, "a", 0.1) as table:
        table.write(**batch(np.arange(N)))
    rng = np.random.default_rng(0)
    for attempt in range(6):
        with running(rewrite_rows, store.path, 1 + 40 * attempt) as receiver:
            messages = wait_for(receiver, rng.integers(1, 9), rng)
        version, part = [*messages, *received(receiver)][-1]
        table = store.checkpoint(0)
        done = np.flatnonzero(table.done)
        for found in np.unique(table.column("loss")[done]):
            rows = done[table.column("loss")[done] == found]
            expected = batch(rows, int(found))
            np.testing.assert_array_equal(stored_features(table, 0, N)[rows], expected["features"])
            np.testing.assert_array_equal(table.column("fingerprint")[rows], expected["fingerprint"])
        if part < PARTS - 1:
            assert (table.column("loss")[done] < version).all(), "a row is done that was not flushed"


def create_everything(sender: Connection, path: Path) -> None:
    sender.send_bytes(b"go")
    store = Store.open(path, manifest())
    for model_id in range(1000):
        store.create_checkpoint(model_id, "abc", 0.5).close()
        sender.send_bytes(b"checkpoint")
        store.create_targets(f"test{model_id % 3}", model_id, 3).close()
        sender.send_bytes(b"targets")


def test_a_kill_while_things_are_created_leaves_whole_ones_only(tmp_path):
    rng = np.random.default_rng(0)
    for attempt in range(10):
        path = tmp_path / str(attempt)
        with running(create_everything, path) as receiver:
            messages = wait_for(receiver, 1 + attempt % 5, rng)
        store = Store.open(path, manifest())
        ids = store.catalog.checkpoint_ids()
        assert ids == list(range(len(ids)))
        assert len(ids) >= messages.count(b"checkpoint")
        for model_id in ids:
            table = store.checkpoint(model_id)
            assert table.attributes["weights_fingerprint"] == "abc" and table.num_done == 0
        for name in store.catalog.exp_names():
            assert all(store.targets(name, model_id).num_rows == 3 for model_id in store.catalog.target_ids(name))
        with store.create_checkpoint(len(ids), "abc", 0.5) as table:
            table.write(**batch(np.arange(3)))
        assert store.checkpoint(len(ids)).num_done == 3
        zarr.open_group(str(path), mode="r")[f"checkpoints/{len(ids)}/done"]


SHAPE = (900, 400)


def score_rows(start: int, stop: int, version: int) -> np.ndarray:
    rows = np.arange(start, stop, dtype=np.float32)[:, None] + np.arange(SHAPE[1], dtype=np.float32)
    return rows * np.float32(version + 1)


def write_scores(sender: Connection, path: Path, first: int) -> None:
    store = Store.open_existing(path)
    for version in range(first, 10**6):
        scores = store.results.scores("test", "tracin", SHAPE, {"version": version}, tile_rows=100)
        for start, stop in scores.remaining():
            scores.write(start, score_rows(start, stop, version))
            scores.flush()
            sender.send_bytes(b"tile")
        scores.close()


def test_no_tile_is_done_that_comes_from_other_inputs(tmp_path):
    store = Store.open(tmp_path, manifest())
    rng = np.random.default_rng(0)
    version, found = 0, 0
    for _ in range(10):
        with running(write_scores, store.path, version) as receiver:
            wait_for(receiver, rng.integers(1, 12), rng)
        try:
            kept = Store.open(store.path, manifest()).catalog.score_paths()
            scores = max(map(ScoreArray, kept), key=lambda scores: scores.inputs["version"])
        except (StoreError, ValueError):  # killed while it was created
            continue
        version = scores.inputs["version"]
        for tile in np.flatnonzero(scores.tile_done):
            start, stop = tile * 100, min((tile + 1) * 100, SHAPE[0])
            np.testing.assert_array_equal(scores.matrix()[start:stop], score_rows(start, stop, version))
            found += 1
    assert found, "no tile was ever done"
    scores = store.results.scores("test", "tracin", SHAPE, {"version": version})
    for start, stop in scores.remaining():
        scores.write(start, score_rows(start, stop, version))
    scores.close()
    read = zarr.open_array(str(scores.path / "scores"), mode="r")[:]
    np.testing.assert_array_equal(read, score_rows(0, SHAPE[0], version))


def open_store(sender: Connection, path: Path, seed: int) -> None:
    try:
        Store.open(path, manifest(seed=seed))
    except MismatchError:
        sender.send_bytes(b"other")
    else:
        sender.send_bytes(b"mine")


def test_one_of_two_that_create_a_store_at_once_wins(tmp_path):
    for attempt in range(5):
        path = tmp_path / str(attempt)
        with running(open_store, path, 1) as first, running(open_store, path, 2) as second:
            assert first.poll(10) and second.poll(10)
            answers = [first.recv_bytes(), second.recv_bytes()]
        assert sorted(answers) == [b"mine", b"other"]
        assert Store.open_existing(path).manifest.settings["seed"] == 1 + answers.index(b"mine")


def write_every_other(sender: Connection, path: Path, first: int) -> None:
    with Store.open_existing(path).checkpoint(0) as table:
        for rows in np.array_split(np.arange(first, N, 2), 30):
            table.write(**batch(rows))
            table.flush()
    sender.send_bytes(b"done")


def test_processes_may_write_different_rows_of_one_table(tmp_path):
    store = Store.open(tmp_path, manifest("float32"))
    store.create_checkpoint(0, "a", 0.1).close()
    with running(write_every_other, store.path, 0) as first, running(write_every_other, store.path, 1) as second:
        assert first.poll(20) and second.poll(20)
    table = store.checkpoint(0)
    assert table.done.all()
    np.testing.assert_array_equal(stored_features(table, 0, N), batch(np.arange(N))["features"])
