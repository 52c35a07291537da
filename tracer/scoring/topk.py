"""Running selection of the k strongest training examples of each target, over tiles of scores."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from tracer.errors import NonFiniteError
from tracer.types import TopK

_TILE_SCORES = 1 << 20
"""The number of scores that are compared at once."""

_MAX_CANDIDATES = 1 << 14
"""The number of candidates that may wait before they are sorted."""


class RunningTopK:
    """The k largest (or smallest) scores of each target over tiles of scores; ties go to the lower train index.

    >>> running = RunningTopK(1, 2)
    >>> running.update(0, torch.tensor([[1.0], [3.0]]))
    >>> running.update(2, torch.tensor([[2.0]]))
    >>> running.result().indices.tolist()
    [[1, 2]]
    """

    def __init__(self, num_targets: int, k: int, largest: bool = True) -> None:
        self.num_targets, self.k, self.largest = num_targets, k, largest
        self._selected = TopK(np.zeros((num_targets, 0), np.int64), np.zeros((num_targets, 0), np.float32))
        self._candidates: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # target, train index, score
        self._threshold: Tensor | None = None

    def update(self, indices: int | Int64[np.ndarray, " n"], scores: Float32[Tensor, "n M"]) -> None:
        """Add scores of new training examples; ``indices`` ascend, or are the first of consecutive ones."""
        indices = np.arange(indices, indices + len(scores)) if isinstance(indices, int) else indices
        step = max(1, _TILE_SCORES // self.num_targets)
        for first in range(0, len(indices), step):
            self._add_tile(indices[first : first + step], scores[first : first + step])

    def merge(self, selection: TopK) -> None:
        """Add a selection, at least k of each target, over training examples that were not added before."""
        indices, scores = selection
        targets = np.arange(self.num_targets).repeat(indices.shape[1])
        self._candidates.append((targets, indices.reshape(-1), scores.reshape(-1)))
        self._select()

    def result(self) -> TopK:
        """Return indices and scores, ``[M, k]`` each, strongest first."""
        self._select()
        return TopK(self._selected.indices.copy(), self._selected.scores.copy())

    def _add_tile(self, indices: Int64[np.ndarray, " n"], scores: Float32[Tensor, "n M"]) -> None:
        # one sum is cheaper than a test of every score, and is NaN or infinite if a score is
        if not bool(torch.isfinite(scores.sum())) and bool(scores.isnan().any()):
            raise NonFiniteError(
                f"Scores of training examples {indices[0]} to {indices[-1]} are NaN: gradients are so large that "
                f"their products are beyond float32. Use estimator='cosine', or leave these examples out by rows=."
            )
        # only scores beyond the k-th so far can be selected, so a tile costs little more than one comparison
        if self._threshold is not None:
            threshold = self._threshold.to(scores.device)
            mask = scores > threshold if self.largest else scores < threshold
        elif len(indices) > self.k:  # before there is a k-th score, that of the tile's first scores is a bound
            threshold = scores[: max(4 * self.k, 512)].topk(self.k, dim=0, largest=self.largest).values[-1]
            mask = scores >= threshold if self.largest else scores <= threshold
        else:
            mask = torch.ones_like(scores, dtype=torch.bool)
        if mask.device.type == "cpu":  # numpy finds a few true values among many much faster than torch
            positions, targets = np.divmod(np.flatnonzero(mask.numpy()), self.num_targets)
            values = scores.numpy()[positions, targets]
        else:
            at = mask.nonzero()
            values = scores[at[:, 0], at[:, 1]].cpu().numpy()
            positions, targets = at.cpu().numpy().T
        self._candidates.append((targets, indices[positions], values))
        num_candidates = sum(len(values) for *_, values in self._candidates)
        if self._threshold is None or num_candidates > max(_MAX_CANDIDATES, self.num_targets * self.k):
            self._select()

    def _select(self) -> None:
        """Sort the candidates into the selection."""
        if not self._candidates:
            return
        old = np.arange(self.num_targets).repeat(self._selected.indices.shape[1])
        parts = [(old, self._selected.indices.reshape(-1), self._selected.scores.reshape(-1)), *self._candidates]
        self._candidates = []
        targets, indices, values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.lexsort((indices, -values if self.largest else values, targets))
        first = np.searchsorted(targets[order], np.arange(self.num_targets))
        size = min(self.k, len(order) - int(first[-1]))  # every target has candidates from equally many examples
        order = order[first[:, None] + np.arange(size)]
        self._selected = TopK(indices[order].astype(np.int64), values[order].astype(np.float32))
        if size == self.k:
            self._threshold = torch.from_numpy(self._selected.scores[:, -1].copy())
