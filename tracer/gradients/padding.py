"""Padding that collation added: the tail, or head, of a dimension whose size changes from batch to batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tracer.data.batches import is_per_sample, leaves, map_leaves, select_samples
from tracer.types import Batch

Dimension = tuple[str, int]
"""The path of a leaf in its batch, and one of its dimensions."""


class Padding:
    """Learns from batches which dimensions collation pads, and cuts the padding of single samples."""

    def __init__(self) -> None:
        self._sizes: dict[Dimension, int] = {}
        self._varying: set[Dimension] = set()

    def observe(self, batch: Batch, batch_size: int) -> None:
        """Note the sizes of a batch's dimensions."""
        for path, leaf in _per_sample(batch, batch_size):
            for dim in range(1, leaf.ndim):
                if self._sizes.setdefault((path, dim), leaf.shape[dim]) != leaf.shape[dim]:
                    self._varying.add((path, dim))

    def without(self, batch: Batch, batch_size: int, row: int) -> Batch | None:
        """Return one sample as a batch with all but one entry of its padding cut off, or None if it has none.

        Entries count as padding if they repeat one value at the end of a sample, or at its beginning, in every tensor
        that has the dimension, and another sample of the batch has no such entries there. One is left: data may end
        with the value that pads (an end-of-text token).
        """
        padded = {
            (path, dim): leaf
            for path, leaf in _per_sample(batch, batch_size)
            for dim in range(1, leaf.ndim)
            if (path, dim) in self._varying
        }
        for size in {leaf.shape[dim] for (_, dim), leaf in padded.items()}:
            group = {(path, dim): leaf for (path, dim), leaf in padded.items() if leaf.shape[dim] == size}
            for at_end in (True, False):
                runs = torch.stack([_runs(leaf, dim, at_end) for (_, dim), leaf in group.items()]).amin(0)
                if runs[row] > 1 and int(runs.min()) <= 1:
                    return _cut(batch, batch_size, row, set(group), int(runs[row]) - 1, at_end)
        return None


def _per_sample(batch: Batch, batch_size: int) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in leaves(batch):
        if isinstance(leaf, Tensor) and leaf.layout == torch.strided and is_per_sample(leaf, batch_size):
            yield path, leaf


def _runs(leaf: Tensor, dim: int, at_end: bool) -> Tensor:
    """Return how many entries of a dimension repeat one value at the end, or at the beginning, of samples: ``[B]``."""
    entries = leaf.detach().movedim(dim, 1).flatten(2) if leaf.ndim > 2 else leaf.detach().unsqueeze(2)
    if at_end:
        entries = entries.flip(1)
    equal = (entries == entries[:, :1, :1]).all(2)  # [B, T]
    return equal.cumprod(1).sum(1).cpu()


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
