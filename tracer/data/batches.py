"""Batches as loaders yield them: tensors inside tuples, lists, mappings and dataclasses.

A leaf is *per row* when its first dimension, or its length, is the number of samples; tensors without dimensions or
with a first dimension of one are *shared* by all rows, and so are single values. Lists without tensors in them (names,
ids, records) are leaves. Anything else is refused, since it could only be assigned to rows by a guess.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracer.errors import BatchError
from tracer.types import Batch

_PLAIN = (str, bytes, int, float, bool, complex, type(None))


def as_tensor(array: np.ndarray) -> Tensor:
    """Return a numeric array as a tensor; what torch cannot share (read-only, reversed, foreign byte order) is copied.

    Args:
        array: The array.

    Returns:
        A tensor of its values.
    """
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    strange = not native.flags.writeable or any(stride < 0 for stride in native.strides)
    return torch.from_numpy(native.copy() if strange else native)


def _is_numeric(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "biuf"


def _is_container(value: Any) -> bool:
    """Tell whether a list or tuple holds tensors, so that its items are leaves of their own."""
    if isinstance(value, Tensor) or _is_numeric(value):
        return True
    items = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, (Mapping, list, tuple)) and any(_is_container(item) for item in items)


def map_leaves(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """Rebuild a batch with ``function`` applied to each leaf; containers keep their type.

    Args:
        batch: Any nesting of tuples, named tuples, lists, mappings and dataclasses.
        function: Called with each leaf; arrays come as tensors, and a list of plain values comes whole.

    Returns:
        The rebuilt batch; the given one is not changed.
    """
    if _is_numeric(batch):
        return function(as_tensor(batch))
    if isinstance(batch, Mapping):
        return _rebuild_mapping(batch, {key: map_leaves(value, function) for key, value in batch.items()})
    if isinstance(batch, (list, tuple)):
        if not _is_container(batch):
            return function(batch)
        items = [map_leaves(item, function) for item in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        values = {f.name: map_leaves(getattr(batch, f.name), function) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **values)
    return function(batch)


def _rebuild_mapping(batch: Mapping, values: dict) -> Mapping:
    if type(batch) is dict or not isinstance(batch, MutableMapping):
        return values
    rebuilt = copy.copy(batch)  # keeps attributes of e.g. transformers' BatchEncoding
    for key, value in values.items():
        rebuilt[key] = value
    return rebuilt


def leaves(batch: Batch, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` for every leaf, in the order of the containers.

    >>> [path for path, _ in leaves({"x": torch.zeros(2), "y": (torch.zeros(2), 1)})]
    ["batch['x']", "batch['y'][0]", "batch['y'][1]"]
    """
    if isinstance(batch, Mapping):
        for key, value in batch.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(batch, (list, tuple)) and _is_container(batch):
        for position, value in enumerate(batch):
            yield from leaves(value, f"{path}[{position}]")
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in (field for field in dataclasses.fields(batch) if field.init):
            yield from leaves(getattr(batch, field.name), f"{path}.{field.name}")
    elif _is_numeric(batch):
        yield path, as_tensor(batch)
    else:
        yield path, batch


def is_per_row(leaf: Any, num_rows: int) -> bool:
    """Return whether a leaf holds one entry for each of ``num_rows`` samples."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return leaf.ndim > 0 and leaf.shape[0] == num_rows
    return isinstance(leaf, (list, tuple)) and len(leaf) == num_rows


def count_rows(batch: Batch) -> int:
    """Return the number of samples of a batch: the first dimension of its first tensor that has one.

    Args:
        batch: The batch.

    Returns:
        The number of rows.

    Raises:
        BatchError: It holds no such tensor.

    >>> count_rows({"x": torch.zeros(3, 2), "y": torch.zeros(3)})
    3
    """
    for _, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            return leaf.shape[0]
    raise BatchError(f"The batch of type {type(batch).__name__} holds no tensor, so its rows cannot be counted.")


def check_batch_size(batch: Batch, num_rows: int) -> None:
    """Check that every tensor of a batch has one entry a row, or is shared by all rows.

    Args:
        batch: The batch.
        num_rows: How many rows it was said to hold.

    Raises:
        BatchError: A tensor has another number of rows, or none has any.
    """
    found = False
    for path, leaf in leaves(batch):
        if not isinstance(leaf, (Tensor, list, tuple, np.ndarray, *_PLAIN)):
            raise BatchError(
                f"{path} is of type {type(leaf).__name__}, whose rows are not known. A batch is made of tensors, "
                f"arrays, single values and lists with one entry a row, in tuples, lists, dicts or dataclasses."
            )
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            continue
        if leaf.shape[0] == num_rows:
            found = True
        elif leaf.shape[0] != 1:
            raise BatchError(
                f"{path} has {leaf.shape[0]} rows (shape {tuple(leaf.shape)}), but {num_rows} were announced by inds "
                f"or num_samples. Every tensor of a batch needs one entry a row in its first dimension; pass the "
                f"indices of exactly the rows in the batch."
            )
    if not found:
        raise BatchError(
            f"The batch of type {type(batch).__name__} holds no tensor with {num_rows} rows, as inds or num_samples "
            f"announced. Pass tensors, or tuples, lists, dicts or dataclasses of tensors, with rows first."
        )


def select_rows(batch: Batch, rows: Tensor, num_rows: int) -> Batch:
    """Return the batch with only the given rows; shared leaves stay whole.

    Args:
        batch: A batch of ``num_rows`` samples.
        rows: Positions within the batch, int64.
        num_rows: The number of samples in the batch.
    """

    def pick(leaf: Any) -> Any:
        if not is_per_row(leaf, num_rows):
            return leaf
        if isinstance(leaf, Tensor):
            return leaf[rows.to(leaf.device)]
        if isinstance(leaf, np.ndarray):
            return leaf[rows.numpy()]
        return type(leaf)(leaf[row] for row in rows.tolist())

    return map_leaves(batch, pick)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on ``device``, usable by autograd also when made in inference mode."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        moved = leaf.detach().to(device, non_blocking=True)
        return moved.clone() if moved.is_inference() else moved

    return map_leaves(batch, move)
