"""SOURCE: the steps between checkpoints unrolled, with constant curvature in each segment (Bae et al. 2024).

Layout: target features ``[M, k]``. A segment is the steps that led to a checkpoint, the time τ of it the sum of their
learning rates over N. Gradients and the Gauss-Newton matrix ``K = Φᵀ diag(w) Φ`` within it are those at the checkpoint.
One more copy of an example z then moves the weights by ``−(1 − exp(−τK)) / K · ∇L(z)`` within each segment, and each
later segment multiplies that by its ``exp(−τK)``. Scores are the changes of the target at the ends of all segments,
averaged, since the last one alone depends on few steps and has more noise.

The matrices are symmetric, so everything is applied to the targets, from the last segment to the first: there are few
targets, and train features stay as they are stored.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from tracer._core.blocks import row_blocks
from tracer.errors import InputError
from tracer.scoring.feature_tables import FeatureTable, dequantized_blocks
from tracer.scoring.kernels import AnyKernel
from tracer.scoring.preconditioned_targets import PreconditionedTargets
from tracer.scoring.read_checks import ReadCheck
from tracer.store import RowTable, Store

logger = logging.getLogger("tracer")


def segment_rates(store: Store, model_ids: Sequence[int]) -> list[float]:
    """Return the summed learning rates of the segments that end at checkpoints, or raise `InputError`."""
    settings, needs = store.manifest.settings, "estimator='source'"
    if len(model_ids) > 1 and not store.manifest.shares_projection:
        raise InputError(
            f"{needs} passes effects from one checkpoint to the next, so all need the same projection, and {store.path}"
            f" has one for each: featurize into another save_dir with shared_projection=True."
        )
    if settings.get("preconditioner") not in (None, "adam"):
        raise InputError(
            f"{needs} unrolls steps of SGD or Adam and {store.path} has preconditioner={settings['preconditioner']!r}: "
            f"featurize into another save_dir with preconditioner=None or 'adam'."
        )
    between = [each for each in store.catalog.checkpoint_ids() if min(model_ids) < each < max(model_ids)]
    skipped = [each for each in between if each not in model_ids]
    if skipped:
        raise InputError(
            f"model_ids={list(model_ids)} skips checkpoints {skipped}: {needs} takes all checkpoints of one run, since "
            f"each stands for the steps since the one before. Choose all of them, or the first or last ones."
        )
    rates: dict[int, Any] = {each: store.table_attributes(each).get("learning_rate") for each in model_ids}
    unknown = [model_id for model_id, rate in rates.items() if rate is None]
    if unknown:
        raise InputError(
            f"{needs} needs the learning rates of all steps, and checkpoints {unknown} have none. Pass for each the "
            f"sum over the steps since the one before, with momentum μ over 1 − μ: tracer.load_checkpoint(checkpoint, "
            f"model_id=..., learning_rate=...), or (checkpoint, rate) to attribute; load_checkpoints returns them."
        )
    return [float(rate) for rate in rates.values()]


def warn_of_other_runs(store: Store, model_ids: Sequence[int]) -> None:
    """Log a warning if the loss rises between checkpoints as if another run began there."""
    ids = sorted(model_ids)
    losses = [float(np.mean(store.checkpoint(each).column("loss"))) for each in ids]
    for before, after, lower, higher in zip(ids, ids[1:], losses, losses[1:], strict=False):
        if higher > 1.5 * lower and higher > (losses[0] + lower) / 2:
            logger.warning(
                "the mean loss rises from %.3g at checkpoint %d to %.3g at checkpoint %d: estimator='source' takes all "
                "checkpoints for one run. If another run begins there, ask for each by model_ids= and average.",
                lower,
                before,
                higher,
                after,
            )


@dataclass(frozen=True)
class Segment:
    """The steps that led to the checkpoint ``model_id``: their time τ, and the kernel K of all training examples."""

    model_id: int
    time: float
    kernel: Callable[[], tuple[AnyKernel, Any]]

    def response(self, features: Float64[Tensor, "m k"]) -> Float64[Tensor, "m k"]:
        """Return ``(1 − exp(−τK)) / K φ``, without what no training example sees."""

        def function(values: Tensor) -> Tensor:
            passed = self.time * values
            return self.time * torch.where(passed > 0, -torch.expm1(-passed) / passed, 1.0)

        return self.kernel()[0].filtered(features, function)

    def decayed(self, features: Float64[Tensor, "m k"]) -> Float64[Tensor, "m k"]:
        """Return ``exp(−τK) φ``."""
        return features + self.kernel()[0].filtered(features, lambda values: torch.expm1(-self.time * values))


class SegmentTargets(PreconditionedTargets):
    """The targets at the ends of a segment and of all later ones, as the segment's training examples move them.

    Args:
        targets: The targets at the segment's end.
        segment: The segment.
        later: The targets of the next segment; None for the last.
        common: The other arguments of `PreconditionedTargets`.
    """

    def __init__(self, targets: FeatureTable, segment: Segment, later: SegmentTargets | None, *common: Any) -> None:
        super().__init__(targets, segment.response, *common)
        self._segment, self._later = segment, later
        self._decayed: np.ndarray | None = None  # until the segment before has taken it

    def _take_decayed(self) -> np.ndarray:
        """Return the targets before the segment, float64, which are not kept."""
        _ = self._features_and_scale
        found, self._decayed = self._decayed, None
        assert found is not None
        return found

    def _blocks(self) -> Iterator[tuple[int, Float64[Tensor, "n k"]]]:
        """Yield targets with those of later segments, block by block, each with its first index."""
        later = None if self._later is None else self._later._take_decayed()
        self._decayed = self._allocate(np.float64)
        for start, features in super()._blocks():
            rows = slice(start, start + len(features))
            if later is not None:
                features = features + torch.from_numpy(later[rows]).to(self._device)
            self._decayed[rows] = self._segment.decayed(features).cpu().numpy()
            yield start, features


def unrolled_targets(
    targets: Sequence[FeatureTable], segments: Sequence[Segment], *common: Any
) -> list[SegmentTargets]:
    """Return the targets of each segment, whose features at its end are given; see `SegmentTargets`."""
    found: dict[int, SegmentTargets] = {}
    later = None
    for segment, table in sorted(zip(segments, targets, strict=True), key=_number, reverse=True):
        later = found[segment.model_id] = SegmentTargets(table, segment, later, *common)
    return [found[segment.model_id] for segment in segments]


def _number(pair: tuple[Segment, Any]) -> int:
    return pair[0].model_id


def unrolled_self_influence(
    tables: Sequence[RowTable], segments: Sequence[Segment], device: torch.device, memory_bytes: int
) -> Float64[np.ndarray, " N"]:
    """Return each training example's influence on its own loss at the end of each segment, summed over these.

    Args:
        tables: The training examples at each checkpoint.
        segments: The segments that end there.
        device: The device to multiply on.
        memory_bytes: The approximate memory.

    Returns:
        ``[N]``, float64.
    """
    num_rows, dim = tables[0].num_rows, tables[0].dim
    found = np.zeros(num_rows)
    forward = sorted(zip(segments, tables, strict=True), key=_number)
    backward = [(segment, table, ReadCheck(table, dim)) for segment, table in reversed(forward)]
    for start, stop in row_blocks(num_rows, 8 * dim, memory_bytes // 8):
        effects, total = torch.zeros(1, dim, dtype=torch.float64, device=device), torch.zeros(1, device=device)
        for segment, table, check in backward:
            check.check(np.arange(start, stop))
            features = torch.cat([rows for _, rows in dequantized_blocks(table, range(start, stop), device)])
            loss_grad = table.column("loss_grad", start, stop).astype(np.float64)
            gradients = features * torch.from_numpy(loss_grad).to(device).unsqueeze(1)
            effects = effects + gradients
            total = total + (segment.response(effects) * gradients).sum(1)
            effects = segment.decayed(effects)
        found[start:stop] = total.cpu().numpy()
    return found
