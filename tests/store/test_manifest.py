"""The manifest: JSON only, compared setting by setting, versions only logged."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tracer._core.files import PARTIAL
from tracer._core.text import listing
from tracer.errors import InputError, InputTypeError, MismatchError, StoreError
from tracer.store.arrays.local_path import LocalPath
from tracer.store.arrays.metadata import NODE, read_document, write_document, write_group
from tracer.store.manifest import FORMAT_VERSION, Manifest, check_same, current_versions, differences

SETTINGS: dict[str, Any] = {
    "train_set_size": 5,
    "feature_dim": 2,
    "storage": "float16",
    "task": {"name": "image_classification", "temperature": 1.0},
    "params": {"b.weight": [3, 4], "a.bias": [3]},
    "projector": {"kind": "sketch", "seed": 0},
}


def manifest(**changes: Any) -> Manifest:
    return Manifest({**SETTINGS, **changes})


def test_a_manifest_survives_json_with_its_order():
    before = Manifest(SETTINGS, info={"model": "ResNet"})
    after = Manifest.from_attributes(json.loads(json.dumps(before.attributes())), Path("run"))
    assert after == before
    assert list(after.settings["params"]) == ["b.weight", "a.bias"]
    assert (after.train_set_size, after.feature_dim, after.storage) == (5, 2, "float16")


def test_tuples_and_numpy_numbers_become_json():
    made = manifest(params={"a": (3, np.int64(4))}, extra=np.float32(0.5))
    assert made.settings["params"] == {"a": [3, 4]} and type(made.settings["params"]["a"][1]) is int
    assert made.settings["extra"] == 0.5


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"device": object()}, InputTypeError, r"settings\.device is of type object"),
        ({"task": {1: 2}}, InputTypeError, r"settings\.task is of type dict: expected JSON values"),
        ({"task": {"a": [float("nan")]}}, InputError, r"settings\.task\.a\[0\] is nan"),
        ({"train_set_size": 0}, InputError, "train_set_size is 0: expected an integer of at least 1"),
        ({"feature_dim": True}, InputError, "feature_dim is True"),
        ({"storage": "int4"}, InputError, "storage='int4' is not known"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(changes, error, text):
    with pytest.raises(error, match=text):
        manifest(**changes)


def test_required_settings_must_be_there():
    with pytest.raises(InputError, match=r"settings lack \['feature_dim', 'storage'\]"):
        Manifest({"train_set_size": 3})


def test_equal_settings_do_not_differ():
    assert differences(manifest(), manifest()) == []
    assert differences(manifest(), manifest(task={"temperature": 1, "name": "image_classification"})) == []


def test_each_difference_is_one_line_with_its_path():
    asked = manifest(projector={"kind": "sketch", "seed": 1, "salt": "x"}, task={"name": "image_classification"})
    assert differences(manifest(), asked) == [
        "task.temperature: stored 1.0, asked nothing",
        "projector.seed: stored 0, asked 1",
        "projector.salt: stored nothing, asked 'x'",
    ]


def test_true_and_one_differ():
    assert differences(manifest(flag=True), manifest(flag=1)) == ["flag: stored True, asked 1"]


def test_parameters_are_named_by_what_happened_to_them():
    lines = differences(manifest(), manifest(params={"b.weight": [3, 5], "c": [1]}))
    assert lines == [
        "params: 1 only stored: 'a.bias'",
        "params: 1 only asked: 'c'",
        "params: 1 of another shape: 'b.weight' stored [3, 4], asked [3, 5]",
    ]
    many = differences(manifest(), manifest(params={**SETTINGS["params"], **{f"p{i}": [1] for i in range(9)}}))
    assert many == ["params: 9 only asked: 'p0', 'p1', 'p2', 'p3', 'p4', 'p5', … (3 more)"]


def test_another_order_of_parameters_is_a_difference():
    lines = differences(manifest(), manifest(params={"a.bias": [3], "b.weight": [3, 4]}))
    assert lines == ["params: in another order, first at position 0: stored 'b.weight', asked 'a.bias'"]


def test_long_values_are_cut():
    (line,) = differences(manifest(names=["x" * 200]), manifest(names=[]))
    assert len(line) < 120 and "..." in line


def test_a_mismatch_lists_everything_and_says_what_to_do():
    asked = manifest(train_set_size=6, storage="float32")
    with pytest.raises(MismatchError) as caught:
        check_same(manifest(), asked, Path("runs/a"))
    text = str(caught.value)
    assert "train_set_size: stored 5, asked 6" in text and "storage: stored 'float16', asked 'float32'" in text
    assert "runs/a" in text and "another save_dir" in text and "stored values" in text


def test_versions_and_info_are_never_a_mismatch(caplog):
    stored = Manifest(SETTINGS, info={"model": "A"}, versions={**current_versions(), "torch": "2.4.0"})
    with caplog.at_level(logging.INFO, logger="tracer"):
        check_same(stored, Manifest(SETTINGS, info={"model": "B"}), Path("run"))
    assert "another version of torch: stored '2.4.0'" in caplog.text
    assert {record.levelname for record in caplog.records} == {"INFO"}


def test_versions_are_recorded():
    assert set(current_versions()) == {"tracer", "torch", "numpy", "zarr"}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "other"}, "did not write: expected the attribute format='tracer', got 'other'"),
        ({"format_version": FORMAT_VERSION + 1}, "upgrade the package"),
        (
            {"format_version": 4},
            "earlier release; expected 10.*featurize again into a new save_dir, or",
        ),
        ({"format_version": None}, "is damaged"),
        ({"settings": 3}, "is damaged"),
        ({"settings": {"train_set_size": 3}}, "is damaged"),
    ],
)
def test_attributes_of_others_are_refused(changes, text):
    with pytest.raises(StoreError, match=text):
        Manifest.from_attributes({**manifest().attributes(), **changes}, Path("run"))


def test_a_listing_says_how_many_more():
    assert listing([1, 2, 3]) == "1, 2, 3" and listing(np.arange(9), most=2) == "0, 1, … (7 more)"


def test_documents_are_replaced_or_kept(tmp_path):
    path = LocalPath(tmp_path)
    write_group(path, {"a": 1})
    write_group(path, {"a": 2}, replace=False)
    assert read_document(path / NODE)["attributes"] == {"a": 1}
    write_group(path, {"a": 2})
    assert read_document(path / NODE)["attributes"] == {"a": 2}
    assert [path.name for path in tmp_path.iterdir()] == [NODE]


def test_a_document_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = LocalPath(tmp_path)
    write_group(path, {"a": 1})
    with pytest.raises(TypeError):
        write_document(path / NODE, {"a": object()})
    assert read_document(path / NODE)["attributes"] == {"a": 1}
    assert not list(tmp_path.glob(PARTIAL + "*"))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "is not zarr version 3"),
        (b'{"zarr_format": 2}', "is not zarr version 3"),
        (b'{"zarr_format": 3, "attributes": 1}', "is damaged"),
    ],
)
def test_damaged_documents_are_named(tmp_path, content, text):
    path = LocalPath(tmp_path)
    (path / NODE).write_bytes(content)
    with pytest.raises(StoreError, match=text):
        read_document(path / NODE)
