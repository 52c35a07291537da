"""Checkpoints: read them safely, fit them to a model, tell them apart, and lend them to a model for a while.

A *state* is a dict of names to tensors as ``model.state_dict()`` gives it. Files are never trusted: nothing in them is
executed. The user's model is never changed for good: inside `weights_in` its parameters and buffers show the
checkpoint's values, behind it they are what they were, the same objects at the same addresses.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tracer._core.sharding import is_sharded, own_part, part_of, settle
from tracer._core.text import listing
from tracer.errors import CheckpointError, InputTypeError
from tracer.types import Checkpoint

_MAX_NAMED = 6

logger = logging.getLogger("tracer")


def read_checkpoint(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the state that a checkpoint holds, without executing anything that a file may contain.

    Args:
        checkpoint: A state dict; or the path of a ``.safetensors`` file, or of one that `torch.save` wrote.

    Returns:
        Names to tensors, as they are in the checkpoint: not copied where a state dict came, on the CPU where a path
        came. ``_extra_state`` entries are left out.

    Raises:
        InputTypeError: It is neither a mapping nor a path.
        CheckpointError: The file is missing, damaged or holds code, or what it holds is no state dict.

    >>> sorted(read_checkpoint(nn.Linear(2, 3).state_dict()))
    ['bias', 'weight']
    """
    return as_state(*checkpoint_value(checkpoint))


def checkpoint_value(checkpoint: Checkpoint) -> tuple[Any, str, str]:
    """Return what a checkpoint holds, whatever it is, without executing anything that a file may contain.

    Args:
        checkpoint: A mapping or a path.

    Returns:
        The value, what to call it in errors, and the expression that gives it.

    Raises:
        InputTypeError: It is neither a mapping nor a path.
        CheckpointError: The file is missing, damaged or holds code.
    """
    if isinstance(checkpoint, Mapping):
        return checkpoint, "the checkpoint", "checkpoint"
    if isinstance(checkpoint, nn.Module):
        raise InputTypeError("the checkpoint is a module: expected its state dict; pass `model.state_dict()`")
    if not isinstance(checkpoint, (str, os.PathLike)):
        raise InputTypeError(
            f"the checkpoint is of type {type(checkpoint).__name__}: expected a state dict or a path; pass "
            "`model.state_dict()` or the path of a .pt, .pth or .safetensors file"
        )
    path = Path(checkpoint)
    if not path.exists():
        raise CheckpointError(f"the checkpoint {path} does not exist: check the path (now in {Path.cwd()})")
    if path.is_dir():
        raise CheckpointError(f"the checkpoint {path} is a directory: pass the path of the file in it")
    if path.suffix == ".safetensors":
        return _read_safetensors(path), str(path), "checkpoint"
    return _read_torch(path), str(path), f'torch.load("{path}", map_location="cpu", weights_only=True)'


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # the library raises its own class, OSError and more
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}): it is damaged or of another format; write it again"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything out of the unpickler
        reason = type(error).__name__
        if not isinstance(error, pickle.UnpicklingError):  # torch's text on those proposes to execute the file
            reason += f": {str(error).strip().partition(chr(10))[0]}"
        raise CheckpointError(
            f"{path} cannot be read as tensors only ({reason}): it is damaged, of another "
            "format, or holds Python objects, which are never executed here. Save `model.state_dict()` alone, or, if "
            "you trust the file, load it yourself and pass the state dict instead of the path"
        ) from error


def as_state(value: Any, where: str, call: str) -> dict[str, Tensor]:
    """Return a mapping as a state, or say what it is instead.

    Args:
        value: What a checkpoint holds.
        where: What to call it in errors.
        call: The expression that gives it, for the call that errors suggest.

    Returns:
        Names to tensors.

    Raises:
        CheckpointError: It is no state dict.
    """
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{where} holds a value of type {type(value).__name__}: expected a state dict; save `model.state_dict()`"
        )
    state = {key: item for key, item in value.items() if not str(key).endswith("_extra_state")}
    wrong = [key for key, item in state.items() if not (isinstance(key, str) and isinstance(item, Tensor))]
    if wrong or not state:
        keys = listing([repr(key) for key in value])
        nested = [key for key in wrong if is_state(value[key])]
        nested.sort(key=lambda key: -len(value[key]))
        if nested:
            raise CheckpointError(
                f"{where} is a training checkpoint with the keys {keys}: expected the state dict of the model alone; "
                f"pass `{call}[{nested[0]!r}]`"
            )
        what = ", ".join(f"{key!r} ({type(value[key]).__name__})" for key in wrong[:_MAX_NAMED]) or "nothing"
        raise CheckpointError(
            f"{where} is no state dict: expected names to tensors, found {what} among the keys {keys or 'none'}; "
            "pass `model.state_dict()`"
        )
    parts = [repr(key) for key, item in state.items() if is_sharded(item)]
    if parts:
        raise CheckpointError(
            f"{where} has sharded tensors, of which each process holds a part: {listing(parts)}; expected a full state "
            f"dict; gather it on all ranks: {{key: value.full_tensor() if isinstance(value, DTensor) else value "
            f"for key, value in state.items()}}, or pass the path of one that was saved"
        )
    meta = [repr(key) for key, item in state.items() if item.is_meta]
    if meta:
        raise CheckpointError(f"{where} has tensors without values, on the meta device: {listing(meta)}; load it fully")
    return state


def is_state(value: Any) -> bool:
    """Say whether a value is a mapping of names to tensors, which is not empty."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(item, Tensor) for item in value.values())


def fit_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with exactly the model's keys, shapes and dtypes.

    A key that the model ties to another one may be missing if the other is there, as safetensors files of tied
    models have it.

    Args:
        model: Tells the keys; it is not changed.
        state: From `read_checkpoint`.

    Returns:
        Names to tensors in the model's order and dtypes, on the devices of ``state``; not copied where the dtype is
        the model's.

    Raises:
        CheckpointError: Keys are missing or unexpected, shapes or kinds of dtype differ, or tied values differ.
    """
    expected = {
        key: value
        for key, value in model.state_dict(keep_vars=True).items()
        if isinstance(value, Tensor) and not key.endswith("_extra_state")
    }
    lazy = [repr(key) for key, value in expected.items() if nn.parameter.is_lazy(value)]
    if lazy:
        raise CheckpointError(f"the model has parameters without a shape: {listing(lazy)}; run one forward pass first")
    given = {key: value for key, value in state.items() if not key.endswith("_extra_state")}
    twins: dict[int, list[str]] = {}
    for key, value in expected.items():
        twins.setdefault(id(value), []).append(key)
    for keys in twins.values():
        there = [key for key in keys if key in given]
        given.update({key: given[there[0]] for key in keys if there and key not in given})
    _check_fit(expected, given)
    fitted = {key: given[key].detach().to(value.dtype) for key, value in expected.items()}
    for keys in twins.values():
        for key in keys[1:]:
            if fitted[key] is not fitted[keys[0]] and not _same_values(fitted[key], fitted[keys[0]]):
                raise CheckpointError(
                    f"the model ties {keys[0]!r} and {key!r}, the checkpoint has different values for them: it is of "
                    "a model that does not tie them; build the model as it was trained"
                )
    return fitted


def _check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Compare keys, shapes and kinds of dtype.

    Raises:
        CheckpointError: Something differs.
    """
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    problems = []
    for keys, what in ((missing, "missing"), (unexpected, "unexpected")):
        if keys:
            problems.append(f"{len(keys)} keys are {what}: {listing([repr(key) for key in keys])}")
    reshaped = []
    for key, value in expected.items():
        if key in given and given[key].shape != value.shape:
            reshaped.append(f"{key!r} is {list(given[key].shape)}, the model has {list(value.shape)}")
        elif key in given and _kind(given[key]) > _kind(value):
            reshaped.append(f"{key!r} is {given[key].dtype}, the model has {value.dtype}")
    if reshaped:
        problems.append(f"{len(reshaped)} tensors do not fit: {listing(reshaped)}")
    if problems:
        hint = _prefix_hint(missing, unexpected) or "build the model as it was trained, or pass its own checkpoint"
        raise CheckpointError("the checkpoint does not fit the model. " + ". ".join(problems) + f". To do: {hint}")


def _kind(value: Tensor) -> int:
    return 2 if value.is_complex() else int(value.is_floating_point())


def _prefix_hint(missing: list[str], unexpected: list[str]) -> str:
    """Return what to do when one prefix explains all differing keys, else an empty text."""
    if not missing or not unexpected:
        return ""
    for shorter, longer, more in ((missing, unexpected, "checkpoint"), (unexpected, missing, "model")):
        for key in longer:
            prefix = key[: -len(shorter[0])]
            if key.endswith(shorter[0]) and prefix and {prefix + name for name in shorter} <= set(longer):
                if more == "checkpoint":
                    only = f" if key.startswith({prefix!r})" if len(longer) > len(shorter) else ""
                    change = f"key.removeprefix({prefix!r}): value for key, value in state.items(){only}"
                else:
                    change = f"{prefix!r} + key: value for key, value in state.items()"
                return f"keys of the {more} begin with {prefix!r}; pass {{{change}}}"
    return ""


def _same_values(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left, right.to(left.device))


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return a digest of names, dtypes, shapes and values, whatever the order, device or strides.

    Args:
        state: Names to tensors.

    Returns:
        32 hexadecimal digits.

    >>> weights_fingerprint({"w": torch.zeros(2)}) == weights_fingerprint({"w": torch.zeros(4)[::2]})
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name].detach().resolve_conj().resolve_neg()
        digest.update(f"{len(name)} {name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class LoadedWeights:
    """A checkpoint's values for one model, copied once to where they are used.

    Args:
        model: The model they are for; it is not changed.
        state: From `read_checkpoint` or `fit_state`; it is fitted here in any case, and copied.
        device: Where the values go; None leaves each where the model's own is. Of a sharded parameter this rank's
            part is kept, where its own part is.
        scales: What the entries of parameters' gradients are multiplied by, ``[*shape]`` each; None: nothing is.

    Attributes:
        parameters: Names to values, each tied parameter once; this rank's parts of sharded ones.
        buffers: Names to values of the persistent buffers.
        device: As passed.
        scales: As passed, where the parameters' values are, float64 for float64 parameters and else float32.

    Raises:
        CheckpointError: The state does not fit the model.
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

        settle(model)
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
    """Let a model show a checkpoint's values, and put back everything however the block ends.

    Inside, the data of each parameter and buffer is the checkpoint's; buffers that checkpoints leave out keep the
    model's values, on the device of ``loaded``; gradients are None. Behind it, the modules hold the parameters and
    buffers that they held, the same objects with the same memory, values and gradients, also those that a forward
    replaced, added or removed. What a forward changes in place inside is gone: buffers are copied at each entry, so
    that it does not reach the next block either. Parameters are not copied: one that is changed in place stays
    changed in ``loaded``, and a warning names it. Tensors that a module keeps as plain attributes stay where they are.

    Of a sharded model each rank's own parts are overwritten in place, since FSDP keeps memory of its own for them, and
    written back; afterwards it holds nothing but its parts.

    Args:
        model: The model that ``loaded`` was made for.
        loaded: The values.

    Yields:
        The model.

    Raises:
        CheckpointError: The model has other parameters than ``loaded``.
    """
    divided = settle(model)
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
            settle(model, failed)
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
