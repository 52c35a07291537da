"""Batches: containers keep their type; samples are counted, selected and recognized."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from batch_cases import X, Y

import tracer
from tracer.data.batches import check_batch_size, count_samples, leaves, map_leaves, select_samples, to_device
from tracer.data.fingerprints import fingerprint_samples

Pair = namedtuple("Pair", "x y")


@dataclasses.dataclass(frozen=True)
class Sample:
    x: torch.Tensor
    words: list


BATCHES = [
    (X, Y),
    [X, Y],
    {"x": X, "y": Y},
    OrderedDict(x=X, y=Y),
    UserDict(x=X, y=Y),
    Pair(X, Y),
    Sample(X, ["a", "b", "c"]),
    ({"x": X, "deep": [X, (Y,)]}, Y),
    (X.numpy(), Y.numpy()),
]


@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: type(batch).__name__)
def test_select_rows_keeps_containers(batch):
    picked = select_samples(batch, torch.tensor([2, 0]), 3)
    assert type(picked) is type(batch)
    before, after = list(leaves(batch)), list(leaves(picked))
    assert [path for path, _ in before] == [path for path, _ in after]
    for (_, old), (_, new) in zip(before, after, strict=True):
        if isinstance(old, torch.Tensor):
            assert torch.equal(new, old[[2, 0]])
        else:
            assert new == [old[2], old[0]]


def test_shared_leaves_stay_whole():
    batch = {"x": X, "scale": torch.tensor(2.0), "positions": torch.arange(7)[None], "name": "all"}
    check_batch_size(batch, 3)
    picked = select_samples(batch, torch.tensor([1]), 3)
    assert picked["scale"] == 2.0
    assert picked["positions"].shape == (1, 7)
    assert picked["name"] == "all"


def test_attributes_of_mappings_survive():
    class Encoding(UserDict):
        note = None

    batch = Encoding(x=X)
    batch.note = "mine"
    assert to_device(batch, torch.device("cpu")).note == "mine"


def test_wrong_sizes_name_the_leaf():
    with pytest.raises(tracer.BatchError, match=r"batch\['y'\]\[0\] has 3 entries"):
        check_batch_size({"x": X[:2], "y": (Y,)}, 2)
    with pytest.raises(tracer.BatchError, match="holds no tensor with 4 entries"):
        check_batch_size({"scale": torch.tensor(1.0), "one": X[:1]}, 4)


SPARSE = X.to_sparse(), X.to_sparse_csr()
NESTED = [torch.nested.nested_tensor([X[:1], X[:2], X], layout=layout) for layout in (torch.strided, torch.jagged)]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("value", [*SPARSE, *NESTED], ids=lambda value: f"{value.layout}, nested {value.is_nested}")
def test_sparse_and_nested_tensors_are_refused_with_what_to_do(value):
    for batch in ((value, Y), {"y": Y, "x": value}):
        with pytest.raises(tracer.BatchError, match="expected dense tensors"):
            check_batch_size(batch, count_samples(batch))


def test_samples_are_counted():
    assert count_samples(({"x": X}, Y)) == 3
    with pytest.raises(tracer.BatchError, match="holds no tensor"):
        count_samples({"words": ["a", "b"]})


@pytest.mark.parametrize(
    "values",
    [["a", "b", "c"], [{"id": 1}, {"id": 2}, {"id": 3}], [[1], [2, 3], []], np.array(["a", "b", "c"]), (None, 1, "x")],
)
def test_lists_without_tensors_have_one_entry_for_each_sample(values):
    batch = {"x": X, "extra": values}
    check_batch_size(batch, 3)
    picked = select_samples(batch, torch.tensor([2, 0]), 3)["extra"]
    assert list(picked) == [values[2], values[0]]
    whole = fingerprint_samples(batch, 3)
    assert fingerprint_samples({"x": X[[2]], "extra": values[2:]}, 1)[0] == whole[2]


def test_values_that_belong_to_no_sample_are_refused():
    class Record:
        pass

    with pytest.raises(tracer.BatchError, match=r"\['r'\] is of type Record, which cannot be assigned to examples"):
        check_batch_size({"x": X, "r": Record()}, 3)


@pytest.mark.filterwarnings("error")
def test_arrays_that_torch_cannot_share_are_copied():
    fixed = np.arange(6.0)
    fixed.setflags(write=False)
    for array in (fixed, np.arange(6.0)[::-1], np.arange(6.0).astype(">f8")):
        found = next(leaf for _, leaf in leaves((array,)))
        np.testing.assert_array_equal(found.numpy(), array)


def test_shared_numbers_are_part_of_a_sample():
    one, other = (fingerprint_samples({"x": X, "temperature": torch.tensor(t)}, 3) for t in (1.0, 2.0))
    assert not set(one.tolist()) & set(other.tolist())


def test_arrays_of_strings_are_left_alone():
    words = np.array(["a", "b", "c"])
    assert map_leaves(words, lambda leaf: leaf) is words
