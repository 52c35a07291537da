"""Rows that wait for a flush when a process ends, or drops the table, without having closed it."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from store_cases import batch, manifest

from tracer.store import Store

WRITE = """
import os, sys
sys.path.insert(0, sys.argv[3])
import numpy as np
from store_cases import batch, manifest
from tracer.store import Store
store = Store.open(sys.argv[1], manifest())
tables = [store.create_checkpoint(0, "a", 0.1), store.create_targets("test", 0, 6)]
for table in tables:
    table.write(**batch(np.arange(4)))
exec(sys.argv[2])
"""


def ends(path, how: str) -> subprocess.CompletedProcess:
    """Run a process that writes four rows of two tables and then ends in some way."""
    command = [sys.executable, "-c", WRITE, str(path), how, os.path.dirname(os.path.dirname(__file__))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def done(path) -> list[int]:
    store = Store.open_existing(path)
    return [store.checkpoint(0).num_done, store.targets("test", 0).num_done]


@pytest.mark.parametrize("how", ["", "sys.exit(3)", "raise ValueError", "del tables, table", "import torch.utils.data"])
def test_a_process_that_ends_without_closing_loses_no_row(tmp_path, how):
    assert "Exception ignored" not in ends(tmp_path / "s", how).stderr
    assert done(tmp_path / "s") == [4, 4]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("end", ["sys.exit(0)", "del table; tables.clear()", "[table.close() for table in tables]"])
def test_a_forked_child_stores_no_rows_of_its_parent(tmp_path, end):
    ends(tmp_path / "s", f"if os.fork(): os.wait(); os._exit(0)\n{end}")
    assert done(tmp_path / "s") == [0, 0]


def work(path) -> None:
    table = Store.open_existing(path).checkpoint(0)
    table.write(**batch(np.arange(4)))
    gc.collect()
    globals()["kept"] = table


@pytest.mark.parametrize("start", multiprocessing.get_all_start_methods())
def test_a_worker_process_stores_what_it_wrote(tmp_path, start):
    Store.open(tmp_path / "s", manifest()).create_checkpoint(0, "a", 0.1).close()
    worker = multiprocessing.get_context(start).Process(target=work, args=(tmp_path / "s",))
    worker.start()
    worker.join()
    assert worker.exitcode == 0 and Store.open_existing(tmp_path / "s").checkpoint(0).num_done == 4


def test_a_table_that_is_dropped_stores_its_rows(tmp_path):
    store = Store.open(tmp_path / "s", manifest())
    store.create_checkpoint(0, "a", 0.1).write(**batch(np.arange(4)))
    assert store.checkpoint(0).num_done == 4
    table = store.checkpoint(0)
    table.write(**batch(np.arange(4, 6)))
    table.circle = table  # collected later, by the garbage collector
    del table
    gc.collect()
    assert store.checkpoint(0).num_done == 6


def test_a_dropped_table_writes_nothing_into_a_store_that_took_the_place_of_its_own(tmp_path, caplog):
    old = Store.open(tmp_path / "s", manifest()).create_checkpoint(0, "a", 0.1)
    old.write(**batch(np.arange(4)))
    shutil.rmtree(tmp_path / "s")
    new = Store.open(tmp_path / "s", manifest()).create_checkpoint(0, "b", 0.1)
    new.write(**batch(np.arange(4, 6)))
    with caplog.at_level(logging.ERROR, "tracer"):
        del old
        gc.collect()
    assert "were not stored" in caplog.text
    new.close()
    assert np.flatnonzero(new.done).tolist() == [4, 5]
