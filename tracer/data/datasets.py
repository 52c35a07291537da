"""Adapters that load examples by index: from data sets, loaders with a fixed order, batches and tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler, Subset, TensorDataset

from tracer.data.batches import count_samples, tensor_from_numpy
from tracer.errors import InputError, InputTypeError
from tracer.types import Batch


class DataSource(ABC):
    """Examples in a fixed order, loaded by index; its length is their number."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def batches(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[Batch, Int64[np.ndarray, " b"]]]:
        """Yield batches that together hold at least the examples of ascending indices, each with its own indices."""


class _MapStyleSource(DataSource):
    """A map-style data set: loads exactly the requested examples."""

    def __init__(self, dataset: Any, **loader_options: Any) -> None:
        self._dataset, self._loader_options = dataset, loader_options

    def __len__(self) -> int:
        return len(self._dataset)

    def batches(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[Batch, Int64[np.ndarray, " b"]]]:
        subset: Any = Subset(self._dataset, indices.tolist())
        # A loader draws a seed for its workers: from a generator of its own, so that the global one does not change.
        options = {"generator": torch.Generator(), **self._loader_options}
        size = self._loader_options["batch_size"]
        for number, batch in enumerate(DataLoader(subset, shuffle=False, **options)):
            yield batch, indices[number * size : (number + 1) * size]


class _BatchListSource(DataSource):
    """Batches that exist already; skips those without a requested example."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._batches, self._sizes = batches, [count_samples(batch) for batch in batches]

    def __len__(self) -> int:
        return sum(self._sizes)

    def batches(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[Batch, Int64[np.ndarray, " b"]]]:
        start = 0
        for batch, size in zip(self._batches, self._sizes, strict=True):
            own = np.arange(start, start + size)
            start += size
            if np.isin(own, indices, assume_unique=True).any():
                yield batch, own


def as_data_source(
    data: Any, name: str, batch_size: int, collate_fn: Callable[[list], Batch] | None = None
) -> DataSource:
    """Return an adapter for data as users pass it.

    Args:
        data: A map-style data set; a tuple of tensors or arrays, examples first; a `DataLoader` that keeps the order; a
            list of batches; or a `DataSource`, which is returned unchanged.
        name: The argument's name, for messages.
        batch_size: The batch size for data sets and tensors.
        collate_fn: Makes a batch of a data set's items.

    Returns:
        The adapter. It yields every example, also of a loader with ``drop_last``.

    Raises:
        InputError: There are no examples, or a loader shuffles.
        InputTypeError: The data are none of these.
    """
    source = data if isinstance(data, DataSource) else _adapt(data, name, batch_size, collate_fn)
    if not len(source):
        raise InputError(f"{name} has no examples; expected at least one.")
    return source


def _adapt(data: Any, name: str, batch_size: int, collate_fn: Callable[[list], Batch] | None) -> DataSource:
    if isinstance(data, DataLoader):
        return _adapt_loader(data, name)
    if isinstance(data, tuple) and data and all(isinstance(column, (Tensor, np.ndarray)) for column in data):
        columns = [tensor_from_numpy(column) if isinstance(column, np.ndarray) else column for column in data]
        if len({len(column) if column.ndim else None for column in columns}) != 1 or not columns[0].ndim:
            shapes = [tuple(column.shape) for column in columns]
            raise InputError(f"{name} is a tuple of tensors; expected one length for all of them, got shapes {shapes}.")
        return _MapStyleSource(TensorDataset(*columns), batch_size=batch_size)
    if isinstance(data, (list, tuple)):
        return _BatchListSource(data)
    is_map_style = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if is_map_style and not isinstance(data, (IterableDataset, Tensor, Mapping)):
        return _MapStyleSource(data, batch_size=batch_size, collate_fn=collate_fn)
    raise InputTypeError(
        f"{name} is a {type(data).__name__}; expected a data set with __len__ and __getitem__, a tuple of tensors, a "
        f"torch DataLoader, or a list of batches. Streams cannot be used, since examples need indices."
    )


def _adapt_loader(loader: DataLoader, name: str) -> DataSource:
    plain = type(loader.batch_sampler) is BatchSampler and isinstance(loader.sampler, SequentialSampler)
    if isinstance(loader.dataset, IterableDataset) or not plain or loader.batch_size is None:
        raise InputError(
            f"{name} is a DataLoader that does not go through its data set in order (its sampler is "
            f"{type(loader.sampler).__name__}), so an index would mean another example each time. Create it with "
            f"shuffle=False, or pass the data set itself."
        )
    return _MapStyleSource(
        loader.dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        timeout=loader.timeout,
        **({} if loader.generator is None else {"generator": loader.generator}),
    )
