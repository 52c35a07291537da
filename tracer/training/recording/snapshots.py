"""Snapshots of a model and its optimizer during training: checks, state dicts, second moments, files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tracer._core.files import partial_path, sync, write_whole
from tracer._core.sharding import fsdp_modules, is_sharded
from tracer.errors import CheckpointError, InputError, InputTypeError
from tracer.training.adafactor import KEYS
from tracer.training.adam import optimizer_path
from tracer.training.checkpoints import FROZEN
from tracer.training.fit_state import adapter_models, frozen_fingerprint


def check_whole(model: nn.Module) -> nn.Module:
    """Return the model, or raise InputError if it is divided among processes or has parameters without shapes."""
    if fsdp_modules(model) or any(is_sharded(parameter) for parameter in model.parameters()):
        raise InputError(
            "model is sharded, and each process holds a part of it; CheckpointRecorder needs the whole model. Gather "
            "it yourself at the moments that you choose, on all ranks: torch.distributed.checkpoint.state_dict."
            "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)), save it "
            "on rank 0, and pass attribute the paths with the learning rates"
        )
    return model


def check_optimizer(optimizer: Any, model: nn.Module, second_moments: bool) -> torch.optim.Optimizer:
    """Return the torch optimizer of a model's parameters, without the wrappers that hold it as ``.optimizer``."""
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InputTypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InputError(
            "optimizer is LBFGS, whose step is not its learning rate times a gradient; sums of its rates mean nothing. "
            "Save checkpoints yourself, and pass attribute learning rates of your choice."
        )
    groups = optimizer.param_groups
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in groups for parameter in group["params"]):
        raise InputError(
            "optimizer holds none of the model's parameters; pass the model that it trains, and the same objects: "
            "optimizers are made after the model was moved or copied."
        )
    if any(group.get("lr") is None for group in groups):
        raise InputError(
            f"optimizer has no learning rates ({type(optimizer).__name__} sets its steps itself); TracIn needs them. "
            f"Pass lr= to the optimizer, or save checkpoints yourself and pass attribute learning rates of your choice."
        )
    known = {"betas", "decay_rate", "beta2_decay"}  # of Adam, and of Adafactor in transformers and torch
    if second_moments and not all(known & group.keys() and "eps" in group for group in groups):
        raise InputError(
            f"second_moments=True came with {type(optimizer).__name__}, which keeps none; expected Adam, AdamW or "
            f"Adafactor. Pass second_moments=False."
        )
    return optimizer


def parameter_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module, before: Sequence[Sequence[str]] = ()
) -> tuple[list[list[str]], list[str]]:
    """Return the trained parameters in each group, also those frozen since ``before``, and the ones in no group."""
    named = {id(parameter): (name, parameter) for name, parameter in model.named_parameters()}
    groups = []
    for number, group in enumerate(optimizer.param_groups):
        known = set(before[number]) if number < len(before) else set()
        held = [named.pop(id(parameter)) for parameter in group["params"] if id(parameter) in named]
        groups.append([name for name, parameter in held if parameter.requires_grad or name in known])
    return groups, [name for name, parameter in named.values() if parameter.requires_grad]


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict for safetensors: on the CPU, contiguous, tied parameters under their first name."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    memories: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor) or name.endswith("_extra_state") or id(value) in seen:
            continue  # `fit_state` takes the first name for all tied ones
        seen.add(id(value))
        value = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        memory = value.untyped_storage().data_ptr()
        state[name] = value.clone() if memory in memories else value  # views of one memory are refused by the format
        memories.add(memory)
    return state


def shapes_of(state: dict[str, Tensor]) -> dict[str, list[int]]:
    """Return the shapes of a state dict's values as JSON values."""
    return {name: list(value.shape) for name, value in state.items()}


def moments_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    """Return an optimizer's second moments in the form of its state dict, with parameters numbered by name."""
    # get_optimizer_state_dict of torch.distributed.checkpoint copies all states, and fails if the optimizer has
    # parameters of another model.
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    state: dict[str, dict[str, Any]] = {}
    groups = []
    for group in optimizer.param_groups:
        held = {named[id(one)]: optimizer.state.get(one, {}) for one in group["params"] if id(one) in named}
        key = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
        for name, entry in held.items():
            moments = {own: entry[own].detach().cpu() for own in KEYS if own in entry}
            if key in entry:
                moments |= dict.fromkeys(("exp_avg_sq", key), entry[key].detach().cpu())
            if moments:
                state[name] = {"step": float(entry["step"]), **moments}
        settings: dict[str, Any] = {own: group[own] for own in ("eps", "decay_rate", "beta2_decay") if own in group}
        if "betas" in group:
            settings["betas"] = tuple(map(float, group["betas"]))
        groups.append({"params": list(held), "amsgrad": bool(group.get("amsgrad")), **settings})
    if not state:
        raise CheckpointError(
            f"second_moments=True came with {type(optimizer).__name__}, whose state has no second moments after a "
            f"step; expected Adam, AdamW or Adafactor, whole in this process. Pass second_moments=False"
        )
    return {"state": state, "param_groups": groups}


def without_base(
    state: dict[str, Tensor], model: nn.Module, groups: Sequence[Sequence[str]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a state without the frozen base of adapters, and metadata with the base's fingerprint."""
    if not adapter_models(model):
        return state, {}
    trained = {name for group in groups for name in group}
    frozen = {name for name, value in model.named_parameters() if not value.requires_grad} - trained
    kept = {name: value for name, value in state.items() if name not in frozen}
    return kept, {FROZEN: frozen_fingerprint(model, kept)}


def write_checkpoint(
    path: Path, state: dict[str, Tensor], metadata: dict[str, str], moments: dict[str, Any] | None = None
) -> None:
    """Write a state dict to a safetensors file, and second moments to a file next to it, each whole or not at all."""
    if moments is not None:
        write_whole(optimizer_path(path), lambda file: torch.save(moments, file))
    # No second copy of the weights in memory. The file's name becomes durable when the directory is synced, which
    # writing the recording that names it does.
    partial = partial_path(path.parent)
    try:
        save_file(state, partial, metadata)
        sync(partial)
        partial.replace(path)
    except SafetensorError as error:
        if "I/O error" in str(error):
            raise OSError(str(error)) from error
        raise CheckpointError(f"the model's state cannot be written as safetensors: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
