"""Which of an optimizer's parameters is which of a model's: by name, or by order and shape where that leaves no doubt.

A state dict of a torch optimizer numbers its parameters. It has their names too where the optimizer was made from
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
    """Say whether a mapping has the form of an optimizer's state dict."""
    return isinstance(value.get("state"), Mapping) and isinstance(value.get("param_groups"), (list, tuple))


def assign_parameters(optimizer: Mapping, model: nn.Module) -> tuple[Assigned, str]:
    """Find which of the optimizer's parameters is which of the model's.

    Names decide where the groups have them. Without names, the parameters of one group are taken in the model's order,
    all or those that require a gradient, whichever has their number. Those of several groups, which may have come in
    any order, are told by their shapes, if all of one shape are in one group.

    Args:
        optimizer: An optimizer's state dict.
        model: The model.

    Returns:
        Number and group by the model's name, and what the optimizer holds, in words.

    Raises:
        CheckpointError: It is damaged, or there is doubt.

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
    """Return the groups that hold parameters.

    Args:
        optimizer: An optimizer's state dict.

    Returns:
        The groups.

    Raises:
        CheckpointError: One is no group.
    """
    groups = list(optimizer["param_groups"])
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups):
        raise CheckpointError(
            "the optimizer's state dict is damaged: expected a mapping with a list of 'params' as each of its "
            "'param_groups'; pass optimizer.state_dict()"
        )
    return [group for group in groups if group["params"]]


def _by_name(held: Sequence[tuple[Any, Mapping]], given: Sequence[str], model: nn.Module) -> Assigned:
    """Return the parameters by the model's names; any name of a tied parameter will do.

    Args:
        held: Number and group of each parameter of the optimizer.
        given: Their names.
        model: The model.

    Returns:
        Number and group by name; without those that the model does not have.

    Raises:
        CheckpointError: There are more or fewer names than parameters.
    """
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
    """Assign the parameters of one group in the model's order, as ``Adam(model.parameters())`` numbers them.

    Args:
        held: Number and group of each parameter of the optimizer.
        state: Of the optimizer's state dict.
        named: Name and shape of as many parameters of the model, in its order.

    Returns:
        Number and group by name.

    Raises:
        CheckpointError: A shape does not fit.
    """
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
    """Assign the parameters of several groups, whose order says nothing: all of one shape must be of one group.

    Within a group they are taken in the model's order.

    Args:
        held: Number and group of each parameter of the optimizer.
        state: Of the optimizer's state dict.
        named: Name and shape of as many parameters of the model, in its order.

    Returns:
        Number and group by name.

    Raises:
        CheckpointError: A shape is unknown, is in several groups, or does not fit the model.
    """
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
