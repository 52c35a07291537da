"""Load the state dict of a model from whatever holds it: a file, a directory, a training checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from tracer._core.text import listing
from tracer.errors import CheckpointError
from tracer.training.checkpoints import Source, read_source, without_extra_state
from tracer.training.fit_state import described, fit_state
from tracer.types import Checkpoint


def load_state(model: nn.Module, checkpoint: Checkpoint, key: str | None = None) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint fitted to a model, not copied, or on the CPU from a path."""
    return find_state(model, read_source(checkpoint), key)


def check_headers(model: nn.Module, checkpoint: Checkpoint, key: str | None = None) -> None:
    """Raise CheckpointError if names, shapes or dtypes in a checkpoint do not fit a model; values are not read."""
    find_state(model, read_source(checkpoint, mapped=True), key, values=False)


def find_state(model: nn.Module, source: Source, key: str | None = None, values: bool = True) -> dict[str, Tensor]:
    """Return the single state dict in a source that fits a model: the source itself, or one nested in it.

    ``key`` chooses one: the keys that lead to it, joined by dots; the last may be a prefix of names of tensors.

    Raises:
        CheckpointError: If none fits, or several do.
    """
    value, where = source.value, source.where
    if key is not None:
        value, where = _chosen(value, key), f"{where}, key {key!r},"
        if value is None:
            raise CheckpointError(
                f"{where} does not exist: expected a mapping or a prefix of names; there are "
                f"{listing([repr(name) for name in source.value]) if isinstance(source.value, Mapping) else 'no keys'}"
            )
    states = dict(_states(value))
    fitted: dict[str, dict[str, Tensor]] = {}
    misfits: dict[str, CheckpointError] = {}
    for name, state in states.items():
        try:
            fitted[name] = fit_state(model, state, source.frozen, values)
        except CheckpointError as error:
            misfits[name] = error
    if len(fitted) == 1:
        return next(iter(fitted.values()))
    if fitted:
        raise CheckpointError(
            f"{where} holds several state dicts of the model, under {listing([repr(name) for name in fitted])}; choose "
            f"one by checkpoint_key={next(iter(fitted))!r}, or pass a mapping that has only the one that counts"
        )
    if misfits:
        name = max(misfits, key=lambda each: sum(isinstance(item, Tensor) for item in states[each].values()))
        if name:
            where = f"{where}, key {name!r}"
        elif source.where == "the checkpoint" and key is None:
            raise misfits[name]
        raise CheckpointError(f"{where}: {misfits[name]}") from misfits[name]
    found = f"a value of type {type(value).__name__}"
    if isinstance(value, Mapping):
        found = f"the keys {listing([described(name, item) for name, item in value.items()]) or 'none'}"
    raise CheckpointError(
        f"{where} holds no state dict: expected names to tensors, found {found}; pass `model.state_dict()`"
    )


def _states(value: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the mappings that have tensors by name, below a value or itself, except those of optimizers."""
    if not isinstance(value, Mapping) or "param_groups" in value:
        return
    if any(isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items()):
        yield name, value
    for key, item in without_extra_state(value).items():
        yield from _states(item, f"{name}.{key}" if name else str(key))


def _chosen(value: Any, key: str) -> Mapping[Any, Any] | None:
    """Return the part of a value under a key, None if there is none."""
    if not isinstance(value, Mapping):
        return None
    if isinstance(value.get(key), Mapping):
        return value[key]
    for name, item in value.items():
        if key.startswith(f"{name}.") and (found := _chosen(item, key.removeprefix(f"{name}."))) is not None:
            return found
    prefix = key + "."
    inside = {name.removeprefix(prefix): item for name, item in value.items() if str(name).startswith(prefix)}
    return inside or None
