"""Data sources: exactly the requested examples, with their indices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

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


@pytest.mark.parametrize("wrapped", [lambda *columns: columns, TensorDataset], ids=["tuple", "TensorDataset"])
def test_batches_of_tensors_are_those_that_a_loader_collates(wrapped):
    columns = torch.randn(10, 3, 2, dtype=torch.float64).transpose(1, 2), torch.arange(10), torch.rand(10) > 0.5
    rows = np.array([1, 2, 5, 7, 9])
    found = list(as_data_source(wrapped(*columns), "train", 2).batches(rows))
    expected = list(DataLoader(Subset(TensorDataset(*columns), rows.tolist()), batch_size=2))
    np.testing.assert_array_equal(np.concatenate([inds for _, inds in found]), rows)
    for (batch, _), collated in zip(found, expected, strict=True):
        assert isinstance(batch, type(collated))
        torch.testing.assert_close(batch, collated, rtol=0, atol=0)
        assert [each.stride() for each in batch] == [each.stride() for each in collated]


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
    def __init__(self, items=tuple(X)):
        self.items = items

    def __iter__(self):
        return iter(self.items)


class Halving(DataLoader):
    def __iter__(self):
        return (batch / 2 for batch in super().__iter__())


class Batches:
    """Iterates as loaders of other libraries do; ``change`` is applied to the batches of each later pass."""

    def __init__(self, change=lambda batches: batches):
        self.change, self.passes = change, 0

    def __iter__(self):
        self.passes += 1
        batches = [(part, part) for part in X.split(4)]
        return iter(batches if self.passes == 1 else self.change(batches))


class Plain:
    def __init__(self, indices):
        self.indices = indices

    def __iter__(self):
        return iter(self.indices)

    def __len__(self):
        return len(self.indices)


ORDER = [3, 1, 8, 0, 2]
PAIRS = TensorDataset(X[:, None].expand(10, 2), X)
ITERATED = {
    "own __iter__": (lambda: Halving(X, batch_size=4), X / 2),
    "sampler": (lambda: DataLoader(X, batch_size=2, sampler=Plain(ORDER)), X[ORDER]),
    "shorter sampler": (lambda: DataLoader(X, batch_size=2, sampler=SequentialSampler(range(5))), X[:5]),
    "batch sampler": (lambda: DataLoader(X, batch_sampler=[[3, 1], [8, 0, 2]]), X[ORDER]),
    "stream": (lambda: DataLoader(Stream(), batch_size=3), X),
    "stream of batches": (lambda: DataLoader(Stream(X.split(4)), batch_size=None), X),
    "single examples": (lambda: DataLoader(PAIRS, batch_size=None), X),
    "stream without a loader": (lambda: Stream(), X),
    "iterable": (lambda: Batches(), X),
    "list of tuples": (lambda: [(x, int(x[0])) for x, _ in PAIRS], X),
    "list of pairs with tensors": (lambda: list(PAIRS), X),
    "list of mappings": (lambda: [{"x": x, "labels": y} for x, y in PAIRS], X),
    "list of tokens": (lambda: [{"input_ids": x.long().tolist()} for x, _ in PAIRS], X),
    "tuple of mappings": (lambda: tuple({"x": x, "labels": [y]} for x, y in zip(X[:, None, None], X, strict=True)), X),
}


def column(batch):
    """The values of `X` in a batch of any of these forms."""
    leaf = next(batch[key] for key in ("x", "input_ids") if key in batch) if isinstance(batch, dict) else batch
    leaf = leaf[0] if isinstance(leaf, (list, tuple)) else leaf
    return leaf.flatten(1)[:, 0] if leaf.ndim > 1 else leaf


@pytest.mark.parametrize("kind", ITERATED)
def test_examples_are_those_that_iterating_yields(kind):
    make, expected = ITERATED[kind]
    source = as_data_source(make(), "train", 3)
    assert len(source) == len(expected)
    for rows in (range(len(expected)), [4]):
        seen = {}
        for batch, inds in source.batches(np.array(list(rows))):
            seen.update(zip(inds.tolist(), column(batch).tolist(), strict=True))
        assert seen.keys() >= set(rows)
        assert all(value == float(expected[index]) for index, value in seen.items())


def shuffled(batches):
    return [tuple(leaf.flip(0) for leaf in batch) for batch in batches]


@pytest.mark.parametrize("change", [shuffled, lambda all: all[::-1], lambda all: all[:1], lambda all: all[:0]])
def test_iterables_that_change_between_passes_are_refused(change):
    source = as_data_source(Batches(change), "train", 4)
    with pytest.raises(tracer.InputError, match="differs from the first one at example"):
        list(source.batches(np.arange(10)))


def test_augmentation_is_allowed_on_request():
    source = as_data_source(Batches(shuffled), "train", 4, check_order=False)
    assert sum(len(inds) for _, inds in source.batches(np.arange(10))) == 10


@pytest.mark.parametrize(
    "loader",
    [
        lambda: DataLoader(TensorDataset(X), shuffle=True),
        lambda: Halving(X, shuffle=True),
        lambda: DataLoader(X, sampler=WeightedRandomSampler(X, 10)),
        lambda: DataLoader(X, sampler=DistributedSampler(X, num_replicas=1, rank=0)),
    ],
)
def test_loaders_that_shuffle_are_refused(loader):
    with pytest.raises(tracer.InputError, match="does not go through its data set in order"):
        as_data_source(loader(), "train", 4)


def test_loaders_of_one_process_of_several_are_refused():
    loader = DataLoader(X, sampler=DistributedSampler(X, num_replicas=2, rank=0, shuffle=False))
    with pytest.raises(tracer.InputError, match="only this process's share of its data set, one of 2"):
        as_data_source(loader, "train", 4)


def test_loaders_that_accelerate_prepared():
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(TensorDataset(X, X), batch_size=4))
    source = as_data_source(loader, "train", 4)
    for _ in range(2):
        seen = [(batch[0].tolist(), inds.tolist()) for batch, inds in source.batches(np.arange(10))]
        assert [value for values, _ in seen for value in values] == X.tolist()


def test_examples_of_any_shape_are_collated_by_the_users_function():
    items = [(torch.full((3, 5, 5), float(i)), torch.zeros(5, 5)) for i in range(4)]
    source = as_data_source(items, "train", 2, lambda rows: tuple(map(torch.stack, zip(*rows, strict=True))))
    assert [batch[0].shape for batch, _ in source.batches(np.arange(4))] == [(2, 3, 5, 5)] * 2
    with pytest.raises(tracer.BatchError, match="has 5 entries"):
        as_data_source(items, "train", 2)


@pytest.mark.parametrize("item", [(torch.ones(3, 2), torch.ones(3)), {"x": torch.ones(3), "labels": torch.ones(3)}])
def test_batches_are_not_taken_for_examples(item):
    assert len(as_data_source([item, item], "train", 4)) == 6


def test_a_loader_that_drops_its_last_examples_still_yields_all():
    loader = DataLoader(TensorDataset(X), batch_size=4, drop_last=True)
    rows = np.concatenate([inds for _, inds in as_data_source(loader, "train", 4).batches(np.arange(10))])
    assert rows.tolist() == list(range(10))


@pytest.mark.parametrize("data", [3, (x for x in X), torch.ones(3), {"x": X}, "words", TensorDataset])
def test_other_types_are_refused(data):
    with pytest.raises(tracer.InputTypeError, match="train is (a|the class TensorDataset)"):
        as_data_source(data, "train", 4)


@pytest.mark.parametrize("column", [torch.nested.nested_tensor([X[0], X[1]]), X.to_sparse()])
def test_tensors_without_rows_are_refused(column):
    with pytest.raises(tracer.BatchError, match=r"train\[0\] is a (nested|sparse) tensor"):
        as_data_source((column, X), "train", 4)
