"""Match an optimizer's parameters with a model's: by name, or by order and shape if that leaves no doubt.

The state dict of a torch optimizer numbers its parameters. It has their names too if the optimizer was made from
``model.named_parameters()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from tracer._core.text import listing
from tracer.errors import CheckpointError

_NAME = (
    "name them: train with torch.optim.AdamW(model.named_parameters()), or add to each group of the optimizer's state "
    'dict a list of its parameters\' names, group["param_names"] = [...]'
)

Assigned = dict[str, tuple[Any, Mapping]]
"""The optimizer's number and group of each parameter, by the model's name."""


def is_optimizer_state(value: Mapping) -> bool:
    """Return whether a mapping has the form of an optimizer's state dict."""
    return isinstance(value.get("state"), Mapping) and isinstance(value.get("param_groups"), (list, tuple))


def assign_parameters(optimizer: Mapping, model: nn.Module) -> tuple[Assigned, str]:
    """Match the optimizer's parameters with the model's.

    Names decide if the groups have them. Without names, parameters of one group are taken in the model's order: all of
    them or those that require a gradient, whichever count matches. Parameters of several groups, which may be in any
    order, are matched by shape if no shape is in two groups.

    Args:
        optimizer: An optimizer's state dict.
        model: The model.

    Returns:
        The optimizer's number and group by the model's name, and a description of the optimizer's content for errors.

    Raises:
        CheckpointError: If it is damaged, or the match is in doubt.

    >>> import torch
    >>> model = nn.Linear(2, 1)
    >>> assigned, _ = assign_parameters(torch.optim.SGD(model.parameters()).state_dict(), model)
    >>> {name: number for name, (number, group) in assigned.items()}
    {'weight': 0, 'bias': 1}
    """
    groups, state = _groups(optimizer), optimizer["state"]
    held = [(number, group) for group in groups for number in group["params"]]
    given = [name for group in groups for name in group.get("param_names") or group["params"]]
    if all(isinstance(name, str) for name in given):  # torch.distributed.checkpoint numbers parameters by their names
        return _by_name(held, given, model), listing([repr(name) for name in given]) or "none"
    named = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    trainable = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    fitting = next((some for some in (named, trainable) if len(some) == len(held)), None)
    if fitting is None:
        raise CheckpointError(
            f"the optimizer holds {len(held)} parameters without names, the model has {len(named)}, of which "
            f"{len(trainable)} require a gradient: which is which cannot be told; {_NAME}"
        )
    by = _by_order if len(groups) == 1 else _by_shape
    return by(held, state, fitting), f"{len(held)} of the model's parameters"


def _groups(optimizer: Mapping) -> list[Mapping]:
    """Return the non-empty parameter groups, or raise CheckpointError if one is damaged."""
    groups = list(optimizer["param_groups"])
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups):
        raise CheckpointError(
            "the optimizer's state dict is damaged: expected a mapping with a list of 'params' as each of its "
            "'param_groups'; pass optimizer.state_dict()"
        )
    return [group for group in groups if group["params"]]


def _by_name(held: Sequence[tuple[Any, Mapping]], given: Sequence[str], model: nn.Module) -> Assigned:
    """Match parameters by name; any name of a tied parameter counts, and names unknown to the model are left out."""
    if len(given) != len(held):
        raise CheckpointError(
            f"the optimizer's state dict has {len(given)} 'param_names' for {len(held)} parameters: expected one each; "
            f"pass optimizer.state_dict()"
        )
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    aliases = {name: canonical[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    return {aliases[name]: one for name, one in zip(given, held, strict=True) if name in aliases}


def _shape(entry: Any) -> tuple[int, ...] | None:
    values = entry.get("exp_avg_sq") if isinstance(entry, Mapping) else None
    return tuple(values.shape) if isinstance(values, Tensor) else None


def _by_order(
    held: Sequence[tuple[Any, Mapping]], state: Mapping, named: Sequence[tuple[str, tuple[int, ...]]]
) -> Assigned:
    """Match the parameters of one group in the model's order, as ``Adam(model.parameters())`` numbers them."""
    for (number, _), (name, shape) in zip(held, named, strict=True):
        came = _shape(state.get(number))
        if came is not None and came != shape:
            raise CheckpointError(
                f"the optimizer's parameters have no names and do not fit in the model's order: {name!r} is "
                f"{list(shape)}, 'exp_avg_sq' of the optimizer's parameter {number!r} is {list(came)}; {_NAME}"
            )
    return {name: one for (name, _), one in zip(named, held, strict=True)}


def _by_shape(
    held: Sequence[tuple[Any, Mapping]], state: Mapping, named: Sequence[tuple[str, tuple[int, ...]]]
) -> Assigned:
    """Match the parameters of several groups by shape, within a group in the model's order."""
    unknown = [repr(number) for number, _ in held if _shape(state.get(number)) is None]
    if unknown:
        raise CheckpointError(
            f"the optimizer has several groups of parameters without names, and no shape is known of its parameters "
            f"{listing(unknown)}, which never stepped: which is which cannot be told; {_NAME}"
        )
    theirs: dict[tuple[int, ...], list[tuple[Any, Mapping]]] = {}
    for number, group in held:
        theirs.setdefault(_shape(state[number]) or (), []).append((number, group))
    mine: dict[tuple[int, ...], list[str]] = {}
    for name, shape in named:
        mine.setdefault(shape, []).append(name)
    for shape in mine.keys() | theirs.keys():
        if len(mine.get(shape, [])) != len(theirs.get(shape, [])):
            raise CheckpointError(
                f"the optimizer's parameters do not fit the model: {len(mine.get(shape, []))} of the model's "
                f"parameters have shape {list(shape)}, {len(theirs.get(shape, []))} of the optimizer's 'exp_avg_sq' "
                f"have; pass the state of the optimizer that trained this model"
            )
        if len({id(group) for _, group in theirs[shape]}) > 1:
            raise CheckpointError(
                f"the optimizer has several groups of parameters without names, and more than one of them has "
                f"parameters of shape {list(shape)}: which is which cannot be told; {_NAME}"
            )
    return {name: one for shape, ones in theirs.items() for name, one in zip(mine[shape], ones, strict=True)}
