"""Batches that begin and end in different calls of a trainer."""

from __future__ import annotations

from contextlib import AbstractContextManager


class _Skipped(Exception):
    """A batch without a backward."""


class BatchScope:
    """At most one block of `GradientCollector.batch`, which one call enters and another one leaves."""

    def __init__(self) -> None:
        self._block: AbstractContextManager[None] | None = None

    def begin(self, block: AbstractContextManager[None]) -> None:
        """Enter a block; one that is still open had no backward, and is forgotten."""
        if self._block is not None:
            open_block, self._block = self._block, None
            try:
                open_block.__exit__(_Skipped, _Skipped(), None)
            except _Skipped:
                pass
        block.__enter__()
        self._block = block

    def end(self) -> None:
        """Leave the block, if there is one."""
        if self._block is not None:
            block, self._block = self._block, None
            block.__exit__(None, None, None)
