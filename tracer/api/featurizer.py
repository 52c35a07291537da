"""Featurizing: the gradients of a batch, projected, checked and written to a table of the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tracer.api.sinks import DroppingSink, NormSink, ProjectingSink, RowValues, row_values, write_values
from tracer.data.batches import check_batch_size, select_samples, to_device
from tracer.data.datasets import DataSource, exact_batches
from tracer.data.fingerprints import fingerprint_samples
from tracer.data.tasks import check_per_sample
from tracer.errors import BatchError
from tracer.gradients import GradientEngine, Sink, isolated
from tracer.gradients.coupling import check_quantization
from tracer.gradients.fsdp import ENDED, WAITING, WORKING
from tracer.gradients.joint import JoiningSink, Joint
from tracer.gradients.norms import row_squares
from tracer.gradients.per_sample import DenseGradient
from tracer.gradients.preconditioning import Preconditioner, PreconditioningSink
from tracer.gradients.verification import checking
from tracer.projection.base import Projector
from tracer.store import RowTable
from tracer.store.quantization import rotated
from tracer.training.lend_weights import LoadedWeights, weights_in
from tracer.types import Batch, Projection, SampleOutputs

Answer = TypeVar("Answer")

_COMPARED = 4
"""How many stored examples are computed again, to see whether model and task are still those of the store."""


class Featurizer:
    """Computes and writes the features of batches at one checkpoint.

    Args:
        engine: Computes per-sample gradients of the model.
        weights: The checkpoint's weights, lent to the model for each batch.
        projector: Projects gradients; None if features are not stored.
        device: The device of batches.
        check_rows: Whether examples are recognized by a fingerprint of their inputs.
        preconditioner: Returns what preconditions gradients, or None; called when it is first needed.
        rotates: Whether features are rotated, since of some their signs are stored.
        joints: The weights and biases whose gradients are joined before anything takes them.
    """

    def __init__(
        self,
        engine: GradientEngine,
        weights: LoadedWeights,
        projector: Projector | None,
        device: torch.device,
        check_rows: bool = True,
        preconditioner: Callable[[], Preconditioner | None] = lambda: None,
        rotates: bool = False,
        joints: Sequence[Joint] = (),
    ) -> None:
        self.engine, self.weights, self.projector = engine, weights, projector
        self.device, self.check_rows, self.preconditioner = device, check_rows, preconditioner
        self.rotates, self.joints = rotates, joints
        self._memory: Tensor | None = None
        self._runs_alone = self._derived_checked = self._compared = False

    @torch.inference_mode(False)
    def write(self, table: RowTable, batch: Batch, rows: np.ndarray, compared: RowTable | None = None) -> int:
        """Compute and write those examples of a batch that the table does not hold yet.

        With a sharded model all ranks must call this or `join`. They run whenever one of them does; those without new
        examples run a stand-in and drop its result.

        Args:
            table: The table.
            batch: A batch of ``len(rows)`` samples.
            rows: ``[n]``, int64, the index of each sample in the table.
            compared: A table of the same examples at another checkpoint, whose fingerprints must be equal.

        Returns:
            The number of examples computed.

        Raises:
            BatchError: If the batch does not hold ``len(rows)`` samples.
            MismatchError: If an example's inputs differ from those stored for its index.
            NonFiniteError: If a gradient, loss or ∂L/∂f is NaN or infinite; nothing of the batch is written.
            RankError: If the model is sharded and another rank failed.
        """
        backend = self.engine.backend
        with backend.step():
            fingerprint, known = self.check(table, batch, rows, compared)
            if known.any():
                self._compare(table, batch, rows)
            new = np.flatnonzero(~known)

            def first_row() -> Batch:
                row = new[:1] if len(new) else np.zeros(1, dtype=np.int64)
                return to_device(select_samples(batch, torch.from_numpy(row), len(rows)), torch.device("cpu"))

            if not backend.begin(WORKING if len(new) else WAITING, first_row):
                return 0
            if len(new) == 0:
                self._stand_in()
            else:
                part = batch if len(new) == len(rows) else select_samples(batch, torch.from_numpy(new), len(rows))
                write_values(table, rows[new], self.compute(part, len(new)), fingerprint[new])
                backend.remember(first_row)
            backend.written()
        return len(new)

    @torch.inference_mode(False)
    def join(self) -> None:
        """Run stand-ins until no rank of a sharded model has batches left."""
        backend = self.engine.backend
        with backend.step():
            while True:
                if backend.begin(ENDED, lambda: None):
                    self._stand_in()
                    backend.written()
                elif backend.all_ended:
                    return

    def check(
        self, table: RowTable, batch: Batch, rows: np.ndarray, compared: RowTable | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Check a batch against both tables; return fingerprints ``[n]`` and which examples are stored ``[n]``."""
        check_batch_size(batch, len(rows))
        fingerprint = np.zeros(len(rows), dtype=np.uint64)
        if self.check_rows:
            fingerprint = fingerprint_samples(batch, len(rows))
            if compared is not None:
                compared.check_rows(rows, fingerprint)
        return fingerprint, table.check_rows(rows, fingerprint)

    def compare(self, table: RowTable, source: DataSource) -> None:
        """Compare all examples of a source that a table holds with it, and some of them by their values."""
        stored = np.flatnonzero(table.done)
        for batch, rows in exact_batches(source, stored) if len(stored) else ():
            self.check(table, batch, rows)
            self._compare(table, batch, rows)

    def _compare(self, table: RowTable, batch: Batch, rows: np.ndarray) -> None:
        """Compute some of the examples that a table holds again, once: does the same function give the same values?"""
        # A checkpoint has no code: no activation, no loss, no constant of either.
        if self._compared or not self.check_rows or self.engine.backend.is_sharded:
            return
        known = np.flatnonzero(table.done[rows])[:_COMPARED]
        if not len(known):
            return
        self._compared = True
        part = select_samples(batch, torch.from_numpy(known), len(rows))
        found = self.compute(part, len(known))
        exact = self.device.type == "cpu" and self.engine.dtype in (torch.float32, torch.float64)
        values = {name: getattr(found, name) for name in ("loss", "loss_grad", "gradient_norm")}
        table.check_values(rows[known], 0.02 if exact else 0.1, **values)

    @torch.inference_mode(False)
    def compute(self, batch: Batch, num_rows: int) -> RowValues:
        """Return the values to store of each of ``num_rows`` samples, on the CPU."""
        if self.projector is None:
            norms_only = NormSink(num_rows, self.device)
            outputs = self.run(batch, num_rows, norms_only)
            return row_values(outputs, norms_only.squared_norm, self.engine.audited)
        if self._memory is None or len(self._memory) < num_rows:
            self._memory = torch.empty(num_rows, self.projector.dim, device=self.device)
        sink = ProjectingSink(self.projector, self._memory[:num_rows])
        outputs = self.run(batch, num_rows, sink)
        projection = sink.finish()
        squares = projection.squared_norm if self.projector.adds_norms else row_squares(projection.features)
        features = rotated(projection.features) if self.rotates else projection.features
        return row_values(outputs, squares, self.engine.audited, features)

    def run(self, batch: Batch, num_rows: int, sink: Sink) -> SampleOutputs:
        """Pass the gradients of a batch, preconditioned, to a sink; return f, L, Q, w of samples."""
        preconditioner = self.preconditioner()
        if preconditioner is not None:
            sink = PreconditioningSink(sink, preconditioner)
        joining = JoiningSink(sink, self.joints, self.engine.layer_parameters)
        with self._at_checkpoint():
            batch = to_device(batch, self.device)
            if not self._runs_alone and not self.engine.backend.is_sharded:
                self._check_first(batch, num_rows)
            outputs = self.engine.compute(batch, num_rows, joining)
            with torch.no_grad():
                joining.finish()
            return outputs

    @torch.no_grad()
    def projected_weights(self) -> Tensor:
        """Return the selected parameters at the checkpoint, projected as a gradient is, ``[k]``."""
        assert self.projector is not None
        features = torch.zeros(1, self.projector.dim, device=self.device)
        running = self.projector.start(Projection(features, torch.zeros(1, dtype=torch.float64, device=self.device)))
        running.add({name: DenseGradient(self.weights.parameters[name][None]) for name in self.engine.names}, 0, 1)
        return running.finish().features[0]

    @torch.inference_mode(False)
    @torch.no_grad()
    def ask(self, question: Callable[[nn.Module, Batch], Answer], batch: Batch) -> Answer:
        """Return the answer to a question about the model at the checkpoint on a batch; its state stays."""
        with self._at_checkpoint(), self.engine.stateless_task.unchanged():
            return question(self.engine.model, to_device(batch, self.device))

    @contextmanager
    def _at_checkpoint(self) -> Iterator[None]:
        """Lend the checkpoint's weights to the model, which is left as it was."""
        with (
            self.engine.backend.running(),
            weights_in(self.engine.model, self.weights),
            no_autocast(self.device),
            isolated(self.engine.model, self.engine.names, self.device),
        ):
            yield

    def _check_first(self, batch: Batch, num_rows: int) -> None:
        """Check before anything is computed that no value comes from other weights, and that one example runs."""
        with checking(self.device), self.engine.stateless_task.unchanged():
            if not self._derived_checked:
                self.engine.stateless_task.check_derived(select_samples(batch, torch.tensor([0]), num_rows))
                self._derived_checked = True
            if num_rows > 1:
                check_quantization(self.engine.model)
                self._check_alone(batch, num_rows)

    def _check_alone(self, batch: Batch, num_rows: int) -> None:
        """Raise `BatchError`, before anything is computed, if one example alone fails, as in a last batch of one."""
        # With gradients, which some forwards need: forces, or hooks of tensors.
        model, task = self.engine.model, self.engine.stateless_task
        try:
            outputs = task.outputs(model, select_samples(batch, torch.tensor([0]), num_rows))
            check_per_sample("output", outputs.output, 1, "example")
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            task.outputs(model, batch)  # raises what is wrong with any batch
            raise BatchError(
                f"The model and task run on a batch of {num_rows} examples, but not on one example alone, as a last "
                f"batch or a check may hold: {type(error).__name__}: {str(error).rstrip('.')}. Outputs often lose the "
                f"batch dimension by squeeze(): use squeeze(-1) or flatten(1). Examples that need each other, as in "
                f"BatchNorm without running statistics, cannot be attributed."
            ) from error
        self._runs_alone = True

    def _stand_in(self) -> None:
        self.run(self.engine.backend.stand_in, 1, DroppingSink())


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Disable a surrounding autocast, whose cached casts belong to other weights."""
    torch.clear_autocast_cache()
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.clear_autocast_cache()
