"""Self-attention of `torch.nn.MultiheadAttention` as layers that can be captured.

The module computes with its parameters directly, so no hook sees its projections. While a batch is captured, its
forward is replaced by an equal one that calls a projection layer (which shares the parameters) and the output layer as
modules. The self-check compares outputs and gradients with the module's own forward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CaptureFailed(Exception):
    """A layer that cannot be captured; never reaches a user.

    Args:
        layer: The layer's name.
        reason: The reason.
        expanded: Whether the layer is only the first of those whose expanded outputs may be to blame.
    """

    def __init__(self, layer: str, reason: str, expanded: bool = False) -> None:
        super().__init__(f"{layer}: {reason}")
        self.layer, self.reason, self.expanded = layer, reason, expanded


class PackedProjection(nn.Module):
    """Queries, keys and values of one input in one product; shares the parameters of an attention module."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.weight, self.bias = attention.in_proj_weight, attention.in_proj_bias
        self._attention = (attention,)  # in a tuple, not to be a submodule

    def forward(self, x: Tensor) -> Tensor:
        """Project ``[B, T, E]`` to ``[B, T, 3 * E]``."""
        (attention,) = self._attention  # whose parameters are whole while it runs, also where the model is sharded
        return F.linear(x, attention.in_proj_weight, attention.in_proj_bias)


class CapturedAttention:
    """An attention module whose projections are captured.

    Args:
        name: The module's name in the model.
        module: The module.

    Attributes:
        projection: The layer that replaces its input projection.
        projection_name: That layer's name in messages.
    """

    def __init__(self, name: str, module: nn.MultiheadAttention) -> None:
        self.module = module
        self.projection = PackedProjection(module)
        self.projection_name = f"{name}.in_proj" if name else "in_proj"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as the module does, in eval mode; arguments and results are the module's."""
        if query is not key or key is not value or query.ndim != 3 or query.is_nested:
            raise CaptureFailed(self.projection_name, "only attention of a batch of sequences to itself has a rule")
        module = self.module
        x = query if module.batch_first else query.transpose(0, 1)
        rows, positions, dim = x.shape
        split = self.projection(x).view(rows, positions, 3, module.num_heads, dim // module.num_heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)  # [B, heads, T, D] each
        hinted = is_causal and attn_mask is not None and key_padding_mask is None and not need_weights
        mixed, weights = attend(q, k, v, attn_mask, key_padding_mask, need_weights, hinted)
        output = module.out_proj(mixed)
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return output if module.batch_first else output.transpose(0, 1), weights


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return values ``[B, T, heads * D]`` mixed by attention, and its weights ``[B, heads, T, T']`` if needed.

    Args:
        q: ``[B, heads, T, D]``.
        k: ``[B, heads, T', D]``.
        v: As ``k``.
        attn_mask: The mask of all samples or of each, as `torch.nn.MultiheadAttention` takes it.
        key_padding_mask: ``[B, T']``.
        need_weights: Whether weights are returned.
        is_causal: Whether the mask is the causal one, and may be replaced by a flag.
    """
    mask = None if is_causal else _joined_mask(attn_mask, key_padding_mask, q)
    weights = None
    if need_weights:
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        mixed = weights @ v
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
    return mixed.transpose(1, 2).flatten(2), weights


def refuses_attention(module: nn.MultiheadAttention) -> str | None:
    """Return the reason why `CapturedAttention` cannot replace an attention module, or None."""
    if not module._qkv_same_embed_dim:
        return "its keys or values have sizes of their own"
    if module.bias_k is not None or module.add_zero_attn:
        return "it adds keys and values of its own"
    if "forward" in module.__dict__:
        return "its forward is replaced"
    return None


@contextmanager
def standing_in(stand_ins: Sequence[Any]) -> Iterator[None]:
    """Replace the forward of each stand-in's ``module`` by its own ``forward`` within a ``with`` block."""
    try:
        for stand_in in stand_ins:
            stand_in.module.__dict__["forward"] = stand_in.forward
        yield
    finally:
        for stand_in in stand_ins:
            stand_in.module.__dict__.pop("forward", None)


def _joined_mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Return both masks as one that is added to scores ``[B, heads, T, T]``, or None."""
    joined: Any = None
    if attn_mask is not None:
        joined = _additive(attn_mask, q.dtype)
        if joined.ndim == 3:  # [B * heads, T, T], or one for all
            joined = joined.unsqueeze(0) if len(joined) == 1 else joined.view(*q.shape[:2], *joined.shape[1:])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q.dtype)[:, None, None, :]
        joined = padding if joined is None else joined + padding
    return joined


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask as numbers to add; a boolean mask forbids positions that are True."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
