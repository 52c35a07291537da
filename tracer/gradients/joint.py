"""The weight and the bias of a layer as one matrix ``[W, b]``, since curvature couples them.

The gradient of ``[W, b]`` is ``g [a, 1]ᵀ``: the bias is the weight of one more input, which is always 1. Gradients are
joined before they are whitened and split again after it, so that whatever takes them sees the model's parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracer._core.sharding import layer_type
from tracer.gradients.attention import CapturedAttention, refuses_attention
from tracer.gradients.audit import Sink
from tracer.gradients.combined import SumGradient
from tracer.gradients.layers import INPUT_DIMS, rule_for
from tracer.gradients.per_sample import DenseGradient, OuterGradient, PerSampleGradient, matrix_shape


@dataclass(frozen=True)
class Joint:
    """A weight and a bias that only layers with both have.

    Attributes:
        weight: The weight's name, under which both are passed on.
        bias: The bias's name.
        shape: The weight's shape.
        dim: The dimension of the weight's matrix that inputs have: 1, or 0 of a weight ``[in, out]``.
    """

    weight: str
    bias: str
    shape: tuple[int, ...]
    dim: int

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of ``[W, b]``."""
        rows, cols = matrix_shape(self.shape)
        return (rows, cols + 1) if self.dim else (rows + 1, cols)

    def matrix(self, weight: Tensor, bias: Tensor) -> Tensor:
        """Return ``[W, b]`` from ``[*b, *shape]`` or ``[*b, numel]``, and ``[*b, n]``."""
        matrix = weight.reshape(*bias.shape[:-1], *matrix_shape(self.shape))
        return torch.cat([matrix, bias.unsqueeze(self.dim - 2)], self.dim - 2)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return weight ``[*b, *shape]`` and bias ``[*b, n]`` of ``[W, b]``, by name."""
        last = matrix.shape[self.dim - 2] - 1
        weight, bias = matrix.narrow(self.dim - 2, 0, last), matrix.select(self.dim - 2, last)
        return {self.weight: weight.reshape(*bias.shape[:-1], *self.shape), self.bias: bias}

    def join(self, weight: PerSampleGradient, bias: PerSampleGradient, from_layers: bool) -> PerSampleGradient:
        """Return the gradient of ``[W, b]``, with factors if the layers' rules gave both parts and the weight's has."""
        parts = weight.parts()
        if not from_layers or any(part.num_positions is None for part in parts):
            return JoinedGradient(self, weight, bias)
        found: list[PerSampleGradient] = []
        for part in parts:
            inputs, others = self._sides(*part.factors(0, part.batch_size))
            found.append(OuterGradient(*self._sides(F.pad(inputs, (0, 1), value=1.0), others), self.matrix_shape))
        return found[0] if len(found) == 1 else SumGradient(found)

    def split(self, gradient: PerSampleGradient) -> dict[str, PerSampleGradient]:
        """Return the gradients of both parameters from that of ``[W, b]``."""
        parts, count = gradient.parts(), gradient.batch_size
        if any(part.num_positions is None for part in parts):
            rows = [self.tensors(_matrices(gradient, row, row + 1))[self.bias] for row in range(count)]
            return {self.weight: SplitGradient(self, gradient), self.bias: DenseGradient(torch.cat(rows))}
        weights: list[PerSampleGradient] = []
        bias: Tensor | float = 0.0
        for part in parts:
            inputs, others = self._sides(*part.factors(0, count))
            weights.append(OuterGradient(*self._sides(inputs[..., :-1], others), self.shape))
            bias = bias + torch.bmm(inputs[..., -1:].transpose(1, 2), others)[:, 0]
        weight = weights[0] if len(weights) == 1 else SumGradient(weights)
        return {self.weight: weight, self.bias: DenseGradient(torch.as_tensor(bias))}

    def _sides(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``left, right`` as inputs and output gradients, and the other way round."""
        return (other, one) if self.dim else (one, other)

    def zeros(self, name: str, like: PerSampleGradient) -> PerSampleGradient:
        """Return gradients of zero of one of the parameters, for the samples of the other's."""
        shape = self.shape if name == self.weight else (matrix_shape(self.shape)[1 - self.dim],)
        zero = torch.zeros((), dtype=like.dtype, device=like.device)
        return DenseGradient(zero.expand(like.batch_size, *shape))


class JoinedGradient(PerSampleGradient):
    """The gradient of ``[W, b]`` from those of both, without factors."""

    def __init__(self, joint: Joint, weight: PerSampleGradient, bias: PerSampleGradient) -> None:
        super().__init__(joint.matrix_shape, weight.batch_size, weight)
        self.joint, self.weight, self.bias = joint, weight, bias
        self.dtype = torch.promote_types(weight.dtype, bias.dtype)

    def dense(self, start: int, stop: int) -> Tensor:
        """Build ``[W, b]`` of samples ``start`` to ``stop``, ``[stop - start, numel]``."""
        weight, bias = self.weight.entries(start, stop), self.bias.entries(start, stop)
        return self.joint.matrix(weight, bias).flatten(1)


class SplitGradient(PerSampleGradient):
    """The gradient of a weight from that of ``[W, b]``, without factors."""

    def __init__(self, joint: Joint, inner: PerSampleGradient) -> None:
        super().__init__(joint.shape, inner.batch_size, inner)
        self.joint, self.inner_gradient = joint, inner

    def dense(self, start: int, stop: int) -> Tensor:
        """Build the weight's gradients of samples ``start`` to ``stop``, ``[stop - start, numel]``."""
        return self.joint.tensors(_matrices(self.inner_gradient, start, stop))[self.joint.weight].flatten(1)


def _matrices(gradient: PerSampleGradient, start: int, stop: int) -> Tensor:
    return gradient.entries(start, stop).unflatten(1, gradient.shape)


def joint_shapes(shapes: Mapping[str, Sequence[int]], joints: Iterable[Joint]) -> dict[str, Sequence[int]]:
    """Return the shapes of parameters, of which some are joined."""
    biases = {joint.bias for joint in joints}
    joined = {joint.weight: joint.matrix_shape for joint in joints}
    return {name: joined.get(name, shape) for name, shape in shapes.items() if name not in biases}


def find_joints(model: nn.Module, names: Collection[str]) -> list[Joint]:
    """Return which of the selected parameters are joined; a weight that is tied to another layer's is not."""
    canonical = {id(parameter): name for name, parameter in model.named_parameters()}
    uses: dict[str, set[Joint | None]] = {}
    for module in model.modules():
        layer: Any = module
        if layer_type(module) is nn.MultiheadAttention and not refuses_attention(layer):
            layer = CapturedAttention("", layer).projection
        own = {local: canonical[id(value)] for local, value in layer._parameters.items() if value is not None}
        rule = rule_for(layer)
        dim = INPUT_DIMS.get(rule.rule) if rule is not None else None
        joint = None
        if dim is not None and own.keys() >= {"weight", "bias"}:
            joint = Joint(own["weight"], own["bias"], tuple(layer.weight.shape), dim)
        for name in own.values():
            uses.setdefault(name, set()).add(joint)
    found = dict.fromkeys(joint for each in uses.values() for joint in each if joint is not None)
    return [
        joint
        for joint in found
        if uses[joint.weight] == uses[joint.bias] == {joint} and {joint.weight, joint.bias} <= set(names)
    ]


class JoiningSink:
    """Passes gradients to another sink, those of a weight and its bias joined under the weight's name.

    Args:
        sink: The other sink.
        joints: What is joined.
        from_layers: Returns the parameters whose gradients come from layers' rules alone, as `begin` finds them.
    """

    def __init__(self, sink: Sink, joints: Iterable[Joint], from_layers: Callable[[], Collection[str]]) -> None:
        self._sink, self._from_layers = sink, from_layers
        self._joints = {name: joint for joint in joints for name in (joint.weight, joint.bias)}

    def begin(self) -> None:
        """Begin again."""
        self._layers = self._from_layers()
        self._waiting: dict[str, list[tuple[int, int, PerSampleGradient]]] = {}
        self._met: set[str] = set()
        self._sink.begin()

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Pass on the gradients of samples ``start`` to ``stop``; one without its partner waits."""
        whole = {name: gradient for name, gradient in gradients.items() if name not in self._joints}
        for name in gradients.keys() - whole.keys():
            joint = self._joints[name]
            other = joint.bias if name == joint.weight else joint.weight
            partner = gradients.get(other) or self._samples(other, start, stop)
            if partner is None:
                self._waiting.setdefault(name, []).append((start, stop, gradients[name]))
            elif name == joint.weight or other not in gradients:
                whole[joint.weight] = self._joined(joint, {name: gradients[name], other: partner})
        if whole:
            self._sink.take(start, stop, whole)

    def finish(self) -> None:
        """Pass on what still waits: the gradient of its partner is zero."""
        for name in self._waiting.keys() - self._met:
            joint = self._joints[name]
            other = joint.bias if name == joint.weight else joint.weight
            for start, stop, gradient in self._waiting[name]:
                both = {name: gradient, other: joint.zeros(other, gradient)}
                self._sink.take(start, stop, {joint.weight: self._joined(joint, both)})

    def _joined(self, joint: Joint, both: Mapping[str, PerSampleGradient]) -> PerSampleGradient:
        return joint.join(both[joint.weight], both[joint.bias], both.keys() <= set(self._layers))

    def _samples(self, name: str, start: int, stop: int) -> PerSampleGradient | None:
        """Return a gradient that waits, of samples ``start`` to ``stop``; None if it does not."""
        for first, last, gradient in self._waiting.get(name, ()):
            if first <= start and stop <= last:
                self._met.add(name)
                if (first, last) == (start, stop):
                    return gradient
                return DenseGradient(gradient.entries(start - first, stop - first).unflatten(1, gradient.shape))
        return None
