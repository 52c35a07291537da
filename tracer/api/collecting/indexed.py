"""A data set whose examples say which they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from tracer.data.indices import ExampleIndices
from tracer.errors import BatchError
from tracer.types import Batch

INDEX = "example_index"


class IndexedDataset(Dataset):
    """A map-style data set whose examples have their index, for `GradientCollector` in a trainer.

    An example that is a mapping gets the entry ``example_index``, another one is followed by its index.

    Args:
        dataset: The data set.

    >>> IndexedDataset([{"x": 1.5}, {"x": 2.5}])[1], IndexedDataset([(1.5, 0)])[0]
    ({'x': 2.5, 'example_index': 1}, (1.5, 0, 0))
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    @staticmethod
    def collator(collate_fn: Callable[[list[Any]], Any]) -> Callable[[list[Any]], dict[str, Any]]:
        """Return a collator that keeps the entry ``example_index`` of mappings, which ``collate_fn`` does not see.

        For trainers that take a data set with such a column, and whose own collator drops it, as TRL's ``SFTTrainer``.

        >>> collate = IndexedDataset.collator(lambda examples: {"x": torch.tensor([each["x"] for each in examples])})
        >>> collate([{"x": 1.5, "example_index": 4}, {"x": 2.5, "example_index": 2}])
        {'x': tensor([1.5000, 2.5000]), 'example_index': tensor([4, 2])}
        """

        def collate(examples: list[Any]) -> dict[str, Any]:
            inds = torch.tensor([int(each[INDEX]) for each in examples])
            plain = [{name: value for name, value in each.items() if name != INDEX} for each in examples]
            return {**collate_fn(plain), INDEX: inds}

        return collate

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        example = self.dataset[index]
        if isinstance(example, Mapping):
            return {**example, INDEX: int(index)}
        return (*example, int(index)) if isinstance(example, (tuple, list)) else (example, int(index))


def split_index(batch: Any) -> tuple[Batch, ExampleIndices]:
    """Return a batch of an `IndexedDataset` without its indices, and the indices.

    Raises:
        BatchError: If it has none.

    >>> split_index({"x": torch.zeros(2), "example_index": torch.tensor([4, 2])})
    ({'x': tensor([0., 0.])}, tensor([4, 2]))
    """
    if isinstance(batch, Mapping) and INDEX in batch:
        return {name: value for name, value in batch.items() if name != INDEX}, batch[INDEX]
    last = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if isinstance(last, Tensor) and last.ndim == 1 and last.dtype == torch.int64:
        rest = tuple(batch[:-1])
        return (rest[0] if len(rest) == 1 else rest), last
    raise BatchError(
        f"A training batch of type {type(batch).__name__} does not say which examples it holds; expected a mapping "
        f"with {INDEX!r}, or indices as the last tensor. Train on tracer.IndexedDataset(dataset)."
    )
