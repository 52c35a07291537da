"""Where rows come from: data sets, loaders that keep their order, lists of batches, columns of tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, Subset, TensorDataset

from tracer.data.batches import as_tensor, count_rows
from tracer.errors import InputError, InputTypeError
from tracer.types import Batch


class RowSource(ABC):
    """Rows in a fixed order, of which any can be asked for.

    Attributes:
        num_rows: How many rows there are.
    """

    num_rows: int

    @abstractmethod
    def batches(self, rows: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield batches that together hold at least the given rows, each with its row indices.

        Args:
            rows: Ascending row indices, int64.

        Yields:
            A batch and the indices of its rows.
        """


class _DatasetSource(RowSource):
    """A map-style data set: loads exactly the rows that are asked for."""

    def __init__(self, dataset: Any, **loader_options: Any) -> None:
        self.dataset, self.loader_options = dataset, loader_options
        self.num_rows = len(dataset)

    def batches(self, rows: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
        subset: Any = Subset(self.dataset, rows.tolist())
        # A loader draws a seed for its workers; from a generator of its own, not from the global one.
        loader: DataLoader = DataLoader(
            subset, shuffle=False, **{"generator": torch.Generator(), **self.loader_options}
        )
        size = self.loader_options["batch_size"]
        for number, batch in enumerate(loader):
            yield batch, rows[number * size : (number + 1) * size]


class _BatchesSource(RowSource):
    """Batches that exist already, or a loader whose way of batching is its own: skips those with nothing asked for."""

    def __init__(self, batches: Any, sizes: Sequence[int]) -> None:
        self._batches, self._sizes = batches, sizes
        self.num_rows = sum(sizes)

    def batches(self, rows: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
        start = 0
        for batch, size in zip(self._batches, self._sizes, strict=True):
            mine = np.arange(start, start + size)
            start += size
            if np.isin(mine, rows, assume_unique=True).any():
                yield batch, mine


def row_source(data: Any, name: str, batch_size: int, collate_fn: Callable[[list], Batch] | None = None) -> RowSource:
    """Return the rows of what a user passed as data.

    Args:
        data: A map-style data set; a tuple of tensors or arrays with rows first; a `DataLoader` that keeps the
            order; a list of batches; or a row source, which is returned as it is.
        name: The argument's name, for messages.
        batch_size: The batch size for data sets and tensors.
        collate_fn: How rows become a batch, for data sets.

    Returns:
        The rows.

    Raises:
        InputError: There are no rows, or a loader shuffles. (All rows count, also with ``drop_last``.)
        InputTypeError: It is none of these.
    """
    source = data if isinstance(data, RowSource) else _row_source(data, name, batch_size, collate_fn)
    if source.num_rows < 1:
        raise InputError(f"{name} holds no rows.")
    return source


def _row_source(data: Any, name: str, batch_size: int, collate_fn: Callable[[list], Batch] | None) -> RowSource:
    if isinstance(data, DataLoader):
        return _loader_source(data, name)
    if isinstance(data, tuple) and data and all(isinstance(column, (Tensor, np.ndarray)) for column in data):
        columns = [as_tensor(column) if isinstance(column, np.ndarray) else column for column in data]
        if len({len(column) if column.ndim else None for column in columns}) != 1 or not columns[0].ndim:
            shapes = [tuple(column.shape) for column in columns]
            raise InputError(f"{name} is a tuple of columns, whose numbers of rows must agree; got shapes {shapes}.")
        return _DatasetSource(TensorDataset(*columns), batch_size=batch_size)
    if isinstance(data, (list, tuple)):
        return _BatchesSource(data, [count_rows(batch) for batch in data])
    is_map_style = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if is_map_style and not isinstance(data, (IterableDataset, Tensor, Mapping)):
        return _DatasetSource(data, batch_size=batch_size, collate_fn=collate_fn)
    raise InputTypeError(
        f"{name} is a {type(data).__name__}; expected a data set with __len__ and __getitem__, a tuple of tensors, a "
        f"torch DataLoader, or a list of batches. Rows need indices, so streams cannot be used."
    )


def _loader_source(loader: DataLoader, name: str) -> RowSource:
    plain = type(loader.batch_sampler) is BatchSampler and isinstance(loader.sampler, SequentialSampler)
    if isinstance(loader.dataset, IterableDataset) or not plain or loader.batch_size is None:
        raise InputError(
            f"{name} is a DataLoader that does not go through its data set in order (its sampler is "
            f"{type(loader.sampler).__name__}): row indices would not stand for the same rows each time. Make it with "
            f"shuffle=False, or pass the data set itself."
        )
    return _DatasetSource(
        loader.dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        timeout=loader.timeout,
        **({} if loader.generator is None else {"generator": loader.generator}),
    )
