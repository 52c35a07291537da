"""Squared norms from built gradients and from factors, and what either costs.

Cancellation: a squared norm from built entries adds squares and loses nothing. One from Gram products, or from the
parts of a sum, ``|A|² + 2<A, B> + |B|²``, adds terms of both signs. In float64 its relative error is 1e-16 times
``(sum of the parts' norms)² / |gradient|²``: below 1e-6 until a gradient is 1e-5 of its parts, a size at which float32
factors have lost it themselves. Gram products in float32, which take half the time, err by about 1e-7 of the sum of the
positions' squared norms, so they are used for the samples whose gradient is not much smaller than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tracer._core.blocks import full_precision

_CHUNK = 1024
_BANDS, _BAND = 4, 64
"""Gram matrices are computed in so many bands of rows, of at least so many positions, up to the diagonal."""
_CANCELLED = 1 / 8
"""A gradient whose squared norm is a smaller share of its positions' is computed in float64."""
_SMALLEST, _LARGEST = 1e-20, 1e20
"""Squared norms of factors that are far from what float32 can represent."""


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
    """Estimate a sample's squared norm by Gram products over positions, in float32 multiply-adds."""
    return (1.1 if positions <= _BAND else 0.7) * positions**2 * (rows + cols)


def build_cost(positions: int, rows: int, cols: int) -> float:
    """Estimate building a sample's ``[O, I]`` and reading it twice, in float32 multiply-adds."""
    return float(rows * cols) * (positions + 12)


def gram_pays(positions: int, rows: int, cols: int) -> bool:
    """Return whether factors cost less than a built gradient."""
    return gram_cost(positions, rows, cols) <= build_cost(positions, rows, cols)


def gram_squares(left: Tensor, right: Tensor) -> Tensor:
    """Return the squared norms of ``sum_t left[t] (outer) right[t]`` without building it: ``[b]``, float64.

    ``sum_{s,t} <left_s, left_t> <right_s, right_t>``, of ``left [b, T, O]`` and ``right [b, T, I]``.
    """
    if left.shape[1] == 1:
        return row_squares(left.squeeze(1)) * row_squares(right.squeeze(1))
    # On a GPU, looking at the result would wait for it. Lower precisions of products are for training.
    single = left.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    if not single or torch.float64 in (left.dtype, right.dtype):
        return _gram_sums(left.double(), right.double())[0]
    left, right = full_precision(left), full_precision(right)
    total, positions, sizes = _gram_sums(left, right)
    sure = (total >= _CANCELLED * positions) & ((sizes > _SMALLEST) & (sizes < _LARGEST)).all(0)
    if not sure.all():
        rows = (~sure).nonzero()[:, 0]
        total[rows] = _gram_sums(left[rows].double(), right[rows].double())[0]
    return total


def _gram_sums(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sums of the product of both Gram matrices ``[b]`` and of its diagonal ``[b]``, in float64.

    The third are the largest squared norms of a position's factors, left and right: ``[2, b]``.
    """
    total = torch.zeros(left.shape[0], dtype=torch.float64, device=left.device)
    step = max(_BAND, -(-left.shape[1] // _BANDS))
    diagonals = []
    for start in range(0, left.shape[1], step):  # what is right of the diagonal equals what is left of it
        stop = min(start + step, left.shape[1])
        lefts = torch.bmm(left[:, start:stop], left[:, :stop].transpose(1, 2))
        rights = torch.bmm(right[:, start:stop], right[:, :stop].transpose(1, 2))
        diagonals.append(torch.stack([each[:, :, start:].diagonal(dim1=1, dim2=2) for each in (lefts, rights)]))
        product = lefts.mul_(rights)
        total += product[:, :, start:].sum((1, 2), dtype=torch.float64)
        if start:
            total += 2 * product[:, :, :start].sum((1, 2), dtype=torch.float64)
    sizes = torch.cat(diagonals, 2)
    return total, (sizes[0] * sizes[1]).sum(1, dtype=torch.float64), sizes.amax(2)


def weighted_norms(squared_norm: Tensor, weights: Tensor) -> Tensor:
    """Return the sum of norms times the sizes of ``weights [B]``, in their dtype, given squared norms: ``[1]``."""
    return (weights.abs() * squared_norm.clamp(min=0).sqrt().to(weights.dtype)).sum().reshape(1)
