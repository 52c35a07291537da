"""Batches as loaders yield them: tensors inside tuples, lists, mappings and dataclasses.

A leaf is *per sample* if its first dimension, or its length, is the batch size; tensors without dimensions or with a
first dimension of one are *shared* by all samples, and so are single values. Lists without tensors in them (names, ids,
records) are leaves. Anything else is refused, since it could be assigned to samples only by a guess.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from tracer.errors import BatchError
from tracer.types import Batch

_SINGLE_VALUES = (str, bytes, int, float, bool, complex, type(None))
_BY_INDEX = (
    "If the examples are no first dimension (graphs, lists of boxes, offsets), pass their indices as the data, "
    "(torch.arange(N),), and as the task a function that loads the examples batch[0] and returns their losses."
)


def tensor_from_numpy(array: np.ndarray) -> Tensor:
    """Return a numeric array as a tensor, which shares its memory if torch can."""
    native = array.astype(array.dtype.newbyteorder("="), copy=False)
    # torch refuses negative strides, and a tensor over read-only memory could be written to.
    must_copy = not native.flags.writeable or any(stride < 0 for stride in native.strides)
    return torch.from_numpy(native.copy() if must_copy else native)


def _is_numeric(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.dtype.kind in "biuf"


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor) or _is_numeric(value):
        return True
    items = value.values() if isinstance(value, Mapping) else value
    return isinstance(value, (Mapping, list, tuple)) and any(_holds_tensors(item) for item in items)


def _children(batch: Batch) -> tuple[dict[Any, Any], str] | None:
    """Return a container's values by key, and the format of a key in a path; None for a leaf."""
    if isinstance(batch, Mapping):
        return dict(batch.items()), "[{!r}]"
    if isinstance(batch, (list, tuple)) and _holds_tensors(batch):
        return dict(enumerate(batch)), "[{!r}]"
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.init}, ".{}"
    return None


def map_leaves(batch: Batch, function: Callable[[Any], Any]) -> Batch:
    """Return a new batch with ``function`` applied to each leaf, arrays as tensors; containers keep their type."""
    children = _children(batch)
    if children is None:
        return function(tensor_from_numpy(batch) if _is_numeric(batch) else batch)
    values = {key: map_leaves(value, function) for key, value in children[0].items()}
    if isinstance(batch, Mapping):
        return _rebuild_mapping(batch, values)
    if isinstance(batch, (list, tuple)):
        return type(batch)(*values.values()) if hasattr(batch, "_fields") else type(batch)(values.values())
    return dataclasses.replace(batch, **values)


def _rebuild_mapping(batch: Mapping, values: dict) -> Mapping:
    if type(batch) is dict or not isinstance(batch, MutableMapping):
        return values
    rebuilt = copy.copy(batch)  # keeps attributes, for example of transformers' BatchEncoding
    for key, value in values.items():
        rebuilt[key] = value
    return rebuilt


def leaves(batch: Batch, path: str = "batch") -> Iterator[tuple[str, Any]]:
    """Yield ``(path, leaf)`` for every leaf in the order of the containers, arrays as tensors.

    >>> [path for path, _ in leaves({"x": torch.zeros(2), "y": (torch.zeros(2), 1)})]
    ["batch['x']", "batch['y'][0]", "batch['y'][1]"]
    """
    children = _children(batch)
    if children is None:
        yield path, tensor_from_numpy(batch) if _is_numeric(batch) else batch
        return
    for key, value in children[0].items():
        yield from leaves(value, path + children[1].format(key))


def is_per_sample(leaf: Any, batch_size: int) -> bool:
    """Return whether a leaf has one entry for each sample."""
    if isinstance(leaf, (Tensor, np.ndarray)):
        return leaf.ndim > 0 and leaf.shape[0] == batch_size
    return isinstance(leaf, (list, tuple)) and len(leaf) == batch_size


def count_samples(batch: Batch) -> int:
    """Return the batch size: the first dimension of the first tensor that has one.

    Raises:
        BatchError: The batch has no such tensor.

    >>> count_samples({"x": torch.zeros(3, 2), "y": torch.zeros(3)})
    3
    """
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.ndim:
            check_dense(path, leaf)
            return leaf.shape[0]
    raise BatchError(
        f"The batch of type {type(batch).__name__} holds no tensor, so its examples cannot be counted; expected at "
        f"least one tensor with the batch dimension first. Pass a single example as a list of it. {_BY_INDEX}"
    )


def check_dense(path: str, leaf: Tensor) -> None:
    """Raise `BatchError` if a tensor is sparse or nested."""
    if leaf.is_nested or leaf.layout != torch.strided:
        kind = "nested" if leaf.is_nested else "sparse"
        raise BatchError(
            f"{path} is a {kind} tensor, whose examples cannot be told apart; expected dense tensors. Pass it padded "
            f"with a mask, or dense, and make it {kind} in the model or the task."
        )


def check_batch_size(batch: Batch, batch_size: int) -> None:
    """Raise `BatchError` unless each tensor has ``batch_size`` entries or is shared, and at least one has them."""
    found = False
    for path, leaf in leaves(batch):
        if not isinstance(leaf, (Tensor, list, tuple, np.ndarray, *_SINGLE_VALUES)):
            raise BatchError(
                f"{path} is of type {type(leaf).__name__}, which cannot be assigned to examples; expected tensors, "
                f"arrays, single values, or lists with one entry for each example, in tuples, lists, dicts or "
                f"dataclasses. {_BY_INDEX}"
            )
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            continue
        check_dense(path, leaf)
        if leaf.shape[0] == batch_size:
            found = True
        elif leaf.shape[0] != 1:
            raise BatchError(
                f"{path} has {leaf.shape[0]} entries (shape {tuple(leaf.shape)}); expected {batch_size}, one for each "
                f"example, as inds, num_samples or the first tensor say. {_BY_INDEX}"
            )
    if not found:
        raise BatchError(
            f"The batch of type {type(batch).__name__} holds no tensor with {batch_size} entries, the number of "
            f"examples by inds or num_samples; expected tensors with the batch dimension first, or tuples, lists, "
            f"dicts or dataclasses of them. {_BY_INDEX}"
        )


def select_samples(batch: Batch, positions: Int64[Tensor, " n"], batch_size: int) -> Batch:
    """Return the batch with only the samples at these positions; shared leaves stay whole."""

    def select(leaf: Any) -> Any:
        if not is_per_sample(leaf, batch_size):
            return leaf
        if isinstance(leaf, Tensor):
            return leaf[positions.to(leaf.device)]
        if isinstance(leaf, np.ndarray):
            return leaf[positions.numpy()]
        return type(leaf)(leaf[position] for position in positions.tolist())

    return map_leaves(batch, select)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its tensors on ``device``, detached."""

    def move(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        moved = leaf.detach().to(device, non_blocking=True)
        # autograd refuses tensors that were made in inference mode; their copies are plain tensors
        return moved.clone() if moved.is_inference() else moved

    return map_leaves(batch, move)
