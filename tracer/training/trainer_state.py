"""What `transformers.Trainer` saves in its checkpoints besides the weights: learning rates, and the optimizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tracer.errors import CheckpointError
from tracer.training.adafactor import moment_shape

STATE = "trainer_state.json"
OPTIMIZERS = ("optimizer.pt", "optimizer_0", "optimizer.bin")  # Trainer's own, and with FSDP accelerate's
_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # of Trainer's own


def trainer_rates(paths: Sequence[Path]) -> list[float | None]:
    """Return the sum of the learning rates of the steps that each checkpoint represents; None if they are not known.

    A checkpoint represents the steps since the one before it of the same run, among those given. Between the steps at
    which the trainer logged it, the rate is interpolated.
    """
    runs: dict[Path, list[tuple[int, int, Mapping[str, Any]]]] = {}
    for place, path in enumerate(paths):
        if (path / STATE).is_file():
            state = _read(path / STATE)
            runs.setdefault(path.absolute().parent, []).append((int(state["global_step"]), place, state))
    rates: list[float | None] = [None] * len(paths)
    for checkpoints in runs.values():
        checkpoints.sort(key=lambda each: each[0])
        log = checkpoints[-1][2].get("log_history") or []
        steps = [int(entry["step"]) for entry in log if "learning_rate" in entry]
        logged = [float(entry["learning_rate"]) for entry in log if "learning_rate" in entry]
        before = 0
        for step, place, _ in checkpoints if steps else ():
            rates[place] = float(np.interp(np.arange(before + 1, step + 1), steps, logged).sum())
            before = step
    return rates


def _read(path: Path) -> Mapping[str, Any]:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
            raise ValueError("it has no global_step")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no state of a trainer ({error}): restore it, or remove it") from error
    return state


def with_parameter_names(optimizer: Any, model: nn.Module) -> Any:
    """Return the state dict of a trainer's optimizer with the parameters' names, unless they do not fit its groups.

    The trainer puts parameters with weight decay into its first group and all others into the second one.
    """
    groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    if not isinstance(groups, list) or len(groups) != 2 or any("param_names" in group for group in groups):
        return optimizer
    inside = {
        f"{name}.{inner}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for inner, _ in module.named_parameters()
    }
    names: tuple[list[str], list[str]] = ([], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = name in inside or any(re.search(pattern, name.lower()) for pattern in _NO_DECAY)
            names[spared].append(name)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for group, own in zip(groups, names, strict=True):
        found = [moment_shape(optimizer["state"].get(number)) for number in group["params"]]
        if len(own) != len(found) or any(
            shape is not None and shape != shapes[name] for shape, name in zip(found, own, strict=True)
        ):
            return optimizer
    named = [{**group, "param_names": own} for group, own in zip(groups, names, strict=True)]
    return {**optimizer, "param_groups": named}
