"""Inputs, labels and logits as batches and models hold them, with checks that name what does not fit."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor, nn

from tracer.errors import BatchError
from tracer.types import Batch

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Keys under which a mapping may hold its labels; the first one present counts."""


def label_key(batch: Mapping) -> str | None:
    """Return the key of a mapping's labels, or None."""
    return next((key for key in LABEL_KEYS if key in batch), None)


def split_labels(model: nn.Module, batch: Batch, task: str) -> tuple[tuple, dict[str, Any], Tensor]:
    """Split ``(*inputs, labels)``, ``(mapping, labels)`` or a mapping into positional and keyword inputs and labels."""
    batch = as_mapping(batch)
    if isinstance(batch, Mapping):
        kwargs, labels = split_mapping(model, batch, task)
        if labels is None:
            raise BatchError(f"{task} needs labels under one of {LABEL_KEYS}; the batch has {sorted(map(str, batch))}.")
        args, kwargs = bind_inputs(model, kwargs)
        return args, kwargs, _check_labels(labels, task)
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        *inputs, labels = batch
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            args, kwargs = bind_inputs(model, dict(inputs[0]))
            return args, kwargs, _check_labels(labels, task)
        if (named := _tokenized(model, inputs, task)) is not None:
            return (), named, _check_labels(labels, task)
        if len(inputs) > 1:
            _check_positional(model, inputs, task)
        return tuple(inputs), {}, _check_labels(labels, task)
    raise BatchError(
        f"{task} expects a batch (inputs, labels) or a mapping with labels; got {type(batch).__name__}. For other "
        f"batches pass task=a function (model, batch) -> loss [B]."
    )


def split_mapping(model: nn.Module, batch: Mapping, task: str) -> tuple[dict[str, Any], Any]:
    """Split a mapping into the model's inputs and labels, or None if it has none; refuse two columns of labels."""
    keys = [key for key in LABEL_KEYS if key in batch]
    if len(keys) > 1:
        accepted = _parameters(model)
        unknown = [key for key in keys[1:] if accepted is not None and key not in accepted]
        if unknown:
            raise BatchError(
                f"{task}: the batch may have its labels under any of {keys}, and {type(model).__name__}.forward does "
                f"not take {unknown}; pass one of them only, under 'labels'."
            )
    labels = batch[keys[0]] if keys else None
    return {key: value for key, value in batch.items() if key not in keys[:1]}, labels


def as_mapping(batch: Batch) -> Batch:
    """Return a dataclass as a mapping of its fields; any other batch is returned unchanged."""
    if isinstance(batch, Mapping) or isinstance(batch, type) or not dataclasses.is_dataclass(batch):
        return batch
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def _signature(model: Any) -> inspect.Signature:
    """Return the signature of a model's forward, or of the model that an adapter of peft passes all arguments to."""
    signature = inspect.signature(model.forward if isinstance(model, nn.Module) else model)
    passes_all = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    return (
        inspect.signature(model.get_base_model().forward)
        if passes_all and hasattr(model, "get_base_model")
        else signature
    )


def _parameters(model: nn.Module) -> dict[str, inspect.Parameter] | None:
    """Return the parameters of a model's forward; None if it takes any keywords."""
    parameters = dict(_signature(model).parameters)
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else parameters


def forward_names(model: nn.Module) -> frozenset[str] | None:
    """Return the names of the arguments of a model's forward; None if it has no names."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(name for name, p in _signature(model).parameters.items() if p.kind in named) or None


def bind_inputs(model: nn.Module, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Return a mapping as arguments of the forward: a single entry also by position; unknown ones are dropped."""
    accepted = _parameters(model)
    if accepted is None:
        return (), kwargs
    if len(kwargs) == 1 and not kwargs.keys() & accepted.keys():
        return tuple(kwargs.values()), {}
    named = {key: value for key, value in kwargs.items() if key in accepted}
    missing = [name for name, p in accepted.items() if _is_required(p) and name not in named]
    if missing or not named:
        raise BatchError(
            f"{type(model).__name__}.forward takes {list(accepted)}, and the batch has {sorted(map(str, kwargs))} "
            f"beside its labels{f', without {missing}' if missing else ''}; name the entries as the model does."
        )
    return (), named


def _is_required(parameter: inspect.Parameter) -> bool:
    return parameter.default is parameter.empty and parameter.kind in (
        parameter.POSITIONAL_ONLY,
        parameter.POSITIONAL_OR_KEYWORD,
        parameter.KEYWORD_ONLY,
    )


def _check_positional(model: nn.Module, inputs: Sequence[Any], task: str) -> None:
    """Raise `BatchError` unless a tuple's inputs are as many as the forward needs, or one more that is its mask."""
    parameters = list(_signature(model).parameters.values())
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(_is_required(p) for p in parameters)
    is_mask = len(inputs) == 2 and len(names) > 1 and "mask" in names[1] and _looks_like_mask(*inputs)
    if len(inputs) != required and not is_mask:
        raise BatchError(
            f"{task}: a batch of {len(inputs) + 1} values would give {type(model).__name__}.forward{tuple(names)} the "
            f"first {len(inputs)} by position and take the last for the labels, which is a guess (is one of them an "
            f"index, a mask, token types?). Pass (inputs, labels), or a mapping with the names of the model's inputs "
            f"and 'labels': {{'{names[0] if names else 'x'}': ..., 'labels': ...}}."
        )


_TOKENIZED = ("input_ids", "token_type_ids", "attention_mask")


def _tokenized(model: nn.Module, inputs: Sequence[Any], task: str) -> dict[str, Any] | None:
    """Return three inputs by the names of a tokenizer's values, in its order, if the forward has these names."""
    # Tokenizers and TRAK have the token types second, many forwards the mask: positions would swap them silently.
    if len(inputs) != len(_TOKENIZED) or not _signature(model).parameters.keys() >= set(_TOKENIZED):
        return None
    named = dict(zip(_TOKENIZED, inputs, strict=True))
    if not _looks_like_mask(named["input_ids"], named["attention_mask"]):
        raise BatchError(
            f"{task}: a batch of 4 values for {type(model).__name__} is taken as {(*_TOKENIZED, 'labels')}, and the "
            f"third one is no attention mask (1 for tokens, 0 for padding, of the shape of input_ids). Pass a mapping "
            f"with the names of the model's inputs and 'labels'."
        )
    return named


def _looks_like_mask(first: Any, mask: Any) -> bool:
    """Return whether a value is 0 or 1 at each position of an input, and 0 at equal ones: padding, no token types."""
    if not (isinstance(first, Tensor) and isinstance(mask, Tensor)) or mask.ndim < 2 or mask.shape != first.shape[:2]:
        return False
    if is_transformed(mask):
        return True
    padding = first[mask == 0]
    return bool(((mask == 0) | (mask == 1)).all()) and bool((padding == padding[:1]).all()) and bool(mask.any())


def logits_of(output: Any) -> Tensor:
    """Return the tensor in a model's output: itself, its ``logits``, or the first item of a tuple."""
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise BatchError(
            f"The model returned {type(output).__name__} without a tensor 'logits'; expected a tensor, an object with "
            f"logits, or a tuple that begins with them. For other outputs pass task=a function (model, batch) -> loss."
        )
    return found


def check_logits(logits: Tensor, task: str) -> None:
    """Raise `BatchError` if a model's output is one of probabilities, by the operation that made it or by its sums."""
    rows = logits.detach()
    kind, changed = _operation(logits.grad_fn)
    if changed and (is_transformed(rows) or not bool(((rows >= 0) & (rows <= 1)).all())):
        kind = None  # a multiple may be a logit
    if kind is None and rows.ndim == 2 and min(rows.shape) > 1 and not is_transformed(rows):
        sums = (rows.sum(1) - 1).abs() <= (1e-2 if rows.dtype in (torch.float16, torch.bfloat16) else 1e-5)
        kind = "normalized" if bool((sums & (rows >= 0).all(1)).all()) else None
    if kind is not None:
        raise BatchError(
            f"{task}: the model's output is one of probabilities ({kind}), where logits are expected. Pass "
            f"task=tracer.Classification(from_probabilities=True) or tracer.BinaryClassification("
            f"from_probabilities=True), whose losses are those of nn.NLLLoss and nn.BCELoss, or a model without its "
            f"last layer. If training took these values for logits, pass a function (model, batch) -> loss [B]."
        )


_SAME_VALUES = (
    "Alias AsStrided Clamp ClampMax ClampMin Clone Expand Hardtanh Index Permute ReshapeAlias Select Slice Squeeze T "
    "ToCopy Transpose UnsafeView Unsqueeze View"
).split()
_PROBABILITIES = ("Hardsigmoid", "LogSigmoid", "Sigmoid", "Softmax")


_WITH_NUMBERS = ("Add", "Div", "Mul", "Neg", "Rsub", "Sub")


def _operation(node: Any) -> tuple[str | None, bool]:
    """Return the operation that made probabilities, and whether numbers were added or multiplied since.

    Views of the values do not matter; for any other values it is None.
    """
    names: list[str] = []
    while node is not None:
        name = node.name().rstrip("0123456789").removesuffix("Backward")
        names.append(name)
        parents = [each for each, _ in node.next_functions if each is not None]
        changed = any(each in _WITH_NUMBERS for each in names)
        if name == "Exp" and names[-3:-1] == ["Reciprocal", "Add"]:
            return "1 / (1 + exp)", True
        if name == "Tanh" and {"Add", "Rsub", "Sub"} & set(names) and {"Div", "Mul"} & set(names):
            return "(tanh + 1) / 2", True  # soft caps of logits only multiply
        if name in _PROBABILITIES and "Reciprocal" not in names:
            return name.lower(), changed
        if name not in (*_SAME_VALUES, *_WITH_NUMBERS, "Reciprocal") or len(parents) != 1:
            return None, False
        node = parents[0]
    return None, False


def upcast_half(values: Tensor) -> Tensor:
    """Return half-precision values as float32, so that losses are computed in float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _check_labels(labels: Any, task: str) -> Tensor:
    if not isinstance(labels, Tensor):
        raise BatchError(f"{task} expects labels as a tensor [B]; got {type(labels).__name__}.")
    return labels


def is_transformed(values: Tensor) -> bool:
    """Return whether the values are inside a torch.func transform, so that they cannot be inspected."""
    return torch.func.debug_unwrap(values, recurse=False) is not values


def attended_labels(tokens: Integer[Tensor, "B T"], mask: Shaped[Tensor, "B T"]) -> Integer[Tensor, "B T"]:
    """Return tokens as labels, with -100 for padding."""
    attended = mask != 0
    # With padding on the left, the first token of a sequence would be predicted from padding alone: no label either.
    before = torch.cat([attended[:, :1], attended[:, :-1]], dim=1)
    return tokens.masked_fill(~(attended & before), -100)


def shapes_message(task: str, output: Tensor, labels: Tensor) -> str:
    """Return the sentence of an error that states the shapes of output and labels."""
    return f"{task}: the model's output has shape {tuple(output.shape)} and the labels {tuple(labels.shape)}."


def check_classes(logits: Tensor, labels: Tensor, task: str) -> None:
    """Raise `BatchError` unless these are logits ``[B, C]`` and class indices ``[B]``."""
    if logits.ndim != 2 or labels.ndim != 1 or logits.shape[0] != labels.shape[0]:
        raise BatchError(
            shapes_message(task, logits, labels)
            + " Expected logits [B, num_classes] and class indices [B], of one-hot labels labels.argmax(1). For one "
            "output a pixel or token pass task=a function (model, batch) -> loss [B]."
        )
    if logits.shape[1] < 2:
        raise BatchError(
            f"{task} expects two or more logits for each example, got one; use task='binary_classification'."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise BatchError(
            f"{task} expects class indices as integers; the labels are {labels.dtype}. For float labels of two "
            f"classes use task='binary_classification'; for soft labels a function (model, batch) -> loss [B]."
        )
    if not is_transformed(labels):
        check_label_range(labels, logits.shape[1], task)


def check_label_range(labels: Integer[Tensor, " n"], num_classes: int, task: str) -> None:
    """Raise `BatchError` if a class index is outside ``0...num_classes - 1``."""
    bad = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(bad):
        raise BatchError(
            f"{task}: label {int(labels[bad[0]])} at position {int(bad[0])} of the batch is outside 0..."
            f"{num_classes - 1} ({len(bad)} such labels); the model has {num_classes} classes."
        )


def flatten_scalars(output: Tensor, labels: Tensor, task: str) -> tuple[Float[Tensor, " B"], Shaped[Tensor, " B"]]:
    """Return outputs and labels of one number for each example, ``[B]`` or ``[B, 1]``, as ``[B]``."""
    batch_size = output.shape[0] if output.ndim else 0
    if batch_size == 0 or output.numel() != batch_size or labels.numel() != batch_size:
        raise BatchError(shapes_message(task, output, labels) + " Expected one number for each example: [B] or [B, 1].")
    return output.reshape(batch_size), labels.reshape(batch_size)


def check_probabilities(values: Shaped[Tensor, "B ..."], what: str, task: str) -> None:
    """Raise `BatchError` if a value is outside [0, 1]; values inside a transform are not checked."""
    if not is_transformed(values) and not bool(((values >= 0) & (values <= 1)).all()):
        low, high = values.min().item(), values.max().item()
        raise BatchError(f"{task} expects {what} in [0, 1]; got {low} to {high}.")
