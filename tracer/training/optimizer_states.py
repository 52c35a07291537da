"""Match an optimizer's parameters with a model's: by name, or by order and shape if that leaves no doubt.

The state dict of a torch optimizer numbers its parameters. It has their names too if the optimizer was made from
``model.named_parameters()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tracer._core.text import listing
from tracer.errors import CheckpointError
from tracer.training.adafactor import moment_shape
from tracer.training.key_matching import match_names

# torch.distributed.checkpoint.state_dict names the parameters of an optimizer in memory, not of a saved state dict; and
# Optimizer.load_state_dict compares no shapes and casts moments to the parameters' dtype. Neither suffices here.

_NAME = (
    "name them: train with torch.optim.AdamW(model.named_parameters()), or add to each group of the optimizer's state "
    'dict a list of its parameters\' names, group["param_names"] = [...]'
)

Assigned = dict[str, tuple[Any, Mapping]]  # the optimizer's number and group of each parameter, by the model's name
Shape = tuple[int, ...]


def unflattened(optimizer: Mapping) -> Mapping:
    """Return an optimizer's state dict in torch's own form, also from ``flatten_optimizer_state_dict=True``.

    That has the keys ``state.<parameter>.<slot>`` and ``param_groups.<parameter>.<option>``; anything else is returned
    as it is.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {"state": {}, "param_groups": {}}
    for key, value in optimizer.items():
        part, _, rest = str(key).partition(".")
        name, dot, last = rest.rpartition(".")
        if part not in found or not dot:
            return optimizer
        found[part].setdefault(name, {})[last] = value
    groups = [{"params": [name], **options} for name, options in found["param_groups"].items()]
    return {"state": found["state"], "param_groups": groups} if groups else optimizer


def assign_parameters(optimizer: Mapping, model: nn.Module) -> tuple[Assigned, str]:
    """Return the optimizer's number and group by the model's name, and a description of its content for errors."""
    groups = optimizer["param_groups"]
    if not all(isinstance(group, Mapping) and isinstance(group.get("params"), (list, tuple)) for group in groups):
        raise CheckpointError(
            "the optimizer's state dict is damaged: expected a mapping with a list of 'params' as each of its "
            "'param_groups'; pass optimizer.state_dict()"
        )
    held = [(number, group) for group in groups for number in group["params"]]
    given = [name for group in groups if group["params"] for name in group.get("param_names") or group["params"]]
    if all(isinstance(name, str) for name in given):  # torch.distributed.checkpoint numbers parameters by their names
        if len(given) != len(held):
            raise CheckpointError(
                f"the optimizer's state dict has {len(given)} 'param_names' for {len(held)} parameters: expected one "
                f"each; pass optimizer.state_dict()"
            )
        canonical = {id(parameter): name for name, parameter in model.named_parameters()}
        # Any name of a tied parameter counts, also with a wrapper's. Names unknown to the model are left out.
        aliases = {name: canonical[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        match = match_names(aliases, (), given)
        aliases = aliases if match.unexpected else match.names
        assigned = {aliases[name]: one for name, one in zip(given, held, strict=True) if name in aliases}
        return assigned, listing([repr(name) for name in given]) or "none"
    named = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    trainable = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    fitting = next((some for some in (named, trainable) if len(some) == len(held)), None)
    if fitting is None:
        raise CheckpointError(
            f"the optimizer holds {len(held)} parameters without names, the model has {len(named)}, of which "
            f"{len(trainable)} require a gradient: which is which cannot be told; {_NAME}"
        )
    entries = [optimizer["state"].get(number) for number, _ in held]
    shapes = [moment_shape(entry) for entry in entries]
    return _by_shape(held, shapes, fitting), f"{len(held)} of the model's parameters"


def _by_shape(
    held: Sequence[tuple[Any, Mapping]], shapes: Sequence[Shape | None], named: Sequence[tuple[str, Shape]]
) -> Assigned:
    """Match parameters without names in the model's order; those of several groups by shape first."""
    if len({id(group) for _, group in held}) == 1:  # as Adam(model.parameters()) numbers them
        for (number, _), found, (name, shape) in zip(held, shapes, named, strict=True):
            if found is not None and found != shape:
                raise CheckpointError(
                    f"the optimizer's parameters have no names and do not fit in the model's order: {name!r} is "
                    f"{list(shape)}, the second moment of the optimizer's parameter {number!r} {list(found)}; {_NAME}"
                )
        return {name: one for (name, _), one in zip(named, held, strict=True)}
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(held):
        unknown = [repr(number) for (number, _), shape in zip(held, shapes, strict=True) if shape is None]
        raise CheckpointError(
            f"the optimizer has several groups of parameters without names, and no shape is known of its parameters "
            f"{listing(unknown)}, which never stepped: which is which cannot be told; {_NAME}"
        )
    assigned: Assigned = {}
    for shape in {*known, *(own for _, own in named)}:
        mine = [name for name, own in named if own == shape]
        theirs = [one for one, found in zip(held, known, strict=True) if found == shape]
        if len(mine) != len(theirs):
            raise CheckpointError(
                f"the optimizer's parameters do not fit the model: {len(mine)} of the model's parameters have shape "
                f"{list(shape)}, {len(theirs)} of the optimizer's second moments have; pass the state of the "
                f"optimizer that trained this model"
            )
        if len({id(group) for _, group in theirs}) > 1:
            raise CheckpointError(
                f"the optimizer has several groups of parameters without names, and more than one of them has "
                f"parameters of shape {list(shape)}: which is which cannot be told; {_NAME}"
            )
        assigned.update(zip(mine, theirs, strict=True))
    return assigned
