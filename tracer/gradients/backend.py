"""Backends that run a model: whole in this process, or sharded among ranks by ``fully_shard``, behind the same calls.

The engine and the featurizer make every call for both kinds. For a whole model each call is the trivial case: no vote,
no waiting, nothing to gather.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tracer._core.sharding import fsdp_modules, is_sharded
from tracer.data.tasks import Task
from tracer.errors import GradientError
from tracer.gradients.fsdp import WORKING, FsdpBackend
from tracer.gradients.selfcheck import Arrivals, Reference, reference_pass
from tracer.types import Batch


class PlainBackend:
    """A model that is whole in this process; see `FsdpBackend` for the meaning of each call.

    Args:
        model: The model.
    """

    is_sharded = False
    stand_in: Any = None
    all_ended = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run the step."""
        yield

    def abandon(self, error: BaseException) -> None:
        """Do nothing: there is no other rank to tell."""

    @contextmanager
    def rank_zero_first(self, what: str = "", value: object = None) -> Iterator[bool]:
        """Yield True: this is the only rank."""
        yield True

    def any(self, flag: bool) -> bool:
        """Return the flag."""
        return flag

    def begin(self, state: int, row: Callable[[], Any]) -> bool:
        """Return whether there is a batch to compute."""
        return state == WORKING

    def remember(self, row: Callable[[], Any]) -> None:
        """Do nothing: no round is run without work."""

    def written(self) -> None:
        """Do nothing: there is no other rank to wait for."""

    def joined(self) -> None:
        """Do nothing: there is no other rank to wait for."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the model."""
        yield

    def reference(
        self,
        task: Task,
        batch: Batch,
        weights: Tensor,
        shapes: Mapping[str, Sequence[int]],
        precision: torch.dtype | None,
        against: Mapping[str, Tensor],
        keep: Collection[str] = (),
    ) -> Reference:
        """Return what autograd's gradients of the weighted sum of outputs are; see `reference_pass`."""
        found = Arrivals(against, keep)
        return reference_pass(self.model, task, batch, weights, list(shapes), found, precision)

    def refuse_fallback(self, reasons: Mapping[str, str]) -> None:
        """Allow the fallback for parameters without a layer rule."""


Backend = PlainBackend | FsdpBackend
"""How a model runs."""


def find_backend(model: nn.Module, device: torch.device) -> Backend:
    """Return the backend of a model; for a sharded one, all ranks must call this.

    Raises:
        GradientError: If the model is sharded in an unsupported way, or over another kind of device.

    >>> find_backend(nn.Linear(2, 2), torch.device("cpu")).is_sharded
    False
    """
    if fsdp_modules(model):
        backend = FsdpBackend(model)
        if backend.device_type != device.type:
            raise GradientError(
                f"expected device={backend.device_type!r}, over which the model is sharded, got "
                f"device={str(device)!r}; leave device out."
            )
        return backend
    spread = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
    if spread:
        raise GradientError(
            f"Parameters {', '.join(spread[:4])} are DTensors, but not by fully_shard (tensor parallelism?): layers "
            f"then compute with parts of activations. Pass the plain model, or one that fully_shard wrapped."
        )
    return PlainBackend(model)
