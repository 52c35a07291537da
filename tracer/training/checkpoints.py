"""Read checkpoints safely, and tell them apart.

A *state* is a dict of names to tensors, as in ``model.state_dict()``. Files are never trusted: nothing in them is
executed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tracer._core.packed import plain_parts
from tracer._core.text import listing
from tracer.errors import CheckpointError, InputTypeError
from tracer.types import Checkpoint

INDEX = ".index.json"
FROZEN = "tracer_frozen"
"""The key of a safetensors file's metadata with the digest of the frozen parameters that it leaves out."""

_STEMS = ("model", "adapter_model", "pytorch_model", "diffusion_pytorch_model")
_ENDS = (".safetensors", ".bin")
_DISTRIBUTED = ".metadata"  # what a distributed checkpoint has instead, in one of these folders
_FOLDERS = ("", "pytorch_model_fsdp_0", "pytorch_model_fsdp")  # the second as accelerate and Trainer name it
_HARMLESS: list[Any] = [argparse.Namespace]  # training scripts save their arguments with the weights


class Source(NamedTuple):
    """The value that a checkpoint holds, its name in errors, and the digest of frozen weights that it left out."""

    value: Any
    where: str
    frozen: str | None = None


def read_source(checkpoint: Checkpoint, mapped: bool = False) -> Source:
    """Return what a mapping, a file or a directory holds; with ``mapped``, files are read when values are needed."""
    if isinstance(checkpoint, Mapping):
        return Source(checkpoint, "the checkpoint")
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
        path = _weights_file(path)
    if path.name == _DISTRIBUTED:
        # Here, since torch.distributed.checkpoint imports sympy, which takes longer than a small attribution.
        from tracer.training.distributed_checkpoint import read_distributed

        return Source(read_distributed(path, mapped), str(path.parent))
    if not path.name.endswith(INDEX):
        return _read_file(path, mapped)
    value: dict[str, Any] = {}
    for shard in _shards(path):
        value.update(_read_file(shard, mapped).value)
    return Source(value, str(path))


def _weights_file(directory: Path) -> Path:
    """Return the single file of weights in a directory."""
    found = weights_files(directory)
    if len(found) != 1:
        names = listing([path.name for path in found]) or f"none of {_STEMS[0]}{_ENDS[0]}, {_STEMS[1]}{_ENDS[0]}, ..."
        raise CheckpointError(
            f"the checkpoint {directory} is a directory: expected one file of weights in it, found {names}; pass the "
            "path of the file"
        )
    return found[0]


def weights_files(directory: Path) -> list[Path]:
    """Return the files of weights in a directory, or their indices, or what a distributed checkpoint has instead."""
    found = [directory / (stem + end + index) for stem in _STEMS for end in _ENDS for index in ("", INDEX)]
    found = [path for path in found if path.is_file()]
    return found or [path for name in _FOLDERS if (path := directory / name / _DISTRIBUTED).is_file()]


def _shards(index: Path) -> list[Path]:
    """Return the files that an index of weights names, all in its directory."""
    try:
        names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files elsewhere")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is no index of weights ({error!r}): write the checkpoint again") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(f"{index} names files that do not exist: {listing(missing)}; put them beside it")
    return [index.parent / name for name in names]


def _read_file(path: Path, mapped: bool) -> Source:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                value = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no mapping
                return Source(value, str(path), (file.metadata() or {}).get(FROZEN))
        except Exception as error:  # the library raises its own class, OSError and more
            raise CheckpointError(
                f"{path} cannot be read as safetensors ({error}): it is damaged or of another format; write it again"
            ) from error
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            mapped = mapped and zipfile.is_zipfile(path)
            return Source(torch.load(path, map_location="cpu", weights_only=True, mmap=mapped), str(path))
    except Exception as error:  # a damaged file can raise nearly anything out of the unpickler
        reason = type(error).__name__
        if not isinstance(error, pickle.UnpicklingError):  # torch's text on those proposes to execute the file
            reason += f": {str(error).strip().partition(chr(10))[0]}"
        raise CheckpointError(
            f"{path} cannot be read as tensors only ({reason}): it is damaged, of another "
            "format, or holds Python objects, which are never executed here. Save `model.state_dict()` alone, or, if "
            "you trust the file, load it yourself and pass the state dict instead of the path"
        ) from error


def without_extra_state(state: Mapping) -> dict[Any, Any]:
    """Return a state dict without what modules add by ``get_extra_state``."""
    return {key: item for key, item in state.items() if not str(key).endswith("_extra_state")}


def weights_fingerprint(state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Return 32 hexadecimal digits from names, dtypes, shapes and values, independent of order and device.

    With ``dtype``, real numbers are cast to it, so that those of another one may be the same.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, value in (part for key in sorted(state) for part in plain_parts(key, state[key])):
        value = value.detach().resolve_conj().resolve_neg()
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        digest.update(f"{len(name)} {name} {value.dtype} {tuple(value.shape)};".encode())
        # A dimension of one element may have any stride, also if a tensor counts as contiguous; a view as bytes not.
        flat = value.cpu().contiguous().as_strided((value.numel(),), (1,))
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
