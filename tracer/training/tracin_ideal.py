"""TracInIdeal (Pruthi et al. 2020, section 3.1): what each step of a training run did to the targets' losses.

``TracInIdeal(z, z') = sum over the steps t that used z of L(w_t, z') - L(w_{t+1}, z')``. It is what TracInCP, which
sees a few checkpoints and first-order terms only, approximates. `IdealRecorder` measures it in the user's own training
loop, at the price of one forward of all targets a step.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracer._core.sharding import fsdp_modules
from tracer._core.validation import check_count, check_device, check_model
from tracer.data.batches import map_leaves, to_device
from tracer.data.datasets import row_source
from tracer.data.fingerprints import row_fingerprints
from tracer.data.indices import RowIndices, row_indices
from tracer.data.tasks import make_task
from tracer.errors import BatchError, CallOrderError, InputError, MismatchError, NonFiniteError
from tracer.gradients.isolation import isolated, seed_generators
from tracer.training.checkpoints import LoadedWeights, weights_fingerprint, weights_in
from tracer.training.tracin_ideal_record import IdealRecord, read_ideal, read_recording, write_recording
from tracer.types import Batch

__all__ = ["IdealRecord", "IdealRecorder", "read_ideal"]

logger = logging.getLogger("tracer")


class IdealRecorder:
    """Records what each step of a training loop does to the losses of target rows.

    Before the first step and after each one, all targets' losses are computed with the model in eval mode. Training is
    not touched: weights, buffers, gradients, modes and the random state are afterwards what they were, bit by bit.
    The targets are read once and kept in memory, where the model is.

    Args:
        model: The model that is trained, on its device.
        task: As `Tracer` takes it; it gives the losses.
        targets: The target rows: a map-style data set, a tuple of tensors, a `DataLoader` with ``shuffle=False``, or a
            list of batches.
        train_set_size: The number of train rows ``N``.
        batch_size: Of targets, for data sets and tensors.
        collate_fn: How rows of a data set become a batch.

    Raises:
        InputError: There are no targets, or the model is sharded by ``fully_shard``.
        InputTypeError: The model, the task or the targets are of a type that cannot be used.

    >>> x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([2.0, 4.0])
    >>> model = nn.Linear(1, 1, bias=False)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> recorder = IdealRecorder(model, "regression", (x, y), train_set_size=2)
    >>> for row in [0, 1, 0]:
    ...     with recorder.step([row]):
    ...         optimizer.zero_grad()
    ...         torch.nn.functional.mse_loss(model(x[[row]])[:, 0], y[[row]]).backward()
    ...         optimizer.step()
    >>> recorder.influence().shape, bool((recorder.loss_changes > 0).all())
    ((2, 2), True)
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        targets: Any,
        train_set_size: int,
        batch_size: int = 64,
        collate_fn: Callable[[list], Batch] | None = None,
    ) -> None:
        self.model = check_model(model)
        if fsdp_modules(self.model):
            raise InputError(
                "model is sharded by fully_shard, and each process holds a part; IdealRecorder needs the plain model."
            )
        self.task = make_task(task)
        self.train_set_size = check_count(train_set_size, "train_set_size")
        self.rows: list[np.ndarray] = []
        self._device = check_device(None, self.model)
        self._changes: list[np.ndarray] = []
        self._weights: LoadedWeights | None = None
        self._losses = np.zeros(0)
        self._stepping = False
        source = row_source(targets, "targets", check_count(batch_size, "batch_size"), collate_fn)
        self.num_targets = source.num_rows
        with self._undisturbed():  # data sets may draw random numbers
            self._batches = [
                (to_device(map_leaves(batch, _cloned), self._device), len(inds))
                for batch, inds in source.batches(np.arange(source.num_rows))
            ]
        self._fingerprint = np.concatenate([row_fingerprints(batch, size) for batch, size in self._batches])

    @property
    def loss_changes(self) -> np.ndarray:
        """Each target's loss before a step minus after it, ``[T, M]``, float64; positive: the step lowered it."""
        return np.stack(self._changes) if self._changes else np.zeros((0, self.num_targets))

    @property
    def record(self) -> IdealRecord:
        """What was recorded so far."""
        return IdealRecord(self.train_set_size, list(self.rows), self.loss_changes)

    def influence(self, share: str | Sequence[np.ndarray] = "equal") -> np.ndarray:
        """Return TracInIdeal of all train rows on all targets, ``[N, M]``, float64; see `IdealRecord.influence`."""
        return self.record.influence(share)

    @contextmanager
    def step(self, inds: RowIndices) -> Iterator[None]:
        """Record the step that is made inside: forward, backward and ``optimizer.step()`` in any form.

        Whatever changes the weights between two steps belongs to neither. A step that raises is not recorded.

        Args:
            inds: The train rows of its batch, ``[B]``; with gradients accumulated over several batches, those of all.
                A row that is in the batch twice is given twice.

        Yields:
            Nothing.

        Raises:
            BatchError: There are no indices, or one is out of range; or the task does not give a loss for each target.
            InputTypeError: They are no integers.
            CallOrderError: It came inside another step.
            NonFiniteError: A target's loss is NaN or infinite; the step is not recorded.
        """
        rows = _batch_rows(inds, self.train_set_size)
        if self._stepping:
            raise CallOrderError("recorder.step came inside another recorder.step; end the first one before it.")
        if self._weights is None:
            self._evaluate()
        elif self._has_changed(self._weights):
            logger.info("weights changed between two recorded steps: the targets' losses are computed again")
            self._evaluate()
        self._stepping, before = True, self._losses
        try:
            yield
        finally:
            self._stepping = False
        self._evaluate()
        self.rows.append(rows)
        self._changes.append(before - self._losses)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was recorded so far to an ``.npz`` file, whole or not at all.

        `load` continues the recording, `read_ideal` reads it without a model. Save it together with a checkpoint of the
        training, from which both go on.

        Args:
            path: Where; its directory is made where it is missing, and a file that is there is replaced.

        Raises:
            StoreError: It cannot be written.
        """
        about = {
            "target_fingerprints": self._fingerprint,
            "task": np.array(json.dumps(self.task.settings(), sort_keys=True)),
            "weights_fingerprint": np.array(self._weights_fingerprint()),
        }
        write_recording(path, self.record, about)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        task: Any,
        targets: Any,
        batch_size: int = 64,
        collate_fn: Callable[[list], Batch] | None = None,
    ) -> IdealRecorder:
        """Continue a recording that was saved.

        Args:
            path: What `save` wrote.
            model: The model, with the weights that it had when the recording was saved.
            task: As before.
            targets: As before.
            batch_size: Of targets, for data sets and tensors.
            collate_fn: How rows of a data set become a batch.

        Returns:
            The recorder.

        Raises:
            StoreError: The file is missing, damaged, of something else or of a newer version.
            MismatchError: Targets, task or weights are not those of the recording.
        """
        about, record = read_recording(path)
        recorder = cls(model, task, targets, record.train_set_size, batch_size, collate_fn)
        found, known = recorder._fingerprint, about["target_fingerprints"]
        if not np.array_equal(found, known):
            differ = f"{len(known)} rows there, {len(found)} now"
            if len(found) == len(known):
                differ = f"rows {np.flatnonzero(found != known)[:5].tolist()} differ"
            raise MismatchError(
                f"{path} was recorded for other targets ({differ}): pass the same targets in the same order, or begin "
                f"a new recording."
            )
        settings = json.dumps(recorder.task.settings(), sort_keys=True)
        if settings != str(about["task"]):
            raise MismatchError(
                f"{path} was recorded with the task {about['task']}, and {settings} came; pass that task."
            )
        if recorder._weights_fingerprint() != str(about["weights_fingerprint"]):
            raise MismatchError(
                f"the model does not have the weights at which {path} was saved, after {len(record.rows)} steps: load "
                f"the checkpoint that was saved with it into the model first, or begin a new recording."
            )
        recorder.rows, recorder._changes = record.rows, list(record.loss_changes)
        return recorder

    def _weights_fingerprint(self) -> str:
        weights = LoadedWeights(self.model, self.model.state_dict())
        return weights_fingerprint(weights.parameters | weights.buffers)

    def _has_changed(self, weights: LoadedWeights) -> bool:
        """Say whether the model's parameters and persistent buffers are not those of the last losses."""
        now: dict[str, Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, value in (weights.parameters | weights.buffers).items():
            if name not in now or now[name].device != value.device or not torch.equal(now[name], value):
                return True
        return False

    def _evaluate(self) -> None:
        """Compute the targets' losses, ``[M]``, at the model's present weights.

        Raises:
            BatchError: The task does not give a loss for each target.
            NonFiniteError: A loss is NaN or infinite.
        """
        self._weights = None
        weights = LoadedWeights(self.model, self.model.state_dict())
        found = []
        with weights_in(self.model, weights), self._undisturbed(), torch.no_grad():
            seed_generators(self._device)
            for batch, size in self._batches:
                loss = self.task.outputs(self.model, batch).loss
                if loss.shape != (size,):
                    raise BatchError(
                        f"The task gave losses of shape {tuple(loss.shape)} for a batch of {size} targets; expected "
                        f"({size},). A task returns one number a sample (losses of torch take reduction='none')."
                    )
                found.append(loss.detach().to("cpu", torch.float64).numpy())
        losses = np.concatenate(found)
        bad = np.flatnonzero(~np.isfinite(losses))
        if len(bad):
            raise NonFiniteError(
                f"The loss of targets {bad[:5].tolist()} is NaN or infinite after {len(self.rows)} recorded steps; the "
                f"training diverged, or their inputs cannot be used."
            )
        self._weights, self._losses = weights, losses

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Put modes and the random state back, and leave a surrounding autocast, whose cached casts are training's."""
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        with ExitStack() as stack:
            torch.clear_autocast_cache()
            stack.callback(torch.clear_autocast_cache)
            stack.enter_context(torch.autocast(self._device.type, enabled=False))
            stack.enter_context(isolated(self.model, trainable, self._device))
            yield


def _batch_rows(inds: RowIndices, train_set_size: int) -> np.ndarray:
    """Return the rows of a batch, ``[B]``, int64, in which one may be more than once."""
    values = inds.detach().cpu().numpy() if isinstance(inds, Tensor) else np.asarray(inds)
    row_indices(np.unique(values) if values.ndim == 1 else values, train_set_size, "train_set_size")
    return values.astype(np.int64)


def _cloned(leaf: Any) -> Any:
    """Return a copy of a tensor, whose memory the user may use again."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf
