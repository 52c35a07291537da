"""Sinks for the gradients of a batch, and the values that are stored for each example."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tracer.errors import NonFiniteError
from tracer.gradients.per_sample import PerSampleGradient
from tracer.projection.base import Projector
from tracer.store import RowTable
from tracer.store.table_schema import VALUES
from tracer.types import Projection, SampleOutputs


@dataclass(frozen=True)
class RowValues:
    """The values to store for each of ``n`` examples; float32 arrays.

    Attributes:
        features: ``[n, dim]``, the projected gradient of f; None if features are not stored.
        loss: ``[n]``, L.
        loss_grad: ``[n]``, Q.
        loss_hess: ``[n]``, w.
        gradient_norm: ``[n]``, the norm of the gradient of f, or of its projection.
        output_change: ``[n]``, f minus the f of a model that has learnt nothing; 0 if the task does not know that.
        rival_share: ``[n]``, the rival's share of the probability of all classes other than the label.
        label: ``[n]``, int64, the class; None if the task gives none.
        rival: ``[n]``, int64, the class other than the label that the model prefers; None if the task gives none.
        audited: ``[n]``, bool, whether the example was run alone with the same result.
    """

    features: np.ndarray | None
    loss: np.ndarray
    loss_grad: np.ndarray
    loss_hess: np.ndarray
    gradient_norm: np.ndarray
    output_change: np.ndarray
    rival_share: np.ndarray
    label: np.ndarray | None
    rival: np.ndarray | None
    audited: np.ndarray

    def select(self, rows: np.ndarray) -> RowValues:
        """Return the values of some examples, given by a mask ``[n]`` or by positions."""
        features = None if self.features is None else self.features[rows]
        label = None if self.label is None else self.label[rows]
        rival = None if self.rival is None else self.rival[rows]
        values = (
            self.loss[rows],
            self.loss_grad[rows],
            self.loss_hess[rows],
            self.gradient_norm[rows],
            self.output_change[rows],
            self.rival_share[rows],
        )
        return RowValues(features, *values, label, rival, self.audited[rows])


class ProjectingSink:
    """Projects gradients as they are computed, after `begin`.

    Args:
        projector: The projector.
        features: ``[B, dim]``, memory for the features.
    """

    def __init__(self, projector: Projector, features: Tensor) -> None:
        self._projector, self._features = projector, features

    def begin(self) -> None:
        """Reset the features to zero."""
        squared_norm = torch.zeros(len(self._features), dtype=torch.float64, device=self._features.device)
        self._running = self._projector.start(Projection(self._features.zero_(), squared_norm))

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Add the gradients of samples ``start`` to ``stop``."""
        self._running.add(gradients, start, stop)

    def finish(self) -> Projection:
        """Return the projection of all gradients."""
        return self._running.finish()


class NormSink:
    """Sums up squared norms, ``[B]``, float64."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self.squared_norm = torch.zeros(num_rows, dtype=torch.float64, device=device)

    def begin(self) -> None:
        """Reset the sums to zero."""
        self.squared_norm.zero_()

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Add the gradients of samples ``start`` to ``stop``."""
        for gradient in gradients.values():
            self.squared_norm[start:stop] += gradient.squared_norm().to(self.squared_norm.device)


def row_values(
    outputs: SampleOutputs, squares: Tensor, audited: int | None, features: Tensor | None = None
) -> RowValues:
    """Return the values to store, on the CPU.

    Args:
        outputs: The outputs of ``n`` examples.
        squares: Squared norms ``[n]``.
        audited: The position of the example that was audited, or None.
        features: ``[n, dim]``, or None.
    """

    def array(values: Tensor) -> np.ndarray:
        return values.detach().to("cpu", torch.float32).numpy()

    def classes(values: Tensor) -> np.ndarray:
        return values.detach().to("cpu", torch.int64).numpy()

    unknown = torch.zeros_like(outputs.loss)
    output_change = unknown if outputs.baseline is None else outputs.output - outputs.baseline
    return RowValues(
        features=None if features is None else array(features),
        loss=array(outputs.loss),
        loss_grad=array(outputs.loss_grad),
        loss_hess=array(outputs.loss_hess),
        gradient_norm=array(squares.sqrt()),
        output_change=array(output_change),
        rival_share=array(unknown if outputs.rival_share is None else outputs.rival_share),
        label=None if outputs.label is None else classes(outputs.label),
        rival=None if outputs.rival is None else classes(outputs.rival),
        audited=np.arange(len(squares)) == (-1 if audited is None else audited),
    )


def write_values(table: RowTable, rows: np.ndarray, values: RowValues, fingerprint: np.ndarray) -> None:
    """Write the values of rows ``[n]``; if one is NaN or infinite, write nothing and raise `NonFiniteError`."""
    floats = {name: getattr(values, name) for name in VALUES}
    for name, column in floats.items():
        finite = np.isfinite(column)
        if not finite.all():
            _refuse("gradient" if name == "gradient_norm" else name, rows[~finite], table)
    table.write(
        rows,
        values.features,
        fingerprint=fingerprint,
        label=values.label,
        rival=values.rival,
        audited=values.audited,
        **floats,
    )


def _refuse(what: str, bad: np.ndarray, table: RowTable) -> None:
    raise NonFiniteError(
        f"The {what} of rows {table.named(bad)} is NaN or infinite (in float32). Nothing of this batch was "
        f"written. Look at these rows' inputs and labels, or leave them out; if all rows are concerned, at the "
        f"checkpoint's weights."
    )


class DroppingSink:
    """Drops all gradients."""

    def begin(self) -> None:
        """Do nothing."""

    def take(self, start: int, stop: int, gradients: dict[str, PerSampleGradient]) -> None:
        """Do nothing."""
