"""Inputs, labels and logits, as batches and models hold them, with the checks that tell what does not fit."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tracer.errors import BatchError
from tracer.types import Batch

LABEL_KEYS = ("labels", "label", "targets", "target", "y")
"""Where a mapping holds its labels; the first one that is there counts."""


def split_labels(model: nn.Module, batch: Batch, name: str) -> tuple[tuple, dict[str, Any], Tensor]:
    """Split a batch into the model's arguments and the labels.

    Args:
        model: The model, whose forward tells whether a mapping's keys are its arguments.
        batch: ``(*inputs, labels)``, ``(mapping, labels)``, or a mapping with a key of `LABEL_KEYS`.
        name: The task's name, for messages.

    Returns:
        Positional arguments, keyword arguments, labels.

    Raises:
        BatchError: There are no labels.
    """
    batch = as_mapping(batch)
    if isinstance(batch, Mapping):
        key = next((key for key in LABEL_KEYS if key in batch), None)
        if key is None:
            raise BatchError(f"{name} needs labels under one of {LABEL_KEYS}; the batch has {sorted(map(str, batch))}.")
        args, kwargs = bind_inputs(model, {k: value for k, value in batch.items() if k != key})
        return args, kwargs, _as_labels(batch[key], name)
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        *inputs, labels = batch
        if len(inputs) == 1 and isinstance(inputs[0], Mapping):
            return (), dict(inputs[0]), _as_labels(labels, name)
        return tuple(inputs), {}, _as_labels(labels, name)
    raise BatchError(
        f"{name} expects a batch (inputs, labels) or a mapping with labels; got {type(batch).__name__}. For other "
        f"batches pass task=a function (model, batch) -> loss [B]."
    )


def as_mapping(batch: Batch) -> Batch:
    """Return a dataclass as a mapping of its fields, and anything else as it is."""
    if isinstance(batch, Mapping) or isinstance(batch, type) or not dataclasses.is_dataclass(batch):
        return batch
    return {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}


def bind_inputs(model: nn.Module, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Pass a mapping's only input by position when the model's forward has another name for it."""
    if len(kwargs) != 1:
        return (), kwargs
    parameters = inspect.signature(model.forward).parameters
    key, value = next(iter(kwargs.items()))
    takes = key in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return ((), kwargs) if takes else ((value,), {})


def logits_of(output: Any) -> Tensor:
    """Return the tensor that a model's output stands for: itself, its ``logits``, or the first of a tuple.

    Args:
        output: What the model returned.

    Returns:
        The tensor.

    Raises:
        BatchError: There is no tensor to be found.
    """
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


def promote(values: Tensor) -> Tensor:
    """Return half-precision values as float32, so that losses are taken in float32."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _as_labels(labels: Any, name: str) -> Tensor:
    if not isinstance(labels, Tensor):
        raise BatchError(f"{name} expects labels as a tensor [B]; got {type(labels).__name__}.")
    return labels


def is_transformed(values: Tensor) -> bool:
    """Tell whether values cannot be inspected, being inside a torch.func transform."""
    return torch.func.debug_unwrap(values, recurse=False) is not values


def attended_labels(tokens: Tensor, mask: Tensor) -> Tensor:
    """Return tokens as labels, without padding and without tokens that only padding could predict (left padding)."""
    attended = mask != 0
    before = torch.cat([attended[:, :1], attended[:, :-1]], dim=1)
    return tokens.masked_fill(~(attended & before), -100)


def shapes_message(name: str, output: Tensor, labels: Tensor) -> str:
    """Return the sentence that says which shapes came."""
    return f"{name}: the model's output has shape {tuple(output.shape)} and the labels {tuple(labels.shape)}."


def check_classes(logits: Tensor, labels: Tensor, name: str) -> None:
    """Check logits ``[B, C]`` and class indices ``[B]``.

    Args:
        logits: The logits.
        labels: The labels; their values are checked where they can be inspected.
        name: The task's name, for messages.

    Raises:
        BatchError: Shapes, dtypes or values do not fit.
    """
    if logits.ndim != 2 or labels.ndim != 1 or logits.shape[0] != labels.shape[0]:
        raise BatchError(
            shapes_message(name, logits, labels)
            + " Expected logits [B, num_classes] and labels [B]. For one output a pixel "
            "or token pass task=a function (model, batch) -> loss [B]."
        )
    if logits.shape[1] < 2:
        raise BatchError(f"{name} needs two logits a sample at least; for one use task='binary_classification'.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise BatchError(
            f"{name} expects class indices as integers; the labels are {labels.dtype}. For float labels of two "
            f"classes use task='binary_classification'; for soft labels a function (model, batch) -> loss [B]."
        )
    if not is_transformed(labels):
        check_label_range(labels, logits.shape[1], name)


def check_label_range(labels: Tensor, num_classes: int, name: str) -> None:
    """Check that class indices lie in ``0...num_classes - 1``.

    Args:
        labels: ``[n]``, integers.
        num_classes: The number of classes.
        name: The task's name, for messages.

    Raises:
        BatchError: One does not.
    """
    bad = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(bad):
        raise BatchError(
            f"{name}: label {int(labels[bad[0]])} at position {int(bad[0])} of the batch is outside 0..."
            f"{num_classes - 1} ({len(bad)} such labels); the model has {num_classes} classes."
        )


def one_number_a_row(output: Tensor, labels: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return outputs and labels of one number a sample, ``[B]`` or ``[B, 1]``, as ``[B]`` each.

    Args:
        output: The model's output.
        labels: The labels.
        name: The task's name, for messages.

    Returns:
        Both.

    Raises:
        BatchError: They are not one number a sample, or of different numbers of samples.
    """
    rows = output.shape[0] if output.ndim else 0
    if rows == 0 or output.numel() != rows or labels.numel() != rows:
        raise BatchError(shapes_message(name, output, labels) + " Expected one number a sample: [B] or [B, 1].")
    return output.reshape(rows), labels.reshape(rows)


def check_probabilities(labels: Tensor) -> None:
    """Check that labels lie in [0, 1], where they can be inspected.

    Args:
        labels: The labels.

    Raises:
        BatchError: One does not.
    """
    if not is_transformed(labels) and not bool(((labels >= 0) & (labels <= 1)).all()):
        low, high = float(labels.min()), float(labels.max())
        raise BatchError(f"binary_classification expects labels in [0, 1]; got {low} to {high}.")
