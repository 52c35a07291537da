"""Subsets of the training set, and the random numbers of each run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from tracer._core.random_streams import Stream
from tracer._core.validation import as_list, check_count, check_seed
from tracer.errors import InputError, InputTypeError

_VERSION = 1  # of the numbers drawn here


def random_subsets(num_subsets: int, num_rows: int, fraction: float = 0.5, seed: int = 0) -> np.ndarray:
    """Draw random subsets of equal size for the linear datamodeling score (Park et al. 2023, section 2).

    A subset depends on its position, not on how many are drawn: the first 100 of 200 are those of a call for 100.

    Args:
        num_subsets: S, the number of subsets.
        num_rows: N, the number of training examples.
        fraction: The share of examples in each subset, above 0 and up to 1. Default: 0.5.
        seed: The seed.

    Returns:
        ``[S, N]``, bool: the examples of each subset, ``round(fraction * N)`` of them.

    Raises:
        InputError: If a number is out of range, or the fraction leaves no example.

    >>> random_subsets(3, 10, fraction=0.3).sum(axis=1)
    array([3, 3, 3])
    """
    check_count(num_subsets, "num_subsets")
    check_count(num_rows, "num_rows")
    seed = check_seed(seed)
    size = round(fraction * num_rows) if 0 < fraction <= 1 else 0
    if size < 1:
        raise InputError(
            f"fraction={fraction} of {num_rows} rows: expected more than 0, at most 1, and one row at least."
        )
    masks = np.zeros((num_subsets, num_rows), dtype=bool)
    for subset, mask in enumerate(masks):
        mask[Stream(seed, _VERSION, "subsets", "rows", subset).permutation(num_rows)[:size]] = True
    return masks


RunKey = tuple[int, int]
"""A subset's position in the masks, and a seed."""


@dataclass(frozen=True, eq=False)
class Run:
    """One model to train."""

    subset: int  # its position in the masks
    seed: int
    mask: np.ndarray  # ``[N]``, bool: its training examples
    paired: bool  # whether random numbers depend on the seed alone

    @cached_property
    def num_rows(self) -> int:
        """The number of its training examples."""
        return int(self.mask.sum())

    @property
    def key(self) -> RunKey:
        """Subset and seed, which identify the run among others with the same masks."""
        return self.subset, self.seed

    def torch_seed(self, purpose: str) -> int:
        """Return the seed of torch's generator for ``purpose``: ``weights`` or ``noise``."""
        return int(self._stream(purpose).words(1)[0]) >> 1

    def orders(self) -> Iterator[Int64[Tensor, " n"]]:
        """Yield a random order of the run's training examples, by their indices, for each epoch."""
        stream = self._stream("order")
        while True:
            # All N examples are permuted and those left out are skipped, so that subsets that differ by one example
            # are visited in nearly the same order.
            order = stream.permutation(len(self.mask))
            yield torch.from_numpy(order[self.mask[order]])

    def _stream(self, purpose: str) -> Stream:
        return Stream(self.seed, _VERSION, "retraining", purpose, *(() if self.paired else (self.subset,)))


def make_runs(masks: Any, num_rows: int, seeds: Iterable[int], paired: bool) -> list[Run]:
    """Return the runs of all subsets and seeds, those of a subset next to each other; no masks means all examples."""
    masks = np.ones((1, num_rows), dtype=bool) if masks is None else masks
    found = masks.cpu().numpy() if isinstance(masks, Tensor) else np.asarray(masks)
    if found.dtype != bool:
        raise InputTypeError(
            f"masks is of dtype {found.dtype}; expected bool, True for the training examples of a subset; call "
            f"random_subsets(...), or masks.astype(bool)."
        )
    if found.ndim != 2 or found.shape[1] != num_rows or len(found) < 1:
        raise InputError(
            f"masks is of shape {found.shape}; expected [subsets, {num_rows}], a column per training example."
        )
    empty = np.flatnonzero(~found.any(axis=1))
    if num_rows and len(empty):  # a training set without examples is refused later
        raise InputError(f"masks leaves no examples in subsets {empty[:5].tolist()}; expected at least one in each.")
    checked = [check_seed(seed) for seed in as_list(seeds, "seeds")]
    if not checked or len(set(checked)) != len(checked):
        raise InputError(f"seeds is {checked}; expected at least one seed, each once.")
    return [Run(subset, seed, mask, paired) for subset, mask in enumerate(found) for seed in checked]
