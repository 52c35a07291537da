"""Two-sided projection of each parameter, ``P_out G P_inᵀ``: LoGra (Choe et al. 2024) with random sides.

Layout: a parameter's gradient ``G [O, I] = sum_t left[t] (outer) right[t]``; ``P_out [ko, O]`` and ``P_in [ki, I]``
have independent signs over ``sqrt(ko)`` and ``sqrt(ki)``, so ``E[P_outᵀ P_out] = I`` and inner products are unbiased.
Each parameter has its own columns of the features: nothing is summed over parameters. It is the cheapest projection per
sample, since factors are projected before they are multiplied, and several times noisier per stored number than a
sketch: the two sides of a parameter err by about ``1 / sqrt(ko)`` and ``1 / sqrt(ki)``, a sketch by
``1 / sqrt(ko * ki)``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tracer._core.blocks import full_precision, row_blocks
from tracer._core.random_streams import Stream
from tracer.errors import InputError
from tracer.gradients.per_sample import PerSampleGradient, matrix_shape
from tracer.projection.base import Projector


class Columns(NamedTuple):
    """The columns of a parameter's projection and the size of its sides.

    Attributes:
        start: The first column of the features.
        out_dim: ``ko``; no projection of rows if it is ``O``.
        in_dim: ``ki``; no projection of columns if it is ``I``.
    """

    start: int
    out_dim: int
    in_dim: int


class FactoredProjector(Projector):
    """Two-sided random projection; ``proj_dim`` is shared by all parameters, `dim` is how much of it is used.

    Every parameter has an equal share. A parameter smaller than its share is stored exactly and leaves the rest to
    larger ones; any other takes ``ko x ki`` numbers, as square as possible.

    Raises:
        InputError: If ``proj_dim`` is below the number of parameters.

    >>> FactoredProjector({"weight": (64, 128), "bias": (64,)}, 320, seed=0).columns
    {'weight': Columns(start=0, out_dim=16, in_dim=16), 'bias': Columns(start=256, out_dim=1, in_dim=64)}
    """

    kind = "factored"

    def _prepare(self, device: torch.device | str | None) -> None:
        names = [name for name, shape in self.shapes.items() if math.prod(shape)]
        if self.proj_dim < len(names):
            raise InputError(
                f"projector='factored' stores at least one number for each of the {len(names)} parameters, got "
                f"proj_dim={self.proj_dim}; pass proj_dim={16 * len(names)} or more, select fewer with params=, or use "
                "projector='sketch'"
            )
        shares = share_out([math.prod(self.shapes[name]) for name in names], self.proj_dim)
        self.columns: dict[str, Columns] = {}
        self.dim = 0
        for name, share in zip(names, shares, strict=True):
            out_dim, in_dim = side_dims(*matrix_shape(self.shapes[name]), share)
            self.columns[name] = Columns(self.dim, out_dim, in_dim)
            self.dim += out_dim * in_dim
        self._sides: dict[tuple[str, torch.device], tuple[Tensor | None, Tensor | None]] = {}

    def add(self, name: str, gradient: PerSampleGradient, features: Tensor, squared_norm: Tensor) -> None:
        """Add ``P_out G P_inᵀ`` to the parameter's columns of ``features [B, dim]`` and ``|G|²``, in place."""
        if gradient.numel == 0:
            return
        if self.adds_norms:
            squared_norm += gradient.squared_norm()
        where = self.columns[name]
        target = features[:, where.start : where.start + where.out_dim * where.in_dim]
        for part in gradient.parts():
            self._add_part(name, part, target)

    def sides(self, name: str, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Return ``P_outᵀ [O, ko]`` and ``P_inᵀ [I, ki]``, float32; None for a side that is not projected."""
        key = name, device
        if key not in self._sides:
            where = self.columns[name]
            pairs = zip(matrix_shape(self.shapes[name]), (where.out_dim, where.in_dim), strict=True)
            out_side, in_side = (
                None if dim == size else self._side(name, side, size, dim).to(device)
                for side, (size, dim) in enumerate(pairs)
            )
            self._sides[key] = out_side, in_side
        return self._sides[key]

    def _side(self, name: str, side: int, size: int, dim: int) -> Tensor:
        """Draw a side ``[size, dim]`` of signs over ``sqrt(dim)``."""
        signs = Stream(self.seed, self.version, self.kind, name, side).signs(size * dim)
        return torch.from_numpy(signs).reshape(size, dim).mul_(dim**-0.5)

    def _add_part(self, name: str, gradient: PerSampleGradient, target: Tensor) -> None:
        """Project one gradient, from its factors if it has any, and add it to ``target [B, ko * ki]``."""
        rows, cols = matrix_shape(gradient.shape)
        out_side, in_side = (
            None if side is None else side.to(target.dtype) for side in self.sides(name, gradient.device)
        )
        positions = gradient.num_positions
        if gradient.touches_rows and out_side is not None:
            row_numbers = (gradient.num_terms or 0) * (out_side.shape[1] + cols)
        else:
            row_numbers = rows * cols if positions is None else positions * (rows + cols)
        for start, stop in row_blocks(gradient.batch_size, 2 * row_numbers * target.element_size()):
            factors = gradient.outer(start, stop)
            if gradient.touches_rows and out_side is not None:
                index, right = gradient.touched_rows(start, stop)
                left = out_side[index]  # a touched row is an outer product of a unit vector and its values
            elif factors is not None:
                left, right = _project(factors[0].to(target.dtype), out_side), factors[1]
            else:
                matrix = gradient.entries(start, stop).to(target.dtype).reshape(stop - start, rows, cols)
                both = _project(_project(matrix, in_side).transpose(1, 2), out_side)  # [b, ki, ko]
                target[start:stop] += both.transpose(1, 2).flatten(1)
                continue
            right = _project(full_precision(right).to(target.dtype), in_side)
            target[start:stop] += torch.bmm(left.transpose(1, 2), right).flatten(1)


def _project(values: Tensor, side: Tensor | None) -> Tensor:
    """Multiply ``[b, n, size]`` by a side ``[size, dim]``, or leave it."""
    return values if side is None else values @ side


def share_out(sizes: Sequence[int], budget: int) -> list[int]:
    """Return equal shares of a budget among positive sizes; none gets more than its size, and larger ones get the rest.

    >>> share_out([100, 4, 50], 40)
    [18, 4, 18]
    """
    shares = [0] * len(sizes)
    left = budget
    for done, place in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        shares[place] = min(sizes[place], left // (len(sizes) - done))
        left -= shares[place]
    return shares


def side_dims(rows: int, cols: int, share: int) -> tuple[int, int]:
    """Return ``(ko, ki)`` near square, with ``ko <= O``, ``ki <= I`` and ``ko * ki <= share``.

    >>> side_dims(64, 128, 256), side_dims(4, 128, 256), side_dims(1, 64, 20), side_dims(3, 3, 9)
    ((16, 16), (4, 64), (1, 20), (3, 3))
    """
    out_dim = min(rows, math.isqrt(share))
    in_dim = min(cols, share // out_dim)
    return min(rows, share // in_dim), in_dim
