"""The source of each checkpoint's weights: a path, which the store remembers, or a state dict in this process."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracer.errors import CallOrderError, InputError, InputTypeError
from tracer.store import RowTable, Store
from tracer.training.checkpoint_paths import checkpoints_at
from tracer.types import Checkpoint

_ALIASING = (
    "Note that state_dict() returns references to the model's tensors, which training changes: copy them, for example "
    "{name: value.clone() for name, value in model.state_dict().items()}, or save each checkpoint to a file."
)


def checkpoint_pairs(checkpoints: Any) -> Iterable[tuple[Checkpoint, float | None]]:
    """Return the checkpoints with their learning rates: a list, or what an iterator yields one at a time."""
    if isinstance(checkpoints, (str, os.PathLike)):
        return list(checkpoints_at(checkpoints))
    if isinstance(checkpoints, Mapping) or not hasattr(checkpoints, "__iter__"):
        raise InputTypeError(
            f"checkpoints is a {type(checkpoints).__name__}; expected a path, or a list or iterator of state dicts or "
            f"paths, each alone or as (checkpoint, learning_rate)."
        )
    pairs = _pairs(checkpoints)
    return pairs if isinstance(checkpoints, Iterator) else list(pairs)


def _pairs(checkpoints: Iterable[Any]) -> Iterator[tuple[Checkpoint, float | None]]:
    number = 0  # enumerate would hold the first one
    for checkpoint in checkpoints:
        number += 1
        pair = tuple(checkpoint) if isinstance(checkpoint, (tuple, list)) else (checkpoint, None)
        if len(pair) != 2:
            raise InputTypeError(f"A checkpoint came as {len(pair)} values; expected (checkpoint, learning_rate).")
        yield pair
        del checkpoint, pair
    if not number:
        raise InputError("checkpoints is empty; pass one checkpoint at least.")


def check_distinct(checkpoints: Sequence[Checkpoint]) -> None:
    """Raise `InputError` if two checkpoints are the same file, or share all memory of a state dict in them."""
    seen: dict[object, int] = {}
    alive = []  # a mapping may make its tensors on access, and freed memory is used again
    for place, checkpoint in enumerate(checkpoints):
        if isinstance(checkpoint, (str, os.PathLike)):
            if (first := seen.setdefault(Path(checkpoint).absolute(), place)) != place:
                both = f"checkpoints[{first}] and [{place}], both the file {checkpoint}"
                raise InputError(f"expected different checkpoints, got {both}")
            continue
        for part, tensors in _state_dicts(checkpoint):
            alive.append(tensors)
            key = part, *(tensor.data_ptr() for tensor in tensors)
            if (first := seen.setdefault(key, place)) != place:
                raise InputError(
                    f"expected different checkpoints, got checkpoints[{first}] and [{place}], both the same tensors. "
                    f"{_ALIASING}"
                )


def _state_dicts(checkpoint: object, part: tuple[object, ...] = ()) -> Iterator[tuple[object, list[Tensor]]]:
    """Yield the plain tensors of each mapping below a checkpoint, for an optimizer's state all of them together."""
    if not isinstance(checkpoint, Mapping):
        return
    tensors = list(_tensors(checkpoint)) if "param_groups" in checkpoint else list(_tensors(checkpoint, nested=False))
    if tensors:
        yield part, tensors
    if "param_groups" not in checkpoint:
        for name in checkpoint:
            yield from _state_dicts(checkpoint[name], (*part, name))


def _tensors(values: Mapping[Any, Any], nested: bool = True) -> Iterator[Tensor]:
    for name in values:
        value = values[name]
        if type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided:
            if value.device.type != "meta" and value.numel():
                yield value
        elif nested and isinstance(value, Mapping):
            yield from _tensors(value)


class CheckpointSources:
    """Remembers where each checkpoint was loaded from; paths are stored, for other processes."""

    def __init__(self) -> None:
        self._passed: dict[int, Checkpoint] = {}
        self._ids: dict[str, int] | None = None

    def check_new(self, store: Store, model_id: int, fingerprint: str) -> None:
        """Raise `InputError` if the store has a new checkpoint's weights under another number."""
        if self._ids is None:  # read once: a store may have thousands of checkpoints
            ids = store.catalog.checkpoint_ids()
            self._ids = {_weights(str(store.table_attributes(each)["weights_fingerprint"])): each for each in ids}
        fingerprint = _weights(fingerprint)
        other = self._ids.setdefault(fingerprint, model_id)
        if other != model_id and store.catalog.has_checkpoint(other):
            raise InputError(
                f"expected other weights under model_id={model_id} than under model_id={other}, got the same: scores "
                f"would count them twice. {_ALIASING} If training did not change them, pass one with both rates."
            )
        self._ids[fingerprint] = model_id

    def remember(self, model_id: int, checkpoint: Checkpoint, table: RowTable) -> None:
        """Remember a checkpoint's path or state dict (not copied); a path is stored with the checkpoint's table."""
        if isinstance(checkpoint, (str, os.PathLike)):
            checkpoint = str(Path(checkpoint).absolute())
            if table.attributes.get("source") != checkpoint:
                table.set_attributes(source=checkpoint)
        self._passed[model_id] = checkpoint

    def forget(self, model_id: int) -> None:
        """Release a checkpoint's state dict; a path stays, as one that the user passed."""
        if not isinstance(self._passed.get(model_id), str):
            self._passed.pop(model_id, None)

    def find(self, model_id: int, table: RowTable, folders: Sequence[str | os.PathLike[str]] | None) -> Checkpoint:
        """Return a checkpoint's state dict or path.

        Args:
            model_id: Its number.
            table: Its table.
            folders: The folders below which a path that the store remembers is followed; None: that of the store.

        Raises:
            CallOrderError: If none is known, the file is gone, or it is elsewhere: the store may come from others.
        """
        passed = self._passed.get(model_id)
        if passed is not None and not isinstance(passed, str):
            return passed
        again = (
            f"Call tracer.load_checkpoint(checkpoint, model_id={model_id}) with the checkpoint that was featurized; a "
            "path is remembered in the store."
        )
        source = passed or table.attributes.get("source")
        if source is None:
            raise CallOrderError(f"The weights of checkpoint {model_id} are not known to this process. {again}")
        if passed is None:
            allowed = [table.path.parent.parent.parent] if folders is None else folders
            if not any(is_below(source, str(folder)) for folder in allowed):
                raise CallOrderError(
                    f"The store says that the weights of checkpoint {model_id} are in {source}, which is in none of "
                    f"{[str(folder) for folder in allowed]}. If you trust it, pass checkpoint_dirs= with its folder. "
                    f"Otherwise: {again}"
                )
        if not Path(source).exists():
            raise CallOrderError(
                f"The weights of checkpoint {model_id} were in {source}, which is not there any more. {again}"
            )
        return str(source)


def is_below(path: str, folder: str) -> bool:
    """Return whether an absolute path is below a folder, by its name and by where links lead."""
    # By name first: on Windows, looking at a path of another machine already logs in there.
    for real in (os.path.abspath, os.path.realpath):
        if not os.path.isabs(path) or not Path(real(path)).is_relative_to(real(folder)):
            return False
    return True


def _weights(fingerprint: str) -> str:
    """Return the part of a checkpoint's fingerprint that is its weights', without an optimizer's moments."""
    return fingerprint.partition("+")[0]
