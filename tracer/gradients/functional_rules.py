"""Layer rules for functions that are called with parameters: ``F.linear``, ``@``, convolutions, norms, lookups."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracer.gradients.experts import ExpertsGradient
from tracer.gradients.layers import LayerCall, LayerRule, rule_of, summed
from tracer.gradients.per_sample import DenseGradient, OuterGradient, PerSampleGradient
from tracer.gradients.rows import RowsGradient

Given = Mapping[str, PerSampleGradient | Tensor]


@dataclass(frozen=True)
class FunctionCall:
    """One call of a function that a rule describes.

    Attributes:
        x: Its input.
        wanted: The tensors whose gradients are wanted, by the name that the rule has for them.
        rule: The rule.
        module: A stand-in for the layer.
        axis: The dimension of its input and output that holds the samples; None: one of the first two.
    """

    x: Tensor
    wanted: dict[str, Tensor]
    rule: LayerRule
    module: Any
    axis: int | None = None

    def gradients(self, x: Tensor, grad: Tensor) -> Given:
        """Return the gradients of wanted tensors for an input and an output's gradient, samples first."""
        return self.rule(LayerCall(self.module, (x,), grad, frozenset(self.wanted)))


def recognize(
    func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], shared: Collection[int]
) -> FunctionCall | None:
    """Return the call of a function whose ``id`` of parameters is among ``shared``, or None if no rule describes it."""
    name = getattr(func, "__name__", "").strip("_")
    if name in ("matmul", "mm", "bmm") and len(args) == 2:
        return _product(args[0], args[1], shared)
    if name == "getitem" and len(args) == 2 and isinstance(args[1], Tensor) and id(args[0]) in shared:
        return _lookup(args[0], args[1])
    signature = _SIGNATURES.get(func)
    if signature is None:
        return None
    names, rule, prepare = signature
    given: dict[str, Any] = dict.fromkeys(names) | dict(zip(names, args, strict=False)) | dict(kwargs)
    x = given.pop("input")
    wanted = {
        key: given[key] for key in ("weight", "bias") if isinstance(given.get(key), Tensor) and id(given[key]) in shared
    }
    if not isinstance(x, Tensor) or id(x) in shared or not wanted or not prepare(given):
        return None
    return FunctionCall(x, wanted, rule, SimpleNamespace(**given))


def _product(first: Tensor, second: Tensor, shared: Collection[int]) -> FunctionCall | None:
    """Return the call of a matrix product with one shared matrix or vector."""
    if id(first) in shared and id(second) in shared:
        return None
    if id(second) in shared and second.ndim == 2 and first.ndim >= 2:
        return FunctionCall(first, {"weight": second}, _right_product, SimpleNamespace(weight=second))
    if id(second) in shared and second.ndim == 1 and first.ndim >= 2:
        return FunctionCall(first, {"weight": second}, _vector_product, SimpleNamespace(weight=second))
    if id(first) in shared and first.ndim == 2 and second.ndim >= 3:
        return FunctionCall(second, {"weight": first}, _left_product, SimpleNamespace(weight=first))
    if id(second) in shared and first.ndim == second.ndim == 3 and len(first) == len(second) > 1:
        return FunctionCall(first, {"weight": second}, _batched_product, SimpleNamespace(weight=second), axis=1)
    return None


def _right_product(call: LayerCall) -> Given:
    x, g = call.x.to(call.grad_output.dtype), call.grad_output
    x, g = (each.reshape(each.shape[0], -1, each.shape[-1]) for each in (x, g))
    return {"weight": OuterGradient(x, g, call.module.weight.shape)}


def _batched_product(call: LayerCall) -> Given:
    x, g = call.x.to(call.grad_output.dtype), call.grad_output  # [N, E, I] and [N, E, O]
    index = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    return {"weight": ExpertsGradient(index, x, g, call.module.weight.shape)}


def _left_product(call: LayerCall) -> Given:
    x, g = call.x.to(call.grad_output.dtype).mT, call.grad_output.mT  # [N, ..., T, I] and [N, ..., T, O]
    x, g = (each.reshape(each.shape[0], -1, each.shape[-1]) for each in (x, g))
    return {"weight": OuterGradient(g, x, call.module.weight.shape)}


def _vector_product(call: LayerCall) -> Given:
    products = call.x * call.grad_output.unsqueeze(-1)
    return {"weight": DenseGradient(summed(products.reshape(len(products), -1, products.shape[-1]), 1))}


def _lookup(table: Tensor, index: Tensor) -> FunctionCall | None:
    """Return the call of a lookup of rows of a table by integers."""
    if index.dtype in (torch.bool, torch.uint8) or table.ndim < 1:
        return None
    return FunctionCall(index, {"weight": table}, _rows, SimpleNamespace(weight=table))


def _rows(call: LayerCall) -> Given:
    shape = call.module.weight.shape
    index = call.x.reshape(len(call.x), -1).long()
    values = call.grad_output.reshape(*index.shape, -1)
    return {"weight": RowsGradient(index % shape[0], values, shape)}


def _prelu(call: LayerCall) -> Given:
    values = call.grad_output * call.x.clamp(max=0)
    if call.module.weight.numel() == 1:
        return {"weight": DenseGradient(summed(values.flatten(1), 1).reshape(-1, 1))}
    return {"weight": DenseGradient(summed(values.flatten(2), 2) if values.ndim > 2 else values)}


def _prepare(**defaults: Any) -> Callable[[dict[str, Any]], bool]:
    """Return a function that fills in the defaults of arguments."""

    def prepare(given: dict[str, Any]) -> bool:
        given.update({key: value for key, value in defaults.items() if given.get(key) is None})
        return True

    return prepare


def _prepare_conv(given: dict[str, Any]) -> bool:
    """Complete the arguments of a convolution as a layer has them."""
    sizes = given["weight"].shape[2:]
    for key, default in (("stride", 1), ("dilation", 1)):
        value = default if given[key] is None else given[key]
        given[key] = (value,) * len(sizes) if isinstance(value, int) else tuple(value) * (len(sizes) // len(value))
    given["groups"] = given["groups"] or 1
    padding = given["padding"] or 0
    if padding == "valid":
        padding = 0
    if padding == "same":
        totals = [dilation * (size - 1) for dilation, size in zip(given["dilation"], sizes, strict=True)]
        pads = [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    else:
        padding = (padding,) * len(sizes) if isinstance(padding, int) else tuple(padding) * (len(sizes) // len(padding))
        pads = [each for each in reversed(padding) for _ in range(2)]
    given |= {"_reversed_padding_repeated_twice": pads, "padding_mode": "zeros"}
    return True


def _prepare_norm(given: dict[str, Any]) -> bool:
    given["normalized_shape"] = tuple(given["normalized_shape"])
    return _prepare(eps=1e-5)(given) if "bias" in given else True


def _prepare_batch_norm(given: dict[str, Any]) -> bool:
    return not given["training"] and given["running_mean"] is not None and _prepare(eps=1e-5)(given)


def _prepare_embedding(given: dict[str, Any]) -> bool:
    if given["max_norm"] is not None or given["scale_grad_by_freq"]:
        return False
    padding, rows = given["padding_idx"], len(given["weight"])
    given["padding_idx"] = padding + rows if padding is not None and padding < 0 else padding
    given["embedding_dim"] = given["weight"].shape[1]
    return True


_CONV = "input weight bias stride padding dilation groups".split(), rule_of(nn.Conv2d), _prepare_conv
_SIGNATURES: dict[Callable[..., Any], tuple[Sequence[str], LayerRule, Callable[[dict[str, Any]], bool]]] = {
    F.linear: ("input weight bias".split(), rule_of(nn.Linear), _prepare()),
    torch.addmm: ("bias input weight".split(), rule_of("transformers.pytorch_utils.Conv1D"), _prepare(beta=1, alpha=1)),
    torch.conv1d: _CONV,
    torch.conv2d: _CONV,
    torch.conv3d: _CONV,
    F.layer_norm: ("input normalized_shape weight bias eps".split(), rule_of(nn.LayerNorm), _prepare_norm),
    F.rms_norm: ("input normalized_shape weight eps".split(), rule_of(nn.RMSNorm), _prepare_norm),
    F.group_norm: ("input num_groups weight bias eps".split(), rule_of(nn.GroupNorm), _prepare(eps=1e-5)),
    F.batch_norm: (
        "input running_mean running_var weight bias training momentum eps".split(),
        rule_of(nn.BatchNorm2d),
        _prepare_batch_norm,
    ),
    F.embedding: (
        "input weight padding_idx max_norm norm_type scale_grad_by_freq sparse".split(),
        rule_of(nn.Embedding),
        _prepare_embedding,
    ),
    F.prelu: ("input weight".split(), _prelu, _prepare()),
}
