"""`CheckpointRecorder`: saves what TracIn needs of a training run, from inside the training loop."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracer._core.processes import this_process
from tracer._core.validation import check_count, check_model
from tracer.errors import CallOrderError, InputError, StoreError
from tracer.training.recording.record import CheckpointRecord, add_rates, check_owner, total_rates, write_recording
from tracer.training.recording.resuming import begin_recording, same_values, state_after
from tracer.training.recording.schedules import Schedule, make_schedule, thin
from tracer.training.recording.snapshots import (
    check_optimizer,
    check_whole,
    model_state,
    moments_state,
    parameter_groups,
    shapes_of,
    without_base,
    write_checkpoint,
)

logger = logging.getLogger("tracer")

Rate = float | Tensor  # a tensor is read only when a checkpoint is saved, so that training never waits for it


class CheckpointRecorder:
    """Records a training run for TracIn: weights, and the learning rates of the steps that led to them.

    Call `step` after each optimizer step and `close` at the end, or use it in a ``with`` block. A hook of the optimizer
    reads learning rates at each step, so a scheduler can step before or after the recorder. Calls without an optimizer
    step, for example while gradients are accumulated or if a ``GradScaler`` skips a step, do not count.

    Training is not affected: weights, gradients, modes, optimizer and random state are the same as without the
    recorder. Under ``torch.distributed`` only the first process writes. `load_checkpoints` reads the recording, which
    is complete at any time, even if the process is killed.

    Args:
        model: The model in training. Wrappers of ``torch.compile`` and `DistributedDataParallel` are removed:
            checkpoints are of the module inside.
        optimizer: Its optimizer, also inside wrappers of accelerate and Lightning.
        directory: The directory of the recording, which is created.
        every: The number of steps between checkpoints; ``geometric`` (default): after steps 1, 2, 4, 8...; ``loss``:
            whenever the smoothed loss has fallen by a tenth; or a schedule of `tracer.training.recording`. The last
            state is saved too.
        max_checkpoints: The largest number of checkpoints. When it is exceeded, every second one is removed, and from
            then on every second one is not saved. The remaining ones represent the steps of those removed. Default: no
            limit.
        second_moments: Also save Adam's second moments, for ``preconditioner="adam"``.
        resume: What to do if the directory holds a recording. False (default): raise an error. True: continue after its
            last checkpoint, whose weights the model must have. A dict from `state_dict`: continue from there, and
            remove checkpoints of later steps.

    Attributes:
        steps: The number of steps taken.
        moves: For each group, how far a gradient of the last step moves its parameters over all later steps: its
            learning rate over 1 − momentum, or 0 if the step was skipped.

    Raises:
        InputTypeError: If the model, the optimizer or another argument has an invalid type.
        InputError: If an argument has an invalid value, the optimizer does not hold the model's parameters or has no
            learning rates, or the model is sharded.
        StoreError: If the directory holds a recording and ``resume`` is False, or it cannot be read or created.
        MismatchError: If the recording is of another model, optimizer, schedule or point of training.

    >>> import tempfile
    >>> from tracer import load_checkpoints
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with CheckpointRecorder(model, optimizer, folder, every=100) as recorder:
    ...         for _ in range(250):
    ...             optimizer.step()
    ...             recorder.step()
    ...     [rate for _, rate in load_checkpoints(folder)]
    [50.0, 50.0, 25.0]
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        directory: str | os.PathLike[str],
        *,
        every: int | str | Schedule = "geometric",
        max_checkpoints: int | None = None,
        second_moments: bool = False,
        resume: bool | Mapping[str, Any] = False,
    ) -> None:
        self.model = check_whole(check_model(model))
        self.optimizer = check_optimizer(optimizer, self.model, second_moments)
        self.directory = Path(directory)
        self.max_checkpoints = None if max_checkpoints is None else check_count(max_checkpoints, "max_checkpoints")
        self.second_moments = second_moments
        self.steps = 0
        self.moves: list[Rate] = []
        self.closed = False
        self._schedule = make_schedule(every)
        self._loss: float | Tensor | None = None
        self._epoch: float | None = None
        self._seen_steps = 0  # at the last call of `step`, and some of the weights then
        self._seen_sample = self._sample()
        self._depth = 0  # of calls of the optimizer's step inside each other
        self._flags: dict[int, tuple[bool, ...]] = {}  # of each group, at the last step that moved it
        self._rates: list[Rate] = []
        self._sums: list[Rate] = []  # since the last checkpoint
        self._writes = this_process().rank == 0
        if self._writes:
            self._recording, state = begin_recording(
                self.directory, self.model, self.optimizer, self._schedule.settings(), resume
            )
            self.steps = self._seen_steps = int(state["step"])
            self._epoch, self._loss, self._rates = state["epoch"], state["loss"], list(state["learning_rates"])
            self._schedule.restore(state["schedule"])
            totals, kept = state["learning_rate_totals"], self._recording.checkpoints
            if kept and kept[-1].step == self.steps:
                totals = [0.0] * len(totals)  # exactly, whatever rounding says
            self._sums = [max(rate, 0.0) for rate in add_rates(totals, [-rate for rate in total_rates(kept)])]
        self._handles = [
            self.optimizer.register_step_pre_hook(self._enter_step),
            self.optimizer.register_step_post_hook(self._leave_step),
        ]

    @property
    def checkpoints(self) -> list[CheckpointRecord]:
        """The checkpoints saved so far; none in processes that do not write."""
        return list(self._recording.checkpoints) if self._writes else []

    @property
    def needs_loss(self) -> bool:
        """Whether the schedule needs a loss at each `step`."""
        return self._schedule.needs_loss

    def step(self, loss: float | Tensor | None = None, epoch: float | None = None) -> None:
        """Mark the end of a training step, and save a checkpoint if one is due.

        It does nothing if the optimizer has not stepped since the last call.

        Args:
            loss: The loss of the step. A tensor is read when a checkpoint is saved, with ``every="loss"`` at each step.
            epoch: The epoch, possibly a fraction.

        Raises:
            CallOrderError: If the recorder is closed.
            InputError: If the schedule needs a loss and none was passed, or it is not a single number.
            StoreError: If a checkpoint cannot be written.
        """
        if self.closed:
            raise CallOrderError("recorder.step came after recorder.close; make another one with resume=True.")
        self._depth = 0  # an error may have ended a step in the middle
        if not self._writes or self.steps == self._seen_steps:
            return
        if loss is None and self.needs_loss:
            raise InputError("every='loss' needs the loss of each step; call recorder.step(loss=loss).")
        if loss is not None:
            self._loss = loss.detach() if isinstance(loss, Tensor) else float(loss)
        if epoch is not None:
            self._epoch = float(epoch)
        self._seen_steps, self._seen_sample = self.steps, self._sample()
        level = self._schedule.level(self.steps, _number(self._loss) if self.needs_loss else None)
        last = self._recording.checkpoints[-1].level if self._recording.checkpoints else 0
        if level // self._recording.stride > last // self._recording.stride:
            self._save(level, keep=False)

    def save(self) -> None:
        """Save a checkpoint now, unless no step was taken since the last one.

        Raises:
            CallOrderError: If the recorder is closed.
            StoreError: If it cannot be written.
        """
        if self.closed:
            raise CallOrderError("recorder.save came after recorder.close; make another one with resume=True.")
        if self._writes and self.steps:
            self._save(self._schedule.level(self.steps, None), keep=True)

    def close(self, save: bool = True) -> None:
        """Stop recording; further calls do nothing.

        Args:
            save: Save the last state, so that every step belongs to a checkpoint. Weights that changed after the last
                step, for example by loading the best ones, are not saved.

        Raises:
            StoreError: If it cannot be written.
        """
        if self.closed:
            return
        try:
            now, seen = self._sample(), self._seen_sample
            same = len(now) == len(seen) and all(map(same_values, now, seen))
            if save and not same and self.steps == self._seen_steps and any(_numbers(self._sums)):
                logger.warning(
                    "%s: the last state is not saved, since weights were changed after step %d; close the recorder "
                    "before loading others",
                    self.directory,
                    self.steps,
                )
            elif save:
                self.save()
        finally:
            self.closed = True
            for handle in self._handles:
                handle.remove()
        if self._writes and not self.steps:
            logger.warning(
                "%s: nothing was recorded, since the optimizer that the recorder got never stepped", self.directory
            )

    def __enter__(self) -> CheckpointRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # An error may have come in the middle of a step, when the weights are of no step.
        self.close(save=kind is None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for ``resume``, as JSON values; save it with a checkpoint of the training.

        It is empty in processes that do not write.
        """
        if not self._writes:
            return {}
        return state_after(self._recording, [*self._recording.checkpoints, self._record(level=0)])

    def _record(self, level: int) -> CheckpointRecord:
        """Return the record of a checkpoint at this point of the training."""
        path, next_id = self.directory / f"step_{self.steps:08d}.safetensors", self._recording.next_model_id
        loss, rates, sums = _number(self._loss), _numbers(self._rates), _numbers(self._sums)
        schedule = self._schedule.state()
        return CheckpointRecord(
            path, next_id, self.steps, self._epoch, loss, rates, sums, self.second_moments, level, schedule
        )

    def _sample(self) -> list[Tensor]:
        """Return copies of some values of three trained parameters, a fast way to tell states apart."""
        held = [one for group in self.optimizer.param_groups for one in group["params"] if one.requires_grad]
        chosen = [held[at] for at in (0, len(held) // 2, -1)] if held else []
        flat = [one.detach().reshape(-1) for one in chosen]
        return [one[:: max(one.numel() // 256, 1)].clone() for one in flat]

    def _enter_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._depth += 1

    def _leave_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Add the learning rates of the optimizer's step."""
        self._depth = max(self._depth - 1, 0)  # torch calls the hooks of a step and of the super().step() in it
        if self._depth:
            return
        self.steps += 1
        overflow = getattr(optimizer, "found_inf", None)  # fused optimizers skip a step by themselves
        self._rates = []
        self.moves = moved = []
        for number, group in enumerate(optimizer.param_groups):
            rate = group["lr"]
            rate = rate.detach().to(torch.float64, copy=True) if isinstance(rate, Tensor) else float(rate)
            self._rates.append(rate)
            flags = tuple(parameter.requires_grad for parameter in group["params"])
            moves = any(flags) and (isinstance(rate, Tensor) or bool(rate))
            if self._writes and moves and flags != self._flags.get(number):
                self._flags[number] = flags
                own = {id(parameter): name for name, parameter in self.model.named_parameters()}
                names = {own[id(one)] for one in group["params"] if one.requires_grad and id(one) in own}
                trained = self._recording.trained
                uneven = {*self._recording.uneven} | (names ^ {*trained.get(str(number), names)})
                trained = {**trained, str(number): sorted(names)}
                self._recording = replace(self._recording, trained=trained, uneven=sorted(uneven))
            if not any(flags):
                rate = 0.0  # it does not move
            elif overflow is not None:
                rate = rate * (overflow == 0).double()
            moved.append(rate * _momentum_factor(group))
        self._sums = [done + rate for done, rate in zip_longest(self._sums, moved, fillvalue=0.0)]

    def _save(self, level: int, keep: bool) -> None:
        """Write a checkpoint, unless no parameter moved since the last one; ``keep`` protects it from thinning."""
        old, new = self._recording, self._record(level)
        if not any(new.learning_rate_sums):
            return
        kept, stride, left_out = thin([*old.checkpoints, new], old.stride, self.max_checkpoints, keep)
        state = model_state(self.model)
        groups, untrained = parameter_groups(self.optimizer, self.model, old.groups)
        recording = replace(old, checkpoints=kept, stride=stride, groups=groups, untrained=untrained)
        recording = replace(recording, shapes=shapes_of(state))
        check_owner(old)
        try:
            if kept[-1].path == new.path:
                moments = moments_state(self.optimizer, self.model) if self.second_moments else None
                write_checkpoint(new.path, *without_base(state, self.model, groups), moments)
                recording = replace(recording, next_model_id=old.next_model_id + 1)
            self._recording, self._sums = recording, list(add_rates(left_out, [0.0] * len(self._sums)))
            write_recording(recording)
            paths = {one.path for one in kept}
            for gone in (file for one in old.checkpoints if one.path not in paths for file in one.files):
                gone.unlink(missing_ok=True)
        except OSError as error:
            raise StoreError(
                f"a checkpoint cannot be written to {self.directory} ({error}). Those saved before are whole: free "
                f"space or mend the disk; to train without recording, close the recorder with close(save=False)"
            ) from error


def _momentum_factor(group: Mapping[str, Any]) -> float:
    """Return how far a gradient moves a parameter of a group over all later steps, in learning rates."""
    momentum = float(group.get("momentum") or 0.0)
    return (1 - float(group.get("dampening") or 0.0)) / (1 - momentum) if 0 < momentum < 1 else 1.0


def _number(value: float | Tensor | None) -> float | None:
    """Return a loss as a float, None if it is not finite, or raise InputError if it is not a single number."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise InputError(f"loss has shape {list(value.shape)}; expected one number, such as loss.mean().")
    return float(value) if value is not None and math.isfinite(value) else None  # JSON has no other numbers


def _numbers(rates: list[Rate]) -> tuple[float, ...]:
    return tuple(float(rate) for rate in rates)
