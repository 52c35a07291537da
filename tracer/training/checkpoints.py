"""Read checkpoints safely, and tell them apart.

A *state* is a dict of names to tensors, as in ``model.state_dict()``. Files are never trusted: nothing in them is
executed.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tracer._core.sharding import is_sharded
from tracer._core.text import listing
from tracer.errors import CheckpointError, InputTypeError
from tracer.types import Checkpoint


def read_checkpoint(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint, not copied, or on the CPU from a path, without ``_extra_state``."""
    return as_state(*checkpoint_value(checkpoint))


def checkpoint_value(checkpoint: Checkpoint) -> tuple[Any, str, str]:
    """Return the value in a checkpoint, its name in errors, and the expression that gives it."""
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
        try:
            return load_file(path, device="cpu"), str(path), "checkpoint"
        except Exception as error:  # the library raises its own class, OSError and more
            raise CheckpointError(
                f"{path} cannot be read as safetensors ({error}): it is damaged or of another format; write it again"
            ) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            value = torch.load(path, map_location="cpu", weights_only=True)
        return value, str(path), f'torch.load("{path}", map_location="cpu", weights_only=True)'
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
    """Return a mapping as a state, or raise an error that suggests ``call``, the expression for the value."""
    if not isinstance(value, Mapping):
        raise CheckpointError(
            f"{where} holds a value of type {type(value).__name__}: expected a state dict; save `model.state_dict()`"
        )
    state = without_extra_state(value)
    wrong = [key for key, item in state.items() if not (isinstance(key, str) and isinstance(item, Tensor))]
    if wrong or not state:
        keys = listing([repr(key) for key in value])
        nested = max(filter(lambda key: is_state(value[key]), wrong), key=lambda key: len(value[key]), default=None)
        if nested is not None:
            raise CheckpointError(
                f"{where} is a training checkpoint with the keys {keys}: expected the state dict of the model alone; "
                f"pass `{call}[{nested!r}]`"
            )
        what = listing([f"{key!r} ({type(value[key]).__name__})" for key in wrong]) or "nothing"
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


def without_extra_state(state: Mapping) -> dict[Any, Any]:
    """Return a state dict without what modules add by ``get_extra_state``."""
    return {key: item for key, item in state.items() if not str(key).endswith("_extra_state")}


def is_state(value: Any) -> bool:
    """Return whether a value is a non-empty mapping to tensors, apart from ``_extra_state`` entries."""
    items = without_extra_state(value).values() if isinstance(value, Mapping) else ()
    return bool(items) and all(isinstance(item, Tensor) for item in items)


def weights_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return 32 hexadecimal digits from names, dtypes, shapes and values, independent of order and device."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name].detach().resolve_conj().resolve_neg()
        digest.update(f"{len(name)} {name} {value.dtype} {tuple(value.shape)};".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
