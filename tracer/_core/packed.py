"""Packed weights: parameters whose meaning is in what their layers, or tensors inside of them, keep beside integers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tracer._core.sharding import is_sharded


def is_packed(parameter: Tensor) -> bool:
    """Return whether a parameter is of integers, as quantized weights are, or made of other tensors.

    >>> import torch
    >>> is_packed(torch.zeros(2, dtype=torch.uint8)), is_packed(torch.zeros(2))
    (True, False)
    """
    return is_composed(parameter) or not (parameter.is_floating_point() or parameter.is_complex())


def is_composed(value: Any) -> bool:
    """Return whether a tensor is made of others, for example of integers and scales (torchao, optimum-quanto)."""
    return not is_sharded(value) and is_traceable_wrapper_subclass(value)


def plain_parts(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the plain tensors that a tensor is made of with their names, or itself.

    >>> import torch
    >>> [name for name, _ in plain_parts("weight", torch.zeros(2))]
    ['weight']
    """
    if not is_composed(value):
        yield name, value
        return
    for part in value.__tensor_flatten__()[0]:
        yield from plain_parts(f"{name}.{part}", getattr(value, part))
