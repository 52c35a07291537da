"""A callback that records the training of Lightning's `Trainer`; for ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

from torch import Tensor

from tracer.errors import InputError, MissingDependencyError
from tracer.training.recording import CheckpointRecorder, Schedule


def _callback_class() -> Any:
    """Return the class of callbacks of the package in use, or else installed; `object` if there is none."""
    names = ["lightning", "pytorch_lightning"]
    names.sort(key=lambda name: name not in sys.modules)  # the one that the user has imported first
    for name in names:
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(f"{name}.pytorch" if name == "lightning" else name).Callback
    return object


_Callback: Any = _callback_class()


class LightningRecorderCallback(_Callback):
    """Records a Lightning `Trainer` by a `CheckpointRecorder`; pass it in ``callbacks=[...]``.

    Fitting resumed with ``ckpt_path=`` continues the recording from that point.

    Args:
        directory: As in `CheckpointRecorder`.
        every: As in `CheckpointRecorder`.
        submodule: The part of the LightningModule to record, for example ``"net"`` for attribution of ``module.net``.
            Default: the whole LightningModule.
        optimizer: The number of the optimizer that trains it, if there are several.
        **options: As in `CheckpointRecorder`; ``resume`` is taken from Lightning's checkpoint.

    Attributes:
        recorder: The recorder; None before training starts.

    Raises:
        MissingDependencyError: If neither lightning nor pytorch-lightning is installed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every: int | str | Schedule = "geometric",
        submodule: str | None = None,
        optimizer: int | None = None,
        **options: Any,
    ) -> None:
        if _Callback is object:
            raise MissingDependencyError("LightningRecorderCallback needs lightning: pip install 'tracin[lightning]'")
        self.recorder: Any = None
        self._directory, self._every, self._options = directory, every, options
        self._submodule, self._optimizer = submodule, optimizer
        self._saved: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """The key of the callback's state in Lightning's checkpoints."""
        return f"{type(self).__qualname__}({os.fspath(self._directory)!r})"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin a recording, or continue it if Lightning resumes.

        Raises:
            InputError: If there are several optimizers and none was chosen, or there is no such submodule.
        """
        optimizers = trainer.optimizers
        if self._optimizer is None and len(optimizers) != 1 or (self._optimizer or 0) >= len(optimizers):
            raise InputError(
                f"{len(optimizers)} optimizers came with optimizer={self._optimizer}; choose one by its number, "
                f"LightningRecorderCallback(directory, optimizer=0)."
            )
        try:
            model = pl_module.get_submodule(self._submodule or "")
        except AttributeError as error:
            raise InputError(
                f"submodule={self._submodule!r} is not in the LightningModule ({error}); pass a name that "
                f"named_modules() has."
            ) from error
        options = {**self._options, "resume": self._saved} if self._saved else self._options
        optimizer = optimizers[self._optimizer or 0]
        self.recorder = self._make(model, optimizer, self._directory, every=self._every, **options)

    def _make(self, *args: Any, **options: Any) -> Any:
        """Return what records the training."""
        return CheckpointRecorder(*args, **options)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Tell the recorder that a batch is over."""
        if self.recorder is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            loss = loss.detach() * trainer.accumulate_grad_batches  # Lightning has divided it
        self.recorder.step(loss=loss, epoch=trainer.current_epoch)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Save the last state."""
        if self.recorder is not None:
            self.recorder.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop recording."""
        if self.recorder is not None:
            self.recorder.close(save=False)

    def state_dict(self) -> dict[str, Any]:
        """Return the state that Lightning stores in its checkpoints."""
        return {} if self.recorder is None else self.recorder.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state that Lightning stored."""
        self._saved = state_dict
