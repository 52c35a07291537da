"""Featurize: the gradients of a batch's rows, projected, checked and written to a table of the store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tracer.batches import check_batch_size, row_fingerprints, select_rows, to_device
from tracer.checkpoints import LoadedWeights, weights_in
from tracer.errors import NonFiniteError
from tracer.factors import PerSampleGradient
from tracer.gradients import GradientEngine, isolated
from tracer.projection.base import Projector
from tracer.store import RowTable
from tracer.types import Batch, Projection, SampleOutputs


@dataclass(frozen=True)
class RowValues:
    """What is stored of each of ``n`` rows; float32 arrays.

    Attributes:
        features: ``[n, dim]``, the projected gradient of f.
        loss: ``[n]``, L.
        slope: ``[n]``, Q.
        curvature: ``[n]``, w.
        gradient_norm: ``[n]``, the exact norm of the gradient of f.
    """

    features: np.ndarray
    loss: np.ndarray
    slope: np.ndarray
    curvature: np.ndarray
    gradient_norm: np.ndarray


class Featurizer:
    """Turns batches into rows of a table, at one checkpoint.

    Args:
        model: The model.
        weights: The checkpoint's weights, put into the model for each batch only.
        engine: Computes per-sample gradients.
        projector: Projects them.
        device: Where batches go.
        check_rows: Whether rows are recognised by a fingerprint of their inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: LoadedWeights,
        engine: GradientEngine,
        projector: Projector,
        device: torch.device,
        check_rows: bool = True,
    ) -> None:
        self.model, self.weights = model, weights
        self.engine, self.projector = engine, projector
        self.device, self.check_rows = device, check_rows
        self._memory: Tensor | None = None

    def write(self, table: RowTable, batch: Batch, rows: np.ndarray, same_rows: RowTable | None = None) -> int:
        """Compute and write those rows of a batch that the table does not hold yet.

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
        """
        check_batch_size(batch, len(rows))
        fingerprint = np.zeros(len(rows), dtype=np.uint64)
        if self.check_rows:
            fingerprint = row_fingerprints(batch, len(rows))
            if same_rows is not None:
                same_rows.check_rows(rows, fingerprint)
        new = np.flatnonzero(~table.check_rows(rows, fingerprint))
        if len(new) == 0:
            return 0
        if len(new) < len(rows):
            batch = select_rows(batch, torch.from_numpy(new), len(rows))
        values = self.compute(batch, len(new))
        _check_finite(values, rows[new])
        table.write(
            rows[new],
            values.features,
            loss=values.loss,
            slope=values.slope,
            curvature=values.curvature,
            gradient_norm=values.gradient_norm,
            fingerprint=fingerprint[new],
        )
        return len(new)

    def compute(self, batch: Batch, num_rows: int) -> RowValues:
        """Compute what is stored of each row of a batch.

        Args:
            batch: A batch of ``num_rows`` samples.
            num_rows: Its number of samples.

        Returns:
            The values, on the CPU.
        """
        sink = _ProjectingSink(self.projector, self._features(num_rows))
        with weights_in(self.model, self.weights), isolated(self.model, self.engine.names, self.device):
            outputs = self.engine.compute(to_device(batch, self.device), num_rows, sink)
            projection = sink.finish()
        return _row_values(projection, outputs)

    def _features(self, num_rows: int) -> Tensor:
        """Return zeros ``[num_rows, dim]`` in memory that is used again for the next batch."""
        if self._memory is None or len(self._memory) < num_rows:
            self._memory = torch.empty(num_rows, self.projector.dim, device=self.device)
        return self._memory[:num_rows]


class _ProjectingSink:
    """Projects gradients as they come.

    Args:
        projector: The projector.
        features: ``[B, dim]``, memory for the features.
    """

    def __init__(self, projector: Projector, features: Tensor) -> None:
        self._projector, self._features = projector, features
        self.begin()

    def begin(self) -> None:
        """Start from zeros."""
        squared_norm = torch.zeros(len(self._features), dtype=torch.float64, device=self._features.device)
        self._running = self._projector.start(Projection(self._features.zero_(), squared_norm))

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Add the gradients of samples ``start`` to ``stop``."""
        self._running.add(gradients, start, stop)

    def finish(self) -> Projection:
        """Return the projection of all that came."""
        return self._running.finish()


def _row_values(projection: Projection, outputs: SampleOutputs) -> RowValues:
    def array(values: Tensor) -> np.ndarray:
        return values.detach().to("cpu", torch.float32).numpy()

    return RowValues(
        features=array(projection.features),
        loss=array(outputs.loss),
        slope=array(outputs.slope),
        curvature=array(outputs.curvature),
        gradient_norm=array(projection.squared_norm.sqrt()),
    )


def _check_finite(values: RowValues, rows: np.ndarray) -> None:
    for name in ("loss", "slope", "curvature", "gradient_norm"):
        finite = np.isfinite(getattr(values, name))
        if not finite.all():
            _refuse("gradient" if name == "gradient_norm" else name, rows[~finite])
    finite = torch.isfinite(torch.from_numpy(values.features).abs().amax(1)).numpy()
    if not finite.all():
        _refuse("gradient", rows[~finite])


def _refuse(what: str, bad: np.ndarray) -> None:
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise NonFiniteError(
        f"The {what} of rows {bad[:5].tolist()}{more} is NaN or infinite (in float32). Nothing of this batch was "
        f"written. Look at these rows' inputs and labels, or leave them out; if all rows are concerned, at the "
        f"checkpoint's weights."
    )
