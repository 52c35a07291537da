"""Per-sample gradients of one parameter, held as factors so that callers need not build them.

Layout, used in every docstring of this package:

- ``B`` samples; ``T`` positions that add up within one sample (tokens, pixels, repeated calls);
- a parameter is seen as a matrix ``[O, I]``: its first dimension by the product of the others; a vector of ``n``
  numbers is ``[1, n]`` and a scalar ``[1, 1]`` (`matrix_shape`);
- ``dense`` gradients are the flattened parameter in its own (row-major) order, ``[b, O * I]``.

Half-precision factors are widened to float32 before any product; squared norms and inner products are float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from tracer._core.blocks import full_precision, row_blocks
from tracer._core.scratch import Scratch
from tracer.gradients.norms import build_cost, gram_pays, gram_squares, row_squares, weighted_norms


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the ``(O, I)`` under which a parameter of this shape is seen as a matrix.

    >>> matrix_shape((8, 3, 5, 5)), matrix_shape((7,)), matrix_shape(())
    ((8, 75), (1, 7), (1, 1))
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


class PerSampleGradient(ABC):
    """Gradients of ``B`` scalar outputs with respect to one parameter.

    A form overrides what it can do better than by building the gradients.

    Attributes:
        shape: The parameter's shape.
        batch_size: The number of samples ``B``.
        device: The device of the factors.
        dtype: The dtype of built gradients.
        touches_rows: Whether gradients touch only some rows of the parameter (see `touched_rows`).
    """

    shape: tuple[int, ...]
    batch_size: int
    device: torch.device
    dtype: torch.dtype
    touches_rows = False

    def __init__(self, shape: Sequence[int], batch_size: int, like: Tensor | PerSampleGradient) -> None:
        self.shape, self.batch_size = tuple(shape), batch_size
        self.device, self.dtype = like.device, like.dtype

    @abstractmethod
    def dense(self, start: int, stop: int) -> Tensor:
        """Build the gradients of samples ``start`` to ``stop``: ``[stop - start, numel]``."""

    def outer(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Return factors ``left [b, T, O]`` and ``right [b, T, I]`` of samples ``start`` to ``stop``.

        The gradient of a sample is ``sum_t left[t] (outer) right[t]``. None if the gradient has no such form.
        """
        return None

    def factors(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the factors of `outer` of a gradient that has them."""
        factors = self.outer(start, stop)
        assert factors is not None
        return factors

    def touched_rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the row numbers ``[b, T]`` that are touched and the values ``[b, T, I]`` that are added to them."""
        raise NotImplementedError(f"{type(self).__name__} touches all rows")

    def unscaled(self) -> tuple[PerSampleGradient, Tensor | None]:
        """Return another gradient and the factors, ``[*shape]`` or None, by which its entries give this one's."""
        return self, None

    def parts(self) -> list[PerSampleGradient]:
        """Return the gradients that this one is the sum of, none of which is a sum itself."""
        return [self]

    @property
    def numel(self) -> int:
        """The number of entries of the parameter."""
        return math.prod(self.shape)

    @property
    def num_positions(self) -> int | None:
        """``T`` of a gradient that has an outer form, or None."""
        factors = self.outer(0, min(1, self.batch_size))
        return None if factors is None else factors[0].shape[1]

    @property
    def num_terms(self) -> int | None:
        """The number of outer products that add up in a sample, for which touched rows count too; or None."""
        return self.num_positions

    @property
    def is_divisible(self) -> bool:
        """Whether `entries` builds some entries without building all."""
        return self.num_positions is not None

    def entries(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Tensor:
        """Build entries ``first`` to ``last`` of the flattened gradients of samples ``start`` to ``stop``.

        Returns:
            ``[stop - start, last - first]``, float32 or float64. Only the matrix rows that hold these entries are
            built if the form allows it.
        """
        last = self.numel if last is None else last
        factors = self.outer(start, stop)
        if factors is None:
            return full_precision(self.dense(start, stop)[:, first:last])
        low, high, inside = self._matrix_rows(first, last)
        left, right = full_precision(factors[0]), full_precision(factors[1])
        return torch.bmm(left[:, :, low:high].transpose(1, 2), right).flatten(1)[:, inside]

    def squared_norm(self) -> Tensor:
        """Return the exact squared norm of each sample's gradient: ``[B]``, float64, in bounded memory."""
        if (positions := self._few_positions) is not None:
            row_bytes = 8 * positions * (2 * positions + sum(matrix_shape(self.shape)))
            return self._by_block(row_bytes, lambda start, stop: gram_squares(*self.factors(start, stop)))
        return self._by_block(4 * self.numel, lambda start, stop: row_squares(self.entries(start, stop)))

    @property
    def _few_positions(self) -> int | None:
        """``T`` if it is so small that factors cost less than a built gradient, or None."""
        positions = self.num_positions if self.numel else None
        return None if positions is None or not gram_pays(positions, *matrix_shape(self.shape)) else positions

    def inner(self, other: PerSampleGradient) -> Tensor:
        """Return the exact inner products with gradients of the same parameter and samples: ``[B]``, float64."""
        if other.touches_rows:
            return other.inner(self)
        rows, cols = matrix_shape(self.shape)
        first, second = self.num_positions, other.num_positions
        if first is not None and second is not None:
            if 2.0 * first * second * (rows + cols) <= build_cost(first + second, rows, cols):

                def gram(start: int, stop: int) -> Tensor:
                    one, two = self.factors(start, stop), other.factors(start, stop)
                    lefts = torch.bmm(one[0].double(), two[0].double().transpose(1, 2))
                    return (lefts * torch.bmm(one[1].double(), two[1].double().transpose(1, 2))).sum((1, 2))

                return self._by_block(8 * ((first + second) * (rows + cols) + 2 * first * second), gram)
        return self._built_inner(other)

    @classmethod
    def joined(cls, gradients: Sequence[Any]) -> list[PerSampleGradient]:
        """Return fewer gradients with the same sum, if the factors of this form can be joined along ``T``."""
        return list(gradients)

    def weighted_sum(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of weighted gradients and of weighted norms ``[1]``, given ``weights [B]``.

        The sum of gradients is ``[numel]``, or sparse and ``[V, I]`` if they touch few rows of a large table.
        """
        total, norms = weights.new_zeros(self.numel), weights.new_zeros(1)
        if positions := self._few_positions:
            shape = matrix_shape(self.shape)
            for start, stop in row_blocks(self.batch_size, 8 * positions * sum(shape), 32 << 20):
                left, right = (each.to(weights.dtype).flatten(0, 1) for each in self.factors(start, stop))
                total.view(shape).addmm_((left * weights[start:stop].repeat_interleave(positions)[:, None]).T, right)
            return total, weighted_norms(self.squared_norm(), weights)
        for start, stop in row_blocks(self.batch_size, 8 * self.numel, 32 << 20):
            block = self.dense(start, stop).to(weights.dtype)
            total += weights[start:stop] @ block
            norms += (weights[start:stop].abs() * torch.linalg.vector_norm(block, dim=1)).sum()
        return total, norms

    def sample(self, row: int) -> Tensor:
        """Return a sample's gradient, in the layout of `weighted_sum`."""
        return self.entries(row, row + 1)[0]

    def fold(self, factor: int) -> PerSampleGradient:
        """Add up groups of ``factor`` consecutive gradients: those of ``B * factor`` rows become those of ``B``."""
        return self if factor == 1 else FoldedGradient(self, factor)

    def scaled(self, scale: Tensor) -> PerSampleGradient:
        """Return the gradient with each entry multiplied by a number of ``scale [*shape]``, in the cheapest form."""
        return ScaledGradient(self, scale)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors held, each with samples first; the gradient is linear in the last. Empty: build it."""
        return ()

    def with_tensors(self, tensors: Sequence[Tensor]) -> PerSampleGradient:
        """Return a gradient of this form with other `tensors`, for example of other samples."""
        raise NotImplementedError(f"{type(self).__name__} holds no tensors")

    def head(self, count: int) -> PerSampleGradient:
        """Return the gradients of the first ``count`` samples, in this form if it holds tensors."""
        if self.tensors():
            return self.with_tensors([each[:count] for each in self.tensors()])
        return DenseGradient(self.entries(0, count).view(count, *self.shape))

    @property
    def form(self) -> Hashable:
        """Equal for two gradients of one parameter if `with_tensors` may join their tensors along samples."""
        return type(self), self.shape, tuple((each.shape[1:], each.dtype, each.device) for each in self.tensors())

    def divided(self, lengths: Tensor) -> PerSampleGradient:
        """Return the gradient of each sample over its length ``[B]``, in full precision."""
        *others, last = self.tensors() or (self._built(),)
        last = full_precision(last)
        over = (last / lengths.view(-1, *(1 for _ in last.shape[1:]))).to(last.dtype)
        return self.with_tensors((*others, over)) if self.tensors() else DenseGradient(over)

    def position_views(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the factors of `outer` as views: ``[b, T, O]``, and right ones whose ``T`` and ``I`` may be split."""
        return self.factors(start, stop)

    def product_factors(self, start: int, stop: int, scratch: Scratch) -> tuple[Tensor, Tensor]:
        """Return ``left [b, O, T]`` and ``right [b, T, I]``, whose product is the gradient."""
        left, right = map(full_precision, self.factors(start, stop))
        dtype = torch.promote_types(left.dtype, right.dtype)
        return left.to(dtype).transpose(1, 2), right.to(dtype)

    def _built(self) -> Tensor:
        """Build all gradients a few samples at a time: ``[B, *shape]``."""
        blocks = row_blocks(self.batch_size, 4 * self.numel)
        return torch.cat([self.entries(start, stop) for start, stop in blocks]).view(-1, *self.shape)

    def _built_inner(self, other: PerSampleGradient) -> Tensor:
        return self._by_block(
            8 * self.numel,
            lambda start, stop: (self.entries(start, stop) * other.entries(start, stop)).sum(1, dtype=torch.float64),
        )

    def _by_block(self, row_bytes: int, compute: Callable[[int, int], Tensor]) -> Tensor:
        """Compute a number for each sample, ``[B]`` float64, in blocks of samples that take so many bytes each."""
        total = torch.zeros(self.batch_size, dtype=torch.float64, device=self.device)
        for start, stop in row_blocks(self.batch_size, row_bytes) if self.numel else ():
            total[start:stop] = compute(start, stop)
        return total

    def _matrix_rows(self, first: int, last: int) -> tuple[int, int, slice]:
        """Return the matrix rows, from and to, that hold some entries, and the slice of the entries within them."""
        cols = matrix_shape(self.shape)[1]
        low, high = first // cols, -(-last // cols)
        return low, high, slice(first - low * cols, last - low * cols)


class DenseGradient(PerSampleGradient):
    """Gradients that are already built: ``values [B, *shape]``.

    >>> gradient = DenseGradient(torch.arange(6.0).reshape(2, 3))
    >>> gradient.dense(1, 2)
    tensor([[3., 4., 5.]])
    """

    is_divisible = True

    def __init__(self, values: Tensor) -> None:
        super().__init__(values.shape[1:], values.shape[0], values)
        self.values = values

    def dense(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop].reshape(stop - start, self.numel)

    def fold(self, factor: int) -> DenseGradient:
        return self if factor == 1 else DenseGradient(self.values.unflatten(0, (-1, factor)).sum(1))

    def scaled(self, scale: Tensor) -> DenseGradient:
        return DenseGradient(self.values * scale)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def with_tensors(self, tensors: Sequence[Tensor]) -> DenseGradient:
        return DenseGradient(*tensors)


class OuterGradient(PerSampleGradient):
    """Gradients ``sum_t left[b, t] (outer) right[b, t]`` with ``left [B, T, O]`` and ``right [B, T, I]``.

    For example a Linear layer's weight: ``left`` is the output gradient, ``right`` the input; ``T`` is 1 for vectors.

    >>> gradient = OuterGradient(torch.ones(1, 2, 1), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), (1, 2))
    >>> gradient.dense(0, 1)
    tensor([[4., 6.]])
    """

    def __init__(self, left: Tensor, right: Tensor, shape: Sequence[int]) -> None:
        super().__init__(shape, left.shape[0], left)
        self.left, self.right = left, right

    def dense(self, start: int, stop: int) -> Tensor:
        left, right = self.left[start:stop], self.right[start:stop]
        return torch.bmm(left.transpose(1, 2), right).reshape(stop - start, self.numel)

    def outer(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.left[start:stop], self.right[start:stop]

    @classmethod
    def joined(cls, gradients: Sequence[OuterGradient]) -> list[PerSampleGradient]:
        left = torch.cat([gradient.left for gradient in gradients], dim=1)
        return [cls(left, torch.cat([gradient.right for gradient in gradients], dim=1), gradients[0].shape)]

    def fold(self, factor: int) -> OuterGradient:
        return OuterGradient(join_samples(self.left, factor), join_samples(self.right, factor), self.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.right, self.left

    def with_tensors(self, tensors: Sequence[Tensor]) -> OuterGradient:
        return OuterGradient(tensors[1], tensors[0], self.shape)


class FoldedGradient(PerSampleGradient):
    """A gradient whose samples are groups of ``factor`` consecutive rows of another, added up.

    For layers that see a sample as several rows: windows of an image, frames of a video, flattened tokens.
    """

    def __init__(self, inner: PerSampleGradient, factor: int) -> None:
        super().__init__(inner.shape, inner.batch_size // factor, inner)
        self.inner_gradient, self.factor = inner, factor

    def dense(self, start: int, stop: int) -> Tensor:
        inner = self.inner_gradient.dense(start * self.factor, stop * self.factor)
        return inner.reshape(stop - start, self.factor, self.numel).sum(1)

    def outer(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        factors = self.inner_gradient.outer(start * self.factor, stop * self.factor)
        return (
            None if factors is None else (join_samples(factors[0], self.factor), join_samples(factors[1], self.factor))
        )

    def head(self, count: int) -> FoldedGradient:
        return FoldedGradient(self.inner_gradient.head(count * self.factor), self.factor)

    def parts(self) -> list[PerSampleGradient]:
        inner = self.inner_gradient.parts()
        return [self] if len(inner) == 1 else [part.fold(self.factor) for part in inner]

    def divided(self, lengths: Tensor) -> FoldedGradient:
        return FoldedGradient(self.inner_gradient.divided(lengths.repeat_interleave(self.factor)), self.factor)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.inner_gradient.tensors()

    def with_tensors(self, tensors: Sequence[Tensor]) -> FoldedGradient:
        return FoldedGradient(self.inner_gradient.with_tensors(tensors), self.factor)

    @property
    def form(self) -> Hashable:
        return type(self), self.factor, self.inner_gradient.form


class ScaledGradient(PerSampleGradient):
    """Another gradient with each entry multiplied by a number of its own, as a diagonal preconditioner does.

    It has no outer form, since the scale of an ``[O, I]`` parameter has none; `PerSampleGradient.scaled` makes it if
    there is nothing cheaper.

    Args:
        inner: The gradient before.
        scale: ``[*shape]``, float32 or float64.

    >>> inner = OuterGradient(torch.ones(1, 1, 1), torch.tensor([[[1.0, 2.0]]]), (1, 2))
    >>> ScaledGradient(inner, torch.tensor([[10.0, 100.0]])).dense(0, 1)
    tensor([[ 10., 200.]])
    """

    def __init__(self, inner: PerSampleGradient, scale: Tensor) -> None:
        super().__init__(inner.shape, inner.batch_size, inner)
        self.inner_gradient, self.scale = inner, scale
        self.dtype = torch.promote_types(inner.dtype, scale.dtype)

    def dense(self, start: int, stop: int) -> Tensor:
        return self.inner_gradient.dense(start, stop) * self.scale.reshape(-1)

    def entries(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Tensor:
        return self.inner_gradient.entries(start, stop, first, last) * self.scale.reshape(-1)[first:last]

    def unscaled(self) -> tuple[PerSampleGradient, Tensor | None]:
        return self.inner_gradient, self.scale

    def fold(self, factor: int) -> PerSampleGradient:
        return self if factor == 1 else ScaledGradient(self.inner_gradient.fold(factor), self.scale)


def flat(gradient: Tensor) -> Tensor:
    """Return a gradient that may be sparse as ``[numel]``."""
    return (gradient.to_dense() if gradient.is_sparse else gradient).reshape(-1)


def join_samples(values: Tensor, factor: int) -> Tensor:
    """Join groups of ``factor`` consecutive samples of ``[B * factor, T, n]`` along ``T``."""
    return values.reshape(len(values) // factor, factor * values.shape[1], values.shape[-1])
