"""Fit a state dict to a model: the same keys, shapes and dtypes, or an error that says what differs and what to do."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tracer._core.text import listing
from tracer.errors import CheckpointError
from tracer.training.checkpoints import without_extra_state


def fit_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with exactly the model's keys, shapes and dtypes; tensors are copied only to change the dtype."""
    own = without_extra_state(model.state_dict(keep_vars=True))
    expected = {key: value for key, value in own.items() if isinstance(value, Tensor)}
    lazy = [repr(key) for key, value in expected.items() if nn.parameter.is_lazy(value)]
    if lazy:
        raise CheckpointError(f"the model has parameters without a shape: {listing(lazy)}; run one forward pass first")
    given = without_extra_state(state)
    twins: dict[int, list[str]] = {}
    for key, value in expected.items():
        twins.setdefault(id(value), []).append(key)
    for keys in twins.values():  # safetensors files have one of the keys that a model ties
        there = [key for key in keys if key in given]
        given.update({key: given[there[0]] for key in keys if there and key not in given})
    _check_fit(expected, given)
    fitted = {key: given[key].detach().to(value.dtype) for key, value in expected.items()}
    for keys in twins.values():
        for key in keys[1:]:
            if not torch.equal(fitted[key], fitted[keys[0]].to(fitted[key].device)):
                raise CheckpointError(
                    f"the model ties {keys[0]!r} and {key!r}, the checkpoint has different values for them: it is of "
                    "a model that does not tie them; build the model as it was trained"
                )
    return fitted


def _check_fit(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if keys, shapes or kinds of dtype differ."""
    missing = [key for key in expected if key not in given]
    unexpected = [key for key in given if key not in expected]
    problems = [
        f"{len(keys)} keys are {what}: {listing([repr(key) for key in keys])}"
        for keys, what in ((missing, "missing"), (unexpected, "unexpected"))
        if keys
    ]
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
    """Return what to do if one prefix explains all differing keys, else an empty text."""
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
