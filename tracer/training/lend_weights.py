"""Lend a checkpoint's values to the user's model, and restore the model afterwards, whatever happens in between."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracer._core.packed import is_packed
from tracer._core.sharding import is_sharded, own_part, part_of, reshard
from tracer._core.text import listing
from tracer.errors import CheckpointError

logger = logging.getLogger("tracer")


class LoadedWeights:
    """A checkpoint's values, fitted to one model, copied once to ``device``, or to the devices of the model's own.

    Of sharded parameters, only this rank's parts are copied, to their devices. Packed weights, which are the model's
    own, are not copied. ``scales`` are factors of gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        fitted: Mapping[str, Tensor],
        device: torch.device | str | None = None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        own = [(name, value) for name, value in model.named_parameters() if not is_packed(value)]  # each tied one once
        left_out = [repr(name) for name, _ in own if name not in fitted]
        if left_out:
            raise CheckpointError(
                f"model.state_dict() leaves out parameters, which no checkpoint can set: {listing(left_out)}"
            )
        self.device = None if device is None else torch.device(device)

        def copies(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
            found = {}
            for name, value in named:
                if is_sharded(value):
                    found[name] = part_of(fitted[name], value).to(own_part(value).device, copy=True)
                elif name in fitted:  # not a buffer that checkpoints leave out
                    found[name] = fitted[name].to(self.device or value.device, copy=True)
            return found

        reshard(model)
        self.parameters = copies(own)
        self.buffers = copies(model.named_buffers())
        self.scales = None
        if scales is not None:
            self.scales = {name: scale.to(self.parameters[name].device) for name, scale in scales.items()}


@contextlib.contextmanager
def weights_in(model: nn.Module, loaded: LoadedWeights) -> Iterator[nn.Module]:
    """Lend a checkpoint's values to a model within a ``with`` block, in which gradients are None."""
    divided = reshard(model)
    modules = [one for one in model.modules() if not isinstance(one, torch.jit.ScriptModule)]  # whose parts are fixed
    buffers = dict(model.named_buffers())
    packed = [value for value in model.parameters() if is_packed(value)]
    parameters = {name: value for name, value in model.named_parameters() if not is_packed(value)}
    if parameters.keys() != loaded.parameters.keys() or not loaded.buffers.keys() <= buffers.keys():
        raise CheckpointError("the weights were loaded for another model: make LoadedWeights with this one")
    # Afterwards the modules hold the same objects as before, with the same memory, values and gradients, even if a
    # forward replaced, added or removed some. Tensors that are plain attributes of modules are not touched.
    with contextlib.ExitStack() as restore:
        for tensor in (*parameters.values(), *buffers.values()):
            if tensor.is_leaf:
                restore.callback(setattr, tensor, "grad", tensor.grad)
                tensor.grad = None
        lent: list[tuple[Tensor, Tensor]] = []
        for name, buffer in buffers.items():  # copied, so in-place changes inside are discarded
            value = loaded.buffers.get(name, buffer.detach())
            lent.append((buffer, value.to(loaded.device or buffer.device, copy=True)))
        lent += [(value, value.detach().to(loaded.device)) for value in packed if loaded.device is not None]
        for name, value in loaded.parameters.items():
            if divided and is_sharded(parameters[name]):
                # FSDP has references of its own to the memory of each part, so that is overwritten, not replaced.
                part = own_part(parameters[name])
                restore.callback(part.copy_, part.clone())
                part.copy_(value)
            else:  # not copied: in-place changes inside persist in ``loaded``, and a warning names them
                lent.append((parameters[name], value))
        for tensor, value in lent:  # each restored by itself, whatever fails
            restore.callback(setattr, tensor, "data", tensor.data)
            tensor.data = value
        for one in modules:
            own = dict(one._parameters), dict(one._buffers), set(one._non_persistent_buffers_set)
            restore.callback(_put_back, one, *own)

        versions = {name: value._version for name, value in parameters.items()}

        def finish(kind: type[BaseException] | None, *_: object) -> None:
            changed = [name for name, version in versions.items() if parameters[name]._version != version]
            if changed:
                logger.warning("parameters were changed in place while a checkpoint was in use: %s", listing(changed))
            reshard(model, failed=kind is not None)

        restore.push(finish)
        yield model


def _put_back(module: nn.Module, parameters: dict[str, Any], buffers: dict[str, Any], non_persistent: set[str]) -> None:
    for registry, held in ((module._parameters, parameters), (module._buffers, buffers)):
        registry.clear()
        registry.update(held)
    module._non_persistent_buffers_set = non_persistent
