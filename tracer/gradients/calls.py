"""Calls of layers with rules: which they were, and what they give for the gradient of an output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from tracer.gradients.attention import CaptureFailed
from tracer.gradients.layers import LayerCall, RegisteredRule
from tracer.gradients.per_sample import DenseGradient, PerSampleGradient
from tracer.gradients.shared import Use


class SampleAxis(Enum):
    """The dimension of a layer's inputs and output that holds the samples.

    Attributes:
        FIRST: The first, maybe with several rows a sample.
        SECOND: The second: sequence first.
        NONE: There is none: one output for all samples (positions, prototypes).
        MIXED: The first, in an order that gradients tell (`tracer.gradients.owners`).
    """

    FIRST = "first"
    SECOND = "second"
    NONE = "none"
    MIXED = "mixed"


@dataclass(frozen=True)
class CapturedLayer:
    """A layer whose parameters are captured.

    Attributes:
        name: Its name in the model.
        module: The layer.
        rule: The rule of its type.
        parameters: The wanted parameters: the layer's own names to the model's names.
        changed: Whether the model changes its output in place, which must not be a view then: autograd gives a view
            that was changed another history, without the edge that was recorded.
    """

    name: str
    module: nn.Module
    rule: RegisteredRule
    parameters: Mapping[str, str]
    changed: bool = False


@dataclass
class Call:
    """A call of a layer.

    Attributes:
        layer: The layer.
        inputs: Its tensor arguments, which the rule reads; None: the node of the edge has saved them.
        ndim: The number of dimensions of the first.
        versions: Their versions at the time of the call.
        edge: Where the gradient of its output arrives.
        axis: The dimension of samples.
        rows: The size of that dimension.
    """

    layer: CapturedLayer
    inputs: tuple[Tensor, ...] | None
    ndim: int
    versions: tuple[int, ...]
    edge: GradientEdge
    axis: SampleAxis
    rows: int

    @property
    def names(self) -> Collection[str]:
        """The parameters, as the model has them."""
        return self.layer.parameters.values()

    @property
    def mixed(self) -> bool:
        """Whether gradients tell whose rows are."""
        return self.axis is SampleAxis.MIXED

    def fold(self, batch_size: int) -> int:
        """Return the number of rows of a sample; 0: any."""
        return 0 if self.mixed else self.rows // batch_size


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


def patterns(calls: Sequence[Call], uses: Sequence[Use], batch_size: int) -> frozenset[CallPattern]:
    """Return the patterns of calls of layers and of uses of other parameters."""
    counts = Counter((call.layer.name, call.axis, call.fold(batch_size), call.ndim) for call in calls)
    axes = SampleAxis.FIRST, SampleAxis.SECOND
    counts.update((use.label, SampleAxis.MIXED if use.mixed else axes[use.axis], use.fold, 0) for use in uses)
    # A model may call a layer of mixed samples for those groups of them that are not empty.
    return frozenset(CallPattern(*key, count > 1 and key[1] is not SampleAxis.MIXED) for key, count in counts.items())


def apply_rule(call: Call, grad: Tensor) -> dict[str, PerSampleGradient]:
    """Run a layer's rule and check the shapes of its gradients."""
    layer = call.layer
    node: Any = call.edge and call.edge.node
    inputs = node.saved_tensors if call.inputs is None else call.inputs
    if any(value._version != version for value, version in zip(inputs, call.versions, strict=False)):
        raise CaptureFailed(layer.name, "its input was changed in place after the call")
    wanted = frozenset(layer.parameters)
    with torch.no_grad():
        try:
            inputs, grad = tuple(value.detach() for value in inputs), grad.detach()
            if call.axis is SampleAxis.SECOND:
                grad = grad.transpose(0, 1)
                inputs = tuple(value.transpose(0, 1) if value.ndim > 1 else value for value in inputs)
            given = layer.rule.rule(LayerCall(layer.module, inputs, grad, wanted))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise CaptureFailed(layer.name, f"its rule failed: {error}") from error
    return _checked_gradients(call, given)


def _checked_gradients(call: Call, given: Mapping[str, PerSampleGradient | Tensor]) -> dict[str, PerSampleGradient]:
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
