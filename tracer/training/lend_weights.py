"""Lend a checkpoint's values to the user's model, and restore the model afterwards, whatever happens in between."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracer._core.sharding import is_sharded, own_part, part_of, reshard
from tracer._core.text import listing
from tracer.errors import CheckpointError
from tracer.training.fit_state import fit_state

logger = logging.getLogger("tracer")


class LoadedWeights:
    """A checkpoint's values for one model, copied once to the device of use.

    Args:
        model: The model they are for; it is not changed.
        state: From `read_checkpoint` or `fit_state`; it is fitted and copied.
        device: The device of the copies; None: each on the device of the model's own. Of a sharded parameter, only this
            rank's part is copied, to the device of its own part.
        scales: Factors for the entries of parameters' gradients, ``[*shape]`` each, or None.

    Attributes:
        parameters: Names to values, each tied parameter once; this rank's parts of sharded ones.
        buffers: Names to values of the persistent buffers.
        device: The device passed.
        scales: The factors on the parameters' devices, float64 for float64 parameters and else float32.

    Raises:
        CheckpointError: If the state does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        device: torch.device | str | None = None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        fitted = fit_state(model, state)
        left_out = [repr(name) for name, _ in model.named_parameters() if name not in fitted]
        if left_out:
            raise CheckpointError(
                f"model.state_dict() leaves out parameters, which no checkpoint can set: {listing(left_out)}"
            )
        self.device = None if device is None else torch.device(device)

        def copied(name: str, value: Tensor) -> Tensor:
            if is_sharded(value):
                return part_of(fitted[name], value).to(own_part(value).device, copy=True)
            return fitted[name].to(self.device or value.device, copy=True)

        def copies(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
            return {name: copied(name, value) for name, value in named if name in fitted}

        reshard(model)
        self.parameters = copies(model.named_parameters())
        self.buffers = copies(model.named_buffers())
        self.scales: dict[str, Tensor] | None = None
        if scales is not None:
            likes = {name: self.parameters[name] for name in scales}
            self.scales = {
                name: scale.to(likes[name].device, torch.promote_types(likes[name].dtype, torch.float32))
                for name, scale in scales.items()
            }


@contextlib.contextmanager
def weights_in(model: nn.Module, loaded: LoadedWeights) -> Iterator[nn.Module]:
    """Lend a checkpoint's values to a model within a ``with`` block.

    Inside, the data of each parameter and buffer is the checkpoint's, and gradients are None. Buffers that checkpoints
    leave out have the model's values on the device of ``loaded``. Afterwards the modules hold the same parameter and
    buffer objects as before, with the same memory, values and gradients, even if a forward replaced, added or removed
    some. In-place changes of buffers inside are discarded, since buffers are copied at each entry. Parameters are not
    copied: an in-place change inside persists in ``loaded``, and a warning names it. Tensors that are plain attributes
    of modules are not touched.

    Args:
        model: The model that ``loaded`` was made for.
        loaded: The values.

    Yields:
        The model.

    Raises:
        CheckpointError: If the model has other parameters than ``loaded``.
    """
    # FSDP keeps its own references to the memory of each part, so parts of a sharded model are overwritten in place and
    # written back, not replaced.
    divided = reshard(model)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    if parameters.keys() != loaded.parameters.keys() or not loaded.buffers.keys() <= buffers.keys():
        raise CheckpointError("the weights were loaded for another model: make LoadedWeights with this one")
    spread = {name for name, value in parameters.items() if divided and is_sharded(value)}
    shards = [(own_part(parameters[name]), loaded.parameters[name]) for name in parameters if name in spread]
    own_values = [part.clone() for part, _ in shards]
    swapped: list[tuple[Tensor, Tensor]] = [
        (parameters[name], value) for name, value in loaded.parameters.items() if name not in spread
    ]
    for name, buffer in buffers.items():
        value = loaded.buffers[name] if name in loaded.buffers else buffer.detach()
        swapped.append((buffer, value.to(loaded.device or buffer.device, copy=True)))
    before = [(tensor, tensor.data) for tensor, _ in swapped]
    grads = [(tensor, tensor.grad) for tensor in (*parameters.values(), *buffers.values()) if tensor.is_leaf]
    registered = [
        (module, dict(module._parameters), dict(module._buffers), set(module._non_persistent_buffers_set))
        for module in model.modules()
    ]
    versions: dict[str, int] = {}
    failed = True
    try:
        for tensor, _ in grads:
            tensor.grad = None
        for tensor, value in swapped:
            tensor.data = value
        for part, value in shards:
            part.copy_(value)
        versions.update((name, parameter._version) for name, parameter in parameters.items())
        yield model
        failed = False
    finally:
        changed = [name for name, version in versions.items() if parameters[name]._version != version]
        try:
            reshard(model, failed)
        finally:
            for module, own_parameters, own_buffers, non_persistent in registered:
                _put_back(module._parameters, own_parameters)
                _put_back(module._buffers, own_buffers)
                module._non_persistent_buffers_set = non_persistent
            for tensor, data in before:
                tensor.data = data
            for (part, _), own in zip(shards, own_values, strict=True):
                part.copy_(own)
            for tensor, grad in grads:
                tensor.grad = grad
        if changed:
            logger.warning("parameters were changed in place while a checkpoint was in use: %s", listing(changed))


def _put_back(registry: dict[str, Any], held: dict[str, Any]) -> None:
    registry.clear()
    registry.update(held)
