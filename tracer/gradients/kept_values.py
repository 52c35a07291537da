"""Where modules keep tensors that no state dict has: in attributes and buffers, and in what these hold."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tracer._core.packed import plain_parts
from tracer._core.sharding import is_sharded

# Captured attention replaces ``forward`` while a batch is computed.
TORCHS_OWN = nn.Module().__dict__.keys() | {"forward"}
"""Attributes of a module that are torch's."""

# Their objects lead far away, to data, threads and files, and keep nothing that is derived from weights.
_PACKAGES = {"torch", "lightning", "pytorch_lightning", "accelerate", *sys.stdlib_module_names}


@dataclass(frozen=True)
class Place:
    """An attribute or buffer with tensors, or a place within one.

    Attributes:
        module: The module.
        path: Names of attributes, keys of dicts and numbers in lists, from ``module.__dict__`` on.
    """

    module: nn.Module
    path: tuple[Any, ...]

    def __str__(self) -> str:
        return ".".join(map(str, self.path)).removeprefix("_buffers.")

    def empty(self) -> None:
        """Empty the dict or list, or put None in the tensor's place."""
        try:
            holder, value = self._find()
        except LookupError:
            return  # it was in something that is empty now
        if isinstance(value, (dict, list)):
            value.clear()
        else:
            holder[self.path[-1]] = None

    def is_filled(self) -> bool:
        """Return whether there are tensors."""
        return bool(self.tensors())

    def tensors(self) -> list[Tensor]:
        """Return the tensors."""
        try:
            return [item for item in _items(self._find()[1]) if type(item) is Tensor]
        except LookupError:
            return []

    def _find(self) -> tuple[Any, Any]:
        holder: Any = self.module.__dict__
        for key in self.path[:-1]:
            inner = holder[key]
            holder = vars(inner) if is_object(inner) else inner
            if not isinstance(holder, (dict, list)):
                raise LookupError(key)
        return holder, holder[self.path[-1]]


@dataclass(frozen=True)
class Flag:
    """An attribute that is True once a module has kept something.

    Attributes:
        module: The module.
        name: The attribute.
    """

    module: nn.Module
    name: str

    def empty(self) -> None:
        """Say that nothing is kept."""
        self.module.__dict__[self.name] = False

    def is_set(self) -> bool:
        """Return whether it is True."""
        return self.module.__dict__.get(self.name) is True


def flags(module: nn.Module) -> list[Flag]:
    """Return the attributes of a module that are True."""
    return [Flag(module, name) for name, value in module.__dict__.items() if value is True and name not in TORCHS_OWN]


def places(module: nn.Module, buffers: bool = False) -> list[Place]:
    """Return where a module, without its submodules, keeps tensors.

    Args:
        module: The module.
        buffers: Also buffers that are in state dicts.
    """
    own = {name: value for name, value in module.__dict__.items() if name not in TORCHS_OWN}
    found = [Place(module, path) for path in _paths(own, set(), attributes=True)]
    for name, value in module._buffers.items():
        if value is not None and value.is_floating_point() and (buffers or name in module._non_persistent_buffers_set):
            found.append(Place(module, ("_buffers", name)))
    return found


def not_stored(found: Iterable[Place], model: nn.Module) -> list[Place]:
    """Return the places without those that share memory with parameters or values in the state dict.

    An object that holds such values, as the scales of packed weights, is left out whole: nothing computes it again, and
    without it a kernel may read beyond the end of other memory.
    """
    values = [*model.parameters(), *model.state_dict(keep_vars=True).values()]
    stored = [part for value in values if isinstance(value, Tensor) for _, part in plain_parts("", value)]
    memories = {address for value in stored for address in _address(value)}

    def whole(place: Place) -> tuple[Any, ...]:
        return id(place.module), *(place.path if len(place.path) == 1 else place.path[:-1])

    found = list(found)
    left_out = {
        whole(place) for place in found if any(address in memories for t in place.tensors() for address in _address(t))
    }
    return [
        place
        for place in found
        if left_out.isdisjoint((id(place.module), *place.path[:end]) for end in range(1, len(place.path) + 1))
    ]


def _address(value: Tensor) -> list[int]:
    """Return the address of a tensor's memory, or an empty list if it has none."""
    if value.layout != torch.strided or value.is_meta or not value.numel() or is_sharded(value):
        return []
    return [value.untyped_storage().data_ptr()]


def _paths(container: Any, seen: set[int], attributes: bool) -> Iterator[tuple[Any, ...]]:
    """Yield the paths to tensors that are attributes, and to dicts, lists and tuples that hold tensors."""
    seen.add(id(container))
    for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
        if type(value) is Tensor:
            if attributes:
                yield (key,)
        elif _has_tensors(value):
            yield (key,)
        inner = vars(value) if is_object(value) else value
        if isinstance(inner, (dict, list)) and id(inner) not in seen:
            yield from ((key, *rest) for rest in _paths(inner, seen, attributes=inner is not value))


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,)


def _has_tensors(value: Any) -> bool:
    return any(type(item) is Tensor for item in _items(value))


def is_object(value: Any) -> bool:
    """Return whether attributes of a value are a model's own, such as those of a workspace."""
    if isinstance(value, (nn.Module, type, Tensor)) or not hasattr(value, "__dict__"):
        return False
    return type(value) is SimpleNamespace or type(value).__module__.partition(".")[0] not in _PACKAGES
