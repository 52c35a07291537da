"""Squared norms from built gradients and from factors, and what either costs.

Cancellation: a squared norm from built entries adds squares and loses nothing. One from Gram products, or from the
parts of a sum, ``|A|² + 2<A, B> + |B|²``, adds terms of both signs. Gram products are float64, so their relative error
is 1e-16 times ``(sum of the parts' norms)² / |gradient|²``: below 1e-6 until a gradient is 1e-5 of its parts, a size
at which float32 factors have lost it themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tracer._core.blocks import full_precision

_CHUNK = 1024


def row_squares(rows: Tensor) -> Tensor:
    """Return the squared norm of each row of ``[b, n]``: ``[b]``, float64.

    Float32 values are summed in float32 within chunks of 1,024 and in float64 over chunks: relative error 1e-6.

    >>> row_squares(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([25.,  4.], dtype=torch.float64)
    """
    if rows.dtype == torch.float64:
        return rows.square().sum(1)
    rows = full_precision(rows)
    whole = rows.shape[1] // _CHUNK * _CHUNK
    total = torch.linalg.vector_norm(rows[:, whole:], dim=1).double().square()
    if whole:
        chunks = rows[:, :whole].unflatten(1, (-1, _CHUNK))
        total += torch.linalg.vector_norm(chunks, dim=2).double().square().sum(1)
    return total


def gram_cost(positions: int, rows: int, cols: int) -> float:
    """Estimate a sample's squared norm by float64 Gram products over positions, in float32 multiply-adds."""
    return 2.0 * positions**2 * (rows + cols)


def build_cost(positions: int, rows: int, cols: int) -> float:
    """Estimate building a sample's ``[O, I]`` and reading it twice, in float32 multiply-adds."""
    return float(rows * cols) * (positions + 12)


def gram_squares(left: Tensor, right: Tensor) -> Tensor:
    """Return the squared norms of ``sum_t left[t] (outer) right[t]`` without building it: ``[b]``, float64.

    ``sum_{s,t} <left_s, left_t> <right_s, right_t>``, of ``left [b, T, O]`` and ``right [b, T, I]``.
    """
    if left.shape[1] == 1:
        return row_squares(left.squeeze(1)) * row_squares(right.squeeze(1))
    left, right = left.double(), right.double()
    gram = torch.bmm(left, left.transpose(1, 2))
    gram *= torch.bmm(right, right.transpose(1, 2))
    return gram.sum((1, 2))
