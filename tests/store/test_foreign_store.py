"""A store that comes from others cannot reach outside itself, and its documents cannot ask for everything."""

from __future__ import annotations

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
from store_cases import N, batch, manifest

from tracer import verify
from tracer.errors import StoreError, TracerError
from tracer.store import Store
from tracer.store.arrays.layout import Layout
from tracer.store.arrays.metadata import NODE
from tracer.store.result_group import load_group, save_group
from tracer.store.revisions import is_superseded

pytestmark = pytest.mark.skipif(os.name == "nt", reason="makes links and pipes")


@pytest.fixture
def store(tmp_path) -> Store:
    """A store with half a table, a whole one with targets, and scores."""
    store = Store.open(tmp_path / "s", manifest())
    for model_id, rows in enumerate((N // 2, N)):
        with store.create_checkpoint(model_id, f"a{model_id}", 0.1) as table:
            table.write(**batch(np.arange(rows)))
    with store.create_targets("test", 1, 3) as targets:
        targets.write(**batch(np.arange(3)))
    with store.results.scores("test", "tracin", (N, 3), {}) as scores:
        scores.write(0, np.ones((N, 3), np.float32))
    return store


def use(store: Store) -> None:
    """Do everything that reads, writes or removes."""
    again = Store.open_existing(store.path)
    with again.create_checkpoint(0, "a0", 0.1) as table:
        table.write(**batch(table.remaining()))
    again.invalidate_rows(np.arange(N))
    for model_id in (0, 1):
        with again.create_checkpoint(model_id, f"a{model_id}", 0.1) as table:
            table.write(**batch(np.arange(N)))


PLACES = [
    NODE, "checkpoints", "checkpoints/0", f"checkpoints/0/{NODE}", "checkpoints/0/done", f"checkpoints/0/done/{NODE}",
    "checkpoints/0/done/c", "checkpoints/0/done/c/0", "checkpoints/0/features/c/0", "checkpoints/0/features/c/0/0",
    "checkpoints/0/done/c/0",
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hangs", [False, True])
def test_links_in_a_store_are_refused_and_what_they_lead_to_is_untouched(store, tmp_path, place, hangs):
    path, outside = store.path / place, tmp_path / "outside"
    shutil.move(path, outside)
    path.symlink_to(outside)
    if hangs:
        shutil.move(outside, tmp_path / "elsewhere")
    before = {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
    with pytest.raises(StoreError, match="is a link|holds no store|is missing" if hangs else "is a link"):
        use(store)
    assert outside.exists() != hangs
    assert {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("name", ["top", "kernels", "scores", "cosines"])
def test_nothing_is_removed_behind_a_link(store, tmp_path, name):
    outside = tmp_path / "outside"
    for inside in ("test", "0"):
        (outside / inside).mkdir(parents=True)
        (outside / inside / NODE).write_text("{}")
        (outside / inside / "precious").write_text("x")
    shutil.rmtree(store.path / name, ignore_errors=True)
    (store.path / name).symlink_to(outside)
    for run in (lambda: use(store), lambda: verify(store.path, progress=False)):
        try:
            run()
        except StoreError as error:
            assert "is a link" in str(error)
    assert len(list(outside.rglob("precious"))) == 2


def test_a_pipe_in_place_of_a_file_is_refused(store):
    (store.path / "checkpoints/0" / NODE).unlink()
    os.mkfifo(store.path / "checkpoints/0" / NODE)
    with pytest.raises(StoreError, match="a link or a device"):
        store.checkpoint(0)


def test_a_store_may_be_reached_through_links(store, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    use(Store.open_existing(tmp_path / "link" / "s"))
    assert store.checkpoint(0).num_done == N


def document(path, change) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("shape", "rows"),
    [([1 << 40], 1 << 40), ([N], 0), ([N], -1), ([1 << 30], 1), ([float(N)], N), (["a"], N), ([], 1), ([True], 1)],
)
def test_arrays_of_absurd_sizes_are_refused(store, shape, rows):
    path = store.path / "checkpoints/0/floats"

    def change(found) -> None:
        found["shape"] = shape
        found["chunk_grid"]["configuration"]["chunk_shape"] = [rows]

    document(path / NODE, change)
    with pytest.raises(StoreError):
        Layout.read(path)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 1_000_000,
        b'{"zarr_format": 3, "attributes": {"num_rows": NaN}}',
        b'{"zarr_format": 3, "attributes": ' + b"9" * 10_000 + b"}",
        b'{"zarr_format": 3, "attributes": 1}',
        b"\xff\xfe",
        b"",
        b" " * (40 << 20),
    ],
    ids=["deep", "NaN", "digits", "number", "bytes", "empty", "large"],
)
@pytest.mark.parametrize("place", ["", "checkpoints/0", "checkpoints/0/floats"])
def test_malformed_documents_are_store_errors(store, text, place):
    (store.path / place / NODE).write_bytes(text)
    with pytest.raises(StoreError):
        Store.open_existing(store.path).checkpoint(0)


def places(value, at=()):
    """Yield the places of all values in a document."""
    yield at
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*at, key))


@pytest.mark.parametrize("place", ["", "checkpoints/0", "targets/test/1"])
def test_any_value_in_a_document_may_be_wrong(store, tmp_path, place):
    whole = json.loads((store.path / place / NODE).read_text())
    whole["attributes"].pop("document_crc32c", None)  # whoever means harm writes the right one
    shutil.copytree(store.path, tmp_path / "whole")
    for at in places(whole["attributes"]):
        for value in (None, "../../..", -1, []):
            found = json.loads(json.dumps(whole))
            inside = found
            for key in ("attributes", *at)[:-1]:
                inside = inside[key]
            inside[("attributes", *at)[-1]] = value
            (store.path / place / NODE).write_text(json.dumps(found))
            for run in (use, lambda store: verify(store.path, progress=False)):
                with contextlib.suppress(TracerError):
                    run(store)
            shutil.rmtree(store.path)
            shutil.copytree(tmp_path / "whole", store.path)


def test_names_in_documents_lead_to_nothing_outside_of_a_store(store, tmp_path):
    with pytest.raises(StoreError, match="may lead out"):
        (store.path / "kernels" / ".." / ".." / NODE).read_bytes()
    assert is_superseded(store.path, {"revisions": {"../s/checkpoints/0": "x"}})
    assert is_superseded(store.path, {"revisions": {str(tmp_path): "x"}})
    save_group(store.path / "kernels" / "a", {}, {"matrix": np.ones((2, 2))})
    document(store.path / "kernels" / "a" / NODE, lambda found: found["attributes"].update(crc32c={"../../b": 1}))
    with pytest.raises(StoreError, match="damaged"):
        load_group(store.path / "kernels" / "a")
