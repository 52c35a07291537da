"""Fit a state dict to a model: the same names, shapes and dtypes, or an error that says what differs and what to do."""

from __future__ import annotations

import re
import sys
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tracer._core.packed import is_composed, is_packed, plain_parts
from tracer._core.sharding import is_sharded
from tracer._core.text import listing
from tracer.errors import CheckpointError
from tracer.training.checkpoints import weights_fingerprint, without_extra_state
from tracer.training.key_matching import Match, match_names

_OF_ADAPTERS = re.compile(r"(^|\.)(lora_|ia3_|vera_|base_layer\.|modules_to_save\.|prompt_encoder\.)")
"""Parts of names that peft gives to adapters and to what they wrap."""


def fit_state(
    model: nn.Module, state: Mapping[str, Any], frozen: str | None = None, values: bool = True
) -> dict[str, Tensor]:
    """Return a state with exactly the model's keys, shapes and dtypes; tensors are copied only to change the dtype.

    Names may differ by what wrappers add to them. Adapters may come alone, on the model's own base, whose fingerprint
    ``frozen`` is if it is known. With ``values=False`` only names, shapes and dtypes are compared.
    """
    own = _ModelState(model)
    given = {str(key): value for key, value in without_extra_state(state).items()}
    match = _agreeing(own, given)
    if match.disagreements:
        renamed = {match.names.get(key, key.removeprefix(match.removed)): given[key] for key in given}
        converted = own.converted(renamed) if len(renamed) == len(given) else None  # no two may become one
        if converted is not None:
            given, match = converted, match_names(own.names, own.required, converted)
    found: dict[str, dict[str, Any]] = {}  # by canonical name
    for name, key in match.names.items():
        found.setdefault(key, {})[name] = given[name]
    _check_fit(own, found, given, match)
    if values:
        own.check_values(found, frozen)
    fitted = {}
    for key, value in own.tensors.items():
        given_one = found.get(own.names[key])
        fitted[key] = (value if given_one is None else next(iter(given_one.values()))).detach().to(value.dtype)
    return fitted


def adapter_models(model: nn.Module) -> dict[str, nn.Module]:
    """Return the outermost modules with adapters of peft by their prefixes in names."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if hasattr(module, "peft_config") and not any(name.startswith(outer) for outer in found):
            found[name and name + "."] = module
    return found if "peft" in sys.modules else {}


def frozen_fingerprint(model: nn.Module, given: Collection[str]) -> str:
    """Return a digest of the model's parameters that a checkpoint of its adapters does not have."""
    left_out = {name: value for name, value in model.named_parameters() if name not in given}
    return weights_fingerprint(left_out, torch.float32)


class _ModelState:
    """The names of a model's state dict, and its entries."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.entries = without_extra_state(model.state_dict(keep_vars=True))
        self.tensors = {key: value for key, value in self.entries.items() if isinstance(value, Tensor)}
        lazy = [repr(key) for key, value in self.tensors.items() if nn.parameter.is_lazy(value)]
        if lazy:
            raise CheckpointError(
                f"the model has parameters without a shape: {listing(lazy)}; run one forward pass first"
            )
        first: dict[int, str] = {}  # safetensors files have one of the keys that a model ties
        self.names = {key: first.setdefault(id(value), key) for key, value in self.entries.items()}
        self.required = {*self.names.values()}
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        buffers = dict(model.named_buffers(remove_duplicate=False))
        # Buffers that checkpoints leave out, packed weights and entries with their scales stay the model's own.
        lent = {*(key for key, value in self.parameters.items() if not is_packed(value)), *buffers}
        self.held = {key: value for key, value in self.entries.items() if key not in lent}
        self.held |= {key: value for key, value in buffers.items() if key not in self.entries}
        self.names |= {key: key for key in self.held}
        self.all = {**self.entries, **self.held}

    def adapters(self) -> tuple[dict[str, str], set[str]]:
        """Return the names of a checkpoint of adapters alone, as peft shortens them, and the required ones."""
        names = {key: one for key, one in self.names.items() if key not in self.parameters}
        required: set[str] = set()
        for prefix, module in adapter_models(self.model).items():
            own = {key.removeprefix(prefix): one for key, one in self.entries.items() if key.startswith(prefix)}
            places = {id(value): self.names[prefix + key] for key, value in own.items()}
            active: Any = getattr(module, "active_adapters", ())
            active = active() if callable(active) else active
            # A file does not name its adapter. Embeddings are in it if adapters are on them.
            for embeddings in (False, True) if len(active) == 1 else ():
                short = sys.modules["peft"].get_peft_model_state_dict(
                    module, own, adapter_name=active[0], save_embedding_layers=embeddings
                )
                found = {prefix + key: places[id(value)] for key, value in short.items() if id(value) in places}
                required = required or {*found.values()}
                names |= found | {key: key for key in found.values()}
        trained = {self.names[key] for key, value in self.parameters.items() if value.requires_grad}
        return names | {key: key for key in trained}, required | trained

    def converted(self, state: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a state of an older version of the model after its own hooks for loading; None if it does not fit."""
        if any(isinstance(module, torch.jit.ScriptModule) for module in self.model.modules()):
            return None
        twin = _twin(self.model, {})
        tied = {key: state[self.names[key]] for key in self.entries if self.names[key] in state}
        try:
            nn.Module.load_state_dict(twin, OrderedDict({**tied, **state}), strict=True, assign=True)
        except Exception:  # whatever hooks raise; the names that disagree are told instead
            return None
        return without_extra_state(twin.state_dict(keep_vars=True))

    def check_values(self, found: Mapping[str, Mapping[str, Any]], frozen: str | None) -> None:
        """Raise CheckpointError if tied values, or values that cannot be lent, differ."""
        for key, given in found.items():
            names, (first, *others) = list(given), given.values()
            if not all(_equal(first, other) for other in others):
                raise CheckpointError(
                    f"the model ties {names[0]!r} and {names[1]!r}, the checkpoint has different values for them: it "
                    "is of a model that does not tie them; build the model as it was trained"
                )
            if key in self.held and not _equal(first, self.held[key]):
                raise CheckpointError(
                    f"the checkpoint has another value of {names[0]!r} than the model, in which it is a packed weight "
                    "of integers, or neither a parameter nor a buffer of state dicts, and cannot be exchanged: load "
                    "the checkpoint into the model first, or build the model as it was trained"
                )
        if frozen is not None and frozen != frozen_fingerprint(self.model, found):
            raise CheckpointError(
                "the checkpoint was recorded without the frozen parameters, and the model has other values of them "
                "than it had in training; load the base weights into the model first, in the dtype of the training"
            )


def _agreeing(own: _ModelState, given: Mapping[str, Any]) -> Match:
    """Return how the names match, by the complete model or by its adapters alone."""
    match = match_names(own.names, own.required, given)
    if match.missing and adapter_models(own.model):
        alone = match_names(*own.adapters(), given)
        match = alone if alone.disagreements < match.disagreements else match
    patterns = getattr(own.model, "_keys_to_ignore_on_load_unexpected", None) or ()  # of transformers
    ignored = [key for key in match.unexpected if any(re.search(pattern, key) for pattern in patterns)]
    return replace(match, unexpected=[key for key in match.unexpected if key not in ignored])


def _check_fit(own: _ModelState, found: Mapping[str, Mapping[str, Any]], given: Mapping, match: Match) -> None:
    """Raise CheckpointError if names, shapes or kinds of dtype differ, or tensors have no values here."""
    problems = []
    missing = [key for key in own.entries if own.names[key] in match.missing]
    for keys, entries, what in ((missing, own.entries, "missing"), (match.unexpected, given, "unexpected")):
        if keys:
            problems.append(f"{len(keys)} keys are {what}: {listing([described(key, entries[key]) for key in keys])}")
    pairs = [(name, value, own.all[key]) for key, values in found.items() for name, value in values.items()]
    parts = [repr(name) for name, value, _ in pairs if isinstance(value, Tensor) and is_sharded(value)]
    if parts:
        raise CheckpointError(
            f"the checkpoint has sharded tensors, of which each process holds a part: {listing(parts)}; expected a "
            "full state dict; gather it on all ranks: {key: value.full_tensor() if isinstance(value, DTensor) else "
            "value for key, value in state.items()}, or pass the path of one that was saved"
        )
    meta = [repr(name) for name, value, _ in pairs if isinstance(value, Tensor) and value.is_meta]
    if meta:
        raise CheckpointError(
            f"the checkpoint has tensors without values, on the meta device: {listing(meta)}; load it fully"
        )
    reshaped = [
        f"{name!r} is {_form(value, shape)}, the model has {_form(there, shape)}"
        for name, value, there in pairs
        for shape in (True, False)
        if (_form(value, shape) != _form(there, shape) if shape else _kind(value) > _kind(there))
    ]
    if reshaped:
        problems.append(f"{len(reshaped)} tensors do not fit: {listing(reshaped)}")
    if problems:
        hint = _hint(own, match, given)
        raise CheckpointError("the checkpoint does not fit the model. " + ". ".join(problems) + f". To do: {hint}")


def described(key: Any, value: Any) -> str:
    """Return a key, and the type of its value if it is no tensor, for an error."""
    return repr(key) if isinstance(value, Tensor) else f"{key!r} ({type(value).__name__})"


def _form(value: Any, shape: bool) -> str:
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}"
    return str(list(value.shape)) if shape else str(value.dtype)


def _kind(value: Any) -> int:
    """Return a rank of a value's kind of dtype; a kind cannot be cast to one of a lower rank."""
    if not isinstance(value, Tensor):
        return 0
    return 3 if value.is_quantized else 2 if value.is_complex() else int(value.is_floating_point())


def _hint(own: _ModelState, match: Match, given: Mapping[str, Any]) -> str:
    """Return what to do about names that differ."""
    prefix = match.removed
    if any(map(_OF_ADAPTERS.search, match.unexpected)) and not adapter_models(own.model):
        return (
            "the checkpoint holds adapters of peft and the model has none; pass the model with them, for example "
            "peft.PeftModel.from_pretrained(model, folder)"
        )
    if match.names and not match.missing and prefix and not any(key.startswith(prefix) for key in match.unexpected):
        only = f"{{key: value for key, value in state.items() if key.startswith({prefix!r})}}"
        return (
            f"the model's names begin with {prefix!r} in the checkpoint; pass {only}, or checkpoint_key={prefix[:-1]!r}"
        )
    if match.unexpected and not match.missing and not prefix:
        only = "{key: value for key, value in state.items() if key in model.state_dict()}"
        return f"if the model has no use for these, pass {only}; else build the model as it was trained"
    if match.missing and not match.unexpected and not prefix:
        if all(key in own.parameters and not own.parameters[key].requires_grad for key in match.missing):
            return "if these frozen parameters are the model's own, pass {**model.state_dict(), **state}"
    return "build the model as it was trained, or pass its own checkpoint"


def _equal(one: Any, other: Any) -> bool:
    """Return whether entries of state dicts are equal: tensors, also quantized ones, and tuples of such."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.is_quantized != other.is_quantized or one.shape != other.shape:
            return False
        if is_composed(one) or is_composed(other):
            ones, others = dict(plain_parts("", one)), dict(plain_parts("", other))
            return ones.keys() == others.keys() and all(_equal(ones[name], others[name]) for name in ones)
        if one.is_quantized:
            return one.dtype == other.dtype and torch.equal(one.dequantize(), other.dequantize())
        return torch.equal(one, other.to(one.device, one.dtype))
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)


def _twin(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Return a module with the same parameters and buffers, which may be replaced in it without changing this one."""
    if id(module) not in made:
        twin = made[id(module)] = module.__class__.__new__(module.__class__)
        twin.__dict__.update(module.__dict__)
        for name in ("_parameters", "_buffers", "_modules"):
            twin.__dict__[name] = dict(module.__dict__[name])
        twin.__dict__["_non_persistent_buffers_set"] = set(module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else _twin(child, made)
    return made[id(module)]
