"""`GradientCollector`: collects what TracIn needs of training examples from inside the training loop."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from tracer._core.processes import this_process
from tracer._core.validation import check_count
from tracer.api.collecting.segments import RECORDING, STORE, SegmentStore, SegmentSums, collected_checkpoints
from tracer.api.collecting.training_step import StepGradients
from tracer.api.featurizer_factory import FeaturizerFactory
from tracer.api.settings import CollectorOptions, FeatureSettings, feature_settings, takes_settings
from tracer.data.batches import check_batch_size
from tracer.data.indices import ExampleIndices, check_indices
from tracer.errors import CallOrderError, InputError, InputTypeError, MismatchError, nearest_name
from tracer.gradients.preconditioning import KRONECKER
from tracer.store import Store
from tracer.store.feature_storage import FeatureStorage
from tracer.training.checkpoints import weights_fingerprint
from tracer.training.recording import CheckpointRecorder, Schedule
from tracer.training.recording.snapshots import model_state
from tracer.types import Batch


@takes_settings(CollectorOptions)
class GradientCollector:
    """Collects training examples' gradients while a model is trained, so that no pass over them is needed afterwards.

    For each example ``z`` the sum over the steps t that used it is stored, in segments of the training::

        N * sum_t of learning rate_t * share of z in the gradient of step t

    with the weights ``w_t`` of each step, as the optimizer used it: the steps of TracInIdeal (Pruthi et al. 2020,
    section 3.1). Targets are explained at one checkpoint within each segment, so scores have the unit of
    `CheckpointRecorder`'s sums of rates: divided by N, they estimate how much an example lowered a target's loss.

    Gradients come from the training's own forward and backward, by hooks of layers. They are projected, in float32, as
    `Tracer` does it. Models whose examples influence each other in training (batch normalization), and those with
    parameters that no layer's input and output explain, take a second pass in eval mode for each batch.

    Processes that train together by `DistributedDataParallel` each collect their own batches, and make the same calls;
    at the end of a segment the first one stores the sum of what all have collected.

    Every step is compared with the gradient that the optimizer used, and at times with a pass of its own in eval mode,
    in which an example is run alone too; the store tells how many agreed (``tracer info``).

    Args:
        model: The model in training, as for `CheckpointRecorder`.
        optimizer: Its optimizer.
        directory: The directory, which is created: ``store`` in it is a store for `Tracer` and `attribute`, and
            ``recording`` has the checkpoints.
        task: As in `Tracer`; the loss of an example in training, up to a factor for each example.
        train_set_size: The number of training examples ``N``.
        every: The number of steps between checkpoints, or another schedule as for `CheckpointRecorder`. Every second
            checkpoint ends a segment; targets are explained at the one before it, in the middle. Default:
            ``geometric``.
        second_pass: Whether gradients come from a pass of their own in eval mode, over the same batch and weights. It
            takes the loss of a step for the mean over its examples, and does not see clipping. Default: only if needed.
        resume: What to do if the directory holds a recording, as for `CheckpointRecorder`: continue after the last
            segment (True), or from a dict of `state_dict`. Default: False, an error.
        **options: The settings of the store. By default all parameters that the optimizer holds are selected, and
            ``preconditioner="adam"`` multiplies gradients by Adam's second moments before each step.

    Attributes:
        model: The model without wrappers.
        recorder: Records the checkpoints.
        store: The path of the store.

    Raises:
        InputError: If a setting is out of range or not supported, or the model is sharded.
        StoreError: If the directory holds a recording and ``resume`` is False.
        MismatchError: If the directory holds what was collected with other settings, or the model does not have the
            weights after which collecting continues.

    >>> import tempfile
    >>> from tracer import attribute
    >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
    >>> model = nn.Linear(3, 2)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with GradientCollector(model, optimizer, folder, "image_classification", 8, every=5) as collector:
    ...         for step in range(20):
    ...             rows = torch.randperm(8)[:4]
    ...             with collector.batch((x[rows], y[rows]), rows):
    ...                 optimizer.zero_grad()
    ...                 nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
    ...             optimizer.step()
    ...             collector.step()
    ...     checkpoints = collector.checkpoints
    ...     found = attribute(
    ...         model, "image_classification", (x, y), (x, y), checkpoints, save_dir=collector.store
    ...     )
    ...     len(checkpoints), found.scores.shape
    (2, (8, 8))
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        directory: str | os.PathLike[str],
        task: Any,
        train_set_size: int,
        *,
        every: int | str | Schedule = "geometric",
        second_pass: bool = False,
        resume: bool | Mapping[str, Any] = False,
        **options: Unpack[CollectorOptions],
    ) -> None:
        self._process = this_process()
        directory = Path(directory)
        self.store = directory / STORE
        settings = _settings(dict(options), optimizer)
        self._adam = settings.preconditioner == "adam"
        factory = FeaturizerFactory(model, task, settings)
        manifest = factory.manifest(check_count(train_set_size, "train_set_size"))
        self.model, self.train_set_size = factory.model, manifest.train_set_size
        self._device = factory.device

        def recorder(state: bool | Mapping[str, Any]) -> CheckpointRecorder:
            folder = directory / RECORDING
            return CheckpointRecorder(model, optimizer, folder, every=every, second_moments=self._adam, resume=state)

        def begin() -> None:
            known = resume is not False and self.store.exists()
            self._segments = SegmentStore(Store.open(self.store, manifest, resume=known), factory)
            state: bool | Mapping[str, Any] = bool(resume)
            if known:
                state = self._checked(self._segments.states()[-1] if resume is True else resume)
            self.recorder = recorder(state)
            if not known:
                self._segments.begin(self._state())
            self._segments.keep(self.recorder.steps)

        self._process.rank_zero_only(begin)
        if self._process.rank:
            self._segments = SegmentStore(Store.open_existing(self.store), factory)
            self.recorder = recorder(False)
        self.recorder.steps = self._process.agreed(self.recorder.steps)
        self._projector = self._segments.projector
        dim = self._projector.dim
        self._sums = SegmentSums(self.train_set_size, dim, settings.memory_bytes, directory, self._process)
        self._step = StepGradients(factory, self.recorder.optimizer, self._adam, second_pass, self._process)
        self._begun, self._open = len(self.recorder.checkpoints), False
        self._applied = self._ended = self.recorder.steps
        self._handle = self.recorder.optimizer.register_step_post_hook(self._after_step)

    @property
    def closed(self) -> bool:
        """Whether the collector is closed."""
        return self.recorder.closed

    @property
    def needs_loss(self) -> bool:
        """Whether the schedule needs a loss at each `step`."""
        return self.recorder.needs_loss

    @property
    def checkpoints(self) -> list[tuple[Path, float]]:
        """The checkpoint and the sum of rates of each finished segment, for `attribute`."""
        return collected_checkpoints(self.store.parent)

    @contextmanager
    def batch(self, batch: Batch, inds: ExampleIndices) -> Iterator[None]:
        """Collect the gradients of a batch in a ``with`` block around its forward and ``backward``.

        Gradients may be accumulated over several batches before the optimizer's step, which is outside.

        Args:
            batch: The batch as the task takes it, with the examples that the forward sees, on any device.
            inds: The index of each example in the training set, ``[B]``; an example may come twice.

        Raises:
            CallOrderError: If the collector is closed, or another batch has not ended.
            BatchError: If the batch does not hold as many examples as ``inds``, or an index is out of range.
            GradientError: If gradients cannot be collected like this; the message says what to do.
        """
        if self.closed or self._open:
            raise CallOrderError(
                "collector.batch came after collector.close; make another one with resume=True."
                if self.closed
                else "collector.batch came before another batch had ended; end its `with` block after its backward."
            )
        rows = check_indices(inds, self.train_set_size, "train_set_size", repeats=True)
        check_batch_size(batch, len(rows))
        self._open = True
        try:
            with self._step.collecting(batch, rows, self._projector):
                yield
        finally:
            self._open = False

    def step(self, loss: float | Tensor | None = None, epoch: float | None = None) -> None:
        """Mark the end of a training step, as `CheckpointRecorder.step`; end the segment if it is due.

        Args:
            loss: The loss of the step.
            epoch: The epoch, possibly a fraction.

        Raises:
            CallOrderError: If the collector is closed.
            InputError: If the schedule needs a loss and none was passed.
            StoreError: If a checkpoint or the store cannot be written.
        """
        self.recorder.step(loss, epoch)
        if self._process.first(len(self.recorder.checkpoints) >= self._begun + 2, self._device):
            self._end_segment()

    def save(self) -> None:
        """End the segment now, unless no step was taken in it.

        Raises:
            CallOrderError: If the collector is closed.
            StoreError: If a checkpoint or the store cannot be written.
        """
        self.recorder.save()
        if self._applied > self._ended:  # else one process may call it alone, as trainers do when they save
            self._end_segment()

    def state_dict(self) -> dict[str, Any]:
        """End the segment, and return the state for ``resume``, as JSON values, to be saved with the training's."""
        if not self.closed:
            self.save()
        return self._segments.states()[-1]

    def close(self, save: bool = True) -> None:
        """Stop collecting.

        Args:
            save: End the segment, so that every step belongs to one.

        Raises:
            StoreError: If a checkpoint or the store cannot be written.
        """
        if self.closed:
            return
        try:
            if save:
                self.save()
        finally:
            self._handle.remove()
            self._sums.close()
            self.recorder.close(save=False)

    def __enter__(self) -> GradientCollector:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(save=kind is None)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Add what the batches contributed to the optimizer's step."""
        if self.recorder.steps == self._applied:  # torch calls the hook for a step inside of another one too
            return
        self._applied = self.recorder.steps
        moves = [self.train_set_size * float(move) for move in self.recorder.moves]
        for each in self._step.finish(moves, self._applied):
            self._sums.add(each.rows, each.values, each.outputs)
            if each.audited is not None:
                self._sums.audited[each.rows[each.audited]] = True

    def _end_segment(self) -> None:
        records, self._ended = self.recorder.checkpoints[self._begun :], self._applied
        if not self._process.first(bool(records), self._device):
            return
        self._step.check_weights()
        self._sums.gather(self._device)
        self._process.rank_zero_only(lambda: self._segments.write(records, self._sums, self._state()))
        self._sums.clear()
        self._projector, self._begun = self._segments.projector, len(self.recorder.checkpoints)

    def _state(self) -> dict[str, Any]:
        """Return what continues the training from here."""
        return {"recorder": self.recorder.state_dict(), "weights": weights_fingerprint(model_state(self.model))}

    def _checked(self, state: Any) -> Mapping[str, Any]:
        """Return the recorder's state of a state that the model's weights fit."""
        if not isinstance(state, Mapping) or not {"recorder", "weights", "step"} <= state.keys():
            raise InputError(f"resume is {state!r}; expected True, False, or what collector.state_dict() returned.")
        if weights_fingerprint(model_state(self.model)) != state["weights"]:
            raise MismatchError(
                f"Collecting continues after step {state['step']}, and the model does not have the weights of then: "
                f"load the training's checkpoint of that step into model and optimizer first, and pass the "
                f"collector.state_dict() that was saved with it, resume=state."
            )
        return state["recorder"]


def _settings(options: dict[str, Any], optimizer: torch.optim.Optimizer) -> FeatureSettings:
    """Return the settings of the store, or raise `InputError` for those that collecting does not allow."""
    held = {id(one) for group in optimizer.param_groups for one in group["params"]}
    if options.get("params") is None:
        options["params"] = lambda name, parameter: parameter.requires_grad and id(parameter) in held
    for name in options.keys() - CollectorOptions.__annotations__.keys():
        raise InputTypeError(
            f"GradientCollector() got an unexpected keyword argument {name!r}; "
            f"{nearest_name(name, CollectorOptions.__annotations__)}."
        )
    settings = feature_settings(options, "GradientCollector")
    if not FeatureStorage(settings.storage).stores_features or settings.preconditioner in KRONECKER:
        raise InputError(
            f"GradientCollector got storage={settings.storage!r} and preconditioner={settings.preconditioner!r}; "
            f"expected a storage of features, and None or 'adam': no curvature is known while training goes on."
        )
    if settings.preconditioner == "adam" and not all("betas" in group for group in optimizer.param_groups):
        raise InputError(
            f"GradientCollector got preconditioner='adam' and {type(optimizer).__name__}; expected Adam or AdamW, "
            f"whose second moments are known at each step. Pass preconditioner=None."
        )
    return settings
