"""Target rows derived from stored ones: weighted, summed up over groups, solved for.

Layout: target rows ``[M, k]``, G groups of them. Sums are float64, derived rows float32.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracer._core.blocks import row_blocks
from tracer.errors import InputError
from tracer.scoring.estimators import Estimate
from tracer.scoring.kernels import BLOCK_BYTES, true_blocks
from tracer.scoring.regularization import Regularization
from tracer.scoring.streaming import Rows


def group_indices(estimate: Estimate, targets: Rows) -> np.ndarray | None:
    """Return the group of each target ``[M]``, int64, -1 for none; None where scores are those of single targets.

    Raises:
        InputError: Their number is not that of the targets, or targets have no classes.
    """
    groups = estimate.groups
    if groups is None:
        return None
    if isinstance(groups, str):
        groups = targets.column("label").astype(np.int64)
        if groups.max() < 0:
            raise InputError("groups='label' came and the targets have no classes; pass groups=[group of each target].")
        return np.maximum(groups, -1)
    if len(groups) != targets.num_rows:
        raise InputError(f"groups has {len(groups)} values; expected one for each of {targets.num_rows} targets.")
    return groups


class DerivedRows:
    """Target rows derived from stored ones, when they are first used: weighted, summed up over groups, solved for.

    They have `tracer.scoring.streaming.Rows`' interface: float32 rows relative to a ``scale`` of each.

    Args:
        targets: The stored rows.
        estimate: What scores are to say.
        groups: As `group_indices` gives them.
        solve: Gives ``(K + λI)⁻¹`` times rows; None without a kernel.
        device: Where to multiply.
        memory_bytes: How many bytes of them may be held; more lie in a temporary file.
    """

    storage = "float32"

    def __init__(
        self,
        targets: Rows,
        estimate: Estimate,
        groups: np.ndarray | None,
        solve: Callable[[Tensor], Tensor] | None,
        device: torch.device,
        memory_bytes: int,
    ) -> None:
        self._targets, self._estimate, self._groups = targets, estimate, groups
        self._solve, self._device, self._memory_bytes = solve, device, memory_bytes
        self.num_rows = targets.num_rows if groups is None else int(groups.max()) + 1
        self.dim = targets.dim
        self._made: tuple[np.ndarray, np.ndarray] | None = None

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the scale of rows, ``[stop - start]``, float64; derived rows have no other column."""
        assert name == "scale", name
        return self._values()[1][start:stop]

    def raw_features(self, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """Return rows divided by their scale, in one piece."""
        return [(start, self._values()[0][start:stop])]

    def _values(self) -> tuple[np.ndarray, np.ndarray]:
        if self._made is None:
            raw, scale = self._memory(), np.ones(self.num_rows)
            for start, rows in self._blocks():
                rows = rows if self._solve is None else self._solve(rows)
                largest = rows.abs().amax(1)
                unit = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
                raw[start : start + len(rows)] = (rows / unit.unsqueeze(1)).float().cpu().numpy()
                scale[start : start + len(rows)] = unit.cpu().numpy()
            self._made = raw, scale
        return self._made

    def _memory(self) -> np.ndarray:
        shape = self.num_rows, self.dim
        if 4 * math.prod(shape) <= self._memory_bytes:
            return np.empty(shape, np.float32)
        with tempfile.TemporaryFile() as file:  # its name is gone at once, the map stays
            return np.memmap(file, np.float32, "w+", shape=shape)

    def _blocks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield rows before they are solved for, ``[n, k]``, float64, with the position of the first."""
        if self._groups is None:
            yield from self._weighted()
            return
        summed = torch.zeros(self.num_rows, self.dim, dtype=torch.float64, device=self._device)
        for start, rows in self._weighted():
            chosen = torch.from_numpy(self._groups[start : start + len(rows)]).to(self._device)
            summed.index_add_(0, chosen[chosen >= 0], rows[chosen >= 0])
        for start, stop in row_blocks(self.num_rows, 8 * self.dim, BLOCK_BYTES):
            yield start, summed[start:stop]

    def _weighted(self) -> Iterator[tuple[int, Tensor]]:
        """Yield target rows times their weights, ``[n, k]``, float64, with the index of the first."""
        loss_grad, norm = (self._targets.column(name) for name in ("loss_grad", "gradient_norm"))
        weights = torch.from_numpy(self._estimate.target_weights(loss_grad, norm)).to(self._device)
        for start, rows in true_blocks(self._targets, range(self._targets.num_rows), self._device):
            yield start, rows.mul_(weights[start : start + len(rows)].unsqueeze(1))


def describe(regularization: Regularization | None) -> dict[str, Any]:
    """Return what decides scores besides the rows and the estimator's name, as JSON values; empty for plain ones."""
    if regularization is None:
        return {}
    return {"regularization": regularization.value, "rule": regularization.rule}
