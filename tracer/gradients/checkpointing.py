"""Gradient checkpointing of transformers' layers, which they leave out in eval mode.

Each such layer runs as a region: activations inside are computed again in the backward. Hooks of captured layers take
their inputs from there (`SavedInputs`), so that they hold no activation that the region would have freed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tracer._core.sharding import layer_type

_WITHOUT_CACHE = {"use_cache": False, "past_key_values": None, "layer_past": None}


class CheckpointFailed(Exception):
    """Regions that captured layers cannot be part of; never reaches a user."""


class CheckpointedForward:
    """The forward of a layer as a region whose activations are computed again in the backward.

    Args:
        module: The layer.

    Attributes:
        used: Whether the layer runs as a region.
    """

    running = 0
    """The number of regions that are being run or run again."""

    def __init__(self, module: nn.Module) -> None:
        self.used, self._forward = True, module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the layer."""
        if not self.used or not torch.is_grad_enabled() or any(map(_is_transformed, (*args, *kwargs.values()))):
            return self._forward(*args, **kwargs)
        # The backward would write to a cache a second time; transformers leaves it out too.
        kwargs |= {key: value for key, value in _WITHOUT_CACHE.items() if kwargs.get(key) is not None}
        args = tuple(None if _is_cache(value) else value for value in args)
        return checkpoint(partial(self._run, **kwargs), *args, use_reentrant=False)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        CheckpointedForward.running += 1
        try:
            return self._forward(*args, **kwargs)
        finally:
            CheckpointedForward.running -= 1


class SavedInputs(torch.autograd.Function):
    """Passes an output on and saves a layer's inputs for the backward, as the operations of a region do."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *inputs: Tensor) -> Tensor:
        """Return the output."""
        ctx.save_for_backward(*inputs)
        ctx.count = len(inputs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the gradient on."""
        return grad, *(None,) * ctx.count


@contextmanager
def checkpointed_layers(model: nn.Module) -> Iterator[None]:
    """Run layers of transformers whose ``gradient_checkpointing`` is on as regions within a ``with`` block."""
    layers = [
        module
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False)
        and any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)
        and layer_type(module) is type(module)
        and "forward" not in module.__dict__
    ]
    try:
        for module in layers:
            module.__dict__["forward"] = CheckpointedForward(module)
        yield
    finally:
        for module in layers:
            module.__dict__.pop("forward", None)


def leave_out(model: nn.Module, parameters: Collection[Tensor], all_layers: bool = False) -> None:
    """Run layers plainly that hold some of these parameters, or all layers."""
    wanted = {id(parameter) for parameter in parameters}
    for module in model.modules():
        if isinstance(forward := module.__dict__.get("forward"), CheckpointedForward):
            held = any(id(parameter) in wanted for parameter in module.parameters())
            forward.used = not (held or all_layers)


def _is_cache(value: object) -> bool:
    return any(kind.__name__ == "Cache" for kind in type(value).__mro__)


def _is_transformed(value: object) -> bool:
    """Return whether a value is a tensor within ``torch.func``, which knows no regions."""
    return isinstance(value, Tensor) and torch.func.debug_unwrap(value, recurse=False) is not value
