"""Sums of per-sample gradients of one parameter: tied weights, layers called more than once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import combinations

import torch
from torch import Tensor

from tracer.gradients.norms import weighted_norms
from tracer.gradients.per_sample import PerSampleGradient


class SumGradient(PerSampleGradient):
    """The sum of several gradients of one parameter."""

    def __init__(self, summands: Sequence[PerSampleGradient]) -> None:
        first = summands[0]
        super().__init__(first.shape, first.batch_size, first)
        self.summands = tuple(summands)

    @property
    def is_divisible(self) -> bool:
        return all(part.is_divisible for part in self.summands)

    def dense(self, start: int, stop: int) -> Tensor:
        return reduce(torch.add, [part.dense(start, stop) for part in self.summands])

    def entries(self, start: int, stop: int, first: int = 0, last: int | None = None) -> Tensor:
        return reduce(torch.add, [part.entries(start, stop, first, last) for part in self.summands])

    def head(self, count: int) -> PerSampleGradient:
        return SumGradient([part.head(count) for part in self.summands])

    def parts(self) -> list[PerSampleGradient]:
        return [leaf for part in self.summands for leaf in part.parts()]

    def squared_norm(self) -> Tensor:
        parts = self.parts()
        return reduce(torch.add, [part.squared_norm() for part in parts]) + cross_terms(parts)

    def weighted_sum(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        total: Tensor | None = None
        for part in self.parts():  # a parameter of several parts may be the largest, as tied embeddings are
            found = part.weighted_sum(weights)[0]
            if total is None:
                total = found
            elif total.is_sparse:
                total = (total + found).coalesce() if found.is_sparse else found.view(total.shape).add_(total)
            else:
                total = total.view(found.shape).add_(found)
        assert total is not None
        return total if total.is_sparse else total.view(-1), weighted_norms(self.squared_norm(), weights)


def cross_terms(parts: Sequence[PerSampleGradient]) -> Tensor:
    """Return ``2 * sum of <A, B>`` over all pairs of gradients of one parameter: ``[B]``, float64."""
    total = torch.zeros(parts[0].batch_size, dtype=torch.float64, device=parts[0].device)
    for one, other in combinations(parts, 2):
        total += 2.0 * one.inner(other)
    return total


def add_gradients(gradients: Sequence[PerSampleGradient]) -> PerSampleGradient:
    """Return the sum of gradients of one parameter and the same samples in the cheapest form."""
    by_type: dict[type[PerSampleGradient], list[PerSampleGradient]] = {}
    for gradient in gradients:
        by_type.setdefault(type(gradient), []).append(gradient)
    # Joining copies the factors, so a single gradient, the usual case, stays as it is.
    joined = [one for kind, alike in by_type.items() for one in (kind.joined(alike) if len(alike) > 1 else alike)]
    return joined[0] if len(joined) == 1 else SumGradient(joined)
