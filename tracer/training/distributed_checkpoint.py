"""Checkpoints of ``torch.distributed.checkpoint``, whose shards are put together; nothing in them is executed."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from tracer.errors import CheckpointError

_GLOBALS = {
    "torch.distributed.checkpoint.metadata": None,  # all of the module
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        *(str(each).removeprefix("torch.") for each in vars(torch).values() if isinstance(each, torch.dtype)),
    },
    "collections": {"OrderedDict", "defaultdict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = _GLOBALS.get(module, set())
        if "." in name or (allowed is not None and name not in allowed):
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is never executed here")
        if allowed is None and getattr(getattr(metadata, name, None), "__module__", None) != metadata.__name__:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is never executed here")
        return super().find_class(module, name)


class _Reader(FileSystemReader):
    """A reader whose metadata are unpickled without executing anything; shards are read as tensors only."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """Return the metadata."""
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _Unpickler(file).load()
        if getattr(found, "storage_meta", None) is None:
            found.storage_meta = metadata.StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Planner(DefaultLoadPlanner):
    """A planner that reads tensors and plain values, and None instead of what would have to be executed."""

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Read a value that is no tensor."""
        try:
            found = torch.load(value, weights_only=True)
        except pickle.UnpicklingError:
            found = None
        self.state_dict[read_item.dest_index.fqn] = found


def read_distributed(path: Path, mapped: bool) -> dict[str, Any]:
    """Return what a checkpoint holds, nested as it was saved and whole; with ``mapped`` no values are read."""
    try:
        reader = _Reader(path.parent)
        found = reader.read_metadata()
        state: dict[str, Any] = {key: _empty(kind) for key, kind in found.state_dict_metadata.items()}
        if mapped:
            state = {key: value if isinstance(value, torch.Tensor) else None for key, value in state.items()}
        elif state:
            planner = _Planner(flatten_state_dict=False, flatten_sharded_tensors=False)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load(state, storage_reader=reader, planner=planner, no_dist=True)
            state = planner.state_dict
        return _nested(state, found.planner_data or {})
    except (Exception, CheckpointException) as error:  # of a damaged file: the package raises many kinds
        cause = next(iter(getattr(error, "failures", {0: (error,)}).values()))[0]
        raise CheckpointError(
            f"{path.parent} cannot be read as a distributed checkpoint ({type(cause).__name__}: {cause}): it is "
            f"damaged or lacks shards; write it again"
        ) from error


def _empty(kind: Any) -> Any:
    is_tensor = isinstance(kind, metadata.TensorStorageMetadata)
    return torch.empty(kind.size, dtype=kind.properties.dtype) if is_tensor else io.BytesIO()


def _nested(state: Mapping[str, Any], paths: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Return values by name in the mappings and lists that they were saved in; weights beside these are the model's.

    >>> _nested({"a.x.y": 1, "b.0": 2}, {"a.x.y": ("a", "x.y"), "b.0": ("b", 0)})
    {'a': {'x.y': 1}, 'b': [2]}
    """
    whole: dict[Any, Any] = {}
    for name, value in state.items():
        inner, (*before, last) = whole, paths.get(name, (name,))
        for key in before:
            inner = inner.setdefault(key, {})
        inner[last] = value
    whole = {name: _with_lists(value) for name, value in whole.items()}
    weights = {name: value for name, value in whole.items() if isinstance(value, torch.Tensor)}
    others = {name: value for name, value in whole.items() if name not in weights}
    return {"model": weights, **others} if weights and "model" not in others else whole


def _with_lists(value: Any) -> Any:
    """Return mappings by places as lists; those that lack a value stay mappings."""
    if not isinstance(value, dict):
        return value
    found = {key: _with_lists(item) for key, item in value.items()}
    is_list = bool(found) and all(type(key) is int for key in found) and sorted(found) == list(range(len(found)))
    return [found[place] for place in range(len(found))] if is_list else found
