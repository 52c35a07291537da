"""Per-sample gradients of one parameter, kept as factors so that projectors need not build them.

Layout, used in every docstring of this package:

- ``B`` samples; ``T`` positions that add up within one sample (tokens, pixels, repeated calls);
- a parameter is seen as a matrix ``[O, I]``: its first dimension by the product of the others; a vector of ``n``
  numbers is ``[1, n]`` and a scalar ``[1, 1]`` (`matrix_shape`);
- ``dense`` rows are the flattened parameter in its own (row-major) order, ``[b, O * I]``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the ``(O, I)`` under which a parameter of this shape is seen as a matrix.

    >>> matrix_shape((8, 3, 5, 5)), matrix_shape((7,)), matrix_shape(())
    ((8, 75), (1, 7), (1, 1))
    """
    if len(shape) < 2:
        return 1, math.prod(shape)
    return shape[0], math.prod(shape[1:])


class PerSampleGradient(ABC):
    """Gradients of ``B`` scalar outputs with respect to one parameter, one row a sample.

    Attributes:
        shape: The parameter's shape.
        batch_size: The number of samples ``B``.
    """

    shape: tuple[int, ...]
    batch_size: int

    @property
    def numel(self) -> int:
        """The number of entries of the parameter."""
        return math.prod(self.shape)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the factors lie."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""

    @abstractmethod
    def dense(self, start: int, stop: int) -> Tensor:
        """Build the gradients of samples ``start`` to ``stop``: ``[stop - start, numel]``."""

    def outer(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Return factors ``left [b, T, O]`` and ``right [b, T, I]`` of samples ``start`` to ``stop``.

        The gradient of a sample is ``sum_t left[t] (outer) right[t]``. None where the gradient has no such form.
        """
        return None

    def fold(self, factor: int) -> PerSampleGradient:
        """Add up groups of ``factor`` consecutive rows: rows of ``B * factor`` become rows of ``B`` samples."""
        return self if factor == 1 else FoldedGradient(self, factor)


class FoldedGradient(PerSampleGradient):
    """A gradient whose rows are groups of ``factor`` consecutive rows of another, added up.

    It stands for layers that see a sample as several rows: windows of an image, frames of a video, flattened tokens.
    """

    def __init__(self, inner: PerSampleGradient, factor: int) -> None:
        self.inner, self.factor = inner, factor
        self.shape = inner.shape
        self.batch_size = inner.batch_size // factor

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.inner.dtype

    def dense(self, start: int, stop: int) -> Tensor:
        """Build the inner rows and add up the groups: ``[b, numel]``."""
        inner = self.inner.dense(start * self.factor, stop * self.factor)
        return inner.reshape(stop - start, self.factor, self.numel).sum(1)

    def outer(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Return the inner factors with the groups joined along ``T``."""
        factors = self.inner.outer(start * self.factor, stop * self.factor)
        if factors is None:
            return None
        left, right = factors
        return left.reshape(stop - start, -1, left.shape[-1]), right.reshape(stop - start, -1, right.shape[-1])


class DenseGradient(PerSampleGradient):
    """Gradients that are already built: ``values [B, *shape]``.

    >>> gradient = DenseGradient(torch.arange(6.0).reshape(2, 3))
    >>> gradient.dense(1, 2)
    tensor([[3., 4., 5.]])
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.batch_size = values.shape[0]
        self.shape = tuple(values.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the values lie."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    def dense(self, start: int, stop: int) -> Tensor:
        """Return the values of the samples, flattened: ``[b, numel]``."""
        return self.values[start:stop].reshape(stop - start, self.numel)

    def fold(self, factor: int) -> DenseGradient:
        """Add up groups of ``factor`` consecutive rows."""
        return self if factor == 1 else DenseGradient(self.values.unflatten(0, (-1, factor)).sum(1))


class OuterGradient(PerSampleGradient):
    """Gradients ``sum_t left[b, t] (outer) right[b, t]`` with ``left [B, T, O]`` and ``right [B, T, I]``.

    A Linear layer's weight: ``left`` is the output gradient, ``right`` the input; ``T`` is 1 for vector inputs.

    >>> gradient = OuterGradient(torch.ones(1, 2, 1), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), (1, 2))
    >>> gradient.dense(0, 1)
    tensor([[4., 6.]])
    """

    def __init__(self, left: Tensor, right: Tensor, shape: Sequence[int]) -> None:
        self.left, self.right = left, right
        self.shape = tuple(shape)
        self.batch_size = left.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.left.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.left.dtype

    def dense(self, start: int, stop: int) -> Tensor:
        """Build the gradients by one batched matrix product: ``[b, O * I]``."""
        left, right = self.left[start:stop], self.right[start:stop]
        return torch.bmm(left.transpose(1, 2), right).reshape(stop - start, self.numel)

    def outer(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return the factors of the samples: ``[b, T, O]`` and ``[b, T, I]``."""
        return self.left[start:stop], self.right[start:stop]

    def fold(self, factor: int) -> OuterGradient:
        """Join groups of ``factor`` consecutive rows along ``T``."""
        rows = self.batch_size // factor
        left, right = self.left, self.right
        return OuterGradient(
            left.reshape(rows, -1, left.shape[-1]), right.reshape(rows, -1, right.shape[-1]), self.shape
        )


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

    def __init__(self, index: Tensor, values: Tensor, shape: Sequence[int]) -> None:
        self.index, self.values = index, values
        self.shape = tuple(shape)
        self.batch_size = values.shape[0]

    @property
    def device(self) -> torch.device:
        """Where the values lie."""
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values."""
        return self.values.dtype

    def dense(self, start: int, stop: int) -> Tensor:
        """Scatter the rows into zeros: ``[b, V * I]``."""
        rows, cols = matrix_shape(self.shape)
        built = self.values.new_zeros(stop - start, rows, cols)
        index = self.index[start:stop].unsqueeze(-1).expand(-1, -1, cols)
        return built.scatter_add_(1, index, self.values[start:stop]).reshape(stop - start, self.numel)

    def fold(self, factor: int) -> RowsGradient:
        """Join groups of ``factor`` consecutive rows along ``T``."""
        rows = self.batch_size // factor
        values = self.values.reshape(rows, -1, self.values.shape[-1])
        return RowsGradient(self.index.reshape(rows, -1), values, self.shape)


class WindowGradient(PerSampleGradient):
    """Gradients of a convolution's weight: output gradients times the windows of the input they were computed from.

    With ``L`` output positions, ``K`` kernel taps and patches ``[B, C * K, L]`` the gradient is ``left @ patchesᵀ``,
    one such product for each group of channels. Patches are views here; whoever needs them unfolded copies them.

    Args:
        padded: The input with its padding, ``[B, C, *S]``.
        left: The gradient with respect to the output, ``[B, O, *L]``.
        shape: The weight's shape ``[O, C / groups, *K]``.
        stride: One a spatial dimension.
        dilation: One a spatial dimension.
        groups: The number of groups.
    """

    def __init__(
        self,
        padded: Tensor,
        left: Tensor,
        shape: Sequence[int],
        *,
        stride: Sequence[int],
        dilation: Sequence[int],
        groups: int = 1,
    ) -> None:
        self.padded, self.left = padded, left
        self.shape = tuple(shape)
        self.batch_size = padded.shape[0]
        self.stride, self.dilation, self.groups = tuple(stride), tuple(dilation), groups

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.padded.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the factors."""
        return self.left.dtype

    def dense(self, start: int, stop: int) -> Tensor:
        """Build the gradients by one product a sample and group: ``[b, numel]``."""
        rows = stop - start
        patches = self.windows(self.padded[start:stop])
        patches = patches.reshape(rows * self.groups, -1, math.prod(self.left.shape[2:]))
        left = self.left[start:stop].reshape(rows * self.groups, -1, patches.shape[-1])
        return torch.bmm(left, patches.transpose(1, 2)).reshape(rows, self.numel)

    def outer(self, start: int, stop: int) -> tuple[Tensor, Tensor] | None:
        """Return output gradients ``[b, L, O]`` and patches ``[b, L, C * K]``; None with groups."""
        if self.groups > 1:
            return None
        positions = math.prod(self.left.shape[2:])
        patches = self.windows(self.padded[start:stop]).reshape(stop - start, -1, positions)
        return self.left[start:stop].flatten(2).transpose(1, 2), patches.transpose(1, 2)

    def windows(self, padded: Tensor) -> Tensor:
        """Return a view of the windows of padded inputs ``[b, C, *S]``: ``[b, C, *K, *L]``.

        Args:
            padded: Inputs of this layer's spatial size; any samples, channels and memory layout.

        Returns:
            The view, which copies nothing.
        """
        spatial = padded.stride()[2:]
        taps = tuple(step * rate for step, rate in zip(spatial, self.dilation, strict=True))
        moves = tuple(step * rate for step, rate in zip(spatial, self.stride, strict=True))
        sizes = (*padded.shape[:2], *self.shape[2:], *self.left.shape[2:])
        return padded.as_strided(sizes, (*padded.stride()[:2], *taps, *moves), padded.storage_offset())


class SumGradient(PerSampleGradient):
    """The sum of several gradients of one parameter: tied weights, layers called more than once."""

    def __init__(self, parts: Sequence[PerSampleGradient]) -> None:
        self.parts = tuple(parts)
        self.shape = self.parts[0].shape
        self.batch_size = self.parts[0].batch_size

    @property
    def device(self) -> torch.device:
        """Where the parts lie."""
        return self.parts[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parts."""
        return self.parts[0].dtype

    def dense(self, start: int, stop: int) -> Tensor:
        """Add up the parts: ``[b, numel]``."""
        total = self.parts[0].dense(start, stop)
        for part in self.parts[1:]:
            total = total + part.dense(start, stop)
        return total


class ScaledGradient(PerSampleGradient):
    """Another gradient with each entry multiplied by a number of its own, as a diagonal preconditioner does.

    It has no factors, since the scale of an ``[O, I]`` parameter has no outer form: it is built. `scale_gradient` makes
    it where there is nothing cheaper.

    Args:
        inner: The gradient before.
        scale: ``[*shape]``, float32 or float64.

    >>> inner = OuterGradient(torch.ones(1, 1, 1), torch.tensor([[[1.0, 2.0]]]), (1, 2))
    >>> ScaledGradient(inner, torch.tensor([[10.0, 100.0]])).dense(0, 1)
    tensor([[ 10., 200.]])
    """

    def __init__(self, inner: PerSampleGradient, scale: Tensor) -> None:
        self.inner, self.scale = inner, scale
        self.shape = inner.shape
        self.batch_size = inner.batch_size

    @property
    def device(self) -> torch.device:
        """Where the factors lie."""
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        """The wider dtype of the inner gradient and the scale."""
        return torch.promote_types(self.inner.dtype, self.scale.dtype)

    def dense(self, start: int, stop: int) -> Tensor:
        """Build the inner gradients and multiply each entry: ``[b, numel]``."""
        return self.inner.dense(start, stop) * self.scale.reshape(-1)

    def fold(self, factor: int) -> PerSampleGradient:
        """Add up groups of ``factor`` consecutive rows before they are scaled."""
        return self if factor == 1 else ScaledGradient(self.inner.fold(factor), self.scale)


def scale_gradient(gradient: PerSampleGradient, scale: Tensor) -> PerSampleGradient:
    """Return a gradient with each entry multiplied by a number of its own, in the cheapest form.

    Built values stay built values and an embedding's touched rows stay rows; anything else becomes a
    `ScaledGradient`.

    Args:
        gradient: Per-sample gradients of one parameter.
        scale: ``[*shape]``, float32 or float64, where the gradient lies.

    Returns:
        The scaled gradient.

    >>> rows = RowsGradient(torch.tensor([[1, 1]]), torch.ones(1, 2, 1), (3, 1))
    >>> scale_gradient(rows, torch.tensor([[1.0], [10.0], [100.0]])).dense(0, 1)
    tensor([[ 0., 20.,  0.]])
    """
    if isinstance(gradient, DenseGradient):
        return DenseGradient(gradient.values * scale)
    if isinstance(gradient, RowsGradient):
        by_row = scale.reshape(matrix_shape(gradient.shape))  # [V, I]
        return RowsGradient(gradient.index, gradient.values * by_row[gradient.index], gradient.shape)
    return ScaledGradient(gradient, scale)


def add_gradients(parts: Sequence[PerSampleGradient]) -> PerSampleGradient:
    """Return the sum of gradients of one parameter in the cheapest form.

    Outer products are joined along ``T`` and embedding rows likewise, which keeps their factors; anything else
    becomes a `SumGradient`.

    Args:
        parts: At least one gradient; all of one parameter, for the same samples.

    Returns:
        One gradient equal to their sum.
    """
    if len(parts) == 1:
        return parts[0]
    outers = [part for part in parts if type(part) is OuterGradient]
    rows = [part for part in parts if type(part) is RowsGradient]
    others = [part for part in parts if type(part) not in (OuterGradient, RowsGradient)]
    joined: list[PerSampleGradient] = list(others)
    if outers:
        left = torch.cat([part.left for part in outers], dim=1)
        right = torch.cat([part.right for part in outers], dim=1)
        joined.append(OuterGradient(left, right, outers[0].shape))
    if rows:
        index = torch.cat([part.index for part in rows], dim=1)
        values = torch.cat([part.values for part in rows], dim=1)
        joined.append(RowsGradient(index, values, rows[0].shape))
    return joined[0] if len(joined) == 1 else SumGradient(joined)
