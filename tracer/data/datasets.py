"""Adapters that load examples by index: from data sets, tensors, and loaders or other iterables with a fixed order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from tracer._core.validation import check_count
from tracer.data.batches import check_batch_size, check_dense, count_samples, leaves, select_samples
from tracer.data.fingerprints import fingerprint_samples
from tracer.data.model_inputs import as_mapping, label_key
from tracer.data.tables import (
    AS_THEY_ARE,
    InputForm,
    as_collate_fn,
    is_array,
    is_column,
    is_frame,
    is_hugging_face,
    prepared,
    with_labels,
)
from tracer.errors import InputError, InputTypeError
from tracer.types import Batch

_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
_LOOP = "make a Tracer and call tracer.featurize(batch, inds=...) with the index of each example"


class DataSource(ABC):
    """Examples in a fixed order, loaded by index; its length is their number."""

    loads_by_index = False  # whether a few examples cost no pass over all of them

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""

    @abstractmethod
    def batches(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[Batch, Int64[np.ndarray, " b"]]]:
        """Yield batches that together hold at least the examples of ascending indices, each with its own indices."""

    def trial_batches(self, count: int) -> Iterator[Batch]:
        """Yield a few batches whose time, but for the first one's, stands for that of all: the first ``count``."""
        return (batch for batch, _ in islice(self.batches(np.arange(len(self))), count))

    def texts(self, indices: Int64[np.ndarray, " n"]) -> list[str] | None:
        """Return the texts of examples of ascending indices, to be shown; None if batches have all there is."""
        return None


class NoExamples(DataSource):
    """Targets that are not known yet."""

    def __len__(self) -> int:
        return 0

    def batches(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[Batch, Int64[np.ndarray, " b"]]]:
        """Yield nothing."""
        yield from ()


class _MapStyleSource(DataSource):
    """A map-style data set: loads exactly the requested examples."""

    loads_by_index = True

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


class _TensorSource(DataSource):
    """Tensors of one length: rows of each are a batch, as a loader would collate them from examples one by one."""

    loads_by_index = True

    def __init__(self, columns: Sequence[Tensor], batch_size: int) -> None:
        self._columns, self._batch_size = columns, batch_size

    def __len__(self) -> int:
        return len(self._columns[0])

    def batches(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[Batch, Int64[np.ndarray, " b"]]]:
        for start in range(0, len(indices), self._batch_size):
            chosen = indices[start : start + self._batch_size]
            rows = torch.tensor(chosen)
            yield [column.index_select(0, rows.to(column.device)) for column in self._columns], chosen


class IteratedSource(DataSource):
    """Whatever can be iterated again and again: yields batches, or examples that are collated to batches.

    The data are iterated once to count the examples, and again for each pass; batches that are not needed are skipped.

    Args:
        data: The iterable.
        name: The argument's name, for messages.
        collate: Collates so many examples; None if the data yield batches, or if the first item is to decide.
        batch_size: The batch size of examples that are collated.
        check_order: Whether each pass must yield what the first one did.
        form: How the model takes arrays and tables. Default: as they are.
    """

    def __init__(
        self,
        data: Iterable[Any],
        name: str = "data",
        batch_size: int = 1,
        collate: Callable[[list], Batch] | None = None,
        check_order: bool = False,
        form: InputForm = AS_THEY_ARE,
    ) -> None:
        self._data, self._name, self._collate, self._batch_size = data, name, collate, batch_size
        self._form = form
        self._starts, self._hashes = [0], []
        for batch in self._items():
            size = count_samples(batch)
            check_batch_size(batch, size)
            self._starts.append(self._starts[-1] + size)
            if check_order:
                self._hashes.append(fingerprint_samples(batch, size))

    def __len__(self) -> int:
        return self._starts[-1]

    def batches(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[Batch, Int64[np.ndarray, " b"]]]:
        """Iterate the data, and yield the batches that hold one of the indices."""
        start = 0
        for number, batch in enumerate(self._items()):
            if start > indices[-1]:
                return
            own = np.arange(start, start + count_samples(batch))
            start += len(own)
            if self._starts[number + 1 : number + 2] != [start]:
                raise InputError(self._other_order(own[0]))
            if np.isin(own, indices, assume_unique=True).any():
                if self._hashes:
                    differs = fingerprint_samples(batch, len(own)) != self._hashes[number]
                    if differs.any():
                        raise InputError(self._other_order(own[differs][0]))
                yield batch, own
        if start <= indices[-1]:
            raise InputError(self._other_order(start))

    def _items(self) -> Iterator[Batch]:
        yield from map(self._form.batch, self._batches())

    def _batches(self) -> Iterator[Batch]:
        items = iter(self._data)
        for first in items:
            items = chain([first], items)
            own = self._collate not in (default_collate, self._form.collate)
            if self._collate is None or not is_sample(first, own):
                yield from items
            else:
                while samples := list(islice(items, self._batch_size)):
                    yield self._collate(samples)

    def _other_order(self, index: int) -> str:
        return (
            f"{self._name} is iterated at each checkpoint, and this pass differs from the first one at example {index} "
            f"of {len(self)}: it shuffles, changes examples at random, or ends early. Make it yield the same each "
            f"time, pass the data set itself, or pass check_rows=False if only augmentation differs; or write the loop "
            f"yourself: {_LOOP}."
        )


def as_data_source(
    data: Any,
    name: str,
    batch_size: int,
    collate_fn: Callable[[list], Batch] | None = None,
    check_order: bool = True,
    form: InputForm = AS_THEY_ARE,
) -> DataSource:
    """Return an adapter for data as users pass it.

    Args:
        data: A map-style data set; a tuple of tensors, arrays or tables, examples first; a table with a column of
            labels; a `DataLoader` or another iterable that yields the same batches, or single examples, each time; a
            list of them; or a `DataSource`, which is returned unchanged.
        name: The argument's name, for messages.
        batch_size: The batch size for data sets, tensors and single examples.
        collate_fn: Makes a batch of examples; or a tokenizer, which pads them.
        check_order: Whether loaders and other iterables must yield equal examples in each pass.
        form: How the model takes arrays and tables. Default: as they are.

    Returns:
        The adapter. It yields every example, also of a plain `DataLoader` with ``drop_last``.

    Raises:
        InputError: There are no examples, or a loader shuffles.
        InputTypeError: The data are none of these.
    """
    collate_fn = as_collate_fn(collate_fn)
    source = data if isinstance(data, DataSource) else _adapt(data, name, batch_size, collate_fn, check_order, form)
    if not len(source) and source is not data:
        raise InputError(f"{name} has no examples; expected at least one.")
    return source


def as_training_source(
    data: Any,
    size: int,
    batch_size: int,
    collate_fn: Callable[[list], Batch] | None,
    check_order: bool,
    form: InputForm = AS_THEY_ARE,
) -> DataSource:
    """Return an adapter for all of ``size`` training examples; see `as_data_source`."""
    source = as_data_source(data, "train", check_count(batch_size, "batch_size"), collate_fn, check_order, form)
    if len(source) != size:
        raise InputError(f"train has {len(source)} rows; expected train_set_size={size}.")
    return source


def is_sample(item: Any, has_collate_fn: bool = False) -> bool:
    """Return whether an item is a single example, not a batch: its label or all of it has no batch dimension."""
    item = as_mapping(item)
    found = [leaf for _, leaf in leaves(item)]
    tensors = [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:  # objects can be collated by the user's function only
        return has_collate_fn or all(isinstance(leaf, (Tensor, np.generic, list, str, int, float)) for leaf in found)
    if has_collate_fn and len({len(leaf) for leaf in tensors} - {1}) > 1:  # no batch, but perhaps part of one
        return True
    if isinstance(item, Mapping):
        tokens = item.get("input_ids")
        if isinstance(tokens, (list, tuple)) or (isinstance(tokens, Tensor) and tokens.ndim == 1):
            return True
        key = label_key(item)
        label = item[key] if key is not None else None
    else:
        label = item[-1] if isinstance(item, (tuple, list)) and len(item) > 1 else None
    if isinstance(label, (Tensor, np.ndarray, np.generic)):
        return label.ndim == 0 or (label.shape == (1,) and len(tensors[0]) > 1)
    return isinstance(label, (int, float, str))


def _adapt(
    data: Any,
    name: str,
    batch_size: int,
    collate_fn: Callable[[list], Batch] | None,
    check_order: bool,
    form: InputForm,
) -> DataSource:
    if is_frame(data):
        data = with_labels(data, name)
    if isinstance(data, tuple) and any(is_frame(column) or is_column(column) for column in data):
        data = tuple(np.asarray(column) if isinstance(column, list) else column for column in data)
    if is_hugging_face(data):
        data = prepared(data, name, form, collate_fn)
    if isinstance(data, DataLoader):
        _check_sampler(data, name)
        if _is_plain(data):
            return _loader_source(data, form)
    if isinstance(data, tuple) and data and all(isinstance(column, Tensor) or is_array(column) for column in data):
        for place, column in enumerate(data):
            if isinstance(column, Tensor):
                check_dense(f"{name}[{place}]", column)
        columns = form.tensors(data, name)
        if len({len(column) if column.ndim else None for column in columns}) != 1 or not columns[0].ndim:
            shapes = [tuple(column.shape) for column in columns]
            raise InputError(f"{name} is a tuple of tensors; expected one length for all of them, got shapes {shapes}.")
        return _TensorSource(columns, batch_size)
    if type(data) is TensorDataset and collate_fn is None:
        return _TensorSource(data.tensors, batch_size)
    is_list = isinstance(data, (list, tuple))
    is_other = isinstance(data, (IterableDataset, DataLoader, Tensor, Mapping, str, bytes, type))
    is_map_style = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not is_other
    if is_sample(data[0], collate_fn is not None) if is_list and data else is_map_style and not is_list:
        return _MapStyleSource(data, batch_size=batch_size, collate_fn=collate_fn or form.collate)
    if not hasattr(data, "__iter__") or isinstance(data, (Tensor, Mapping, str, bytes, type)):
        kind = f"the class {data.__name__}" if isinstance(data, type) else f"a {type(data).__name__}"
        raise InputTypeError(
            f"{name} is {kind}; expected a data set with __len__ and __getitem__, a tuple of tensors, arrays or "
            f"tables, a torch DataLoader or another iterable of batches, or a list of batches or examples."
        )
    if isinstance(data, Iterator) and not hasattr(data, "__len__"):  # some loaders are their own iterators
        raise InputTypeError(
            f"{name} is a {type(data).__name__}, which can be iterated only once; expected data that every checkpoint "
            f"can iterate again. Pass a list, a data set or a DataLoader; or write the loop yourself: {_LOOP}."
        )
    return IteratedSource(data, name, batch_size, collate_fn or form.collate, check_order and not is_list, form)


def _is_plain(loader: DataLoader) -> bool:
    """Return whether a loader does nothing but collate its data set in order, so that parts can be loaded alone."""
    dataset: Any = loader.dataset
    return (
        type(loader) is DataLoader
        and not isinstance(dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.sampler) is SequentialSampler
        and len(loader.sampler) == len(dataset)
    )


def _check_sampler(loader: DataLoader, name: str) -> None:
    """Raise `InputError` if a loader is known to shuffle, or to yield only the share of one of several processes."""
    for part in (loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)):
        if isinstance(part, _RANDOM_SAMPLERS) or getattr(part, "shuffle", False):
            raise InputError(
                f"{name} is a DataLoader that does not go through its data set in order (its sampler is "
                f"{type(part).__name__}), so an index would mean another example each time. Create it with "
                f"shuffle=False, or pass the data set itself."
            )
    for part in (loader.sampler, loader.batch_sampler, loader.dataset, getattr(loader, "state", None)):
        shares = getattr(part, "num_replicas", None) or getattr(part, "num_processes", None) or 1
        if shares > 1:
            raise InputError(
                f"{name} is a DataLoader that yields only this process's share of its data set, one of {shares}; "
                f"expected all examples, which are divided here. Pass the data set, or the loader before it was "
                f"prepared for several processes."
            )


def _loader_source(loader: DataLoader, form: InputForm) -> DataSource:
    return _MapStyleSource(
        loader.dataset,
        batch_size=loader.batch_size,
        collate_fn=form.collate if loader.collate_fn is default_collate else loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        worker_init_fn=loader.worker_init_fn,
        timeout=loader.timeout,
        **({} if loader.generator is None else {"generator": loader.generator}),
    )


def exact_batches(source: DataSource, rows: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
    """Yield batches of exactly the given examples, ascending, with their indices."""
    wanted = np.zeros(len(source), dtype=bool)
    wanted[rows] = True
    for batch, inds in source.batches(rows):
        mine = wanted[inds]
        if not mine.all():
            batch = select_samples(batch, torch.from_numpy(np.flatnonzero(mine)), len(inds))
        if mine.any():
            yield batch, inds[mine]
