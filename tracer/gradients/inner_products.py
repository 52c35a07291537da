"""Exact inner products of all samples of a batch with all targets, from factors, without storing a gradient.

Layout as in `tracer.gradients.per_sample`; ``B`` samples of a batch, ``m`` targets. Two gradients of outer form are
multiplied in either of two ways, whichever has fewer operations:

- gram: ``sum_{s,t} <left_s, left'_t> <right_s, right'_t>``, two matrix products over all pairs of positions, nothing
  built; an embedding's touched rows are outer products whose left factors are unit vectors, and a convolution's windows
  share pixels (`window_products`);
- built: the batch's gradients are built some output channels at a time and multiplied with those of the targets, which
  are built once and cached.

Built float32 gradients are multiplied in float32, and so are positions if there is one a sample. With more, the terms
of a gram may cancel (inputs with a large common part), so it is float64, as are norms and sums over parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tracer._core.blocks import full_precision, row_blocks
from tracer._core.scratch import Scratch
from tracer.gradients import norms
from tracer.gradients.per_sample import DenseGradient, PerSampleGradient, matrix_shape
from tracer.gradients.window_products import window_bytes, window_operations, window_pair, window_products
from tracer.gradients.windows import WindowGradient

GRAM_BYTES, FACTOR_BYTES, BUILT_BYTES = 32 << 20, 64 << 20, 32 << 20
"""The bytes of products of positions, of factors and of built gradients that are held at once."""


class TargetGradients:
    """The gradients of some targets over their lengths, held as factors, and built if that is cheaper.

    Attributes:
        num_rows: The number of targets ``m``.
    """

    def __init__(self) -> None:
        self.num_rows = 0
        self._parts: dict[str, list[tuple[int, PerSampleGradient]]] = {}
        self._built: dict[tuple[str, int], Tensor] = {}
        self._scratch = Scratch()

    def append(self, lengths: Tensor, pieces: Sequence[tuple[int, dict[str, PerSampleGradient]]]) -> None:
        """Add the gradients of a batch, each divided by its length, so that products neither overflow nor vanish.

        Args:
            lengths: ``[B]``, the divisor of each target's gradient; its norm, or 1 for a gradient of zero.
            pieces: The gradients by parameter name, of the batch's targets from the given one on.
        """
        for start, gradients in pieces:
            for name, gradient in gradients.items():
                rows = lengths[start : start + gradient.batch_size].to(gradient.device)
                for part in gradient.parts():
                    self._parts.setdefault(name, []).append((self.num_rows + start, part.divided(rows)))
        self.num_rows += len(lengths)

    def num_bytes(self) -> int:
        """Return the bytes that are held, or will be once batches like these are multiplied."""
        storages: dict[int, int] = {}
        built = 0
        for parts in self._parts.values():
            rows = sum(part.batch_size for _, part in parts)
            for _, part in parts:
                storages |= {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in part.tensors()}
                if not isinstance(part, DenseGradient) and not _gram_pays(part, part, rows):
                    built += max(4, part.dtype.itemsize) * part.batch_size * part.numel
        return sum(storages.values()) + built

    def join(self) -> None:
        """Concatenate consecutive parts of the same form, whose products are then faster."""
        for name, parts in self._parts.items():
            runs: list[list[tuple[int, PerSampleGradient]]] = []
            for first, part in sorted(parts, key=lambda one: one[0]):
                open_runs = (run for run in runs if run[-1][0] + run[-1][1].batch_size == first)
                run = next((run for run in open_runs if run[-1][1].form == part.form), None)
                if run is None:
                    runs.append([(first, part)])
                else:
                    run.append((first, part))
            self._parts[name] = [(run[0][0], _concatenated([part for _, part in run])) for run in runs]

    def add_products(self, name: str, gradient: PerSampleGradient, products: Tensor) -> Tensor:
        """Add one parameter's inner products with all targets, and return its squared norms.

        Args:
            name: The parameter's name.
            gradient: Its gradient, of ``B`` samples.
            products: ``[B, m]``, float64, updated in place.

        Returns:
            ``[B]``, float64, exact.
        """
        parts = self._parts.get(name, [])
        num_targets = sum(part.batch_size for _, part in parts)
        leaves = gradient.parts() if gradient.numel else []
        squares = None
        for leaf in leaves:
            to_build = []
            for first, part in parts:
                if _gram_pays(leaf, part, num_targets):
                    _add_gram(leaf, part, products[:, first : first + part.batch_size], self._scratch)
                else:
                    to_build.append((first, self._built_part(name, part)))
            if to_build:
                squares = _add_built(leaf, to_build, products, self._scratch)
        return gradient.squared_norm() if squares is None or len(leaves) > 1 else squares

    def _built_part(self, name: str, part: PerSampleGradient) -> Tensor:
        """Return the built gradients of a part, ``[m, numel]``, cached after the first use."""
        if isinstance(part, DenseGradient):
            return full_precision(part.dense(0, part.batch_size))
        key = name, id(part)
        if key not in self._built:
            dtype = torch.promote_types(part.dtype, torch.float32)
            built = torch.empty(part.batch_size, part.numel, dtype=dtype, device=part.device)
            for start, stop, entries, values in _built_blocks(part, self._scratch):
                built[start:stop, entries] = values
            self._built[key] = built
        return self._built[key]


def _concatenated(parts: Sequence[PerSampleGradient]) -> PerSampleGradient:
    """Return the samples of all parts, which have one form."""
    if len(parts) == 1:
        return parts[0]
    return parts[0].with_tensors([torch.cat(each) for each in zip(*(part.tensors() for part in parts), strict=True)])


def _gram_pays(one: PerSampleGradient, other: PerSampleGradient, num_targets: int) -> bool:
    """Return whether multiplying positions costs less than building the gradients, the targets being built already."""
    first, second = one.num_terms, other.num_terms
    if first is None or second is None:
        return False
    rows, cols = matrix_shape(one.shape)
    by_index = one.touches_rows or other.touches_rows
    precision = 1 if first * second == 1 else 2  # sums over positions are float64
    pair = window_pair(one, other)
    operations = window_operations(*pair) if pair else first * second * ((1 if by_index else rows) + cols + 4)
    gram = precision * num_targets * operations
    build = 12 if one.touches_rows else first + 12
    return gram <= rows * cols * (num_targets + build)


def _add_gram(one: PerSampleGradient, other: PerSampleGradient, products: Tensor, scratch: Scratch) -> None:
    """Add ``sum_{s,t} <l_s, l'_t> <r_s, r'_t>`` of all pairs to ``products [B, m]``."""
    first, second = one.num_terms or 0, other.num_terms or 0
    if not first * second:
        return
    if pair := window_pair(one, other):
        return _add_window_gram(*pair, products, scratch)
    rows, cols = matrix_shape(one.shape)
    dtype = torch.promote_types(one.dtype, torch.float32 if first * second == 1 else torch.float64)
    pair_bytes = 2 * dtype.itemsize * first * second
    target_step = max(1, FACTOR_BYTES // (4 * max(1, second) * (rows + cols)))
    for low in range(0, other.batch_size, target_step):
        high = min(low + target_step, other.batch_size)
        row_bytes = max(pair_bytes * (high - low), 4 * first * (rows + cols) // 2)
        right = _position_rows(other, low, high, dtype, scratch, "targets")
        for start, stop in row_blocks(one.batch_size, row_bytes, GRAM_BYTES):
            left = _position_rows(one, start, stop, dtype, scratch, "rows")
            gram = _left_gram(left, right, scratch)
            gram *= _matmul(left[1], right[1].T, scratch, "right gram")
            summed = gram.view(stop - start, first, -1).sum(1).view(stop - start, high - low, second).sum(2)
            products[start:stop, low:high] += summed


def _add_window_gram(one: WindowGradient, other: WindowGradient, products: Tensor, scratch: Scratch) -> None:
    factor_bytes = 8 * (other.padded[:1].numel() + other.left[:1].numel())
    for low, high in row_blocks(other.batch_size, factor_bytes, FACTOR_BYTES):
        for start, stop in row_blocks(one.batch_size, window_bytes(one, other) * (high - low), GRAM_BYTES):
            found = window_products(one, slice(start, stop), other, slice(low, high), scratch)
            products[start:stop, low:high] += found


def _position_rows(
    gradient: PerSampleGradient, start: int, stop: int, dtype: torch.dtype, scratch: Scratch, use: str
) -> tuple[Tensor, Tensor]:
    """Return ``[b * T, O]``, or the numbers of touched rows ``[b * T]``, and ``[b * T, I]``."""

    def rows(values: Tensor, side: str) -> Tensor:
        """Copy ``[b, ..., n]`` to ``[b * T, n]`` in the dtype, into memory that is used again."""
        taken = scratch.take(f"{use} {side}", values.shape, dtype, values.device).copy_(values)
        return taken.view(-1, values.shape[-1])

    left, right = gradient.position_views(start, stop)
    lefts = left.reshape(-1) if gradient.touches_rows else rows(left, "left")
    return lefts, rows(right, "right").view(len(lefts), -1)


def _matmul(left: Tensor, right: Tensor, scratch: Scratch, use: str) -> Tensor:
    """Multiply matrices into reused memory; fresh memory costs more than the product."""
    out = scratch.take(use, (left.shape[0], right.shape[1]), left.dtype, left.device)
    return torch.mm(left, right, out=out)


def _left_gram(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], scratch: Scratch) -> Tensor:
    """Return the products of left factors of all pairs of positions: ``[b * T, m * T']``."""
    left, right = one[0], other[0]
    if left.ndim == 1 and right.ndim == 1:
        return (left.unsqueeze(1) == right).to(one[1].dtype)
    if left.ndim == 1:
        return right.T.index_select(0, left)
    if right.ndim == 1:
        return left.index_select(1, right)
    return _matmul(left, right.T, scratch, "left gram")


def _built_blocks(gradient: PerSampleGradient, scratch: Scratch) -> Iterator[tuple[int, int, slice, Tensor]]:
    """Yield sample ranges, entries, and their values ``[b, entries]``, float32 or float64, valid until the next."""
    rows, cols = matrix_shape(gradient.shape)
    positions = gradient.num_positions
    if positions is None:
        for start, stop in row_blocks(gradient.batch_size, 4 * gradient.numel, BUILT_BYTES):
            yield start, stop, slice(0, gradient.numel), gradient.entries(start, stop)
        return
    for start, stop in row_blocks(gradient.batch_size, 4 * positions * (rows + cols), FACTOR_BYTES):
        left, right = gradient.product_factors(start, stop, scratch)
        step = max(1, BUILT_BYTES // (4 * (stop - start) * cols))
        for low in range(0, rows, step):
            high = min(low + step, rows)
            built = scratch.take("built", (stop - start, high - low, cols), left.dtype, left.device)
            torch.bmm(left[:, low:high], right, out=built)
            yield start, stop, slice(low * cols, high * cols), built.flatten(1)


def _add_built(
    gradient: PerSampleGradient, targets: Sequence[tuple[int, Tensor]], products: Tensor, scratch: Scratch
) -> Tensor:
    """Add the products of built gradients to ``products [B, m]`` and return the squared norms: ``[B]``, float64."""
    total = torch.zeros(gradient.batch_size, dtype=torch.float64, device=gradient.device)
    for start, stop, entries, values in _built_blocks(gradient, scratch):
        total[start:stop] += norms.row_squares(values)
        for first, target in targets:
            found = values @ target[:, entries].to(values.dtype).T
            products[start:stop, first : first + len(target)] += found
    return total
