"""Losses and labels of examples from the outputs that the model gave in training, without another forward."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tracer.data import tasks
from tracer.data.tasks import LowerPrecision, Task
from tracer.errors import TracerError
from tracer.gradients.attention import standing_in
from tracer.types import Batch, SampleOutputs

logger = logging.getLogger("tracer")


class TrainingLosses:
    """Keeps what the model returned in the last forward of a block, and has a named task compute losses of it.

    Args:
        model: The model.
        task: The task. Of tasks of users nothing is known: they may use parts of the model.
    """

    def __init__(self, model: nn.Module, task: Task) -> None:
        self._model = model
        self._task = task.task if isinstance(task, LowerPrecision) else task
        self._known = type(self._task).__module__.startswith(f"{tasks.__package__}.") and self._task.name != "callable"
        self._output: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep the output of forwards with gradients in a ``with`` block."""

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            if torch.is_grad_enabled():
                self._output = output

        handle = self._model.register_forward_hook(keep) if self._known else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    def of(self, batch: Batch, batch_size: int) -> SampleOutputs | None:
        """Return losses and labels of a batch that the model has just seen; None if they cannot be told."""
        output, self._output = self._output, None
        if output is None:
            return None
        replay = _Replay(self._model, output)
        try:
            with torch.no_grad(), standing_in([replay]):
                found = self._task.outputs(self._model, batch)
        except (TracerError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            logger.debug("losses of training examples are not known: %s", error)
            self._known = False
            return None
        if not replay.used or found.loss.shape != (batch_size,):
            self._known = False
            return None
        return found


class _Replay:
    """Stands in for a model's forward and returns what it returned before."""

    def __init__(self, module: nn.Module, output: Any) -> None:
        self.module, self.used = module, False

        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.used = True
            return output

        self.forward = forward
