"""The division of a model or a tensor among ranks, read from it without communication.

Nothing here imports ``torch.distributed``: if it was not imported, there can be no sharded model.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def _loaded(module: str, name: str) -> Any:
    """Return a name of a module that is imported already, or None: without the import there can be no instance."""
    return getattr(sys.modules.get(module), name, None)


def fsdp_modules(model: nn.Module) -> list[Any]:
    """Return the modules of a model to which ``fully_shard`` was applied, outer ones first.

    >>> fsdp_modules(nn.Linear(2, 2))
    []
    """
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def layer_type(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before ``fully_shard`` gave it one of its own.

    >>> layer_type(nn.Linear(2, 2))
    <class 'torch.nn.modules.linear.Linear'>
    """
    kind = _loaded("torch.distributed.fsdp", "FSDPModule")
    if kind is None or not isinstance(module, kind):
        return type(module)
    return next(base for base in type(module).__bases__ if base is not kind)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is spread over ranks."""
    kind = _loaded("torch.distributed.tensor", "DTensor")
    return kind is not None and isinstance(tensor, kind)


def own_part(tensor: Any) -> Tensor:
    """Return this rank's part of a sharded tensor: the same memory, not a copy."""
    return tensor.detach().to_local()


def part_of(whole: Tensor, sharded: Any) -> Tensor:
    """Return this rank's part of a whole tensor that is divided like a sharded one, as a view; nothing is sent."""
    mesh = sharded.device_mesh
    part = whole
    for axis, (placement, position) in enumerate(zip(sharded.placements, mesh.get_coordinate(), strict=True)):
        if placement.is_shard():
            chunks = part.chunk(mesh.size(axis), placement.dim)
            empty = part.narrow(placement.dim, 0, 0)
            part = chunks[position] if position < len(chunks) else empty
    return part


def reshard(model: nn.Module, failed: bool = False) -> bool:
    """Reshard a model after a forward or backward, maybe a ``failed`` one; return whether the model is sharded."""
    modules = fsdp_modules(model)
    if failed:
        for module in outermost(modules):
            if fsdp_state(module)._is_root:  # it ran once; before, there is nothing to reset
                module.reset_iter_state()
    for module in modules:
        module.reshard()
    return bool(modules)


def outermost(modules: Sequence[Any]) -> list[Any]:
    """Return those modules that are inside none of the rest."""
    below = {id(inner) for outer in modules for inner in outer.modules() if inner is not outer}
    return [module for module in modules if id(module) not in below]


def fsdp_state(module: Any) -> Any:
    return module._get_fsdp_state()
