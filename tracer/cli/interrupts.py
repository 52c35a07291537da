"""Ctrl-C during a run: the current batch is finished, computed values are saved, and then the run stops."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

import click
import numpy as np

from tracer.data.datasets import DataSource
from tracer.types import Batch


class Interruption:
    """A context in which the first Ctrl-C ends the batches of a source and the second one interrupts immediately.

    >>> with Interruption() as interruption:
    ...     interruption.is_requested()
    False
    """

    def __init__(self) -> None:
        self._requested = self.in_batches = False
        self._before: Any = None

    def is_requested(self) -> bool:
        """Return whether Ctrl-C was pressed."""
        return self._requested

    def guard(self, source: DataSource, *, immediately: bool) -> DataSource:
        """Return a source whose batches end after Ctrl-C, with ``KeyboardInterrupt`` now or at the next request."""
        return _InterruptibleSource(source, self, immediately)

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated, self._requested = self._requested, True
        if repeated or not self.in_batches:
            raise KeyboardInterrupt
        click.echo("\nStopping after this batch; Ctrl-C again stops immediately.", err=True)


class _InterruptibleSource(DataSource):
    def __init__(self, source: DataSource, interruption: Interruption, immediately: bool) -> None:
        self._source, self._interruption, self._immediately = source, interruption, immediately

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, indices: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
        interruption = self._interruption
        if interruption.is_requested():
            raise KeyboardInterrupt
        interruption.in_batches = True
        try:
            for each in self._source.batches(indices):
                yield each
                if interruption.is_requested():  # by a signal during the yield
                    if self._immediately:
                        raise KeyboardInterrupt
                    return  # an ordinary end: the caller finalizes what it has, so that it is saved
        finally:
            interruption.in_batches = False
