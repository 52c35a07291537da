"""Featurize: the gradients of a batch's rows, projected, checked and written to a table of the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tracer.data.batches import check_batch_size, select_samples, to_device
from tracer.data.fingerprints import fingerprint_samples
from tracer.errors import NonFiniteError
from tracer.gradients import GradientEngine, Sink, isolated
from tracer.gradients.norms import squared_norm
from tracer.gradients.per_sample import PerSampleGradient, scale_gradient
from tracer.projection.base import Projector
from tracer.store import RowTable
from tracer.training.lend_weights import LoadedWeights, weights_in
from tracer.types import Batch, Projection, SampleOutputs


@dataclass(frozen=True)
class RowValues:
    """What is stored of each of ``n`` rows; float32 arrays.

    Attributes:
        features: ``[n, dim]``, the projected gradient of f; None where features are not stored.
        loss: ``[n]``, L.
        loss_grad: ``[n]``, Q.
        loss_hess: ``[n]``, w.
        gradient_norm: ``[n]``, the exact norm of the gradient of f.
        output_change: ``[n]``, f minus the f of a model that has learnt nothing; 0 where the task does not know that.
        label: ``[n]``, int64, the class; None where the task gives none.
    """

    features: np.ndarray | None
    loss: np.ndarray
    loss_grad: np.ndarray
    loss_hess: np.ndarray
    gradient_norm: np.ndarray
    output_change: np.ndarray
    label: np.ndarray | None = None

    def select(self, rows: np.ndarray) -> RowValues:
        """Return the values of some rows, given by a mask ``[n]`` or by positions."""
        features = None if self.features is None else self.features[rows]
        label = None if self.label is None else self.label[rows]
        values = (
            self.loss[rows],
            self.loss_grad[rows],
            self.loss_hess[rows],
            self.gradient_norm[rows],
            self.output_change[rows],
        )
        return RowValues(features, *values, label)


class Featurizer:
    """Turns batches into rows of a table, at one checkpoint.

    Args:
        model: The model.
        weights: The checkpoint's weights, put into the model for each batch only; and what its gradients are scaled
            by, if by anything.
        engine: Computes per-sample gradients.
        projector: Projects them; None where features are not stored.
        device: Where batches go.
        check_rows: Whether rows are recognised by a fingerprint of their inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: LoadedWeights,
        engine: GradientEngine,
        projector: Projector | None,
        device: torch.device,
        check_rows: bool = True,
    ) -> None:
        self.model, self.weights = model, weights
        self.engine, self.projector = engine, projector
        self.device, self.check_rows = device, check_rows
        self._memory: Tensor | None = None

    @torch.inference_mode(False)
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
        fingerprint, known = self.check(table, batch, rows, same_rows)
        new = np.flatnonzero(~known)
        if len(new) == 0:
            return 0
        if len(new) < len(rows):
            batch = select_samples(batch, torch.from_numpy(new), len(rows))
        write_values(table, rows[new], self.compute(batch, len(new)), fingerprint[new])
        return len(new)

    def check(
        self, table: RowTable, batch: Batch, rows: np.ndarray, same_rows: RowTable | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Check that a batch is what it is said to be.

        Args:
            table: Where the rows belong.
            batch: A batch of ``len(rows)`` samples.
            rows: ``[n]``, int64, the index of each sample in the table.
            same_rows: A table of the same rows at another checkpoint.

        Returns:
            Fingerprints ``[n]``, uint64, and which rows the table holds already, ``[n]``, bool.

        Raises:
            BatchError: The batch does not hold ``len(rows)`` samples.
            MismatchError: A row's inputs differ from those that either table holds for its index.
        """
        check_batch_size(batch, len(rows))
        fingerprint = np.zeros(len(rows), dtype=np.uint64)
        if self.check_rows:
            fingerprint = fingerprint_samples(batch, len(rows))
            if same_rows is not None:
                same_rows.check_rows(rows, fingerprint)
        return fingerprint, table.check_rows(rows, fingerprint)

    @torch.inference_mode(False)
    def compute(self, batch: Batch, num_rows: int) -> RowValues:
        """Compute what is stored of each row of a batch.

        Args:
            batch: A batch of ``num_rows`` samples.
            num_rows: Its number of samples.

        Returns:
            The values, on the CPU.
        """
        if self.projector is None:
            norms_only = NormSink(num_rows, self.device)
            outputs = self.run(batch, num_rows, norms_only)
            return row_values(outputs, norms_only.squared_norm)
        if self._memory is None or len(self._memory) < num_rows:
            self._memory = torch.empty(num_rows, self.projector.dim, device=self.device)
        sink = _ProjectingSink(self.projector, self._memory[:num_rows])
        outputs = self.run(batch, num_rows, sink)
        projection = sink.finish()
        return row_values(outputs, projection.squared_norm, projection.features)

    def run(self, batch: Batch, num_rows: int, sink: Sink) -> SampleOutputs:
        """Give the gradients of a batch to a sink, with the checkpoint's weights, and scaled if it has scales.

        Args:
            batch: A batch of ``num_rows`` samples.
            num_rows: Its number of samples.
            sink: Takes the gradients.

        Returns:
            f, L, Q, w of each sample; f as the model gives it.
        """
        if self.weights.scales is not None:
            sink = _ScalingSink(sink, self.weights.scales)
        with (
            weights_in(self.model, self.weights),
            _no_autocast(self.device),
            isolated(self.model, self.engine.names, self.device),
        ):
            return self.engine.compute(to_device(batch, self.device), num_rows, sink)


@contextmanager
def _no_autocast(device: torch.device) -> Iterator[None]:
    """Leave a surrounding autocast, whose cached casts are of other weights too: the task says what is lowered."""
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.clear_autocast_cache()


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


class _ScalingSink:
    """Scales gradients entry by entry before another sink takes them.

    Args:
        sink: The other sink.
        scales: What each entry is multiplied by, ``[*shape]`` of each parameter.
    """

    def __init__(self, sink: Sink, scales: Mapping[str, Tensor]) -> None:
        self._sink, self._scales = sink, scales

    def begin(self) -> None:
        """Start again."""
        self._sink.begin()

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Hand on the gradients of samples ``start`` to ``stop``, scaled."""
        scaled = {
            name: scale_gradient(gradient, self._scales[name].to(gradient.device))
            for name, gradient in gradients.items()
        }
        self._sink.take(start, stop, scaled)


class NormSink:
    """Sums up squared norms, ``[B]``, float64."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.squared_norm = torch.zeros(num_rows, dtype=torch.float64, device=device)

    def begin(self) -> None:
        """Start from zeros."""
        self.squared_norm.zero_()

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Add the gradients of samples ``start`` to ``stop``."""
        for gradient in gradients.values():
            self.squared_norm[start:stop] += squared_norm(gradient).to(self.squared_norm.device)


def row_values(outputs: SampleOutputs, squares: Tensor, features: Tensor | None = None) -> RowValues:
    """Return what is stored of each row, on the CPU.

    Args:
        outputs: f, L, Q, w of each of ``n`` samples.
        squares: ``[n]``, float64, squared norms of the gradient of f.
        features: ``[n, dim]``, or None.

    Returns:
        The values.
    """

    def array(values: Tensor) -> np.ndarray:
        return values.detach().to("cpu", torch.float32).numpy()

    output_change = torch.zeros_like(outputs.loss) if outputs.baseline is None else outputs.output - outputs.baseline
    return RowValues(
        features=None if features is None else array(features),
        loss=array(outputs.loss),
        loss_grad=array(outputs.loss_grad),
        loss_hess=array(outputs.loss_hess),
        gradient_norm=array(squares.sqrt()),
        output_change=array(output_change),
        label=None if outputs.label is None else outputs.label.detach().to("cpu", torch.int64).numpy(),
    )


def write_values(table: RowTable, rows: np.ndarray, values: RowValues, fingerprint: np.ndarray) -> None:
    """Write rows that were computed.

    Args:
        table: Where they go.
        rows: ``[n]``, int64, their indices.
        values: Of each row.
        fingerprint: ``[n]``, uint64.

    Raises:
        NonFiniteError: A row's gradient, loss or slope is NaN or infinite; nothing is written.
    """
    for name in ("loss", "loss_grad", "loss_hess", "gradient_norm", "output_change"):
        finite = np.isfinite(getattr(values, name))
        if not finite.all():
            _refuse("gradient" if name == "gradient_norm" else name, rows[~finite])
    table.write(
        rows,
        values.features,
        loss=values.loss,
        loss_grad=values.loss_grad,
        loss_hess=values.loss_hess,
        gradient_norm=values.gradient_norm,
        output_change=values.output_change,
        fingerprint=fingerprint,
        label=values.label,
    )


def _refuse(what: str, bad: np.ndarray) -> None:
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise NonFiniteError(
        f"The {what} of rows {bad[:5].tolist()}{more} is NaN or infinite (in float32). Nothing of this batch was "
        f"written. Look at these rows' inputs and labels, or leave them out; if all rows are concerned, at the "
        f"checkpoint's weights."
    )
