"""Inputs, labels and logits as batches and models hold them, with checks that name what does not fit."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
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
        key = label_key(batch)
        if key is None:
            raise BatchError(f"{task} needs labels under one of {LABEL_KEYS}; the batch has {sorted(map(str, batch))}.")
        args, kwargs = bind_inputs(model, {k: value for k, value in batch.items() if k != key})
        return args, kwargs, _check_labels(batch[key], task)
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        *inputs, labels = batch
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return (), dict(inputs[0]), _check_labels(labels, task)
        return tuple(inputs), {}, _check_labels(labels, task)
    raise BatchError(
        f"{task} expects a batch (inputs, labels) or a mapping with labels; got {type(batch).__name__}. For other "
        f"batches pass task=a function (model, batch) -> loss [B]."
    )


def as_mapping(batch: Batch) -> Batch:
    """Return a dataclass as a mapping of its fields; any other batch is returned unchanged."""
    if isinstance(batch, Mapping) or isinstance(batch, type) or not dataclasses.is_dataclass(batch):
        return batch
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def bind_inputs(model: nn.Module, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pass a mapping's only input by position if the model's forward has another name for it."""
    if len(kwargs) != 1:
        return (), kwargs
    parameters = inspect.signature(model.forward).parameters
    key, value = next(iter(kwargs.items()))
    is_argument = key in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return ((), kwargs) if is_argument else ((value,), {})


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
            + " Expected logits [B, num_classes] and labels [B]. For one output a pixel "
            "or token pass task=a function (model, batch) -> loss [B]."
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


def check_probabilities(labels: Shaped[Tensor, " B"]) -> None:
    """Raise `BatchError` if a label is outside [0, 1]; labels inside a transform are not checked."""
    if not is_transformed(labels) and not bool(((labels >= 0) & (labels <= 1)).all()):
        low, high = float(labels.min()), float(labels.max())
        raise BatchError(f"binary_classification expects labels in [0, 1]; got {low} to {high}.")
