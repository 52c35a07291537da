"""Capture: one forward and one backward give every layer's input and output gradient, for all samples at once.

Forward hooks store each layer's input and the autograd edge of its output (an edge, not the tensor: an activation that
works in place replaces the tensor's history). One ``torch.autograd.grad`` of the outputs' sum with respect to the
innermost of these edges then passes all other edges, whose gradients are taken on the way: they are passed on and freed
at once, so that the backward holds no more than a training step's. Batch gradients of weights are never computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, get_gradient_edge

from tracer.data.tasks import Task
from tracer.errors import BatchError, RankError
from tracer.gradients.attention import CapturedAttention, CaptureFailed, standing_in
from tracer.gradients.calls import Call, CapturedLayer, SampleAxis, apply_rule, patterns
from tracer.gradients.checkpointing import CheckpointedForward, CheckpointFailed, SavedInputs, leave_out
from tracer.gradients.combined import add_gradients
from tracer.gradients.experts import CapturedExperts
from tracer.gradients.owners import NoOwner, Owners, regroup
from tracer.gradients.per_sample import PerSampleGradient
from tracer.gradients.raw import RawParameters
from tracer.gradients.shared import Pullback, RawFailed, Use, failing_as_raw
from tracer.types import Batch, SampleOutputs, detached

Receiver = Callable[[dict[str, PerSampleGradient]], None]
"""A consumer of gradients by parameter name, each parameter once and complete."""


class CallRecorder:
    """The forward hooks of one pass."""

    def __init__(self, batch_size: int, axes: Mapping[str, SampleAxis]) -> None:
        self.batch_size = batch_size
        self.axes = axes
        self.calls: list[Call] = []
        self.expanded = self.saving = self.finished = False
        self.autocast: set[torch.dtype] = set()

    def hook(self, layer: CapturedLayer) -> Callable[..., Tensor | None]:
        """Return the forward hook of a layer."""

        def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
            with torch._C.DisableTorchFunction():  # or `RawParameters` would see each look at a tensor
                inputs = self._checked(layer, args, kwargs, output)
                if inputs is None:
                    return None
                axis = self._axis(layer.name, output)
                if layer.changed:
                    output = torch.ops.aten._unsafe_view(output, output.shape)
                if axis is not SampleAxis.NONE:
                    rows = self.batch_size if axis is SampleAxis.SECOND else output.shape[0]
                    saved = self.record(layer, inputs, output, axis, rows)
                    return output if saved is None and layer.changed else saved
            # Give each sample its own copy, so that the gradient of the copy is the sample's.
            leading_one = output.ndim > 0 and output.shape[0] == 1
            expanded = _expand_input(output, leading_one, self.batch_size)
            inputs = tuple(_expand_input(value, leading_one, self.batch_size) for value in inputs)
            self.expanded = True
            saved = self.record(layer, inputs, expanded, axis, self.batch_size)
            return expanded if saved is None else saved

        return record

    def record(
        self, layer: CapturedLayer, inputs: tuple[Tensor, ...], output: Tensor, axis: SampleAxis, rows: int
    ) -> Tensor | None:
        """Record a call; return the output that takes the place of this one, if it saves the inputs in a region."""
        if not CheckpointedForward.running:
            versions = tuple(value._version for value in inputs)
            if not self.finished:
                self.calls.append(Call(layer, inputs, inputs[0].ndim, versions, get_gradient_edge(output), axis, rows))
            return None
        saving = SavedInputs.apply(output, *inputs)
        if not self.finished:
            self.saving = True
            self.calls.append(Call(layer, None, inputs[0].ndim, (), get_gradient_edge(saving), axis, rows))
        return saving

    def _checked(
        self, layer: CapturedLayer, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any
    ) -> tuple[Tensor, ...] | None:
        """Return the tensors that a layer was called with, or None if its output has no gradient."""
        if not torch.is_grad_enabled():
            return None
        if not isinstance(output, Tensor) or torch.func.debug_unwrap(output, recurse=False) is not output:
            raise CaptureFailed(layer.name, "its output is not a plain tensor")
        if not output.requires_grad or not output.numel():
            return None
        if torch.is_autocast_enabled(output.device.type):
            self.autocast.add(torch.get_autocast_dtype(output.device.type))
        inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if any(value.is_nested or value.layout != torch.strided for value in (output, *inputs)):
            raise CaptureFailed(layer.name, "it was called with nested or sparse tensors")
        if not inputs:
            raise CaptureFailed(layer.name, "it was called without tensors")
        return inputs

    def _axis(self, name: str, output: Tensor) -> SampleAxis:
        """Return the axis that was found for a layer, or the likeliest one for its output's shape."""
        sequence_first = output.ndim > 2 and output.shape[1] == self.batch_size
        chosen = self.axes.get(name)
        if chosen is SampleAxis.NONE or (chosen is SampleAxis.SECOND and sequence_first):
            return chosen
        if chosen is SampleAxis.MIXED and output.ndim > 1:
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
        stand_ins: The modules of attention or experts whose products are among them.
        axes: The axis of samples by layer or raw parameter, if it is not the one that shapes suggest.
        raw: The names of parameters that are captured wherever the forward uses them.
        checkpoints: Whether layers whose gradient checkpointing is on run so. Default: True.

    Attributes:
        outputs: f, L, Q, w of each sample, detached.
        patterns: How the layers were called; a pass with new patterns is checked.
        autocast: The dtypes of autocast that layers ran under.
        layers: After the backward: for each parameter, the names of the layers that contributed.

    Raises:
        CaptureFailed: If a layer was used in a way that its rule cannot describe.
        RawFailed: If other parameters were used in a way that no rule describes.
        CheckpointFailed: If the model cannot run with regions that save the inputs of layers.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        batch: Batch,
        batch_size: int,
        layers: Sequence[CapturedLayer],
        stand_ins: Sequence[CapturedAttention | CapturedExperts],
        axes: Mapping[str, SampleAxis],
        raw: Collection[str] = (),
        checkpoints: bool = True,
    ) -> None:
        recorder = CallRecorder(batch_size, axes)
        parameters = {name: value for name, value in model.named_parameters() if name in raw}
        seen = RawParameters(parameters, batch, batch_size, axes)
        leave_out(model, list(parameters.values()), not checkpoints)
        with ExitStack() as stack:
            for layer in layers:
                hook = layer.module.register_forward_hook(recorder.hook(layer), prepend=True, with_kwargs=True)
                stack.callback(hook.remove)
            stack.enter_context(standing_in(stand_ins))
            with seen.watching():
                outputs = _checked_forward(task, model, batch, batch_size, recorder, seen)
            recorder.finished = True
            # Regions run again in the backward, where they must save what they saved here.
            self._has_regions = recorder.saving
            self._running_again = stack.pop_all() if recorder.saving else ExitStack()
        if seen.failed:
            self.close()
            raise RawFailed(seen.failed)
        self._calls: list[Call | Use] = [*recorder.calls, *seen.uses]
        self._batch_size, self._pullback = batch_size, Pullback(parameters)
        self._output: Tensor | None = outputs.output
        self.outputs = detached(outputs)
        self.patterns = patterns(recorder.calls, seen.uses, batch_size)
        self.autocast = recorder.autocast
        self.layers: dict[str, list[str]] = {}

    def close(self) -> None:
        """Remove hooks."""
        self._running_again.close()

    def half_precision(self) -> set[torch.dtype]:
        """Return the dtypes of half precision that the forward computed in."""
        found: set[torch.dtype] = set()
        seen: set[Node] = set()
        stack = [None if self._output is None else self._output.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                found.update(each.dtype for each in node._input_metadata)
                stack += [below for below, _ in node.next_functions]
        return found & {torch.float16, torch.bfloat16}

    def backward(self, receive: Receiver) -> None:
        """Pass the gradient of each captured parameter that f depends on to ``receive``, as soon as it is complete.

        Args:
            receive: Called during the backward; gradients that it does not store are freed.

        Raises:
            CaptureFailed: If a layer was used in a way that its rule cannot describe.
            CheckpointFailed: If a region does not run again as it ran.
            OutOfMemoryError: If memory is short.
            RuntimeError: If torch raises another error, and there are no regions.
        """
        output, calls = self._output, self._calls
        self._output, self._calls = None, []
        assert output is not None, "a pass has one backward"
        with self._running_again:
            try:
                if calls and output.requires_grad:
                    self._run_backward(output, calls, receive)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                if not self._has_regions:
                    raise
                raise CheckpointFailed(str(error).partition("\n")[0]) from error

    def _run_backward(self, output: Tensor, calls: list[Call | Use], receive: Receiver) -> None:
        total = output.sum()
        calls_of: dict[Node, list[Call | Use]] = {}
        for call in calls:
            calls_of.setdefault(call.edge.node, []).append(call)
        reached, innermost = _innermost(total.grad_fn, calls_of)
        calls = [call for node in reached for call in calls_of[node]]
        owners = self._owners(output, [call for call in calls if call.mixed])
        del output
        arrivals = _Arrivals(calls, owners, receive, self.layers, self._pullback)
        last = [call for call in calls if call.edge.node in innermost]
        hooks = [node.register_prehook(arrivals.hook(calls_of[node])) for node in reached if node not in innermost]
        hooks += [
            call.leaf.register_hook(arrivals.leaf_hook(call))
            for call in last
            if isinstance(call, Use) and call.leaf is not None
        ]
        edges = [call.edge for call in last]
        calls_of.clear()
        try:
            grads = torch.autograd.grad(total, edges, allow_unused=True) if edges else ()
        finally:
            for hook in hooks:
                hook.remove()
        del total, edges
        arrivals.take([(call, grad) for call, grad in zip(last, grads, strict=True) if not _has_leaf(call)])
        arrivals.finish()

    def _owners(self, output: Tensor, mixed: Sequence[Call | Use]) -> Owners:
        if mixed and self._has_regions:
            raise CheckpointFailed("its samples are mixed, and gradients that tell them apart need the graph twice")
        return Owners(output, [call.edge for call in mixed], [id(call) for call in mixed])


def _has_leaf(call: Call | Use) -> bool:
    return isinstance(call, Use) and call.leaf is not None


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
        self,
        calls: Sequence[Call | Use],
        owners: Owners,
        receive: Receiver,
        layers: dict[str, list[str]],
        pullback: Pullback,
    ) -> None:
        self._owners, self._receive, self._layers, self._pullback = owners, receive, layers, pullback
        self._awaited = Counter(name for call in calls for name in call.names)
        # Gradients that come by way of other shared tensors are complete at the end.
        self._awaited.update({name for call in calls if isinstance(call, Use) for name in call.names})
        self._parts: dict[str, list[PerSampleGradient]] = {}

    def hook(self, calls: Sequence[Call | Use]) -> Callable[[tuple[Tensor | None, ...]], None]:
        """Return the hook of a node that these calls' outputs come from."""

        def arrive(grads: tuple[Tensor | None, ...]) -> None:
            self.take([(call, grads[call.edge.output_nr]) for call in calls])

        return arrive

    def leaf_hook(self, use: Use) -> Callable[[Tensor], Tensor]:
        """Return the hook of copies of a parameter."""

        def arrive(grad: Tensor) -> Tensor:
            self.take([(use, grad)])
            return grad.new_zeros(()).expand(grad.shape)  # autograd holds what it is given until its end

        return arrive

    def take(self, arrived: Sequence[tuple[Call | Use, Tensor | None]]) -> None:
        """Take the output gradients of some calls and pass on the parameters that are complete by them."""
        whole: dict[str, PerSampleGradient] = {}
        for call, grad in arrived:
            given = {} if grad is None else self._gradients(call, grad)
            for name in call.names:
                self._awaited[name] -= 1
                if name in given:
                    self._parts.setdefault(name, []).append(given[name])
                if not self._awaited[name] and name in self._parts:
                    whole[name] = add_gradients(self._parts.pop(name))
        if whole:
            self._receive(whole)

    def _gradients(self, call: Call | Use, grad: Tensor) -> dict[str, PerSampleGradient]:
        """Return the gradients of parameters that a call gives."""
        batch_size = self._owners.batch_size
        if isinstance(call, Use):
            with torch.no_grad(), failing_as_raw(call.names):
                return self._pullback.direct(call.convert(grad.detach(), partial(self._owners.of, id(call))))
        found = apply_rule(call, grad)
        call.inputs = ()  # frees the activation, once the graph has let go of it
        for name in found:
            self._layers.setdefault(name, []).append(call.layer.name)
        if not call.mixed:
            return {name: gradient.fold(call.rows // batch_size) for name, gradient in found.items()}
        try:
            owner = self._owners.of(id(call), grad, 1)
        except NoOwner as error:
            raise CaptureFailed(call.layer.name, str(error)) from error
        return {name: regroup(gradient, owner, batch_size) for name, gradient in found.items()}

    def finish(self) -> None:
        """Pass on parameters that waited for calls that f turned out not to depend on, or for a way back."""
        for name, gradient in self._pullback.finish().items():
            self._parts.setdefault(name, []).append(gradient)
        whole = {name: add_gradients(parts) for name, parts in self._parts.items()}
        self._parts.clear()
        if whole:
            self._receive(whole)


def _checked_forward(
    task: Task, model: nn.Module, batch: Batch, batch_size: int, recorder: CallRecorder, seen: RawParameters
) -> SampleOutputs:
    """Run the task; blame the expanded layers for an error that only their expansion can have caused."""
    try:
        outputs = task.outputs(model, batch)
        if recorder.expanded and outputs.output.shape != (batch_size,):
            raise RuntimeError(f"the output has shape {tuple(outputs.output.shape)}")
    except (torch.OutOfMemoryError, RankError):
        raise
    except Exception as error:
        if isinstance(error, CaptureFailed):
            raise
        if recorder.saving:
            raise CheckpointFailed(str(error)) from error
        shared = next((call.layer.name for call in recorder.calls if call.axis is SampleAxis.NONE), None)
        if shared is None:
            seen.blame(error)
            raise
        raise CaptureFailed(shared, f"its output without rows cannot be expanded ({error})", True) from error
    if not isinstance(outputs, SampleOutputs):
        raise BatchError(f"{type(task).__name__}.outputs must return SampleOutputs; it gave {type(outputs).__name__}.")
    return outputs
