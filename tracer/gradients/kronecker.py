"""Kronecker-factored curvature of parameters, and gradients whitened by it.

A parameter is seen as a matrix ``[O, I]`` (`matrix_shape`), and the Fisher information of its entries as ``c (G x A)``:
G is the second moment of the left factors of gradients, A that of their right factors, each with a mean eigenvalue of
1, and c the mean square of an entry (K-FAC, Martens & Grosse 2015). The factors are those that gradients are held in,
so any layer has them: inputs and output gradients of a Linear layer, windows of a convolution, rows of an embedding
with their counts. A gradient that is built is divided between its sides (as in Shampoo, Gupta et al. 2018).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from tracer._core.blocks import full_precision, row_blocks
from tracer.gradients.combined import SumGradient
from tracer.gradients.per_sample import OuterGradient, PerSampleGradient, matrix_shape
from tracer.gradients.rows import RowsGradient

MAX_SIDE = 8192
"""The largest side of a parameter that has a full second moment; a larger one, as of a vocabulary, has a diagonal."""


@dataclass
class FactorSums:
    """Sums over the gradients of one parameter that are held in one form.

    Attributes:
        left: The sum of ``v vᵀ`` over left factors v, ``[O, O]``, or its diagonal ``[O]``.
        right: The same of right factors, ``[I, I]`` or ``[I]``.
        weight: ``[]``, the sum of the squared norms of the outer products that gradients consist of.
    """

    left: Tensor
    right: Tensor
    weight: Tensor

    @classmethod
    def zeros(cls, gradient: PerSampleGradient) -> FactorSums:
        """Return sums of nothing for gradients of a form."""

        def zeros(size: int, diagonal: bool) -> Tensor:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            return torch.zeros((size,) if diagonal else (size, size), dtype=dtype, device=gradient.device)

        rows, cols = matrix_shape(gradient.shape)
        left = zeros(rows, rows > MAX_SIDE or gradient.touches_rows)
        return cls(left, zeros(cols, cols > MAX_SIDE), torch.zeros((), dtype=torch.float64, device=gradient.device))

    def add(self, gradient: PerSampleGradient) -> None:
        """Add gradients of the form."""
        rows, cols = matrix_shape(gradient.shape)
        terms = gradient.num_terms or rows
        for start, stop in row_blocks(gradient.batch_size, 8 * terms * (rows + cols)):
            if gradient.touches_rows:
                index, values = gradient.touched_rows(start, stop)
                values = full_precision(values).flatten(0, 1)
                squares = values.square().sum(1)
                self.left.index_add_(0, index.flatten(), (squares > 0).to(self.left.dtype))
                _add_products(self.right, values)
                self.weight += squares.sum()
            elif gradient.num_positions is not None:
                left, right = (full_precision(each).flatten(0, 1) for each in gradient.factors(start, stop))
                self._add_outer(left, right)
            else:
                self._add_built(gradient.entries(start, stop).unflatten(1, (rows, cols)))

    def _add_outer(self, left: Tensor, right: Tensor) -> None:
        """Add the outer products of ``left [m, O]`` and ``right [m, I]``."""
        squares = left.square().sum(1) * right.square().sum(1)
        # Padding has inputs, but no output gradient: it has no part in the gradient, and so none in a moment.
        counts = (squares > 0).unsqueeze(1)
        _add_products(self.left, torch.where(counts, left, 0.0))
        _add_products(self.right, torch.where(counts, right, 0.0))
        self.weight += squares.sum()

    def _add_built(self, matrix: Tensor) -> None:
        """Add gradients ``[b, O, I]``."""
        if matrix.shape[1] == 1:
            return self._add_outer(matrix.new_ones(len(matrix), 1), matrix[:, 0])
        norms = torch.linalg.vector_norm(matrix, dim=(1, 2), keepdim=True)
        matrix = matrix / norms.sqrt().clamp(min=torch.finfo(matrix.dtype).tiny)
        _add_products(self.left, matrix.transpose(1, 2).flatten(0, 1))
        _add_products(self.right, matrix.flatten(0, 1))
        self.weight += norms.square().sum()

    def merge(self, others: FactorSums) -> None:
        """Add other sums of the form."""
        self.left += others.left
        self.right += others.right
        self.weight += others.weight


def _add_products(total: Tensor, vectors: Tensor) -> None:
    """Add ``vᵀ v``, or its diagonal, of vectors ``[m, n]``."""
    vectors = vectors.to(total.dtype)
    if total.ndim == 1:
        total += vectors.square().sum(0)
    else:
        total.addmm_(vectors.T, vectors)


def _form(gradient: PerSampleGradient) -> str:
    if gradient.touches_rows:
        return "rows"
    return "built" if gradient.num_positions is None else "outer"


class KroneckerSums:
    """A sink that sums up the factors of gradients.

    Attributes:
        factors: The sums by parameter and form.
        squares: The sum of squared norms of whole gradients, by parameter.
    """

    def __init__(self) -> None:
        self.factors: dict[tuple[str, str], FactorSums] = {}
        self.squares: dict[str, float] = {}

    def begin(self) -> None:
        """Start from zeros."""
        self.factors.clear()
        self.squares.clear()

    def take(self, start: int, stop: int, gradients: Mapping[str, PerSampleGradient]) -> None:
        """Add the gradients of samples ``start`` to ``stop``."""
        for name, gradient in gradients.items():
            self.squares[name] = self.squares.get(name, 0.0) + float(gradient.squared_norm().sum())
            for part in gradient.parts():
                key = name, _form(part)
                if key not in self.factors:
                    self.factors[key] = FactorSums.zeros(part)
                self.factors[key].add(part)

    @property
    def finite(self) -> bool:
        """Whether no gradient was NaN or infinite."""
        return all(math.isfinite(each) for each in self.squares.values())

    def merge(self, others: KroneckerSums) -> None:
        """Add other sums."""
        for name, squares in others.squares.items():
            self.squares[name] = self.squares.get(name, 0.0) + squares
        for key, sums in others.factors.items():
            if key in self.factors:
                self.factors[key].merge(sums)
            else:
                self.factors[key] = sums

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return everything that was summed up, for `restored`."""
        tensors = {
            f"{side} {form} {name}": getattr(sums, side)
            for (name, form), sums in self.factors.items()
            for side in ("left", "right")
        }
        weights = {f"{form} {name}": float(sums.weight) for (name, form), sums in self.factors.items()}
        return tensors, {**weights, **{f"squares {name}": value for name, value in self.squares.items()}}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> KroneckerSums:
        """Return sums from their state."""
        sums = cls()
        for key, value in numbers.items():
            form, name = key.split(" ", 1)
            if form == "squares":
                sums.squares[name] = value
                continue
            left, right = tensors[f"left {key}"], tensors[f"right {key}"]
            sums.factors[name, form] = FactorSums(left, right, torch.tensor(value, dtype=torch.float64))
        return sums

    def curvatures(self, num_samples: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, KroneckerCurvature]:
        """Return the curvature of each parameter from the gradients of so many samples.

        A parameter without any gradient, as of an expert that no sample reached, has the mean eigenvalue of all.
        """
        sizes = {name: math.prod(shape) for name, shape in shapes.items()}
        seen = {name for name, squares in self.squares.items() if squares > 0}
        mean = sum(self.squares[name] for name in seen) / num_samples / (sum(sizes[name] for name in seen) or 1)
        found = {}
        for name, shape in shapes.items():
            sums = [each for (known, _), each in self.factors.items() if known == name]
            if name in seen:
                found[name] = KroneckerCurvature.of(sums, self.squares[name] / num_samples)
            else:
                left, right = (torch.ones(size, dtype=torch.float64) for size in matrix_shape(shape))
                found[name] = KroneckerCurvature(left, right, mean)
        return found


class SquareSums:
    """A sink that sums up the squares of the entries of gradients, by parameter."""

    def __init__(self) -> None:
        self.squares: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Start from zeros."""
        self.squares.clear()

    def take(self, start: int, stop: int, gradients: Mapping[str, PerSampleGradient]) -> None:
        """Add the gradients of samples ``start`` to ``stop``."""
        for name, gradient in gradients.items():
            for first, last in row_blocks(gradient.batch_size, 4 * gradient.numel):
                squares = gradient.entries(first, last).square().sum(0).view(gradient.shape)
                self._add(name, squares)

    def merge(self, others: SquareSums) -> None:
        """Add other sums."""
        for name, squares in others.squares.items():
            self._add(name, squares)

    def _add(self, name: str, squares: Tensor) -> None:
        if name in self.squares:
            self.squares[name] += squares
        else:
            self.squares[name] = squares

    @property
    def finite(self) -> bool:
        """Whether no gradient was NaN or infinite."""
        return all(bool(each.isfinite().all()) for each in self.squares.values())

    def state(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Return everything that was summed up, for `restored`."""
        return self.squares, {}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]) -> SquareSums:
        """Return sums from their state."""
        sums = cls()
        sums.squares.update(tensors)
        return sums


@dataclass(frozen=True)
class KroneckerCurvature:
    """The curvature of one parameter, ``mean_square * (left x right)``; both sides have a mean eigenvalue of 1.

    Attributes:
        left: ``[O, O]``, or a diagonal ``[O]``; float64.
        right: ``[I, I]``, or a diagonal ``[I]``; float64.
        mean_square: The mean square of the gradients' entries, which is the mean eigenvalue.
    """

    left: Tensor
    right: Tensor
    mean_square: float

    @classmethod
    def of(cls, sums: Sequence[FactorSums], mean_squared_norm: float) -> KroneckerCurvature:
        """Return the curvature from the sums of each form, which count by their share of the squared norm."""
        total = sum(float(each.weight) for each in sums)
        left, right = (
            _side([getattr(each, side) for each in sums], [float(each.weight) / (total or 1.0) for each in sums])
            for side in ("left", "right")
        )
        return cls(left, right, mean_squared_norm / (len(left) * len(right)))

    @property
    def size(self) -> int:
        """The number of the parameter's entries."""
        return len(self.left) * len(self.right)

    def root(self, damping: float, floor: float) -> tuple[Tensor, Tensor]:
        """Return symmetric ``left`` and ``right`` with which ``left g right`` is whitened.

        Their product is ``((c + floor) (G + √damping) x (A + √damping))^(-1/2)``.
        """
        left, right = (_inverse_root(side, damping**0.5) for side in (self.left, self.right))
        return left * (self.mean_square + floor) ** -0.5, right

    def eigenvectors(self) -> tuple[Tensor, Tensor]:
        """Return the eigenvectors of both sides, in columns; ones for a diagonal."""
        left, right = (
            torch.ones_like(side) if side.ndim == 1 else torch.linalg.eigh(side)[1] for side in (self.left, self.right)
        )
        return left, right


def _side(sums: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Return the weighted mean of moments, each with a mean eigenvalue of 1; a diagonal if all are."""
    found = []
    for value, share in zip(sums, shares, strict=True):
        value = value.double()
        trace = float(value.sum() if value.ndim == 1 else value.trace())
        found.append(value * (share * len(value) / (trace or 1.0)))
    if len({value.ndim for value in found}) > 1:
        found = [torch.diag(value) if value.ndim == 1 else value for value in found]
    return sum(found[1:], found[0])


def _inverse_root(side: Tensor, added: float) -> Tensor:
    """Return ``(S + added)^(-1/2)`` of a symmetric matrix ``[n, n]``, or of a diagonal ``[n]``."""
    if side.ndim == 1:
        return (side.clamp(min=0) + added).rsqrt()
    values, vectors = torch.linalg.eigh(side)
    return (vectors * (values.clamp(min=0) + added).rsqrt()) @ vectors.T


class MultipliedGradient(PerSampleGradient):
    """Gradients ``leftᵀ g right`` of a form without factors, built when they are asked for.

    Args:
        inner: The gradient before.
        left: ``[O, O]`` or a diagonal ``[O]``.
        right: ``[I, I]`` or a diagonal ``[I]``.
    """

    def __init__(self, inner: PerSampleGradient, left: Tensor, right: Tensor) -> None:
        super().__init__(inner.shape, inner.batch_size, inner)
        self.inner_gradient, self.left, self.right = inner, left, right
        self.dtype = torch.promote_types(inner.dtype, left.dtype)

    def dense(self, start: int, stop: int) -> Tensor:
        """Build the gradients of samples ``start`` to ``stop``, ``[stop - start, numel]``."""
        matrix = self.inner_gradient.entries(start, stop).unflatten(1, matrix_shape(self.shape)).to(self.dtype)
        return times(times(matrix, self.right).transpose(1, 2), self.left).transpose(1, 2).flatten(1)


def times(values: Float[Tensor, "*b n"], matrix: Tensor) -> Float[Tensor, "*b n"]:
    """Return values times a matrix ``[n, n]``, or a diagonal ``[n]``."""
    return values * matrix if matrix.ndim == 1 else values @ matrix


def multiplied(gradient: PerSampleGradient, left: Tensor, right: Tensor) -> PerSampleGradient:
    """Return ``leftᵀ g right`` in the cheapest form, with matrices ``[O, O]`` and ``[I, I]`` or diagonals."""
    parts = [_multiplied(part, left, right) for part in gradient.parts()]
    return parts[0] if len(parts) == 1 else SumGradient(parts)


def _multiplied(gradient: PerSampleGradient, left: Tensor, right: Tensor) -> PerSampleGradient:
    size = gradient.batch_size
    if gradient.touches_rows:
        index, values = gradient.touched_rows(0, size)
        values = times(full_precision(values).to(right.dtype), right)
        if left.ndim == 1:
            return RowsGradient(index, values * left[index].unsqueeze(-1), gradient.shape)
        return OuterGradient(left[index], values, gradient.shape)
    if gradient.num_positions is not None:
        one, other = (full_precision(each).to(left.dtype) for each in gradient.factors(0, size))
        return OuterGradient(times(one, left), times(other, right), gradient.shape)
    return MultipliedGradient(gradient, left, right)
