"""TrackStar (Chang et al. 2024): cosines of loss gradients that are whitened by second moments of both sides.

Loss gradients ``g = Q φ`` of N training examples and M targets have the second moments ``R_train = Σ g gᵀ / N`` and
``R_eval = Σ g' g'ᵀ / M``, ``[k, k]``. Scores are cosines after the whitening ``(R + δI)^{-1/2}`` with
``R = λ R_eval + (1 − λ) R_train``, which takes away the directions that all targets of a task share: those of its
template rather than of what a single target is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import CheckpointPair, FeatureTable, dequantized_blocks
from tracer.scoring.kernels import Kernels, leverages
from tracer.scoring.preconditioned_targets import PreconditionedTargets
from tracer.scoring.regularization import Kernel
from tracer.store import RowTable
from tracer.store.revisions import Revisions

SHARED_COMPONENTS = 1000 / 65536
"""The share of components, the strongest ones, that are taken for common to all targets (section A.1.3)."""

DAMPING = 0.1
"""δ in units of the mean eigenvalue of R, by default. The paper has more examples than features, and needs none."""


@dataclass(frozen=True)
class Whitening:
    """The mixed second moments of one checkpoint.

    Attributes:
        moments: R, in a basis that spans all examples if these are fewer than features.
        mixing: λ, the share of the targets' second moments.
        damping: δ.
    """

    moments: Kernel
    mixing: float
    damping: float

    def solve(self, features: Float64[Tensor, "m k"]) -> Float64[Tensor, "m k"]:
        """Return ``(R + δI)⁻¹ φ``."""
        return self.moments.solve(features, self.damping)

    def train_lengths(self, table: RowTable, device: torch.device) -> Float64[np.ndarray, " N"]:
        """Return ``‖(R + δI)^{-1/2} φ‖`` of each training example."""
        return np.sqrt(np.maximum(leverages(table, self.moments, self.damping, device), 0.0))

    def target_lengths(self, targets: FeatureTable, device: torch.device) -> Float64[np.ndarray, " M"]:
        """Return ``‖(R + δI)^{-1/2} φ‖`` of each target."""
        found = [
            (self.solve(features) * features).sum(1)
            for _, features in dequantized_blocks(targets, range(targets.num_rows), device)
        ]
        return np.sqrt(np.maximum(torch.cat(found).cpu().numpy(), 0.0))


def whitening(kernels: Kernels, model_id: int, targets: FeatureTable | None, estimate: Estimate) -> Whitening:
    """Return the whitening of a checkpoint; without targets that of training examples alone, ``λ = 0``."""
    assert estimate.kernel is not None
    kernel, sums = kernels.get(model_id, estimate.kernel, [])
    num_rows = kernels.store.manifest.train_set_size
    mixing, moments = 0.0, Kernel(kernel.in_basis.matrix / num_rows, kernel.in_basis.basis)
    if targets is not None and sums.trace > 0:
        mixing, moments = _mixed(moments, targets, kernels)
    unit = float(moments.matrix.diagonal().mean())
    share = DAMPING if estimate.regularization == "auto" else float(estimate.regularization)
    return Whitening(moments, mixing, share * unit)


def whitened_terms(
    kernels: Kernels, revisions: Revisions, targets: Sequence[FeatureTable], common: Any, stored: bool
) -> tuple[list[CheckpointPair], dict[str, Any]]:
    """Return the terms of the mean over checkpoints, and JSON values that decide the whitening.

    Args:
        kernels: The kernels of the store.
        revisions: The checkpoints.
        targets: The targets at each.
        common: The estimator's settings, groups, the device and the memory of `PreconditionedTargets`.
        stored: Whether the targets are a set in the store, whose second moments then have a part in the whitening.
    """
    # Second moments of the targets of a question would depend on what else is asked with it. Those of a target set are
    # the same whatever is asked of it, and results have its revision.
    estimate, groups, device, memory_bytes = common
    weight, pairs, mixing = 1 / len(targets), [], []
    for model_id, train, table in zip(revisions.model_ids, revisions.checkpoints, targets, strict=True):
        found = whitening(kernels, model_id, table if stored else None, estimate)
        lengths = found.target_lengths(table, device)
        whitened = PreconditionedTargets(table, found.solve, estimate, groups, device, memory_bytes, lengths)
        whitened.column("scale")  # computed now, one kernel after the other
        tables = (f"{path} {revision}" for path, revision in revisions.tables.items())
        key = ("trackstar", str(model_id), str(found.damping), str(stored), *tables)
        sizes = kernels.sizes(key, partial(found.train_lengths, train, device))
        pairs.append(CheckpointPair(weight, train, whitened, sizes=sizes))
        mixing.append(found.mixing)
    share = DAMPING if estimate.regularization == "auto" else estimate.regularization
    return pairs, {"regularization": share, "kernel": estimate.kernel, "mixing": mixing}


def _mixed(train: Kernel, targets: FeatureTable, kernels: Kernels) -> tuple[float, Kernel]:
    """Return λ and R, of the second moments of training examples and of targets."""
    device, num_targets, dim = kernels.device, targets.num_rows, targets.dim
    few = num_targets < dim  # then features are smaller than their second moments
    rows, own = [], torch.zeros(0 if few else dim, dim, dtype=torch.float64, device=device)
    for start, features in dequantized_blocks(targets, range(num_targets), device):
        loss_grad = targets.column("loss_grad", start, start + len(features)).astype(np.float64)
        gradients = features.mul_(torch.from_numpy(loss_grad).to(device).unsqueeze(1)).div_(num_targets**0.5)
        if few:
            rows.append(gradients)
        else:
            own.addmm_(gradients.T, gradients)
    roots = torch.cat(rows) if few else None
    strongest = torch.linalg.eigvalsh(own if roots is None else roots @ roots.T)
    mixing = kernels.process.agreed(mixing_share(train.spectrum()[0], strongest))
    matrix, basis = train.matrix, train.basis
    if roots is not None and basis is not None and basis.shape[1] + num_targets < dim:
        both = torch.linalg.qr(torch.cat([basis, roots.T], 1)).Q
        along, roots = basis.T @ both, roots @ both
        matrix, basis = along.T @ matrix @ along, both
    elif basis is not None:
        matrix, basis = basis @ matrix @ basis.T, None
    of_targets = own if roots is None else roots.T @ roots
    return mixing, Kernel((1 - mixing) * matrix + mixing * of_targets, basis)


def mixing_share(train: Float64[Tensor, " r"], targets: Float64[Tensor, " s"]) -> float:
    """Return λ by which the curves of sorted eigenvalues of ``λ R_eval`` and ``(1 − λ) R_train`` cross.

    They cross at the component `SHARED_COMPONENTS` of the smaller rank, at the first one at least: above it the
    targets' second moments are the larger ones.

    Args:
        train: The eigenvalues of R_train, ascending.
        targets: Those of R_eval.

    >>> mixing_share(torch.tensor([1.0, 3.0]).double(), torch.tensor([0.0, 1.0]).double())
    0.75
    """
    ranks = [int((each > torch.finfo(each.dtype).eps * len(each) * each[-1]).sum()) for each in (train, targets)]
    if not min(ranks):
        return 0.0  # gradients that are all zero have no share
    place = max(1, round(SHARED_COMPONENTS * min(ranks)))
    of_train, of_targets = float(train[-place]), float(targets[-place])
    return of_train / (of_train + of_targets)
