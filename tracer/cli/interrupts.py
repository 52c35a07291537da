"""Ctrl-C during a run: the batch at hand is finished, what was computed is made durable, and then the run stops."""

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
    """A context in which the first Ctrl-C asks rows to end, and a second one interrupts at once.

    >>> with Interruption() as interruption:
    ...     interruption.asked()
    False
    """

    def __init__(self) -> None:
        self._asked = False
        self._feeding = False
        self._before: Any = None

    def asked(self) -> bool:
        """Tell whether Ctrl-C was pressed."""
        return self._asked

    def rows(self, source: DataSource, *, at_once: bool) -> DataSource:
        """Return rows that end where Ctrl-C was pressed.

        Args:
            source: The rows.
            at_once: Raise ``KeyboardInterrupt`` there; else the rows just end, so that whoever reads them closes its
                work on them, and it is raised when rows are next asked for.

        Returns:
            The same rows.
        """
        return _Interruptible(source, self, at_once)

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked or not self._feeding:
            self._asked = True
            raise KeyboardInterrupt
        self._asked = True
        click.echo("\nStopping after this batch; Ctrl-C again stops at once.", err=True)


class _Interruptible(DataSource):
    """Rows of another source, which end at an interruption."""

    def __init__(self, source: DataSource, interruption: Interruption, at_once: bool) -> None:
        self._source, self._interruption, self._at_once = source, interruption, at_once

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, rows: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield the batches of the source up to an interruption."""
        interruption = self._interruption
        if interruption.asked():
            raise KeyboardInterrupt
        interruption._feeding = True
        try:
            for each in self._source.batches(rows):
                yield each
                if interruption.asked():
                    if self._at_once:
                        raise KeyboardInterrupt
                    return
        finally:
            interruption._feeding = False
