"""Segments of a training run: sums of what each example contributed, and their tables in the store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracer._core.blocks import row_blocks
from tracer._core.processes import Process
from tracer.api.checkpoint_sources import CheckpointSources
from tracer.api.featurizer_factory import FeaturizerFactory
from tracer.api.sinks import row_values
from tracer.errors import MismatchError, NonFiniteError
from tracer.projection.base import Projector
from tracer.scoring.readiness import finalize_features
from tracer.store import Store
from tracer.store.quantization import rotated
from tracer.store.table_schema import NO_LABEL
from tracer.training.recording import CheckpointRecord
from tracer.types import SampleOutputs

STORE, RECORDING = "store", "recording"
_COLLECTED = "collected"
_BLOCK_BYTES = 64 << 20


class SegmentSums:
    """The sum of each example's contributions to the steps of a segment, on the CPU, in each process of its own.

    Args:
        num_rows: The number of training examples ``N``.
        dim: The values of each.
        memory_bytes: If they take more memory, they are in a file.
        folder: The folder of that file.
        process: This process.

    Attributes:
        audited: ``[N]``, bool, the examples of which a gradient was compared with that of the example alone.
        loss: ``[N]``, float32, the loss of each example when it was last seen, in any segment.
        label: ``[N]``, int64, its class; `NO_LABEL` if none is known.
    """

    def __init__(self, num_rows: int, dim: int, memory_bytes: int, folder: Path, process: Process) -> None:
        self._file = folder / f"sums_{process.rank}.bin" if 4 * num_rows * dim > memory_bytes else None
        if self._file is None:
            self.values = torch.zeros(num_rows, dim)
        else:
            self._file.unlink(missing_ok=True)
            size = num_rows * dim
            self.values = torch.from_file(str(self._file), shared=True, size=size).view(num_rows, dim)  # all zeros
        self.audited = np.zeros(num_rows, bool)
        self.loss = np.zeros(num_rows, np.float32)
        self.label = np.full(num_rows, NO_LABEL)
        self._process = process
        self._seen, self._num_seen = np.zeros(num_rows, np.int64), 0  # for each example, the number of the last batch

    def add(self, rows: np.ndarray, values: Tensor, outputs: SampleOutputs | None) -> None:
        """Add contributions ``[B, dim]`` of some examples, which may be repeated."""
        self.values.index_add_(0, torch.from_numpy(rows), values.detach().to("cpu", torch.float32))
        if outputs is not None:
            self._num_seen += 1
            self._seen[rows] = self._num_seen
            self.loss[rows] = outputs.loss.detach().float().cpu().numpy()
            if outputs.label is not None:
                self.label[rows] = outputs.label.cpu().numpy()

    def gather(self, device: torch.device) -> None:
        """Add up the sums of processes that train together, and take losses and labels from the last that saw them.

        Args:
            device: The device that they communicate through.
        """
        process = self._process
        if not process.together:
            return

        def added(values: Any, operation: str = "SUM") -> Tensor:
            return process.all_reduce(torch.as_tensor(values).to(device, copy=True), operation).cpu()

        for start, stop in row_blocks(len(self.values), 4 * self.values.shape[1], _BLOCK_BYTES):
            self.values[start:stop] = added(self.values[start:stop])
        self.audited = added(self.audited.astype(np.int64)).numpy() > 0
        place = self._seen * process.count + process.rank
        last = added(place, "MAX").numpy()
        own, known = place == last, last >= process.count
        self.loss = added(np.where(own & known, self.loss, np.float32(0))).numpy()
        labels = added(np.where(own & known, self.label, 0)).numpy()
        self.label = np.where(known, labels, NO_LABEL)
        self._seen, self._num_seen = last // process.count, int(last.max()) // process.count

    def clear(self) -> None:
        """Begin a segment."""
        self.values.zero_()
        self.audited[:] = False

    def close(self) -> None:
        """Remove the file."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


@dataclass(frozen=True)
class SegmentStore:
    """Writes finished segments to a store, each as the features of a checkpoint.

    Attributes:
        store: The store.
        factory: Reads checkpoints and makes projectors.
    """

    store: Store
    factory: FeaturizerFactory

    @property
    def next_id(self) -> int:
        """The number of the segment in progress."""
        return len(self.store.catalog.checkpoint_ids())

    @property
    def projector(self) -> Projector:
        """The projector of the segment in progress."""
        projector = self.factory.projector(self.next_id)
        projector.adds_norms = False  # those of sums are of another kind
        return projector

    def write(self, records: Sequence[CheckpointRecord], sums: SegmentSums, state: dict[str, Any]) -> None:
        """Write a segment.

        Args:
            records: The checkpoints in it; targets are explained at the first one.
            sums: The sums.
            state: What continues the training after it.

        Raises:
            NonFiniteError: If the sums of an example are NaN or infinite; nothing counts as written.
        """
        rate = max(map(sum, zip(*(record.learning_rate_sums for record in records), strict=True)))
        model_id, path = self.next_id, records[0].path
        loaded = self.factory.read(path)
        CheckpointSources().check_new(self.store, model_id, loaded.fingerprint)
        table = self.store.create_checkpoint(model_id, loaded.fingerprint, rate)
        rotates = self.store.manifest.feature_storage.is_binary
        with table:
            for start, stop in row_blocks(table.num_rows, 4 * table.dim, _BLOCK_BYTES):
                features = sums.values[start:stop] / rate
                norms = torch.linalg.vector_norm(features, dim=1)
                if not torch.isfinite(norms).all():
                    wrong = table.named(start + np.flatnonzero(~np.isfinite(norms.numpy())))
                    raise NonFiniteError(
                        f"The gradients of rows {wrong} up to step {records[-1].step} have a sum that is NaN or "
                        f"infinite: look at their inputs and at the training's losses."
                    )
                rows = np.arange(start, stop)
                ones = torch.ones(len(rows))
                outputs = SampleOutputs(ones, torch.from_numpy(sums.loss[rows]), ones, 0 * ones)
                values = row_values(outputs, norms.double().square(), None, rotated(features) if rotates else features)
                floats = {name: getattr(values, name) for name in ("loss", "loss_grad", "loss_hess", "gradient_norm")}
                fingerprint = np.zeros(len(rows), np.uint64)  # inputs may be augmented, so there is none
                more = {"fingerprint": fingerprint, "label": sums.label[rows], "audited": sums.audited[rows]}
                table.write(rows, values.features, **more, **floats)
        table = self.store.checkpoint(model_id)
        CheckpointSources().remember(model_id, path, table)
        table.set_attributes(**{_COLLECTED: {"step": records[-1].step, **state}})
        table.close()
        finalize_features(self.store, [model_id], False)

    def begin(self, state: dict[str, Any]) -> None:
        """Write what begins the training."""
        self.store.set_info(**{_COLLECTED: {"step": 0, **state}})

    def states(self) -> list[dict[str, Any]]:
        """Return what continues the training from its start, and after each finished segment."""
        attributes = [self.store.table_attributes(each) for each in self.store.catalog.checkpoint_ids()]
        ended = [each[_COLLECTED] for each in attributes if each.get("finalized") and _COLLECTED in each]
        return [self.store.manifest.info[_COLLECTED], *ended]

    def keep(self, step: int) -> None:
        """Remove segments of later steps, unfinished ones, and what was computed at them.

        Raises:
            MismatchError: If no segment ends at the step.
        """
        states = self.states()
        steps = [state["step"] for state in states if state["step"] <= step]
        if steps[-1] != step:
            raise MismatchError(
                f"expected a state after one of the steps {[state['step'] for state in states]}, at which the "
                f"collected segments in {self.store.path} end, got step {step}: pass what collector.state_dict() "
                f"returned, with the model as it was then."
            )
        catalog = self.store.catalog
        for model_id in reversed(catalog.checkpoint_ids()[len(steps) - 1 :]):
            for name in catalog.exp_names():
                catalog.targets_path(name, model_id).remove()
            catalog.checkpoint_path(model_id).remove()


def collected_checkpoints(directory: str | os.PathLike[str]) -> list[tuple[Path, float]]:
    """Return the checkpoints and rates of what `GradientCollector` collected, for `attribute`.

    Args:
        directory: The collector's directory.

    Returns:
        For each segment the path of the weights at which targets are explained, and the sum of learning rates.

    Raises:
        StoreError: If there is no store in ``directory/store``.
    """
    store = Store.open_existing(Path(directory) / STORE)
    found = []
    for model_id in store.catalog.checkpoint_ids():
        attributes = store.table_attributes(model_id)
        if attributes.get("finalized") and _COLLECTED in attributes:
            # The directory may have been moved since.
            path = Path(directory) / RECORDING / Path(attributes["source"]).name
            found.append((path, float(attributes["learning_rate"])))
    return found
