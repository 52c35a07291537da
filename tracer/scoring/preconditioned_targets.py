"""Target features that are weighted, summed over groups, and multiplied by an inverse kernel before they are scored.

Layout: target features ``[M, k]``, G groups of them. Sums are float64, the results float32.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, Shaped
from torch import Tensor

from tracer._core.blocks import row_blocks
from tracer.errors import InputError
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import DEQUANTIZED_BYTES, FeatureTable, dequantized_blocks


def group_indices(estimate: Estimate, targets: FeatureTable) -> Int64[np.ndarray, " M"] | None:
    """Return the group of each target, -1 for none; None if scores are those of single targets."""
    groups = estimate.groups
    if groups is None:
        return None
    if isinstance(groups, str):
        groups = targets.column("label").astype(np.int64)
        if groups.max() < 0:
            raise InputError("groups='label' needs targets with classes; pass groups=[group of each target].")
        return np.maximum(groups, -1)
    if len(groups) != targets.num_rows:
        raise InputError(f"groups has {len(groups)} values; expected one for each of {targets.num_rows} targets.")
    return groups


class PreconditionedTargets:
    """A `FeatureTable` of transformed targets, computed when first used, in a temporary file if beyond memory."""

    # φ(z')ᵀ (K + λI)⁻¹ φ(z) is symmetric. Solving for the targets, of which there are few, leaves train features as
    # they are stored and the scoring loop as it is. The results are float32 divided by a scale, as they may be 1e-15.

    storage = "float32"

    def __init__(
        self,
        targets: FeatureTable,
        solve: Callable[[Tensor], Tensor] | None,  # multiplies by (K + λI)⁻¹
        estimate: Estimate,
        groups: Int64[np.ndarray, " M"] | None,
        device: torch.device,
        memory_bytes: int,
        lengths: Float64[np.ndarray, " M"] | None = None,  # in place of gradients' norms
    ) -> None:
        self._targets, self._estimate, self._groups = targets, estimate, groups
        self._solve, self._device, self._memory_bytes, self._lengths = solve, device, memory_bytes, lengths
        self.num_rows = targets.num_rows if groups is None else int(groups.max()) + 1
        self.dim = targets.dim

    def column(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the ``scale`` of each target from ``start`` to ``stop``, float64."""
        assert name == "scale", name
        return self._features_and_scale[1][start:stop]

    def raw_features(self, start: int, stop: int) -> list[tuple[int, np.ndarray]]:
        """Return features divided by their scale as one view, with its first index."""
        return [(start, self._features_and_scale[0][start:stop])]

    @cached_property
    def _features_and_scale(self) -> tuple[Float32[np.ndarray, "M k"], Float64[np.ndarray, " M"]]:
        raw, scale = self._allocate(np.float32), np.ones(self.num_rows)
        for start, features in self._blocks():
            features = features if self._solve is None else self._solve(features)
            largest = features.abs().amax(1)
            unit = torch.where((largest > 0) & torch.isfinite(largest), largest, 1.0)
            raw[start : start + len(features)] = (features / unit.unsqueeze(1)).float().cpu().numpy()
            scale[start : start + len(features)] = unit.cpu().numpy()
        self._solve = None  # a kernel takes much memory
        return raw, scale

    def _allocate(self, dtype: type) -> Shaped[np.ndarray, "M k"]:
        shape = self.num_rows, self.dim
        if np.dtype(dtype).itemsize * math.prod(shape) <= self._memory_bytes:
            return np.empty(shape, dtype)
        with tempfile.TemporaryFile() as file:  # the map outlives the file's name, so nothing is left behind
            return np.memmap(file, dtype, "w+", shape=shape)

    def _blocks(self) -> Iterator[tuple[int, Float64[Tensor, "n k"]]]:
        """Yield targets before they are solved for, block by block, each with its first index."""
        if self._groups is None:
            yield from self._weighted()
            return
        summed = torch.zeros(self.num_rows, self.dim, dtype=torch.float64, device=self._device)
        for start, features in self._weighted():
            groups = torch.from_numpy(self._groups[start : start + len(features)]).to(self._device)
            summed.index_add_(0, groups[groups >= 0], features[groups >= 0])
        for start, stop in row_blocks(self.num_rows, 8 * self.dim, DEQUANTIZED_BYTES):
            yield start, summed[start:stop]

    def _weighted(self) -> Iterator[tuple[int, Float64[Tensor, "n k"]]]:
        """Yield targets times their weights, block by block, each with its first index."""
        loss_grad, norm = (self._targets.column(name) for name in ("loss_grad", "gradient_norm"))
        lengths = norm if self._lengths is None else self._lengths
        weights = torch.from_numpy(self._estimate.target_weights(loss_grad, lengths)).to(self._device)
        for start, features in dequantized_blocks(self._targets, range(self._targets.num_rows), self._device):
            yield start, features.mul_(weights[start : start + len(features)].unsqueeze(1))
