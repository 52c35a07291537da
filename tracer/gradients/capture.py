"""Capture: one forward and one backward give every layer's input and output gradient, for all samples at once.

Forward hooks store each layer's input and the autograd edge of its output (an edge, not the tensor: an activation that
works in place replaces the tensor's history). One ``torch.autograd.grad`` of the outputs' sum with respect to the
innermost of these edges then passes all other edges, whose gradients are taken on the way: they are passed on and freed
at once, so that the backward holds no more than a training step's. Batch gradients of weights are never computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from tracer.data.tasks import Task
from tracer.errors import BatchError, RankError
from tracer.gradients.attention import CapturedAttention, CaptureFailed, attending
from tracer.gradients.combined import add_gradients
from tracer.gradients.layers import LayerCall, RegisteredRule
from tracer.gradients.per_sample import DenseGradient, PerSampleGradient
from tracer.types import Batch, SampleOutputs, detached


class SampleAxis(Enum):
    """The dimension of a layer's inputs and output that holds the samples.

    Attributes:
        FIRST: The first, maybe with several rows a sample.
        SECOND: The second: sequence first.
        NONE: There is none: one output for all samples (positions, prototypes).
    """

    FIRST = "first"
    SECOND = "second"
    NONE = "none"


@dataclass(frozen=True)
class CapturedLayer:
    """A layer whose parameters are captured.

    Attributes:
        name: Its name in the model.
        module: The layer.
        rule: The rule of its type.
        parameters: The wanted parameters: the layer's own names to the model's names.
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
    axis: SampleAxis
    rows: int


class CallPattern(NamedTuple):
    """A way of calling a layer, as far as it decides which rows belong to which samples.

    Attributes:
        layer: The layer's name.
        axis: The axis of the samples.
        fold: The number of rows of a sample.
        ndim: The dimensions of its input.
        repeated: Whether it was called so more than once.
    """

    layer: str
    axis: SampleAxis
    fold: int
    ndim: int
    repeated: bool


Receiver = Callable[[dict[str, PerSampleGradient]], None]
"""A consumer of gradients by parameter name, each parameter once and complete."""


class _Recorder:
    """The forward hooks of one pass."""

    def __init__(self, batch_size: int, axes: Mapping[str, SampleAxis]) -> None:
        self.batch_size = batch_size
        self.axes = axes
        self.calls: list[_Call] = []
        self.expanded = False
        self.autocast: set[torch.dtype] = set()

    def hook(self, layer: CapturedLayer) -> Callable[..., Tensor | None]:
        """Return the forward hook of a layer."""

        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            if not isinstance(output, Tensor) or torch.func.debug_unwrap(output, recurse=False) is not output:
                raise CaptureFailed(layer.name, "its output is not a plain tensor")
            if not output.requires_grad:
                return None
            if torch.is_autocast_enabled(output.device.type):
                self.autocast.add(torch.get_autocast_dtype(output.device.type))
            inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            if any(value.is_nested or value.layout != torch.strided for value in (output, *inputs)):
                raise CaptureFailed(layer.name, "it was called with nested or sparse tensors")
            if not inputs:
                raise CaptureFailed(layer.name, "it was called without tensors")
            return self._record(layer, inputs, output)

        return record

    def _record(self, layer: CapturedLayer, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        axis = self._axis(layer.name, output)
        versions = tuple(value._version for value in inputs)
        if axis is not SampleAxis.NONE:
            rows = output.shape[0] if axis is SampleAxis.FIRST else self.batch_size
            self.calls.append(_Call(layer, inputs, versions, get_gradient_edge(output), axis, rows))
            return None
        # Give each sample its own copy, so that the gradient of the copy is the sample's.
        leading_one = output.ndim > 0 and output.shape[0] == 1
        expanded = _expand_input(output, leading_one, self.batch_size)
        inputs = tuple(_expand_input(value, leading_one, self.batch_size) for value in inputs)
        self.calls.append(_Call(layer, inputs, versions, get_gradient_edge(expanded), axis, self.batch_size))
        self.expanded = True
        return expanded

    def _axis(self, name: str, output: Tensor) -> SampleAxis:
        """Return the axis that was found for a layer, or the likeliest one for its output's shape."""
        sequence_first = output.ndim > 2 and output.shape[1] == self.batch_size
        chosen = self.axes.get(name)
        if chosen is SampleAxis.NONE or (chosen is SampleAxis.SECOND and sequence_first):
            return chosen
        if output.ndim > 0 and output.shape[0] > 0 and output.shape[0] % self.batch_size == 0:
            return SampleAxis.FIRST
        return SampleAxis.SECOND if sequence_first else SampleAxis.NONE


def _expand_input(value: Tensor, leading_one: bool, batch_size: int) -> Tensor:
    if leading_one and value.ndim and value.shape[0] == 1:
        return value.expand(batch_size, *value.shape[1:])
    return value.unsqueeze(0).expand(batch_size, *value.shape)


class CapturedPass:
    """A forward pass of the model with the calls of its layers; its backward can be run once.

    Args:
        model: The model, inside `isolated`.
        task: The task.
        batch: A batch of ``B`` samples on the model's device.
        batch_size: ``B``.
        layers: The layers to capture.
        attentions: The attention modules whose projections are among them.
        axes: The axis of samples by layer name, if it is not the one that the output's shape suggests.

    Attributes:
        outputs: f, L, Q, w of each sample, detached.
        patterns: How the layers were called; a pass with new patterns is checked.
        autocast: The dtypes of autocast that layers ran under.
        layers: After the backward: for each parameter, the names of the layers that contributed.

    Raises:
        CaptureFailed: If a layer was used in a way that its rule cannot describe.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        batch: Batch,
        batch_size: int,
        layers: Sequence[CapturedLayer],
        attentions: Sequence[CapturedAttention],
        axes: Mapping[str, SampleAxis],
    ) -> None:
        recorder = _Recorder(batch_size, axes)
        hooks = [
            layer.module.register_forward_hook(recorder.hook(layer), prepend=True, with_kwargs=True) for layer in layers
        ]
        try:
            with attending(attentions):
                outputs = _checked_forward(task, model, batch, batch_size, recorder)
        finally:
            for hook in hooks:
                hook.remove()
        self._calls, self._batch_size = recorder.calls, batch_size
        self._output: Tensor | None = outputs.output
        self.outputs = detached(outputs)
        self.patterns = _patterns(recorder.calls, batch_size)
        self.autocast = recorder.autocast
        self.layers: dict[str, list[str]] = {}

    def backward(self, receive: Receiver) -> None:
        """Pass the gradient of each captured parameter that f depends on to ``receive``, as soon as it is complete.

        Args:
            receive: Called during the backward; gradients that it does not store are freed.

        Raises:
            CaptureFailed: If a layer was used in a way that its rule cannot describe.
        """
        output, calls = self._output, self._calls
        self._output, self._calls = None, []
        assert output is not None, "a pass has one backward"
        if not calls or not output.requires_grad:
            return
        total = output.sum()
        del output
        calls_of: dict[Node, list[_Call]] = {}
        for call in calls:
            calls_of.setdefault(call.edge.node, []).append(call)
        reached, innermost = _innermost(total.grad_fn, calls_of)
        calls = [call for node in reached for call in calls_of[node]]
        arrivals = _Arrivals(calls, self._batch_size, receive, self.layers)
        last = [call for call in calls if call.edge.node in innermost]
        hooks = [node.register_prehook(arrivals.hook(calls_of[node])) for node in reached if node not in innermost]
        edges = [call.edge for call in last]
        calls_of.clear()
        try:
            grads = torch.autograd.grad(total, edges, allow_unused=True) if edges else ()
        finally:
            for hook in hooks:
                hook.remove()
        del total, edges
        arrivals.take(list(zip(last, grads, strict=True)))
        arrivals.finish()


def _innermost(root: Node | None, wanted: Collection[Node]) -> tuple[list[Node], set[Node]]:
    """Return the wanted nodes below a root, and those from which no other wanted node can be reached."""
    above: dict[Node, bool] = {}  # whether a wanted node lies below
    reached: list[Node] = []
    stack: list[tuple[Node, bool]] = [] if root is None else [(root, False)]
    while stack:
        node, finished = stack.pop()
        if not finished and node in above:
            continue
        children = [child for child, _ in node.next_functions if child is not None]
        if finished:
            above[node] = any(child in wanted or above[child] for child in children)
            continue
        above[node] = False
        if node in wanted:
            reached.append(node)
        stack.append((node, True))
        stack += [(child, False) for child in children if child not in above]
    return reached, {node for node in reached if not above[node]}


class _Arrivals:
    """Output gradients in any order, turned into gradients of parameters and passed on when complete."""

    def __init__(
        self, calls: Sequence[_Call], batch_size: int, receive: Receiver, layers: dict[str, list[str]]
    ) -> None:
        self._batch_size, self._receive, self._layers = batch_size, receive, layers
        self._awaited = Counter(name for call in calls for name in call.layer.parameters.values())
        self._parts: dict[str, list[PerSampleGradient]] = {}

    def hook(self, calls: Sequence[_Call]) -> Callable[[tuple[Tensor | None, ...]], None]:
        """Return the hook of a node that these calls' outputs come from."""

        def arrive(grads: tuple[Tensor | None, ...]) -> None:
            self.take([(call, grads[call.edge.output_nr]) for call in calls])

        return arrive

    def take(self, arrived: Sequence[tuple[_Call, Tensor | None]]) -> None:
        """Take the output gradients of some calls and pass on the parameters that are complete by them."""
        whole: dict[str, PerSampleGradient] = {}
        for call, grad in arrived:
            given = {} if grad is None else _apply_rule(call, grad)
            call.inputs = ()  # frees the activation, once the graph has let go of it
            for name in call.layer.parameters.values():
                self._awaited[name] -= 1
                if name in given:
                    self._layers.setdefault(name, []).append(call.layer.name)
                    self._parts.setdefault(name, []).append(given[name].fold(call.rows // self._batch_size))
                if not self._awaited[name] and name in self._parts:
                    whole[name] = add_gradients(self._parts.pop(name))
        if whole:
            self._receive(whole)

    def finish(self) -> None:
        """Pass on parameters that waited for calls that f turned out not to depend on."""
        whole = {name: add_gradients(parts) for name, parts in self._parts.items()}
        self._parts.clear()
        if whole:
            self._receive(whole)


def _checked_forward(task: Task, model: nn.Module, batch: Batch, batch_size: int, recorder: _Recorder) -> SampleOutputs:
    """Run the task; blame the expanded layers for an error that only their expansion can have caused."""
    try:
        outputs = task.outputs(model, batch)
        if recorder.expanded and outputs.output.shape != (batch_size,):
            raise RuntimeError(f"the output has shape {tuple(outputs.output.shape)}")
    except (torch.OutOfMemoryError, RankError):
        raise
    except Exception as error:
        shared = next((call.layer.name for call in recorder.calls if call.axis is SampleAxis.NONE), None)
        if shared is None or isinstance(error, CaptureFailed):
            raise
        raise CaptureFailed(shared, f"its output without rows cannot be expanded ({error})", True) from error
    if not isinstance(outputs, SampleOutputs):
        raise BatchError(f"{type(task).__name__}.outputs must return SampleOutputs; it gave {type(outputs).__name__}.")
    return outputs


def _patterns(calls: Sequence[_Call], batch_size: int) -> frozenset[CallPattern]:
    counts = Counter((call.layer.name, call.axis, call.rows // batch_size, call.inputs[0].ndim) for call in calls)
    return frozenset(CallPattern(*key, repeated=count > 1) for key, count in counts.items())


def _apply_rule(call: _Call, grad: Tensor) -> dict[str, PerSampleGradient]:
    """Run a layer's rule and check the shapes of its gradients."""
    layer = call.layer
    if any(value._version != version for value, version in zip(call.inputs, call.versions, strict=True)):
        raise CaptureFailed(layer.name, "its input was changed in place after the call")
    wanted = frozenset(layer.parameters)
    with torch.no_grad():
        try:
            inputs, grad = tuple(value.detach() for value in call.inputs), grad.detach()
            if call.axis is SampleAxis.SECOND:
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
            got = (gradient.batch_size, *gradient.shape)
            raise CaptureFailed(call.layer.name, f"expected shape {expected} for {local!r} from its rule, got {got}")
        found[name] = gradient
    return found
