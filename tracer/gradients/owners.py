"""Whose row is whose: samples told apart by their gradients.

No shape tells to which samples rows belong where experts get some tokens of each, or where a model sorts or drops
padding. But the backward is linear: with f_b weighted by c_b, the gradient of a row that f of sample b alone depends on
is c_b times as large. So one more backward finds b, and shows rows that several samples depend on, which have no owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from tracer._core.blocks import full_precision
from tracer.gradients.per_sample import DenseGradient, PerSampleGradient

_MOST_POWERS = 64
"""The range of weights as a power of 2; up to so many samples they are powers, and scale without rounding."""

_ROUNDING, _MOST_NOISE = 1e-3, 0.03


class NoOwner(Exception):
    """A row that several samples depend on, or none for certain; never reaches a user."""


class Owners:
    """Finds the samples of rows by one more backward of f, which keeps the graph.

    Args:
        output: f, ``[B]``.
        edges: Where the gradients of rows arrive.
        keys: What to ask for them by.
    """

    def __init__(self, output: Tensor, edges: Sequence[GradientEdge], keys: Sequence[Any]) -> None:
        self.batch_size = len(output)
        order = torch.randperm(self.batch_size, generator=torch.Generator().manual_seed(self.batch_size))
        step = min(1.0, _MOST_POWERS / self.batch_size)
        self._exponents = ((order - self.batch_size // 2) * step).double().to(output.device)
        self._closest = 2.0 ** (step / 4) - 1  # the most that an owner's weight may seem to differ
        self._weights = self._exponents.exp2()
        grads: Sequence[Tensor | None] = [None] * len(edges)
        if edges and self.batch_size > 1:
            weighted = (self._weights.to(output.dtype) * output).sum()
            grads = torch.autograd.grad(weighted, edges, retain_graph=True, allow_unused=True)
        self._weighted = dict(zip(keys, grads, strict=True))

    def of(self, key: Any, grad: Tensor, num_dims: int) -> Tensor:
        """Return the sample of each row of a gradient, whose first ``num_dims`` dimensions number rows.

        Raises:
            NoOwner: If a row has none.
        """
        weighted, shape = self._weighted.pop(key, None), grad.shape[:num_dims]
        if self.batch_size == 1 or not grad.numel():
            return torch.zeros(shape, dtype=torch.int64, device=grad.device)
        if weighted is None:
            raise NoOwner("no gradient arrived with other weights")
        plain, other = (each.reshape(*shape, -1).double() for each in (grad, weighted))
        size = torch.linalg.vecdot(plain, plain)
        exponents = (torch.linalg.vecdot(plain, other) / size).nan_to_num(0.0).clamp(min=0).log2()
        owner = (exponents.unsqueeze(-1) - self._exponents).abs().argmin(-1)
        weights = self._weights[owner]
        apart, scale = (other - weights.unsqueeze(-1) * plain).norm(dim=-1), weights * size.sqrt()
        # What is left of larger terms that cancel is noise, whoever's it is; float64 models may compute in float32.
        noise = min(64 * max(torch.finfo(grad.dtype).eps, torch.finfo(torch.float32).eps), _MOST_NOISE)
        allowed = min(self._closest, max(noise, _ROUNDING)) * scale
        if not bool((apart <= allowed).all()):
            largest = scale.new_zeros(self.batch_size)
            largest.scatter_reduce_(0, owner.flatten(), scale.flatten(), "amax")
            if not bool((apart <= allowed + noise * largest[owner]).all()):
                raise NoOwner("some of its rows belong to several samples")
        return owner


def regroup(gradient: PerSampleGradient, owner: Tensor, batch_size: int) -> PerSampleGradient:
    """Add up the gradients of rows ``[N]``, given the sample of each: those of ``batch_size`` samples."""
    counts = torch.bincount(owner, minlength=batch_size)
    if isinstance(gradient, DenseGradient) or not gradient.tensors():
        values = gradient.dense(0, gradient.batch_size).view(gradient.batch_size, *gradient.shape)
        total = full_precision(values).new_zeros(batch_size, *gradient.shape)
        return DenseGradient(total.index_add_(0, owner, full_precision(values)).to(values.dtype))
    # Each sample gets as many rows as the one with the most; rows of zeros add nothing.
    most, (samples, order) = max(1, int(counts.max())), owner.sort(stable=True)
    first = (counts.cumsum(0) - counts)[samples]
    to, grouped = samples * most + torch.arange(len(owner), device=owner.device) - first, []
    for each in gradient.tensors():
        rows = each.new_zeros(batch_size * most, *each.shape[1:])
        rows[to] = each[order]
        grouped.append(rows)
    return gradient.with_tensors(grouped).fold(most)
