"""Checkpoints of ``torch.distributed.checkpoint``, whose shards are put together; nothing in them is executed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import metadata
from torch.distributed.checkpoint.api import CheckpointException
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


def read_distributed(path: Path, mapped: bool) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name, whole; with ``mapped`` their values are not read."""
    try:
        reader = _Reader(path.parent)
        kinds = reader.read_metadata().state_dict_metadata
        tensors = {key: kind for key, kind in kinds.items() if isinstance(kind, metadata.TensorStorageMetadata)}
        state = {key: torch.empty(kind.size, dtype=kind.properties.dtype) for key, kind in tensors.items()}
        if state and not mapped:
            load(state, storage_reader=reader, no_dist=True)
        return state
    except (Exception, CheckpointException) as error:  # of a damaged file: the package raises many kinds
        cause = next(iter(getattr(error, "failures", {0: (error,)}).values()))[0]
        raise CheckpointError(
            f"{path.parent} cannot be read as a distributed checkpoint ({type(cause).__name__}: {cause}): it is "
            f"damaged or lacks shards; write it again"
        ) from error
