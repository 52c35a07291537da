"""A callback that collects gradients in the Hugging Face `transformers.Trainer`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tracer.api.collecting.collector import GradientCollector
from tracer.api.collecting.indexed import INDEX, split_index
from tracer.api.collecting.scopes import BatchScope
from tracer.errors import InputError
from tracer.training.integrations.huggingface import HuggingFaceRecorderCallback
from tracer.training.recording import Schedule

_NOT_INPUTS = ("num_items_in_batch", "use_cache", "fused_lm_head")  # the last two of SFTTrainer


class HuggingFaceCollectorCallback(HuggingFaceRecorderCallback):
    """Collects gradients in a `transformers.Trainer` by a `GradientCollector`; pass it in ``callbacks=[...]``.

    Train on ``IndexedDataset(dataset)`` with ``remove_unused_columns=False``: the callback takes the indices out of
    each batch before the model sees it. Training resumed with ``resume_from_checkpoint=`` continues; each checkpoint
    that the trainer saves ends a segment.

    Args:
        directory: As in `GradientCollector`.
        task: As in `GradientCollector`.
        train_set_size: The number of training examples ``N``.
        every: As in `GradientCollector`.
        **options: As in `GradientCollector`; ``resume`` is taken from the trainer's checkpoint.

    Attributes:
        recorder: The collector; None before training starts.

    Raises:
        MissingDependencyError: If transformers is not installed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        task: Any,
        train_set_size: int,
        every: int | str | Schedule = "geometric",
        **options: Any,
    ) -> None:
        super().__init__(directory, every, **options)
        self._task, self._train_set_size = task, train_set_size
        self._scope = BatchScope()
        self._hook: Any = None

    def _make(self, *args: Any, **options: Any) -> GradientCollector:
        model, optimizer, directory = args
        return GradientCollector(model, optimizer, directory, self._task, self._train_set_size, **options)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to collect, or continue if the trainer resumes.

        Raises:
            InputError: If the trainer removes the indices from batches.
        """
        if args.remove_unused_columns:
            raise InputError(
                f"The trainer would remove {INDEX!r} from its batches; pass remove_unused_columns=False in "
                f"TrainingArguments, and train on tracer.IndexedDataset(dataset)."
            )
        super().on_train_begin(args, state, control, **kwargs)
        self._remove_hook()
        self._hook = kwargs["model"].register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True)

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Take the indices out of a batch, and begin to collect it."""
        trains = model.training and torch.is_grad_enabled()
        if INDEX not in kwargs and not trains:
            return None
        inputs, inds = split_index(kwargs)
        assert isinstance(inputs, Mapping)
        if trains:
            batch = {name: value for name, value in inputs.items() if name not in _NOT_INPUTS}
            self._scope.begin(self.recorder.batch(batch, inds))
        return args, dict(inputs)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End a batch whose gradients are accumulated."""
        self._scope.end()

    on_pre_optimizer_step = on_substep_end

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the segment in all processes if the trainer is about to save, for which it asks only the first one."""
        super().on_epoch_end(args, state, control, **kwargs)
        if control.should_save and not self.recorder.closed:
            self.recorder.save()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the segment if the trainer may save after an evaluation."""
        super().on_evaluate(args, state, control, **kwargs)
        if args.save_strategy == "best" and not self.recorder.closed:
            self.recorder.save()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the last segment."""
        self._scope.end()
        self._remove_hook()
        super().on_train_end(args, state, control, **kwargs)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def state(self) -> dict[str, Any]:
        """Return the state that the trainer stores in its checkpoints; it ends the segment."""
        found = super().state()
        task = self._task if isinstance(self._task, str) else None
        found["args"] |= {"task": task, "train_set_size": self._train_set_size}
        return found
