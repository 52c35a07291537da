"""Data sources: exactly the requested examples, with their indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import tracer
from tracer.data.datasets import as_data_source

X = torch.arange(10.0)
SOURCES = {
    "tensors": lambda: (X, X),
    "dataset": lambda: TensorDataset(X, X),
    "loader": lambda: DataLoader(TensorDataset(X, X), batch_size=4),
    "batches": lambda: [(part, part) for part in X.split(4)],
}


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("rows", [range(10), [3, 7, 8, 9], [0]])
def test_examples_and_indices_belong_together(kind, rows):
    source = as_data_source(SOURCES[kind](), "train", 4)
    assert len(source) == 10
    seen = []
    for batch, inds in source.batches(np.array(list(rows))):
        np.testing.assert_array_equal(batch[0], inds)
        seen += inds.tolist()
    assert set(rows) <= set(seen)
    if kind != "batches":
        assert seen == list(rows)


def test_only_requested_examples_are_loaded():
    loaded = []

    class Recording(Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, row):
            loaded.append(row)
            return X[row]

    list(as_data_source(Recording(), "train", 4).batches(np.array([2, 5])))
    assert loaded == [2, 5]


def test_collate_functions():
    source = as_data_source(TensorDataset(X), "train", 4, lambda rows: {"x": torch.stack([row[0] for row in rows])})
    batch, _ = next(source.batches(np.arange(3)))
    assert batch["x"].tolist() == [0.0, 1.0, 2.0]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(X)


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(TensorDataset(X), shuffle=True),
        lambda: DataLoader(Stream()),
        lambda: DataLoader(TensorDataset(X), batch_sampler=[[3, 1], [2]]),
        lambda: DataLoader(TensorDataset(X), batch_size=None),
    ],
)
def test_loaders_without_a_fixed_order_are_refused(loader):
    with pytest.raises(tracer.InputError, match="does not go through its data set in order"):
        as_data_source(loader(), "train", 4)


def test_a_loader_that_drops_its_last_examples_still_yields_all():
    loader = DataLoader(TensorDataset(X), batch_size=4, drop_last=True)
    rows = np.concatenate([inds for _, inds in as_data_source(loader, "train", 4).batches(np.arange(10))])
    assert rows.tolist() == list(range(10))


@pytest.mark.parametrize("data", [3, Stream(), (x for x in X), torch.ones(3), {"x": X}])
def test_other_types_are_refused(data):
    with pytest.raises(tracer.InputTypeError, match="train is a"):
        as_data_source(data, "train", 4)
