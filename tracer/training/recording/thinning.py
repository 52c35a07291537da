"""Thin a recording to a number of checkpoints without losing a learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tracer.training.recording.record import CheckpointRecord


def thin(
    checkpoints: Sequence[CheckpointRecord], stride: int, max_checkpoints: int | None, keep_last: bool
) -> tuple[list[CheckpointRecord], int, tuple[float, ...]]:
    """Leave out checkpoints, evenly in the schedule's levels, until at most ``max_checkpoints`` remain.

    The stride doubles until there are few enough. A checkpoint remains if it is the first at its ``floor(level /
    stride)``, counted from 1; the last one also remains if ``keep_last``.

    Args:
        checkpoints: The checkpoints in the order of training.
        stride: The stride so far.
        max_checkpoints: The largest number; None: no limit.
        keep_last: Whether the last one remains in any case.

    Returns:
        The remaining checkpoints; the new stride; and the sums of learning rates, by group, of those left out after the
        last that remains.
    """
    # A remaining checkpoint stands for the steps of those left out before it, so sums over checkpoints stay the same.
    kept, left_out = list(checkpoints), add_rates((), ())
    while max_checkpoints is not None and len(kept) > max_checkpoints:
        stride *= 2
        kept, left_out = _at_stride(checkpoints, stride, keep_last)
    return kept, stride, left_out


def _at_stride(
    checkpoints: Sequence[CheckpointRecord], stride: int, keep_last: bool
) -> tuple[list[CheckpointRecord], tuple[float, ...]]:
    kept: list[CheckpointRecord] = []
    left_out: tuple[float, ...] = ()
    before = 0
    for one in checkpoints:
        sums = add_rates(left_out, one.learning_rate_sums)
        if one.level // stride > before or (keep_last and one is checkpoints[-1]):
            kept.append(replace(one, learning_rate_sums=sums))
            before, left_out = one.level // stride, ()
        else:
            left_out = sums
    return kept, left_out


def add_rates(left: Sequence[float], right: Sequence[float]) -> tuple[float, ...]:
    """Return the sums of two sequences of rates by group, either of which may have fewer groups.

    >>> add_rates((1.0,), (2.0, 3.0))
    (3.0, 3.0)
    """
    size = max(len(left), len(right))
    padded = ([*rates, *[0.0] * (size - len(rates))] for rates in (left, right))
    return tuple(one + other for one, other in zip(*padded, strict=True))


def total_rates(checkpoints: Sequence[CheckpointRecord]) -> tuple[float, ...]:
    """Return the sum over checkpoints of each group's learning rates."""
    size = max((len(one.learning_rate_sums) for one in checkpoints), default=0)
    columns = zip(*(add_rates(one.learning_rate_sums, [0.0] * size) for one in checkpoints), strict=True)
    return tuple(math.fsum(column) for column in columns)
