"""Work in a process of its own: its memory and processor time are nobody else's, and its end is not ours."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

T = TypeVar("T")


class ProcessError(RuntimeError):
    """The process failed or ended without an answer; the message says how."""


def in_own_process(work: Callable[[], T]) -> T:
    """Run work in a fork of this process, which knows everything that this one knows.

    Args:
        work: What to run; what it returns is pickled.

    Returns:
        What it returned.

    Raises:
        ProcessError: It raised, or the process was ended, as by a lack of memory.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(work, sender))
    process.start()
    sender.close()
    try:
        found, error = receiver.recv()
    except EOFError:
        process.join()
        raise ProcessError(f"the process ended with exit code {process.exitcode} and no answer") from None
    process.join()
    if error:
        raise ProcessError(error)
    return found


def _answer(work: Callable[[], T], sender: Connection) -> None:
    """Send what work returns, or what it raised."""
    try:
        answer = work(), ""
    except Exception as error:
        answer = None, f"{type(error).__name__}: {error}"
    sender.send(answer)
