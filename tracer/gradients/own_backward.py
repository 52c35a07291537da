"""Per-sample gradients from the forward and backward of the user's own training step.

Forward hooks see the inputs of layers, as in `tracer.gradients.capture`, and a hook on the autograd node of each output
sees the gradient of the training loss with respect to it. By the layer's rule these give each sample's share of the
gradient that the optimizer gets: whatever the loss divides by, the shares of all samples add up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from tracer.errors import GradientError
from tracer.gradients.attention import CaptureFailed
from tracer.gradients.calls import Call, CallPattern, CapturedLayer, SampleAxis, apply_rule, patterns
from tracer.gradients.capture import CallRecorder, Receiver

_NO_EDGE: Any = None  # of a call that is held by the edge's node, which would hold itself


class OwnBackward:
    """Hooks in a ``with`` block around forwards and backwards of a training step; the step itself is not changed.

    Args:
        batch_size: The number of samples ``B`` of each forward in the block.
        layers: The layers to capture.
        axes: The axis of samples by layer name, if it is not the one that the output's shape suggests.
        receive: Called with gradients of parameters, ``B`` samples each, as they arrive: shares of the training loss's
            gradient. A parameter comes once for each call of its layers.

    Attributes:
        patterns: After the block: how the layers were called.

    Raises:
        GradientError: In the block, if a layer is used in a way that its rule cannot describe.
    """

    def __init__(
        self, batch_size: int, layers: Sequence[CapturedLayer], axes: Mapping[str, SampleAxis], receive: Receiver
    ) -> None:
        self._layers, self._receive, self._batch_size = layers, receive, batch_size
        self._recorder = _SharesRecorder(batch_size, axes, self._arrived)
        self._stack = ExitStack()
        self.patterns: frozenset[CallPattern] = frozenset()

    def __enter__(self) -> OwnBackward:
        for layer in self._layers:
            hook = _failing_clearly(self._recorder.hook(layer))
            handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
            self._stack.callback(handle.remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._recorder.finished = True
        self.patterns = patterns(self._recorder.calls, (), self._batch_size)

    def _arrived(self, call: Call, grad: Tensor) -> None:
        with torch.no_grad():
            try:
                found = apply_rule(call, grad)
            except CaptureFailed as failure:
                raise _error(failure) from failure
            self._receive({name: each.fold(call.rows // self._batch_size) for name, each in found.items()})


class _SharesRecorder(CallRecorder):
    """Hooks that hold each call in the autograd graph alone, which frees it with its activation."""

    def __init__(
        self, batch_size: int, axes: Mapping[str, SampleAxis], arrived: Callable[[Call, Tensor], None]
    ) -> None:
        super().__init__(batch_size, axes)
        self._arrived = arrived

    def record(
        self, layer: CapturedLayer, inputs: tuple[Tensor, ...], output: Tensor, axis: SampleAxis, rows: int
    ) -> Tensor | None:
        """Record a call, and wait for the gradient of its output."""
        edge = get_gradient_edge(output)
        versions = tuple(value._version for value in inputs)
        call = Call(layer, tuple(value.detach() for value in inputs), inputs[0].ndim, versions, _NO_EDGE, axis, rows)
        self.calls.append(Call(layer, None, inputs[0].ndim, (), _NO_EDGE, axis, rows))
        number, arrived = edge.output_nr, self._arrived

        def arrive(grads: tuple[Tensor | None, ...]) -> None:
            grad = grads[number]
            if grad is not None:
                if not call.inputs:
                    raise _error(CaptureFailed(layer.name, "its part of the graph was passed twice (retain_graph)"))
                arrived(call, grad)
                call.inputs = ()  # a loss that is kept keeps the graph

        edge.node.register_prehook(arrive)
        return None


def _failing_clearly(hook: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    def record(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Tensor | None:
        try:
            return hook(module, args, kwargs, output)
        except CaptureFailed as failure:
            raise _error(failure) from failure

    return record


def _error(failure: CaptureFailed) -> GradientError:
    return GradientError(
        f"Layer {failure.layer!r} cannot be captured in the training step: {failure.reason}. Pass second_pass=True, "
        f"which computes gradients by a pass of its own."
    )
