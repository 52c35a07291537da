"""Examples as people see them: images, numbers and texts out of batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from tracer.data.batches import tensor_from_numpy
from tracer.data.datasets import DataSource, exact_batches
from tracer.data.model_inputs import label_key


def displayable(source: DataSource, indices: Int64[np.ndarray, " n"] | None = None) -> tuple[Any, Any]:
    """Return inputs and labels of examples, ascending, as arrays or texts; None for tokens and other kinds."""
    chosen = np.arange(len(source)) if indices is None else indices
    if (texts := source.texts(chosen)) is not None:
        return texts, None
    pairs = [_split(batch) for batch, _ in exact_batches(source, chosen)]
    inputs, labels = ([pair[side] for pair in pairs] for side in (0, 1))
    # a matrix of integers holds tokens
    shown = _concatenate(inputs, lambda values: values.ndim > 2 or (values.ndim == 2 and values.dtype.kind == "f"))
    return shown, _concatenate(labels, lambda values: values.ndim == 1)


def _split(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        key = label_key(batch)
        first = next((value for name, value in batch.items() if name != key), None)
        return first, batch.get(key)
    if isinstance(batch, (list, tuple)) and len(batch) > 1:
        return batch[0], batch[-1]
    return batch, None


def _concatenate(parts: list[Any], is_usable: Callable[[np.ndarray], bool]) -> Any:
    if all(isinstance(part, (list, tuple)) and all(isinstance(text, str) for text in part) for part in parts):
        return [text for part in parts for text in part]
    tensors = [tensor_from_numpy(part) if isinstance(part, np.ndarray) else part for part in parts]
    if not all(isinstance(part, torch.Tensor) for part in tensors):
        return None
    # numpy has no bfloat16
    values = [part.detach().float().numpy() if part.is_floating_point() else part.numpy() for part in tensors]
    if len({value.shape[1:] for value in values}) != 1 or not is_usable(values[0]):
        return None
    return np.concatenate(values)
