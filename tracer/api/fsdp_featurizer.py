"""Featurize with a sharded model: all ranks run whenever one of them does.

A round: each rank says whether it has rows to compute, has none in this batch, or has no more batches at all. If any
has, all run a forward and a backward, each of its own rows, or else of one stand-in row whose result is dropped. So
ranks may have batches of any size and number, rows that are stored already, or no batch at all.
"""

from __future__ import annotations

import numpy as np
import torch

from tracer.api.featurizer import Featurizer, write_values
from tracer.data.batches import select_samples, to_device
from tracer.gradients import GradientEngine, Sink
from tracer.gradients.fsdp import ENDED, WAITING, WORKING, Ranks
from tracer.gradients.per_sample import PerSampleGradient
from tracer.projection.base import Projector
from tracer.store import RowTable
from tracer.training.lend_weights import LoadedWeights
from tracer.types import Batch, SampleOutputs


class SharedFeaturizer(Featurizer):
    """A `Featurizer` that goes in step with the other ranks of a sharded model.

    Args:
        ranks: The ranks.
        weights: The checkpoint's weights, this rank's parts.
        engine: Computes per-sample gradients.
        projector: Projects them; None where features are not stored.
        device: Where batches go.
        check_rows: Whether rows are recognised by a fingerprint of their inputs.
    """

    def __init__(
        self,
        ranks: Ranks,
        weights: LoadedWeights,
        engine: GradientEngine,
        projector: Projector | None,
        device: torch.device,
        check_rows: bool = True,
    ) -> None:
        super().__init__(ranks.model, weights, engine, projector, device, check_rows)
        self.ranks = ranks

    @torch.inference_mode(False)
    def write(self, table: RowTable, batch: Batch, rows: np.ndarray, same_rows: RowTable | None = None) -> int:
        """Compute and write those rows of a batch that the table does not hold yet; all ranks must call this or `join`.

        Args:
            table: Where the rows go.
            batch: A batch of ``len(rows)`` samples.
            rows: ``[n]``, int64, the index of each sample in the table.
            same_rows: A table of the same rows at another checkpoint, with which fingerprints are compared.

        Returns:
            The number of rows computed.

        Raises:
            BatchError: The batch does not hold ``len(rows)`` samples.
            MismatchError: A row's inputs differ from those that either table holds for its index.
            NonFiniteError: A row's gradient, loss or slope is NaN or infinite; nothing of the batch is written.
            RankError: Another rank failed.
        """
        with self.ranks.step():
            fingerprint, known = self.check(table, batch, rows, same_rows)
            new = np.flatnonzero(~known)

            def first_row() -> Batch:
                row = new[:1] if len(new) else np.zeros(1, dtype=np.int64)
                return to_device(select_samples(batch, torch.from_numpy(row), len(rows)), torch.device("cpu"))

            if not self.ranks.begin(WORKING if len(new) else WAITING, first_row):
                return 0
            if len(new) == 0:
                self._stand_in()
            else:
                part = batch if len(new) == len(rows) else select_samples(batch, torch.from_numpy(new), len(rows))
                values = self.compute(part, len(new))
                write_values(table, rows[new], values, fingerprint[new])
                if self.ranks.stand_in is None:
                    self.ranks.stand_in = first_row()
            self.ranks.written()
        return len(new)

    @torch.inference_mode(False)
    def join(self) -> None:
        """Run along until no rank has batches left.

        Raises:
            RankError: Another rank failed.
        """
        with self.ranks.step():
            while True:
                if self.ranks.begin(ENDED, lambda: None):
                    self._stand_in()
                    self.ranks.written()
                elif self.ranks.all_ended:
                    return

    def run(self, batch: Batch, num_rows: int, sink: Sink) -> SampleOutputs:
        """Give the gradients of a batch to a sink, with the checkpoint's weights; all ranks must call this."""
        with self.ranks.running():
            return super().run(batch, num_rows, sink)

    def _stand_in(self) -> None:
        self.run(self.ranks.stand_in, 1, _Dropped())


class _Dropped:
    """A sink that keeps nothing."""

    def begin(self) -> None:
        """Start again."""

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Drop what comes."""
