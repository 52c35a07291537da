"""Experts of transformers, whose weights are slices of one parameter, as layers that can be captured.

The experts of a mixture are products with ``weight[e]``, and how tokens find them differs: loops over experts, grouped
products, batched ones. While a batch is captured, the forward is replaced by an equal one that calls both products as
layers, on tokens in their own order, so that it is known whose each is. The self-check compares outputs and gradients
with the module's own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracer._core.blocks import full_precision, row_blocks
from tracer.gradients.attention import CaptureFailed
from tracer.gradients.layers import LayerCall, register_layer_rule
from tracer.gradients.norms import gram_squares, row_squares, weighted_norms
from tracer.gradients.per_sample import PerSampleGradient, join_samples
from tracer.gradients.rows import RowsGradient

_ATTRIBUTES = ("num_experts", "has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_apply_gate")


class ExpertsGradient(PerSampleGradient):
    """Gradients of a parameter ``[E, O, I]``, one matrix for each expert, that touch the experts a sample was sent to.

    Sample ``b`` has ``left[b, t] (outer) right[b, t]`` added to the matrix of expert ``index[b, t]``.

    Args:
        index: ``[B, T]``, int64, below ``E``.
        left: ``[B, T, O]``.
        right: ``[B, T, I]``.
        shape: The parameter's shape ``(E, O, I)``.

    >>> ExpertsGradient(torch.tensor([[1, 1]]), torch.ones(1, 2, 1), torch.ones(1, 2, 1), (2, 1, 1)).dense(0, 1)
    tensor([[0., 2.]])
    """

    touches_rows = True

    def __init__(self, index: Tensor, left: Tensor, right: Tensor, shape: Sequence[int]) -> None:
        super().__init__(shape, left.shape[0], left)
        self.index, self.left, self.right = index, left, right

    @property
    def num_terms(self) -> int:
        return min(self.index.shape[1], self.shape[0])

    def dense(self, start: int, stop: int) -> Tensor:
        rows, index, left, right = self._matrices(start, stop)
        built = left.new_zeros(stop - start, *self.shape)
        built[rows, index] = torch.bmm(left.transpose(1, 2), right)
        return built.flatten(1)

    def touched_rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        rows, index, left, right = self._matrices(start, stop)
        first = torch.searchsorted(rows, rows)
        place = torch.arange(len(rows), device=rows.device) - first  # of the expert among those of its sample
        most = int(place.max()) + 1 if len(rows) else 1
        experts = index.new_zeros(stop - start, most)
        values = left.new_zeros(stop - start, most, *self.shape[1:])
        experts[rows, place] = index
        values[rows, place] = torch.bmm(left.transpose(1, 2), right)
        return experts, values.flatten(2)

    position_views = touched_rows

    def squared_norm(self) -> Tensor:
        total = torch.zeros(self.batch_size, dtype=torch.float64, device=self.device)
        size = self.shape[1] * self.shape[2]
        for start, stop in row_blocks(self.batch_size, 8 * self.num_terms * size):
            rows, _, left, right = self._matrices(start, stop)
            left, right = full_precision(left), full_precision(right)
            if left.shape[1] * (self.shape[1] + self.shape[2]) < size:
                squares = gram_squares(left, right)
            else:
                squares = row_squares(torch.bmm(left.transpose(1, 2), right).flatten(1))
            total[start:stop].index_add_(0, rows, squares)
        return total

    def inner(self, other: PerSampleGradient) -> Tensor:
        return self._built_inner(other)

    def weighted_sum(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        index = self.index.flatten()
        left = (self.left.to(weights.dtype) * weights.view(-1, 1, 1)).flatten(0, 1)
        right = self.right.to(weights.dtype).flatten(0, 1)
        total = weights.new_zeros(self.shape)
        for expert in index.unique().tolist():
            tokens = index == expert
            total[expert] = left[tokens].T @ right[tokens]
        return total.reshape(-1), weighted_norms(self.squared_norm(), weights)

    def fold(self, factor: int) -> ExpertsGradient:
        index = self.index.reshape(self.batch_size // factor, -1)
        return ExpertsGradient(index, join_samples(self.left, factor), join_samples(self.right, factor), self.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.index, self.right, self.left

    def with_tensors(self, tensors: Sequence[Tensor]) -> ExpertsGradient:
        index, right, left = tensors
        return ExpertsGradient(index, left, right, self.shape)

    @classmethod
    def joined(cls, gradients: Sequence[ExpertsGradient]) -> list[PerSampleGradient]:
        index, right, left = (
            torch.cat(each, dim=1) for each in zip(*(gradient.tensors() for gradient in gradients), strict=True)
        )
        return [cls(index, left, right, gradients[0].shape)]

    def _matrices(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Group the tokens of samples by expert.

        Returns:
            For each pair of a sample and an expert it was sent to, in order: the sample from ``start`` on, the expert,
            and factors ``[pairs, T', O]`` and ``[pairs, T', I]``, zero behind the last token.
        """
        index = self.index[start:stop]
        samples = torch.arange(stop - start, device=index.device).unsqueeze(1)
        pairs, place, counts = (
            (samples * self.shape[0] + index).flatten().unique(return_inverse=True, return_counts=True)
        )
        order = place.argsort(stable=True)
        first = (counts.cumsum(0) - counts)[place[order]]
        within = torch.arange(len(order), device=order.device) - first
        factors = []
        for values in (self.left, self.right):
            padded = values.new_zeros(len(pairs), int(counts.max()) if len(counts) else 0, values.shape[-1])
            padded[place[order], within] = values[start:stop].flatten(0, 1)[order]
            factors.append(padded)
        return pairs // self.shape[0], pairs % self.shape[0], factors[0], factors[1]


class ExpertProjection(nn.Module):
    """The product of tokens with the matrices of their experts; shares the parameters of a module of experts.

    Args:
        experts: The module.
        name: The name of its weight, ``[E, O, I]``, or ``[E, I, O]`` if it is transposed.
    """

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        self.weight, self.bias = getattr(experts, name), getattr(experts, f"{name}_bias", None)
        self.transposed = bool(experts.is_transposed)
        self._experts, self._name = (experts,), name  # in a tuple, not to be a submodule

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Multiply tokens ``[N, I]`` by the matrices of experts ``index [N]``: ``[N, O]``."""
        (experts,) = self._experts  # whose parameters are whole while it runs, also where the model is sharded
        weight, bias = getattr(experts, self._name), getattr(experts, f"{self._name}_bias", None)
        order = index.argsort(stable=True)
        counts = torch.bincount(index, minlength=len(weight)).tolist()
        parts = []
        for expert, tokens in enumerate(x[order].to(weight.dtype).split(counts)):
            if len(tokens):
                matrix = weight[expert].T if self.transposed else weight[expert]
                parts.append(F.linear(tokens, matrix, None if bias is None else bias[expert]))
        return torch.cat(parts)[order.argsort()]


class CapturedExperts:
    """A module of experts whose products are captured.

    Args:
        name: The module's name in the model.
        module: The module.

    Attributes:
        name: The module's name.
        projections: The layers that replace its products, by their names in messages.
    """

    def __init__(self, name: str, module: Any) -> None:
        self.module, self.name = module, name
        first, second = ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"
        self._first, self._second = ExpertProjection(module, first), ExpertProjection(module, second)
        self.projections = {f"{name}.{first}": self._first, f"{name}.{second}": self._second}

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Mix experts as the module does, in eval mode; arguments and result are the module's."""
        module, index = self.module, top_k_index.reshape(-1)
        if hidden_states.ndim != 2 or top_k_index.ndim != 2 or bool((index >= module.num_experts).any()):
            raise CaptureFailed(next(iter(self.projections)), "tokens are not sent to experts in the usual way")
        mixed = self._first(hidden_states.repeat_interleave(top_k_index.shape[1], dim=0), index)
        mixed = module._apply_gate(mixed) if module.has_gate else module.act_fn(mixed)
        mixed = self._second(mixed, index)
        if module.has_post_expert_norm:
            mixed = module.post_expert_norm(mixed)
        weighted = mixed * top_k_weights.reshape(-1, 1)
        return weighted.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


def has_experts(module: Any) -> bool:
    """Return whether a module is one of experts, as ``use_experts_implementation`` of transformers makes them."""
    first = "gate_up_proj" if getattr(module, "has_gate", False) else "up_proj"
    weights = [getattr(module, name, None) for name in (first, "down_proj")]
    return (
        all(hasattr(module, name) for name in _ATTRIBUTES)
        and all(isinstance(weight, nn.Parameter) and weight.ndim == 3 for weight in weights)
        and not getattr(module, "_is_expert_parallel", False)
        and "forward" not in module.__dict__
    )


def _rule(call: LayerCall) -> dict[str, PerSampleGradient]:
    (x, index), g, module = call.inputs, call.grad_output, call.module
    x, g, index = x.to(g.dtype).unsqueeze(1), g.unsqueeze(1), index.unsqueeze(1)
    found: dict[str, PerSampleGradient] = {}
    if "weight" in call.wanted:
        left, right = (x, g) if module.transposed else (g, x)
        found["weight"] = ExpertsGradient(index, left, right, module.weight.shape)
    if "bias" in call.wanted:
        found["bias"] = RowsGradient(index, g, module.bias.shape)
    return found


register_layer_rule(ExpertProjection, _rule)
