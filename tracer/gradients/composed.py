"""Functions that consist of others, for which there are rules: each equal to one of torch, in eval mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tracer.gradients.attention import attend


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attend as `torch.nn.functional.multi_head_attention_forward` does, sequence first."""
    if query.ndim != 3 or add_zero_attn or any(each is not None for each in (bias_k, bias_v, static_k, static_v)):
        return NotImplemented
    if use_separate_proj_weight:
        weights: Any = q_proj_weight, k_proj_weight, v_proj_weight
    else:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    parts = []
    for x, weight, bias in zip((query, key, value), weights, biases, strict=True):
        projected = F.linear(x.transpose(0, 1), weight, bias)  # [B, T, E]
        parts.append(projected.unflatten(-1, (num_heads, -1)).transpose(1, 2))
    hinted = is_causal and attn_mask is not None and key_padding_mask is None and not need_weights
    q, k, v = parts
    mixed, shares = attend(q, k, v, attn_mask, key_padding_mask, need_weights, hinted)
    output = F.linear(mixed, out_proj_weight, out_proj_bias).transpose(0, 1)
    return output, shares.mean(1) if shares is not None and average_attn_weights else shares


def _baddbmm(input: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """Add a batch of products as `torch.baddbmm` does."""
    product = torch.bmm(batch1, batch2)
    return input * beta + product * alpha if (beta, alpha) != (1, 1) else input + product


COMPOSED: dict[Callable[..., Any], Callable[..., Any]] = {
    F.multi_head_attention_forward: _attention,
    torch.baddbmm: _baddbmm,
    Tensor.baddbmm: _baddbmm,
}
"""The functions, and what they are equal to; this returns ``NotImplemented`` for arguments that it does not know."""
