"""Selection of parameters by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence

from torch import nn

from tracer._core.packed import is_composed
from tracer._core.text import listing
from tracer.errors import InputError, InputTypeError, nearest_name

ParamSelection = str | Sequence[str] | Callable[[str, nn.Parameter], bool] | None
"""Name patterns, a function of name and parameter, or None for all trainable parameters."""


def select_parameters(model: nn.Module, params: ParamSelection = None) -> list[str]:
    """Return the names of the selected trainable parameters, in the model's order.

    Args:
        model: The model; frozen parameters (``requires_grad=False``) are never selected.
        params: Shell patterns, for example ``"fc.*"`` or ``"*.lora_*"``; a module's name selects everything below it,
            and any name of a tied parameter selects it. Or a function ``(name, parameter) -> bool``. Default: all.

    Returns:
        Names as ``model.named_parameters()`` has them.

    Raises:
        InputTypeError: If `params` is of another type.
        InputError: If nothing is selected, a pattern matches no trainable parameter, or one is made of other tensors.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> select_parameters(model, "1")
    ['1.weight', '1.bias']
    """
    named = list(model.named_parameters(remove_duplicate=False))
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    if not trainable:
        raise InputError(
            f"The model {type(model).__name__} has no trainable parameter (of {len(named)}, all have "
            f"requires_grad=False). Set requires_grad_(True) on those whose gradients count before making the Tracer."
        )
    if params is None:
        chosen = {id(parameter) for _, parameter in trainable}
    elif callable(params):
        chosen = {id(parameter) for name, parameter in trainable if params(name, parameter)}
    else:
        chosen = _by_patterns(named, trainable, _as_patterns(params))
    if not chosen:
        raise InputError(f"params={params!r} selects none of the {len(trainable)} trainable parameters.")
    found = {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}
    if packed := [f"{name!r} ({type(value).__name__})" for name, value in found.items() if is_composed(value)]:
        raise InputError(
            f"expected parameters that are plain tensors, got {listing(packed)}, made of others; leave them out with "
            f"params=, or call requires_grad_(False) on them and train adapters."
        )
    return list(found)


def _as_patterns(params: object) -> list[str]:
    if isinstance(params, str):
        return [params]
    if isinstance(params, Sequence) and params and all(isinstance(pattern, str) for pattern in params):
        return list(params)
    raise InputTypeError(
        f"params is {params!r}; expected a name pattern such as 'fc.*', a list of patterns, a function "
        f"(name, parameter) -> bool, or None for all trainable parameters."
    )


def _by_patterns(named: list, trainable: list, patterns: list[str]) -> set[int]:
    chosen: set[int] = set()
    for pattern in patterns:
        below = (pattern, f"{pattern}.*")
        matched = {id(p) for name, p in trainable if any(fnmatch.fnmatchcase(name, one) for one in below)}
        if not matched:
            frozen = [name for name, _ in named if any(fnmatch.fnmatchcase(name, one) for one in below)]
            why = (
                f"it matches only frozen ones ({', '.join(frozen[:3])}); set requires_grad_(True) on them first"
                if frozen
                else nearest_name(pattern, [name for name, _ in trainable][:40])
            )
            raise InputError(f"params pattern {pattern!r} matches no trainable parameter: {why}.")
        chosen |= matched
    return chosen
