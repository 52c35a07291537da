"""Capture: one forward and one backward give every layer's input and output gradient, for all samples at once.

Forward hooks keep each layer's input and the autograd edge of its output (an edge, not the tensor: an activation that
works in place replaces the tensor's history). One ``torch.autograd.grad`` of the outputs' sum with respect to these
edges then gives all output gradients; batch gradients of weights are never computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from tracer.errors import BatchError
from tracer.factors import DenseGradient, PerSampleGradient, add_gradients
from tracer.gradients.attention import CapturedAttention, attending
from tracer.gradients.failure import CaptureFailed
from tracer.gradients.layers import LayerCall, RegisteredRule
from tracer.tasks import Task
from tracer.types import Batch, SampleOutputs


class Layout(Enum):
    """Where a layer's inputs and output have the samples.

    Attributes:
        ROWS: In the first dimension, maybe several rows a sample.
        SECOND: In the second dimension: sequence first.
        SHARED: Nowhere: one output for all samples (positions, prototypes).
    """

    ROWS = "rows"
    SECOND = "second"
    SHARED = "shared"


@dataclass(frozen=True)
class CapturedLayer:
    """A layer whose parameters are captured.

    Attributes:
        name: Its name in the model.
        module: The layer.
        rule: The rule of its type.
        parameters: From the layer's own parameter names to the model's names, of the wanted parameters.
    """

    name: str
    module: nn.Module
    rule: RegisteredRule
    parameters: Mapping[str, str]


@dataclass
class _Call:
    layer: CapturedLayer
    inputs: tuple[Tensor, ...]
    versions: tuple[int, ...]
    edge: GradientEdge
    layout: Layout
    rows: int


class CallPattern(NamedTuple):
    """How a layer was called, as far as it decides which rows are which samples.

    Attributes:
        layer: The layer's name.
        layout: Where it had its samples.
        fold: How many of its rows make a sample.
        ndim: The dimensions of its input.
        repeated: Whether it was called so more than once.
    """

    layer: str
    layout: Layout
    fold: int
    ndim: int
    repeated: bool


@dataclass
class Captured:
    """What one captured pass gave.

    Attributes:
        outputs: f, L, Q, w of each sample, detached.
        gradients: The per-sample gradient of each captured parameter that f depends on.
        patterns: How the layers were called; a pass with patterns not seen before is checked again.
        layers: For each parameter, the names of the layers that contributed.
    """

    outputs: SampleOutputs
    gradients: dict[str, PerSampleGradient]
    patterns: frozenset[CallPattern]
    layers: dict[str, list[str]] = field(default_factory=dict)


class _Recorder:
    """The forward hooks of one pass."""

    def __init__(self, batch_size: int, layouts: Mapping[str, Layout]) -> None:
        self.batch_size = batch_size
        self.layouts = layouts
        self.calls: list[_Call] = []
        self.recording = True
        self.expanded = False

    def hook(self, layer: CapturedLayer) -> Callable[..., Tensor | None]:
        """Return the forward hook of a layer."""

        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
            if not self.recording or not torch.is_grad_enabled():
                return None
            if not isinstance(output, Tensor) or torch.func.debug_unwrap(output, recurse=False) is not output:
                raise CaptureFailed(layer.name, "its output is not a plain tensor")
            if not output.requires_grad:
                return None
            inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            if not inputs:
                raise CaptureFailed(layer.name, "it was called without tensors")
            return self._record(layer, inputs, output)

        return record

    def _record(self, layer: CapturedLayer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        layout = self._layout(layer.name, output)
        versions = tuple(value._version for value in inputs)
        if layout is not Layout.SHARED:
            rows = output.shape[0] if layout is Layout.ROWS else self.batch_size
            self.calls.append(_Call(layer, inputs, versions, get_gradient_edge(output), layout, rows))
            return None
        # Give each sample its own copy, so that the gradient of the copy is the sample's.
        leading_one = output.ndim > 0 and output.shape[0] == 1
        expanded = _expand_input(output, leading_one, self.batch_size)
        inputs = tuple(_expand_input(value, leading_one, self.batch_size) for value in inputs)
        self.calls.append(_Call(layer, inputs, versions, get_gradient_edge(expanded), layout, self.batch_size))
        self.expanded = True
        return expanded

    def _layout(self, name: str, output: Tensor) -> Layout:
        """Return the layout that was found for a layer, or the likeliest for its output's shape."""
        sequence_first = output.ndim > 2 and output.shape[1] == self.batch_size
        chosen = self.layouts.get(name)
        if chosen is Layout.SHARED or (chosen is Layout.SECOND and sequence_first):
            return chosen
        if output.ndim > 0 and output.shape[0] > 0 and output.shape[0] % self.batch_size == 0:
            return Layout.ROWS
        return Layout.SECOND if sequence_first else Layout.SHARED


def _expand_input(value: Tensor, leading_one: bool, batch_size: int) -> Tensor:
    if leading_one and value.ndim and value.shape[0] == 1:
        return value.expand(batch_size, *value.shape[1:])
    return value.unsqueeze(0).expand(batch_size, *value.shape)


def capture(
    model: nn.Module,
    task: Task,
    batch: Batch,
    batch_size: int,
    layers: Sequence[CapturedLayer],
    attentions: Sequence[CapturedAttention],
    layouts: Mapping[str, Layout],
) -> Captured:
    """Run the model once forward and once backward and return the per-sample gradients of the layers' parameters.

    Args:
        model: The model, inside `isolated`.
        task: The task.
        batch: A batch of ``B`` samples on the model's device.
        batch_size: ``B``.
        layers: The layers to capture.
        attentions: The attention modules whose projections are among them.
        layouts: Where layers have their samples, by name, if not where their output's shape suggests.

    Returns:
        Outputs and gradients.

    Raises:
        CaptureFailed: A layer was used in a way that its rule cannot describe.
    """
    recorder = _Recorder(batch_size, layouts)
    hooks = [
        layer.module.register_forward_hook(recorder.hook(layer), prepend=True, with_kwargs=True) for layer in layers
    ]
    try:
        with attending(attentions):
            outputs = _checked_forward(task, model, batch, batch_size, recorder)
        recorder.recording = False
        edges = [call.edge for call in recorder.calls]
        depends = bool(edges) and outputs.output.requires_grad
        grads = torch.autograd.grad(outputs.output.sum(), edges, allow_unused=True) if depends else ()
    finally:
        recorder.recording = False
        for hook in hooks:
            hook.remove()
    return _collect(outputs, recorder, grads, batch_size)


def _checked_forward(task: Task, model: nn.Module, batch: Batch, batch_size: int, recorder: _Recorder) -> SampleOutputs:
    """Run the task; blame the expanded layers for an error that only their expansion can have caused."""
    try:
        outputs = task.outputs(model, batch)
        if recorder.expanded and outputs.output.shape != (batch_size,):
            raise RuntimeError(f"the output has shape {tuple(outputs.output.shape)}")
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        shared = next((call.layer.name for call in recorder.calls if call.layout is Layout.SHARED), None)
        if shared is None or isinstance(error, CaptureFailed):
            raise
        raise CaptureFailed(shared, f"its output without rows cannot be expanded ({error})", True) from error
    if not isinstance(outputs, SampleOutputs):
        raise BatchError(f"{type(task).__name__}.outputs must return SampleOutputs; it gave {type(outputs).__name__}.")
    return outputs


def _collect(outputs: SampleOutputs, recorder: _Recorder, grads: tuple, batch_size: int) -> Captured:
    parts: dict[str, list[PerSampleGradient]] = {}
    sources: dict[str, list[str]] = {}
    counts: dict[tuple[str, Layout, int, int], int] = {}
    for call, grad in zip(recorder.calls, grads, strict=False):
        key = (call.layer.name, call.layout, call.rows // batch_size, call.inputs[0].ndim)
        counts[key] = counts.get(key, 0) + 1
        if grad is None:
            continue
        for name, gradient in _apply_rule(call, grad).items():
            parts.setdefault(name, []).append(gradient.fold(call.rows // batch_size))
            sources.setdefault(name, []).append(call.layer.name)
    patterns = frozenset(CallPattern(*key, repeated=count > 1) for key, count in counts.items())
    gradients = {name: add_gradients(found) for name, found in parts.items()}
    detached = SampleOutputs(outputs.output.detach(), outputs.loss, outputs.slope, outputs.curvature)
    return Captured(detached, gradients, patterns, sources)


def _apply_rule(call: _Call, grad: Tensor) -> dict[str, PerSampleGradient]:
    """Run a layer's rule and check the shapes of what it gives."""
    layer = call.layer
    if any(value._version != version for value, version in zip(call.inputs, call.versions, strict=True)):
        raise CaptureFailed(layer.name, "its input was changed in place after the call")
    wanted = frozenset(layer.parameters)
    with torch.no_grad():
        try:
            inputs, grad = tuple(value.detach() for value in call.inputs), grad.detach()
            if call.layout is Layout.SECOND:
                grad = grad.transpose(0, 1)
                inputs = tuple(value.transpose(0, 1) if value.ndim > 1 else value for value in inputs)
            given = layer.rule.rule(LayerCall(layer.module, inputs, grad, wanted))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise CaptureFailed(layer.name, f"its rule failed: {error}") from error
    return _checked_gradients(call, given)


def _checked_gradients(call: _Call, given: Mapping[str, PerSampleGradient | Tensor]) -> dict[str, PerSampleGradient]:
    found: dict[str, PerSampleGradient] = {}
    for local, name in call.layer.parameters.items():
        if local not in given:
            raise CaptureFailed(call.layer.name, f"its rule gave no gradient for {local!r}")
        value = given[local]
        gradient = DenseGradient(value) if isinstance(value, Tensor) else value
        expected = (call.rows, *getattr(call.layer.module, local).shape)
        if (gradient.batch_size, *gradient.shape) != expected:
            came = (gradient.batch_size, *gradient.shape)
            raise CaptureFailed(call.layer.name, f"its rule gave {came} for {local!r}, expected {expected}")
        found[name] = gradient
    return found
