"""A callback that records the training of the Hugging Face `transformers.Trainer`."""

from __future__ import annotations

import os
from typing import Any

from tracer.errors import MissingDependencyError
from tracer.training.recording import CheckpointRecorder, Schedule, make_schedule


def _callback_class() -> Any:
    """Return the class of callbacks with a state; `object` if transformers is not installed."""
    try:
        from transformers import TrainerCallback
        from transformers.trainer_callback import ExportableState
    except ImportError:
        return object
    return type("StatefulCallback", (TrainerCallback, ExportableState), {})


_Callback: Any = _callback_class()


class HuggingFaceRecorderCallback(_Callback):
    """Records a `transformers.Trainer` by a `CheckpointRecorder`; pass it in ``callbacks=[...]``.

    Training resumed with ``resume_from_checkpoint=`` continues the recording from that point. Losses are the means that
    the trainer logs every ``logging_steps``; with ``every="loss"`` a checkpoint is due after one of them.

    Args:
        directory: As in `CheckpointRecorder`.
        every: As in `CheckpointRecorder`.
        **options: As in `CheckpointRecorder`; ``resume`` is taken from the trainer's checkpoint.

    Attributes:
        recorder: The recorder; None before training starts.

    Raises:
        MissingDependencyError: If transformers is not installed.
    """

    def __init__(
        self, directory: str | os.PathLike[str], every: int | str | Schedule = "geometric", **options: Any
    ) -> None:
        if _Callback is object:
            raise MissingDependencyError("HuggingFaceRecorderCallback needs transformers: pip install 'tracin[hf]'")
        self.recorder: Any = None
        self._directory, self._every, self._options = os.fspath(directory), every, options
        self._logged: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a recording, or continue it if the trainer resumes."""
        if self.recorder is not None:
            self.recorder.close(save=False)  # of a training that an error ended
        saved = state.stateful_callbacks.get(type(self).__name__, []) if state.global_step else []
        own = [one for one in (saved if isinstance(saved, list) else [saved]) if self._is_own(one)]
        options = {**self._options, "resume": own[0]["attributes"]["saved"]} if own else self._options
        self.recorder = self._make(kwargs["model"], kwargs["optimizer"], self._directory, every=self._every, **options)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Store the logged loss."""
        self._logged = (logs or {}).get("loss", self._logged)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the recorder that a step is over."""
        if self.recorder is not None and (self._logged is not None or not self.recorder.needs_loss):
            self.recorder.step(loss=self._logged, epoch=state.epoch)
            self._logged = None
        self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the last state if the training is about to end, before load_best_model_at_end loads other weights."""
        ends = control.should_training_stop or state.global_step >= state.max_steps
        if ends and self.recorder is not None and not self.recorder.closed:
            self.recorder.save()

    on_evaluate = on_save = on_epoch_end  # also if a later callback has decided to end it

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save the last state."""
        if self.recorder is not None:
            self.recorder.close()

    def state(self) -> dict[str, Any]:
        """Return the state that the trainer stores in its checkpoints."""
        saved = {} if self.recorder is None else self.recorder.state_dict()
        arguments = {"directory": self._directory, "every": make_schedule(self._every).settings(), **self._options}
        return {"args": arguments, "attributes": {"saved": saved}}

    def _make(self, *args: Any, **options: Any) -> Any:
        """Return what records the training."""
        return CheckpointRecorder(*args, **options)

    def _is_own(self, saved: dict[str, Any]) -> bool:
        return bool(saved["attributes"].get("saved")) and saved["args"].get("directory") == self._directory
