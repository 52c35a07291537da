"""Checks of single arguments; each error says what was expected and what the argument was."""

from __future__ import annotations

import inspect
import math
import operator
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tracer._core.text import listing
from tracer.errors import InputError, InputTypeError, nearest_name


def check_model(model: nn.Module) -> nn.Module:
    """Return the module that owns the parameters, without the wrappers of ``torch.compile``, DataParallel and DDP."""
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputTypeError("model is a TorchScript module, whose layers cannot be seen; pass the Python module.")
    inner: Any = model
    while inner is not None:
        model, parallel = inner, isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        inner = inner.module if parallel else getattr(inner, "_orig_mod", None)  # what torch.compile wrapped
    flat = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if flat is not None and any(isinstance(module, flat) for module in model.modules()):
        raise InputTypeError(
            "model is wrapped by FullyShardedDataParallel, which joins parameters to flat ones whose names and shapes "
            "are lost; wrap it with torch.distributed.fsdp.fully_shard instead, or pass the plain module."
        )
    if lazy := [repr(name) for name, value in model.named_parameters() if nn.parameter.is_lazy(value)]:
        raise InputError(f"model has parameters without a shape: {listing(lazy)}; run one forward pass first.")
    return model


def check_choice(name: str, value: Any, choices: Collection[str], more: str = "") -> None:
    """Raise `InputError` with the nearest choice if a value is none of them; ``more`` names other accepted values."""
    if value not in choices:
        raise InputError(f"{name}={value!r} is not known; {nearest_name(value, choices)}{more}.")


def check_autocast(autocast: str | torch.dtype | None) -> torch.dtype | None:
    """Return the dtype of ``autocast=``, or None."""
    if autocast is None:
        return None
    found = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(autocast).removeprefix("torch."))
    if found is None:
        raise InputError(f"autocast={autocast!r} is not known; expected 'bfloat16', 'float16' or None.")
    return found


def wrapped_autocast(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of an autocast that a model's forward was wrapped in, as accelerate and Trainer do, or None."""
    function: Any = vars(model).get("forward")
    while function is not None:
        function = getattr(function, "__func__", function)
        variables = inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}
        for value in variables.values():
            if isinstance(value, torch.autocast) and value._enabled:
                return value.fast_dtype
        function = getattr(function, "__wrapped__", None)
    return None


def bar_disabled(progress: bool | None) -> bool | None:
    """Return tqdm's ``disable`` for ``progress=``: None, a bar on a terminal only, if ``progress`` is None."""
    return None if progress is None else not progress


def shown(value: Any) -> str:
    """Return a value for an error, or its type if it is long, such as a state dict."""
    text = repr(value)
    return text if len(text) <= 80 else f"of type {type(value).__name__}"


def check_integer(value: Any, name: str, least: int, most: int | None = None) -> int:
    """Return a Python int from ``least`` to ``most``; raise `InputTypeError` or `InputError` for anything else."""
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) in (bool, torch.bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, RuntimeError):  # for example a tensor of float, or without memory
        raise InputTypeError(f"{name} is {shown(value)}; expected an integer.") from None
    if number < least or (most is not None and number > most):
        raise InputError(f"{name} is {number}; expected {least} {'or more' if most is None else f'to {most}'}.")
    return number


def check_flag(value: Any, name: str) -> None:
    """Raise `InputTypeError` unless a value is True or False: a text such as ``"no"`` would count as True."""
    if not isinstance(value, (bool, np.bool_)):
        raise InputTypeError(f"{name} is {shown(value)}; expected True or False.")


def check_count(value: Any, name: str) -> int:
    """Return a positive int."""
    return check_integer(value, name, 1)


def check_model_id(model_id: Any) -> int:
    """Return the number of a checkpoint, 0 for the first."""
    return check_integer(model_id, "model_id", 0)


def check_seed(seed: Any) -> int:
    """Return a seed of at most 64 bits."""
    return check_integer(seed, "seed", 0, (1 << 64) - 1)


def as_list(values: object, name: str) -> list:
    """Return the items of a list, tuple, array, range or generator, but not of a string."""
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise InputTypeError(f"{name} is {values!r}; expected a list.")
    return list(values)


def check_positive(value: Any, name: str) -> float:
    """Return a finite number above 0 as float."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputTypeError(f"{name} is {shown(value)}; expected a number.") from None
    if not 0 < number < math.inf:
        raise InputError(f"{name} is {number}; expected a number above 0.")
    return number


def check_rate(learning_rate: float | None) -> float | None:
    """Return a learning rate as float, or None."""
    if learning_rate is None:
        return None
    try:
        rate = float(learning_rate)
    except (TypeError, ValueError):
        raise InputTypeError(f"learning_rate is {shown(learning_rate)}; expected a number.") from None
    if not 0 <= rate <= 1e30:
        raise InputError(f"learning_rate is {rate}; expected a number from 0 to 1e30, which float32 scores can hold.")
    return rate


def complete_rates(names: Sequence[object], rates: Sequence[float | None], advice: str) -> list[float]:
    """Return learning rates, 1 for all if no checkpoint has one; raise `InputError` if only some have one."""
    unknown = [name for name, rate in zip(names, rates, strict=True) if rate is None]
    # Without any rate equal weights are a plain average. To guess some would weigh checkpoints against each other.
    if unknown and len(unknown) < len(rates):
        raise InputError(
            f"Checkpoints {unknown} have no learning rate and the other checkpoints have one: they cannot be weighed "
            f"against each other. {advice}"
        )
    return [1.0 if rate is None else rate for rate in rates]


def check_device(device: str | torch.device | None, model: nn.Module | None = None) -> torch.device:
    """Return the device to compute on, with its index; None is the device of the model."""
    if device is None:
        first: Any = None if model is None else next(model.parameters(), None)
        mesh = getattr(first, "device_mesh", None)  # of a sharded parameter, which may lie elsewhere than it is used
        if mesh is not None and mesh.device_type != first.device.type:
            return check_device(mesh.device_type, model)
        return _check_supported(first.device) if first is not None else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device={device!r} is no torch device ({error}); use 'cpu', 'cuda' or 'cuda:1'.") from error
    if chosen.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (chosen.index or 0) >= count:
            raise InputError(f"device={device!r} is not there: torch sees {count} CUDA devices.")
        return torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
    return _check_supported(chosen)


def _check_supported(device: torch.device) -> torch.device:
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {str(device)!r} is not supported: norms need float64; use 'cpu' or a CUDA device.")
    return device
