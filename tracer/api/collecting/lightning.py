"""A callback that collects gradients in Lightning's `Trainer`; for ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from tracer.api.collecting.collector import GradientCollector
from tracer.api.collecting.indexed import split_index
from tracer.api.collecting.scopes import BatchScope
from tracer.data.indices import ExampleIndices
from tracer.training.integrations.lightning import LightningRecorderCallback
from tracer.training.recording import Schedule
from tracer.types import Batch


class LightningCollectorCallback(LightningRecorderCallback):
    """Collects gradients in a Lightning `Trainer` by a `GradientCollector`; pass it in ``callbacks=[...]``.

    Batches say which examples they hold if they come from ``IndexedDataset(dataset)``; ``training_step`` gets the
    indices as a last element, or under ``example_index``. Fitting resumed with ``ckpt_path=`` continues; each
    checkpoint that Lightning saves ends a segment.

    Args:
        directory: As in `GradientCollector`.
        task: As in `GradientCollector`.
        train_set_size: The number of training examples ``N``.
        every: As in `GradientCollector`.
        split: Returns the batch as the task takes it, and the indices of its examples, from what ``training_step``
            gets. Default: that of an `IndexedDataset`.
        **options: As in `GradientCollector` and `LightningRecorderCallback`: ``submodule`` and ``optimizer``.

    Attributes:
        recorder: The collector; None before training starts.

    Raises:
        MissingDependencyError: If neither lightning nor pytorch-lightning is installed.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        task: Any,
        train_set_size: int,
        every: int | str | Schedule = "geometric",
        split: Callable[[Any], tuple[Batch, ExampleIndices]] = split_index,
        **options: Any,
    ) -> None:
        super().__init__(directory, every, **options)
        self._task, self._train_set_size, self._split = task, train_set_size, split
        self._scope = BatchScope()

    def _make(self, *args: Any, **options: Any) -> GradientCollector:
        model, optimizer, directory = args
        return GradientCollector(model, optimizer, directory, self._task, self._train_set_size, **options)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin to collect a batch."""
        self._scope.begin(self.recorder.batch(*self._split(batch)))

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """End a batch."""
        self._scope.end()
