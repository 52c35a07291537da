"""Second moments of Adam or Adafactor, read from a training checkpoint, as a diagonal metric of gradients.

Adam moves a parameter along ``m / (sqrt(v̂) + eps)`` (Kingma & Ba 2015), so a gradient g moves it along ``Γ g`` with
the diagonal ``Γ = 1 / (sqrt(v̂) + eps)``. If the gradients of training examples and targets are multiplied by the
entries of ``Γ^{1/2}``, their inner products are ``<Γ g, g'>``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracer._core.sharding import is_sharded
from tracer._core.text import listing
from tracer.errors import CheckpointError
from tracer.training.adafactor import (
    FACTORS,
    KEYS,
    AdafactorMoment,
    floor_of,
    is_adafactor,
    moment_shape,
    stored_arrays,
)
from tracer.training.checkpoints import read_source, weights_fingerprint
from tracer.training.load_state import find_state, load_state
from tracer.training.optimizer_states import assign_parameters, unflattened
from tracer.training.trainer_state import OPTIMIZERS, with_parameter_names
from tracer.types import Checkpoint


@dataclass(frozen=True)
class SecondMoment:
    """Adam's second moment of one parameter, after a number of steps."""

    values: Tensor  # ``exp_avg_sq``, or ``max_exp_avg_sq`` with amsgrad
    step: float
    beta2: float
    eps: float

    def gamma(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Return ``1 / (sqrt(v̂) + eps)``, computed in a dtype."""
        corrected = self.values.to(dtype) / (1.0 - self.beta2**self.step)  # a mean that begins at zero
        return corrected.sqrt_().add_(self.eps).reciprocal_()

    def described(self, name: str) -> dict[str, Tensor]:
        """Return what decides it, by name."""
        numbers = torch.tensor([self.step, self.beta2, self.eps], dtype=torch.float64)
        return {name: self.values, f"{name} step, beta2, eps": numbers}


def moment_of(optimizer: torch.optim.Optimizer, group: Mapping, parameter: Tensor) -> SecondMoment | None:
    """Return Adam's second moment of a parameter as it is in an optimizer now; None before its first step."""
    entry = optimizer.state.get(parameter, {})
    values = entry.get("max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq")
    if values is None or float(entry["step"]) < 1:
        return None
    return SecondMoment(values, float(entry["step"]), float(group["betas"][1]), float(group["eps"]))


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A model's weights, and its optimizer's second moments of the selected parameters by name, or None."""

    state: dict[str, Tensor]
    moments: Mapping[str, SecondMoment | AdafactorMoment] | None = None

    def scales(self) -> dict[str, Tensor] | None:
        """Return ``Γ^{1/2}`` of each selected parameter; float64 for float64 parameters and else float32."""
        if self.moments is None:
            return None
        found = {}
        for name, moment in self.moments.items():
            found[name] = moment.gamma().sqrt_().to(torch.promote_types(self.state[name].dtype, torch.float32))
        return found

    def fingerprint(self) -> str:
        """Return a digest of the weights; with second moments ``+`` and a digest of these and their settings."""
        if self.moments is None:
            return weights_fingerprint(self.state)
        # Of the moments as stored, not of Γ, whose last bit may differ between machines.
        described = {
            key: value for name, moment in self.moments.items() for key, value in moment.described(name).items()
        }
        return f"{weights_fingerprint(self.state)}+{weights_fingerprint(described)}"


def optimizer_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of the optimizer's state that belongs to the weights in a ``.safetensors`` file."""
    return Path(path).with_suffix(".optimizer.pt")


def _optimizer_beside(path: Path) -> Path | None:
    """Return the path of the optimizer's state that was saved beside weights; None if there is none."""
    if path.suffix == ".safetensors":
        return beside if (beside := optimizer_path(path)).exists() else None
    return next((each for name in OPTIMIZERS if (each := path / name).exists()), None)


def read_training_checkpoint(
    checkpoint: Checkpoint,
    model: nn.Module,
    names: Sequence[str],
    preconditioner: str | None = "adam",
    key: str | None = None,
) -> TrainingCheckpoint:
    """Read weights and, for ``"adam"``, the named parameters' second moments; ``key`` is as in `find_state`."""
    if preconditioner != "adam":
        return TrainingCheckpoint(load_state(model, checkpoint, key))
    source = read_source(checkpoint)
    if isinstance(checkpoint, (str, os.PathLike)) and (beside := _optimizer_beside(Path(checkpoint))):
        optimizer = read_source(beside).value
        if isinstance(optimizer, Mapping):  # accelerate's distributed checkpoint has it under a key
            optimizer = with_parameter_names(optimizer.get("optimizer", optimizer), model)
        source = source._replace(value={"model": source.value, "optimizer": optimizer})
    value, where = source.value, source.where
    items = value.items() if isinstance(value, Mapping) else ()
    nested = {name: unflattened(item) for name, item in items if isinstance(item, Mapping)}
    optimizers = [
        name
        for name, item in nested.items()
        if isinstance(item.get("state"), Mapping) and isinstance(item.get("param_groups"), (list, tuple))
    ]
    if len(optimizers) != 1:
        raise _no_optimizer(optimizers, value, where)
    return TrainingCheckpoint(find_state(model, source, key), _moments(nested[optimizers[0]], model, names))


def _no_optimizer(found: list, value: Any, where: str) -> CheckpointError:
    """Return the error of a checkpoint with no state dict of an optimizer, or with several."""
    if found:
        return CheckpointError(
            f"{where} holds several state dicts of the optimizer, under {listing([repr(name) for name in found])}; "
            f"pass a mapping that has the one that counts only, such as {{'optimizer': checkpoint[{found[0]!r}], ...}}"
        )
    held = f"a value of type {type(value).__name__}"
    if isinstance(value, Mapping):
        held = f"the keys {listing([repr(name) for name in value]) or 'none'}"
    return CheckpointError(
        f"preconditioner='adam' takes a training checkpoint: a mapping, or the path of one that torch.save wrote, "
        f"with the model's state dict under one key and the optimizer's under another. {where} has no state dict "
        f"of the optimizer (a mapping with 'state' and 'param_groups'), but {held}; pass "
        '{"model": model.state_dict(), "optimizer": optimizer.state_dict()}, or record with '
        "CheckpointRecorder(second_moments=True)"
    )


def _moments(optimizer: Mapping, model: nn.Module, names: Sequence[str]) -> dict[str, SecondMoment | AdafactorMoment]:
    """Return the second moments of the named parameters, or raise CheckpointError if one is missing or in doubt."""
    state = optimizer["state"]
    kept = sorted({str(key) for entry in state.values() if isinstance(entry, Mapping) for key in entry})
    if not {"exp_avg_sq", *KEYS} & set(kept):
        raise CheckpointError(
            f"preconditioner='adam' needs second moments, 'exp_avg_sq', which the optimizer's state does not have: it "
            f"holds {listing(kept) or 'nothing'}. Expected the state of Adam, AdamW or Adafactor after one step at "
            f"least; with another optimizer pass preconditioner=None"
        )
    assigned, known = assign_parameters(optimizer, model)
    missing = [repr(name) for name in names if name not in assigned]
    if missing:
        raise CheckpointError(
            f"the optimizer does not hold {len(missing)} selected parameters: {listing(missing)}; it holds {known}. "
            f"Leave them out with params=, or pass the state of the optimizer that trains them"
        )
    entries = {name: state.get(assigned[name][0]) for name in names}
    idle = [
        repr(name)
        for name, entry in entries.items()
        if not (isinstance(entry, Mapping) and entry and float(entry.get("step", 1)) >= 1)
    ]
    if idle:
        raise CheckpointError(
            f"the optimizer has never stepped {len(idle)} selected parameters, which so have no second moments: "
            f"{listing(idle)}. Leave them out with params="
        )
    found: dict[str, SecondMoment | AdafactorMoment] = {}
    for name in names:
        entry, group, parameter = entries[name], assigned[name][1], model.get_parameter(name)
        read = _adafactor_moment if is_adafactor(entry, group) else _moment
        found[name] = read(entry, group, parameter, name)
    return found


def _moment(entry: Any, group: Any, parameter: Tensor, name: str) -> SecondMoment:
    """Read and check Adam's second moment of one parameter from its state and group."""
    key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    values, step, betas, eps = entry.get(key), entry.get("step"), group.get("betas"), group.get("eps")
    wrong = ""
    if not isinstance(values, Tensor) or step is None or betas is None or eps is None:
        wrong = f"expected {key!r} and 'step' in it, and 'betas' and 'eps' in its group"
    elif is_sharded(values) or values.is_meta:
        wrong = f"{key!r} has no values, or is a part of a sharded tensor; expected all of it"
    elif values.shape != parameter.shape:
        wrong = f"{key!r} is {list(values.shape)}, the parameter is {list(parameter.shape)}"
    elif not (0 <= float(betas[1]) < 1 and 0 <= float(eps) < math.inf):
        wrong = f"beta2 is {betas[1]} and eps is {eps}; expected 0 <= beta2 < 1 and eps >= 0"
    elif not bool((torch.isfinite(values) & (values >= 0 if eps > 0 else values > 0)).all()):
        wrong = f"{key!r} has values that are NaN, infinite or negative, or zero while eps is 0"
    if wrong:
        raise _unusable(name, wrong)
    return SecondMoment(values.detach(), float(step), float(betas[1]), float(eps))


def _adafactor_moment(entry: Any, group: Any, parameter: Tensor, name: str) -> AdafactorMoment:
    """Read and check Adafactor's second moment of one parameter from its state and group."""
    arrays, floor, wrong = stored_arrays(entry), floor_of(entry, group, parameter.dtype), ""
    if not arrays or floor is None:
        names = ", ".join(f"{rows!r} and {columns!r}" for rows, columns in FACTORS)
        wrong = f"expected {names} or 'variance' in it, and two values of 'eps' in its group"
    elif any(is_sharded(each) or each.is_meta for each in arrays):
        wrong = "second moments have no values, or are a part of a sharded tensor; expected all of them"
    elif moment_shape(entry) != tuple(parameter.shape):
        wrong = (
            f"second moments are of shape {list(moment_shape(entry) or ())}, the parameter is {list(parameter.shape)}"
        )
    elif not all(bool((each.isfinite() & (each >= 0 if floor > 0 else each > 0)).all()) for each in arrays):
        wrong = "second moments have values that are NaN, infinite or negative, or zero while the first eps is 0"
    if wrong or floor is None:
        raise _unusable(name, wrong)
    return AdafactorMoment(tuple(each.detach() for each in arrays), floor)


def _unusable(name: str, wrong: str) -> CheckpointError:
    return CheckpointError(
        f"the optimizer's state of {name!r} cannot be used: {wrong}. Pass the whole optimizer.state_dict() of Adam, "
        f"AdamW or Adafactor, saved with these weights"
    )
