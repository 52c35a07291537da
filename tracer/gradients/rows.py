"""Per-sample gradients of embeddings, which touch few rows of a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tracer._core.blocks import full_precision
from tracer.gradients.norms import row_squares, weighted_norms
from tracer.gradients.per_sample import PerSampleGradient, join_samples, matrix_shape

LARGE_TABLE = 1 << 18
"""From so many entries on a table's sums are sparse if few rows are touched."""


class RowsGradient(PerSampleGradient):
    """Gradients that touch few rows of a matrix ``[V, I]``: an embedding's.

    Sample ``b`` has ``values[b, t]`` added to row ``index[b, t]``; rows that occur twice add up.

    Args:
        index: ``[B, T]``, int64, row numbers below ``V``.
        values: ``[B, T, I]``.
        shape: The parameter's shape ``(V, I)``.

    >>> RowsGradient(torch.tensor([[1, 1]]), torch.ones(1, 2, 1), (3, 1)).dense(0, 1)
    tensor([[0., 2., 0.]])
    """

    touches_rows = is_divisible = True

    def __init__(self, index: Tensor, values: Tensor, shape: Sequence[int]) -> None:
        super().__init__(shape, values.shape[0], values)
        self.index, self.values = index, values

    @property
    def num_terms(self) -> int:
        return self.index.shape[1]

    def dense(self, start: int, stop: int) -> Tensor:
        rows, cols = matrix_shape(self.shape)
        built = self.values.new_zeros(stop - start, rows, cols)
        index = self.index[start:stop].unsqueeze(-1).expand(-1, -1, cols)
        return built.scatter_add_(1, index, self.values[start:stop]).reshape(stop - start, self.numel)

    def touched_rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.index[start:stop], self.values[start:stop]

    position_views = touched_rows

    def entries(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Tensor:
        low, high, inside = self._matrix_rows(first, self.numel if last is None else last)
        index, values = self.index[start:stop] - low, full_precision(self.values[start:stop])
        # Touched rows that are not asked for are added to one spare row at the end.
        index = torch.where((index >= 0) & (index < high - low), index, high - low)
        rows = values.new_zeros(stop - start, high - low + 1, values.shape[-1])
        rows.scatter_add_(1, index.unsqueeze(-1).expand_as(values), values)
        return rows[:, :-1].flatten(1)[:, inside]

    def squared_norm(self) -> Tensor:
        def squares(start: int, stop: int) -> Tensor:
            # Equal rows are found by sorting the indices: T * I numbers a sample, never V * I.
            index, values = self.index[start:stop], full_precision(self.values[start:stop])
            ordered, order = index.sort(dim=1)
            group = torch.zeros_like(ordered)
            group[:, 1:] = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
            group = torch.empty_like(group).scatter_(1, order, group)
            grouped = torch.zeros_like(values).scatter_add_(1, group.unsqueeze(-1).expand_as(values), values)
            return row_squares(grouped.flatten(1))

        return self._by_block(8 * self.values[:1].numel(), squares)

    def inner(self, other: PerSampleGradient) -> Tensor:
        touched, cols, positions = self.num_terms, self.values.shape[-1], other.num_positions

        def with_rows(start: int, stop: int) -> Tensor:
            (index, values), (others, added) = self.touched_rows(start, stop), other.touched_rows(start, stop)
            equal = index.unsqueeze(2) == others.unsqueeze(1)  # [b, S, S']
            return (torch.bmm(values.double(), added.double().transpose(1, 2)) * equal).sum((1, 2))

        def with_outer(start: int, stop: int) -> Tensor:
            left, right = other.factors(start, stop)
            index = self.index[start:stop].unsqueeze(1).expand(-1, left.shape[1], -1)
            weights = left.gather(2, index).double()  # [b, T, S]: only touched rows of the outer form are built
            rows = torch.bmm(weights.transpose(1, 2), right.double())
            return (rows * self.values[start:stop].double()).sum((1, 2))

        if other.touches_rows:
            return self._by_block(8 * (touched + cols) * (touched + (other.num_terms or 0)), with_rows)
        if positions is not None:
            return self._by_block(8 * (positions * (touched + cols) + 2 * touched * cols), with_outer)
        return self._built_inner(other)

    def weighted_sum(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        weighted = self.values.to(weights.dtype) * weights.view(-1, 1, 1)
        return self._added(self.index, weighted), weighted_norms(self.squared_norm(), weights)

    def sample(self, row: int) -> Tensor:
        return self._added(self.index[row], full_precision(self.values[row]))

    def _added(self, index: Tensor, values: Tensor) -> Tensor:
        """Return the sum of values ``[..., I]`` at rows, in the layout of `weighted_sum`."""
        # A table may be large and a batch touches few of its rows: nothing of B * V * I numbers is built.
        rows, cols = matrix_shape(self.shape)
        index, values = index.reshape(-1), values.reshape(-1, cols)
        if self.numel >= LARGE_TABLE and 4 * len(index) < rows:
            return torch.sparse_coo_tensor(index[None], values, (rows, cols), check_invariants=False).coalesce()
        return values.new_zeros(rows, cols).index_add_(0, index, values).reshape(-1)

    @classmethod
    def joined(cls, gradients: Sequence[RowsGradient]) -> list[PerSampleGradient]:
        index = torch.cat([gradient.index for gradient in gradients], dim=1)
        return [cls(index, torch.cat([gradient.values for gradient in gradients], dim=1), gradients[0].shape)]

    def fold(self, factor: int) -> RowsGradient:
        index = self.index.reshape(self.batch_size // factor, -1)
        return RowsGradient(index, join_samples(self.values, factor), self.shape)

    def scaled(self, scale: Tensor) -> RowsGradient:
        by_row = scale.reshape(matrix_shape(self.shape))  # [V, I]
        return RowsGradient(self.index, self.values * by_row[self.index], self.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.index, self.values

    def with_tensors(self, tensors: Sequence[Tensor]) -> RowsGradient:
        return RowsGradient(tensors[0], tensors[1], self.shape)
