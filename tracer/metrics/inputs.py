"""Arguments of metrics as checked numpy arrays. Messages name shapes by letters, for example ``[N, M]``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tracer.errors import InputError, InputTypeError

Array = npt.ArrayLike | Tensor
"""Anything that a metric accepts as an array."""


def as_array(name: str, value: Array, shape: str) -> np.ndarray:
    """Return a numpy array with as many dimensions as ``shape`` has letters; bfloat16 becomes float32."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = value.float() if value.dtype == torch.bfloat16 else value  # numpy has no such dtype
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"{name} must be an array {shape}; numpy says of it: {error}") from error
    if array.ndim != shape.count(",") + 1 or array.size == 0:
        raise InputError(f"{name} must be {shape} and not empty, got shape {list(array.shape)}.")
    return array


def numbers(name: str, value: Array, shape: str) -> np.ndarray:
    """Return an array of finite booleans, integers or floats, in its own dtype, or raise naming the first bad value."""
    array = as_array(name, value, shape)
    if array.dtype.kind not in "biuf":
        raise InputTypeError(f"{name} {shape} must hold real numbers, got dtype {array.dtype}.")
    bad = ~np.isfinite(array)
    if bad.any():
        count = int(bad.sum())
        raise InputError(
            f"{name} {shape} has {count} NaN or infinite value{'s'[: count != 1]} of {array.size}, the first at "
            f"{_first(bad)}. Leave its row or target out, or compute it again."
        )
    return array


def flags(name: str, value: Array, shape: str) -> np.ndarray:
    """Return booleans from booleans or from numbers that are all 0 or 1."""
    array = as_array(name, value, shape)
    if array.dtype == np.bool_:
        return array
    if array.dtype.kind not in "iuf":
        raise InputTypeError(f"{name} {shape} must be True/False or 0/1, got dtype {array.dtype}.")
    bad = (array != 0) & (array != 1)
    if bad.any():
        raise InputError(f"{name} {shape} must be True/False or 0/1, got {array[bad][0]} at {_first(bad)}.")
    return array.astype(np.bool_)


def checked_indices(name: str, value: Array, shape: str, num_rows: int) -> np.ndarray:
    """Return int64 indices of training examples, all from 0 to ``num_rows - 1``."""
    array = as_array(name, value, shape)
    if array.dtype.kind not in "iu":
        raise InputTypeError(f"{name} {shape} must hold row indices, integers, got dtype {array.dtype}.")
    bad = (array < 0) | (array >= num_rows)
    if bad.any():
        raise InputError(
            f"{name} {shape} must be row indices from 0 to {num_rows - 1}, got {array[bad][0]} at {_first(bad)}."
        )
    return array.astype(np.int64)


def proponent_indices(name: str, value: Array, num_rows: int) -> np.ndarray:
    """Return ``[M, k]``, int64: training examples of each target, none twice, as in ``top(...).indices``."""
    array = checked_indices(name, value, "[M, k]", num_rows)
    ordered = np.sort(array, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if twice.any():
        raise InputError(f"{name} [M, k] must name each row once for a target; target {int(twice.argmax())} does not.")
    return array


def same_size(first: str, first_size: int, second: str, second_size: int, letter: str) -> None:
    """Raise InputError if two arguments differ in the size of the axis ``letter``; names include shapes."""
    if first_size != second_size:
        raise InputError(f"{first} and {second} must agree in {letter}, got {first_size} and {second_size}.")


def _first(bad: np.ndarray) -> list[int]:
    """Return the index of the first True."""
    return [int(i) for i in np.unravel_index(int(bad.argmax()), bad.shape)]
