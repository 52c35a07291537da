"""Adam's second moments, read from a training checkpoint, as a diagonal metric of gradients.

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
from tracer.training.checkpoints import read_source, weights_fingerprint
from tracer.training.load_state import find_state, load_state
from tracer.training.optimizer_states import assign_parameters
from tracer.training.trainer_state import OPTIMIZER, with_parameter_names
from tracer.types import Checkpoint


@dataclass(frozen=True)
class SecondMoment:
    """Adam's second moment of one parameter, after a number of steps."""

    values: Tensor  # ``exp_avg_sq``, or ``max_exp_avg_sq`` with amsgrad
    step: float
    beta2: float
    eps: float


@dataclass(frozen=True)
class TrainingCheckpoint:
    """A model's weights, and its optimizer's second moments of the selected parameters by name, or None."""

    state: dict[str, Tensor]
    moments: dict[str, SecondMoment] | None = None

    def scales(self) -> dict[str, Tensor] | None:
        """Return ``Γ^{1/2}`` of each selected parameter; float64 for float64 parameters and else float32."""
        if self.moments is None:
            return None
        found = {}
        for name, moment in self.moments.items():
            corrected = moment.values.double() / (1.0 - moment.beta2**moment.step)  # a mean that begins at zero
            scale = corrected.sqrt_().add_(moment.eps).reciprocal_().sqrt_()
            found[name] = scale.to(torch.promote_types(self.state[name].dtype, torch.float32))
        return found

    def fingerprint(self) -> str:
        """Return a digest of the weights; with second moments ``+`` and a digest of these and their settings."""
        if self.moments is None:
            return weights_fingerprint(self.state)
        # Of the moments as stored, not of Γ, whose last bit may differ between machines.
        values = {name: moment.values for name, moment in self.moments.items()}
        numbers = {
            f"{name} step, beta2, eps": torch.tensor([moment.step, moment.beta2, moment.eps], dtype=torch.float64)
            for name, moment in self.moments.items()
        }
        return f"{weights_fingerprint(self.state)}+{weights_fingerprint(values | numbers)}"


def optimizer_path(path: str | os.PathLike[str]) -> Path:
    """Return the path of the optimizer's state that belongs to the weights in a ``.safetensors`` file."""
    return Path(path).with_suffix(".optimizer.pt")


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
    if isinstance(checkpoint, (str, os.PathLike)) and Path(checkpoint).suffix == ".safetensors":
        beside = optimizer_path(checkpoint)
        if beside.exists():
            source = source._replace(value={"model": source.value, "optimizer": read_source(beside).value})
    elif isinstance(checkpoint, (str, os.PathLike)) and (Path(checkpoint) / OPTIMIZER).is_file():
        optimizer = with_parameter_names(read_source(Path(checkpoint) / OPTIMIZER).value, model)
        source = source._replace(value={"model": source.value, "optimizer": optimizer})
    value, where = source.value, source.where
    items = value.items() if isinstance(value, Mapping) else ()
    nested = {name: item for name, item in items if isinstance(item, Mapping)}
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


def _moments(optimizer: Mapping, model: nn.Module, names: Sequence[str]) -> dict[str, SecondMoment]:
    """Return the second moments of the named parameters, or raise CheckpointError if one is missing or in doubt."""
    state = optimizer["state"]
    kept = sorted({str(key) for entry in state.values() if isinstance(entry, Mapping) for key in entry})
    if "exp_avg_sq" not in kept:
        raise CheckpointError(
            f"preconditioner='adam' needs second moments, 'exp_avg_sq', which the optimizer's state does not have: it "
            f"holds {listing(kept) or 'nothing'}. Expected the state of Adam or AdamW after one step at least; with "
            f"another optimizer pass preconditioner=None"
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
    return {name: _moment(entries[name], assigned[name][1], model.get_parameter(name).shape, name) for name in names}


def _moment(entry: Any, group: Any, shape: torch.Size, name: str) -> SecondMoment:
    """Read and check the second moment of one parameter from its state and group."""
    key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    values, step, betas, eps = entry.get(key), entry.get("step"), group.get("betas"), group.get("eps")
    wrong = ""
    if not isinstance(values, Tensor) or step is None or betas is None or eps is None:
        wrong = f"expected {key!r} and 'step' in it, and 'betas' and 'eps' in its group"
    elif is_sharded(values) or values.is_meta:
        wrong = f"{key!r} has no values, or is a part of a sharded tensor; expected all of it"
    elif values.shape != shape:
        wrong = f"{key!r} is {list(values.shape)}, the parameter is {list(shape)}"
    elif not (0 <= float(betas[1]) < 1 and 0 <= float(eps) < math.inf):
        wrong = f"beta2 is {betas[1]} and eps is {eps}; expected 0 <= beta2 < 1 and eps >= 0"
    elif not bool((torch.isfinite(values) & (values >= 0 if eps > 0 else values > 0)).all()):
        wrong = f"{key!r} has values that are NaN, infinite or negative, or zero while eps is 0"
    if wrong:
        raise CheckpointError(
            f"the optimizer's state of {name!r} cannot be used: {wrong}. Pass the whole optimizer.state_dict() of Adam "
            f"or AdamW, saved with these weights"
        )
    return SecondMoment(values.detach(), float(step), float(betas[1]), float(eps))
