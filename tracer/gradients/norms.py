"""Exact squared norms and inner products of per-sample gradients, from their factors where that is cheaper.

Layout as in `tracer.gradients.per_sample`: ``B`` samples, ``T`` positions, a parameter as a matrix ``[O, I]``.
Half-precision factors are widened to float32 before any product; sums over entries are float64.

Cancellation: a squared norm from built entries adds squares and loses nothing. One from Gram products, or from the
parts of a sum, ``|A|² + 2<A, B> + |B|²``, adds terms of both signs. Gram products are float64, so their relative error
is 1e-16 times ``(sum of the parts' norms)² / |gradient|²``: below 1e-6 until a gradient is 1e-5 of its parts, where
float32 factors have lost it themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from tracer._core.blocks import full_precision, row_blocks
from tracer.gradients.per_sample import (
    DenseGradient,
    FoldedGradient,
    PerSampleGradient,
    RowsGradient,
    ScaledGradient,
    SumGradient,
    matrix_shape,
)

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


def num_positions(gradient: PerSampleGradient) -> int | None:
    """Return ``T`` of a gradient that offers outer factors, None for one that does not."""
    factors = gradient.outer(0, min(1, gradient.batch_size))
    return None if factors is None else factors[0].shape[1]


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


def squared_norm(gradient: PerSampleGradient) -> Tensor:
    """Return the exact squared norm of each sample's gradient: ``[B]``, float64.

    Args:
        gradient: Per-sample gradients of one parameter, of any kind.

    Returns:
        The squared norms, computed in blocks of samples so that memory stays bounded.
    """
    total = torch.zeros(gradient.batch_size, dtype=torch.float64, device=gradient.device)
    if gradient.numel == 0:
        return total
    if isinstance(gradient, SumGradient):
        parts = flatten_sum(gradient)
        return torch.stack([squared_norm(part) for part in parts]).sum(0) + cross_terms(parts)
    if isinstance(gradient, RowsGradient):
        return _rows_squares(gradient)
    rows, cols = matrix_shape(gradient.shape)
    positions = num_positions(gradient)
    gram = positions is not None and gram_cost(positions, rows, cols) <= build_cost(positions, rows, cols)
    row_bytes = 8 * positions * (2 * positions + rows + cols) if gram and positions else 4 * rows * cols
    for start, stop in row_blocks(gradient.batch_size, row_bytes):
        factors = gradient.outer(start, stop) if gram else None
        total[start:stop] = gram_squares(*factors) if factors else row_squares(built(gradient, start, stop))
    return total


def flatten_sum(gradient: PerSampleGradient) -> list[PerSampleGradient]:
    """Return the parts of a sum of gradients, also of sums within it; any other gradient is its own part."""
    if isinstance(gradient, FoldedGradient):
        inner = flatten_sum(gradient.inner)
        return [gradient] if len(inner) == 1 else [part.fold(gradient.factor) for part in inner]
    if not isinstance(gradient, SumGradient):
        return [gradient]
    return [leaf for part in gradient.parts for leaf in flatten_sum(part)]


def cross_terms(parts: Sequence[PerSampleGradient]) -> Tensor:
    """Return ``2 * sum of <A, B>`` over all pairs of the parts: ``[B]``, float64."""
    total = torch.zeros(parts[0].batch_size, dtype=torch.float64, device=parts[0].device)
    for one, other in combinations(parts, 2):
        total += 2.0 * inner_product(one, other)
    return total


def inner_product(one: PerSampleGradient, other: PerSampleGradient) -> Tensor:
    """Return the exact inner product of two gradients of one parameter, sample by sample: ``[B]``, float64.

    Outer products and embedding rows meet in their factors; anything else is built a few samples at a time.

    Args:
        one: Gradients of ``B`` samples.
        other: Gradients of the same parameter and samples.

    Returns:
        The inner products.
    """
    if isinstance(one, RowsGradient):
        one, other = other, one
    rows, cols = matrix_shape(one.shape)
    first, second = num_positions(one), num_positions(other)
    row_bytes, product = 8 * rows * cols, _dense_product
    if isinstance(other, RowsGradient):
        num_rows = other.index.shape[1]
        if isinstance(one, RowsGradient):
            row_bytes, product = 8 * (num_rows + cols) * (num_rows + one.index.shape[1]), _rows_rows
        elif first is not None:
            row_bytes, product = 8 * (first * (num_rows + cols) + 2 * num_rows * cols), _outer_rows
    elif first is not None and second is not None:
        gram = 2.0 * first * second * (rows + cols)
        if gram <= build_cost(first + second, rows, cols):
            row_bytes, product = 8 * ((first + second) * (rows + cols) + 2 * first * second), _outer_outer
    total = torch.zeros(one.batch_size, dtype=torch.float64, device=one.device)
    for start, stop in row_blocks(one.batch_size, row_bytes):
        total[start:stop] = product(one, other, start, stop)
    return total


def dense_entries(gradient: PerSampleGradient, start: int, stop: int, first: int, last: int) -> Tensor:
    """Build entries ``first`` to ``last`` of the flattened gradients: ``[stop - start, last - first]``.

    Only the matrix rows that hold these entries are built where the form allows it.

    Args:
        gradient: Per-sample gradients of one parameter.
        start: First sample.
        stop: One past the last sample.
        first: First entry of the flattened parameter.
        last: One past the last entry.

    Returns:
        The entries, float32 or float64.
    """
    if isinstance(gradient, SumGradient):
        return torch.stack([dense_entries(part, start, stop, first, last) for part in gradient.parts]).sum(0)
    if isinstance(gradient, ScaledGradient):
        return dense_entries(gradient.inner, start, stop, first, last) * gradient.scale.reshape(-1)[first:last]
    if isinstance(gradient, DenseGradient):
        return full_precision(gradient.dense(start, stop)[:, first:last])
    cols = matrix_shape(gradient.shape)[1]
    low, high = first // cols, -(-last // cols)
    span = slice(first - low * cols, last - low * cols)
    if isinstance(gradient, RowsGradient):
        index, values = gradient.index[start:stop] - low, full_precision(gradient.values[start:stop])
        # Rows outside the range are added to one spare row at the end.
        index = torch.where((index >= 0) & (index < high - low), index, high - low)
        rows = values.new_zeros(stop - start, high - low + 1, cols)
        rows.scatter_add_(1, index.unsqueeze(-1).expand_as(values), values)
        return rows[:, :-1].flatten(1)[:, span]
    factors = gradient.outer(start, stop)
    if factors is None:
        return full_precision(gradient.dense(start, stop)[:, first:last])
    left, right = full_precision(factors[0]), full_precision(factors[1])
    return torch.bmm(left[:, :, low:high].transpose(1, 2), right).flatten(1)[:, span]


def built(gradient: PerSampleGradient, start: int, stop: int) -> Tensor:
    """Build the gradients of samples ``start`` to ``stop`` in float32 or float64: ``[stop - start, O * I]``."""
    return dense_entries(gradient, start, stop, 0, gradient.numel)


def _rows_squares(gradient: RowsGradient) -> Tensor:
    """Return the squared norms of embedding gradients, rows that occur twice added first: ``[B]``, float64.

    Equal rows are found by sorting the indices, so it costs ``T * I`` numbers a sample and never ``V * I``.
    """
    total = torch.zeros(gradient.batch_size, dtype=torch.float64, device=gradient.device)
    for start, stop in row_blocks(gradient.batch_size, 8 * gradient.values[:1].numel()):
        index, values = gradient.index[start:stop], full_precision(gradient.values[start:stop])
        ordered, order = index.sort(dim=1)
        group = torch.zeros_like(ordered)
        group[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
        group = torch.empty_like(group).scatter_(1, order, group)
        grouped = torch.zeros_like(values).scatter_add_(1, group.unsqueeze(-1).expand_as(values), values)
        total[start:stop] = row_squares(grouped.flatten(1))
    return total


def _dense_product(one: PerSampleGradient, other: PerSampleGradient, start: int, stop: int) -> Tensor:
    """Return the inner products of two built gradients: ``[b]``, float64."""
    return (built(one, start, stop) * built(other, start, stop)).sum(1, dtype=torch.float64)


def _outer_outer(one: PerSampleGradient, other: PerSampleGradient, start: int, stop: int) -> Tensor:
    """Return ``sum_{s,t} <l_s, l'_t> <r_s, r'_t>`` of two outer forms: ``[b]``, float64."""
    first, second = one.outer(start, stop), other.outer(start, stop)
    assert first is not None and second is not None
    gram = torch.bmm(first[0].double(), second[0].double().transpose(1, 2))
    return (gram * torch.bmm(first[1].double(), second[1].double().transpose(1, 2))).sum((1, 2))


def _outer_rows(one: PerSampleGradient, other: PerSampleGradient, start: int, stop: int) -> Tensor:
    """Return ``sum_{s,t} left[t][index_s] <right_t, values_s>`` of an outer form and rows: ``[b]``, float64.

    Only the touched rows of the outer form are built: ``[b, S, I]`` for ``S`` rows a sample.
    """
    factors = one.outer(start, stop)
    assert factors is not None and isinstance(other, RowsGradient)
    left, right = factors
    index = other.index[start:stop].unsqueeze(1).expand(-1, left.shape[1], -1)
    touched = left.gather(2, index).double()  # [b, T, S]
    rows = torch.bmm(touched.transpose(1, 2), right.double())
    return (rows * other.values[start:stop].double()).sum((1, 2))


def _rows_rows(one: PerSampleGradient, other: PerSampleGradient, start: int, stop: int) -> Tensor:
    """Return ``sum over equal rows of <values_s, values'_t>``: ``[b]``, float64."""
    assert isinstance(one, RowsGradient) and isinstance(other, RowsGradient)
    equal = one.index[start:stop].unsqueeze(2) == other.index[start:stop].unsqueeze(1)  # [b, S, S']
    products = torch.bmm(one.values[start:stop].double(), other.values[start:stop].double().transpose(1, 2))
    return (products * equal).sum((1, 2))
