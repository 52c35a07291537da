"""Padding that collation added: the tail, or head, of a dimension whose size changes from batch to batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tracer.data.batches import is_per_sample, leaves, map_leaves, select_samples
from tracer.types import Batch

Dimension = tuple[str, int]
"""The path of a leaf in its batch, and one of its dimensions."""


_LEAST_SEEN, _LEAST_SHARE = 3, 0.8


class Padding:
    """Learns from batches which dimensions collation pads, and cuts the padding of single samples.

    A side of a dimension is padded if many samples repeat one value there, nearly always the same one, and few samples
    do so on the other side: data alone may have such repetitions too.
    """

    def __init__(self) -> None:
        self._sizes: dict[Dimension, int] = {}
        self._varying: set[Dimension] = set()
        self._edges: dict[tuple[Dimension, bool], Counter[float]] = {}  # repeated values at the end, or the beginning

    def observe(self, batch: Batch, batch_size: int) -> None:
        """Note the sizes of a batch's dimensions, and the values that samples repeat where these vary."""
        for path, leaf in _per_sample(batch, batch_size):
            for dim in range(1, leaf.ndim):
                if self._sizes.setdefault((path, dim), leaf.shape[dim]) != leaf.shape[dim]:
                    self._varying.add((path, dim))
                for at_end in (True, False) if (path, dim) in self._varying and leaf.shape[dim] else ():
                    runs, values = _runs(leaf, dim, at_end)
                    self._edges.setdefault(((path, dim), at_end), Counter()).update(values[runs > 1].tolist())

    def without(self, batch: Batch, batch_size: int, row: int) -> Batch | None:
        """Return one sample as a batch with all but one entry of its padding cut off, or None if it has none.

        Its padding is as long as in every tensor that has the dimension. One entry is left: data may end with the value
        that pads (an end-of-text token).
        """
        varying = {
            (path, dim): leaf
            for path, leaf in _per_sample(batch, batch_size)
            for dim in range(1, leaf.ndim)
            if (path, dim) in self._varying and leaf.shape[dim]
        }
        for size in {leaf.shape[dim] for (_, dim), leaf in varying.items()}:
            group = {(path, dim): leaf for (path, dim), leaf in varying.items() if leaf.shape[dim] == size}
            for at_end in (True, False):
                if any(self._is_padded(dimension, at_end) for dimension in group):
                    runs = torch.stack([_runs(leaf, dim, at_end)[0] for (_, dim), leaf in group.items()]).amin(0)
                    if runs[row] > 1 and int(runs.min()) <= 1:
                        return _cut(batch, batch_size, row, set(group), int(runs[row]) - 1, at_end)
        return None

    def _is_padded(self, dimension: Dimension, at_end: bool) -> bool:
        here, there = (self._edges.get((dimension, side), Counter()) for side in (at_end, not at_end))
        most = max(here.values(), default=0)
        return most >= _LEAST_SEEN and most >= _LEAST_SHARE * here.total() and here.total() >= 2 * there.total()


def _per_sample(batch: Batch, batch_size: int) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and is_per_sample(leaf, batch_size):
            yield path, leaf


def _runs(leaf: Tensor, dim: int, at_end: bool) -> tuple[Tensor, Tensor]:
    """Return how many entries repeat one value at the end, or beginning, of samples, and the value: ``[B]`` each."""
    entries = leaf.detach().movedim(dim, 1).flatten(2) if leaf.ndim > 2 else leaf.detach().unsqueeze(2)
    if at_end:
        entries = entries.flip(1)
    equal = (entries == entries[:, :1, :1]).all(2)  # [B, T]
    return equal.cumprod(1).sum(1).cpu(), entries[:, 0, 0].double().cpu()


def _cut(batch: Batch, batch_size: int, row: int, dimensions: set[Dimension], count: int, at_end: bool) -> Batch:
    one = select_samples(batch, torch.tensor([row]), batch_size)
    paths = iter([path for path, _ in leaves(one)])

    def cut(leaf: Any) -> Any:
        path = next(paths)
        for dim in range(1, leaf.ndim) if isinstance(leaf, Tensor) else ():
            if (path, dim) in dimensions:
                leaf = leaf.narrow(dim, 0 if at_end else count, leaf.shape[dim] - count)
        return leaf

    return map_leaves(one, cut)
