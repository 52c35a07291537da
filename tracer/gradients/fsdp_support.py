"""Checks of a model that `fully_shard` divided, and the private parts of torch that they need."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed, nn

from tracer._core.sharding import fsdp_state, is_sharded
from tracer.errors import GradientError


def initialize(module: Any) -> None:
    """Run FSDP's lazy initialization now, while the user's requires_grad flags are in force."""
    state = fsdp_state(module)
    if state._is_root is False:
        raise GradientError(
            "The model is a part of a larger one to which fully_shard was applied; pass the whole model, and choose "
            "with params=."
        )
    state._lazy_init()


def check_policy(module: Any) -> None:
    """Raise `GradientError` if the sharding of a module is not supported."""
    if not hasattr(module, "reset_iter_state") or not hasattr(fsdp_state(module), "_fsdp_param_groups"):
        raise GradientError(
            f"The model is sharded by fully_shard, and torch {torch.__version__} lacks FSDPModule.reset_iter_state, "
            f"by which a model recovers from an error; use torch 2.13 or newer, or pass the plain model."
        )
    policy = fsdp_state(module)._mp_policy
    lowered = [dtype for dtype in (policy.param_dtype, policy.output_dtype) if dtype is not None]
    dtypes = {parameter.dtype for parameter in module.parameters()}
    if any(dtype not in dtypes for dtype in lowered):
        names = ", ".join(str(dtype) for dtype in lowered)
        raise GradientError(
            f"fully_shard was given a MixedPrecisionPolicy that casts to {names}: the store would not know of it. Wrap "
            f"the model without it, and pass autocast='bfloat16' or 'float16' to the Tracer."
        )


def one_mesh(model: nn.Module) -> tuple[Any, int]:
    """Return the mesh over which all parameters are sharded and its axis; raise `GradientError` unless there is one."""
    found: dict[tuple, tuple[Any, int]] = {}
    sharded: Mapping[str, Any] = {name: value for name, value in model.named_parameters() if is_sharded(value)}
    for name, value in sharded.items():
        *others, last = value.placements
        if type(last).__name__ != "Shard" or any(not one.is_replicate() for one in others) or len(others) > 1:
            raise GradientError(
                f"Parameter {name!r} has the placements {value.placements}; expected those of fully_shard alone: "
                f"(Shard,), or (Replicate, Shard). Tensor parallelism and replicate() are not supported."
            )
        if value.device.type == "meta":
            raise GradientError(
                f"Parameter {name!r} has no memory yet (it is on the meta device); call model.to_empty(device=...) "
                f"before making the Tracer: the values come from checkpoints."
            )
        axis = len(others)
        members = tuple(distributed.get_process_group_ranks(value.device_mesh.get_group(axis)))
        found[members] = value.device_mesh, axis
    if len(found) != 1:
        raise GradientError(
            f"The parameters are sharded over {len(found)} sets of ranks; expected one for the whole model."
        )
    return next(iter(found.values()))
