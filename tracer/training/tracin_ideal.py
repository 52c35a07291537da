"""TracInIdeal (Pruthi et al. 2020, section 3.1): the change of targets' losses at each step of a training run.

``TracInIdeal(z, z') = sum over the steps t that used z of L(w_t, z') - L(w_{t+1}, z')``. TracInCP approximates it from
a few checkpoints and first-order terms. `IdealRecorder` measures it in the user's own training loop, at the cost of one
forward of all targets per step.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tracer._core.sharding import fsdp_modules
from tracer._core.validation import check_count, check_device, check_model
from tracer.data.batches import map_leaves, to_device
from tracer.data.datasets import as_data_source
from tracer.data.fingerprints import fingerprint_samples
from tracer.data.indices import ExampleIndices, check_indices
from tracer.data.named_tasks import make_task
from tracer.data.tasks import check_per_sample
from tracer.errors import CallOrderError, InputError, MismatchError, NonFiniteError
from tracer.gradients.isolation import isolated, seed_generators
from tracer.training.checkpoints import weights_fingerprint
from tracer.training.lend_weights import LoadedWeights, weights_in
from tracer.training.tracin_ideal_record import IdealRecord, read_with_context, write_ideal
from tracer.types import Batch

logger = logging.getLogger("tracer")


class IdealRecorder:
    """Records the effect of each step of a training loop on the losses of targets.

    Before the first step and after each one, all targets' losses are computed with the model in eval mode. Training is
    not affected: weights, buffers, gradients, modes and the random state are restored bit by bit. Targets are read once
    and held in memory on the model's device.

    Args:
        model: The model in training, on its device.
        task: As in `Tracer`; it gives the losses.
        targets: The targets: a map-style data set, a tuple of tensors, a `DataLoader` with ``shuffle=False``, or a list
            of batches.
        train_set_size: The number of training examples ``N``.
        batch_size: The batch size of targets, for data sets and tensors. Default: 64.
        collate_fn: Makes a batch of a data set's examples.

    Attributes:
        rows: The training examples of each recorded step, ``[B_t]``, int64.
        num_targets: The number of targets ``M``.

    Raises:
        InputError: If there are no targets, or the model is sharded by ``fully_shard``.
        InputTypeError: If the model, the task or the targets have an invalid type.

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
        source = as_data_source(targets, "targets", check_count(batch_size, "batch_size"), collate_fn)
        self.num_targets = len(source)
        with self._undisturbed():  # data sets may draw random numbers
            self._batches = []
            for batch, inds in source.batches(np.arange(len(source))):
                own = map_leaves(batch, lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
                self._batches.append((to_device(own, self._device), len(inds)))  # the user may reuse the batch's memory
        self._fingerprint = np.concatenate([fingerprint_samples(batch, size) for batch, size in self._batches])

    @property
    def loss_changes(self) -> np.ndarray:
        """Each target's loss before a step minus after it, ``[T, M]``, float64; positive if the step lowered it."""
        return np.stack(self._changes) if self._changes else np.zeros((0, self.num_targets))

    @property
    def record(self) -> IdealRecord:
        """The recorded steps."""
        return IdealRecord(self.train_set_size, list(self.rows), self.loss_changes)

    def influence(self, share: str | Sequence[np.ndarray] = "equal") -> np.ndarray:
        """Return TracInIdeal of training examples on targets, ``[N, M]``, float64; see `IdealRecord.influence`."""
        return self.record.influence(share)

    @contextmanager
    def step(self, inds: ExampleIndices) -> Iterator[None]:
        """Record the step made inside: forward, backward and ``optimizer.step()`` in any form.

        A change of the weights between two steps belongs to neither. A step that raises is not recorded.

        Args:
            inds: The training examples of its batch, ``[B]``; with accumulated gradients, those of all its batches. An
                example that occurs twice is listed twice.

        Yields:
            Nothing.

        Raises:
            BatchError: If there are no indices, one is out of range, or the task does not give a loss for each target.
            InputTypeError: If they are not integers.
            CallOrderError: If it is called inside another step.
            NonFiniteError: If a target's loss is NaN or infinite; the step is not recorded.
        """
        rows = inds.detach().cpu().numpy() if isinstance(inds, Tensor) else np.asarray(inds)
        check_indices(np.unique(rows) if rows.ndim == 1 else rows, self.train_set_size, "train_set_size")
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
        self.rows.append(rows.astype(np.int64))
        self._changes.append(before - self._losses)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recorded steps to an ``.npz`` file, whole or not at all.

        `load` continues the recording, `read_ideal` reads it without a model. Save it together with a checkpoint of the
        training to resume both.

        Args:
            path: The file, which is replaced if it exists; its directory is created.

        Raises:
            StoreError: If it cannot be written.
        """
        write_ideal(path, self.record, self._context())

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
        """Continue a saved recording.

        Args:
            path: A file written by `save`.
            model: The model, with its weights at the time of saving.
            task: The same task.
            targets: The same targets.
            batch_size: The batch size of targets, for data sets and tensors. Default: 64.
            collate_fn: Makes a batch of a data set's examples.

        Returns:
            The recorder.

        Raises:
            StoreError: If the file is missing, damaged, not a recording, or of a newer version.
            MismatchError: If targets, task or weights differ from those of the recording.
        """
        there, record = read_with_context(path)
        recorder = cls(model, task, targets, record.train_set_size, batch_size, collate_fn)
        now = recorder._context()
        found, known = now["target_fingerprints"], there["target_fingerprints"]
        if not np.array_equal(found, known):
            differ = f"{len(known)} rows there, {len(found)} now"
            if len(found) == len(known):
                differ = f"rows {np.flatnonzero(found != known)[:5].tolist()} differ"
            raise MismatchError(
                f"{path} was recorded for other targets ({differ}): pass the same targets in the same order, or begin "
                f"a new recording."
            )
        if now["task"] != there["task"]:
            raise MismatchError(
                f"{path} was recorded with the task {there['task']}, and {now['task']} came; pass that task."
            )
        if now["weights_fingerprint"] != there["weights_fingerprint"]:
            raise MismatchError(
                f"the model does not have the weights at which {path} was saved, after {len(record.rows)} steps: load "
                f"the checkpoint that was saved with it into the model first, or begin a new recording."
            )
        recorder.rows, recorder._changes = record.rows, list(record.loss_changes)
        return recorder

    def _context(self) -> dict[str, np.ndarray]:
        """Return the arrays that describe targets, task and present weights."""
        weights = LoadedWeights(self.model, self.model.state_dict())
        return {
            "target_fingerprints": self._fingerprint,
            "task": np.array(json.dumps(self.task.settings(), sort_keys=True)),
            "weights_fingerprint": np.array(weights_fingerprint(weights.parameters | weights.buffers)),
        }

    def _has_changed(self, weights: LoadedWeights) -> bool:
        now: dict[str, Tensor] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        return not all(
            name in now and now[name].device == value.device and torch.equal(now[name], value)
            for name, value in (weights.parameters | weights.buffers).items()
        )

    def _evaluate(self) -> None:
        """Compute the targets' losses, ``[M]``, at the model's present weights."""
        self._weights = None
        weights = LoadedWeights(self.model, self.model.state_dict())
        found = []
        with weights_in(self.model, weights), self._undisturbed(), torch.no_grad():
            seed_generators(self._device)
            for batch, size in self._batches:
                loss = self.task.outputs(self.model, batch).loss
                check_per_sample("losses", loss, size, "targets")
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
        """Restore modes and random state afterwards, and leave a surrounding autocast."""
        trainable = {name for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        torch.clear_autocast_cache()  # casts that autocast has cached are of the training's weights
        try:
            with torch.autocast(self._device.type, enabled=False), isolated(self.model, trainable, self._device):
                yield
        finally:
            torch.clear_autocast_cache()
