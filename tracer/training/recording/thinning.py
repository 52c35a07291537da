"""Thin a recording to a number of checkpoints without losing a learning rate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest

from tracer.training.recording.record import CheckpointRecord


def thin(
    checkpoints: Sequence[CheckpointRecord], stride: int, max_checkpoints: int | None, keep_last: bool
) -> tuple[list[CheckpointRecord], int, tuple[float, ...]]:
    """Leave out checkpoints, evenly in levels; return the rest, the new stride and the rates after the last of them."""
    kept: list[CheckpointRecord] = list(checkpoints)
    left_out: tuple[float, ...] = ()
    while max_checkpoints is not None and len(kept) > max_checkpoints:
        stride *= 2
        kept, left_out, before = [], (), 0
        for one in checkpoints:
            left_out = add_rates(left_out, one.learning_rate_sums)
            # The first at each floor(level / stride), counted from 1, remains. It stands for the steps of those left
            # out before it, so sums over checkpoints stay the same.
            if one.level // stride > before or (keep_last and one is checkpoints[-1]):
                kept.append(replace(one, learning_rate_sums=left_out))
                before, left_out = one.level // stride, ()
    return kept, stride, left_out


def add_rates(left: Sequence[float], right: Sequence[float]) -> tuple[float, ...]:
    """Return the sums of two sequences of rates by group, either of which may have fewer groups."""
    return tuple(one + other for one, other in zip_longest(left, right, fillvalue=0.0))


def total_rates(checkpoints: Sequence[CheckpointRecord]) -> tuple[float, ...]:
    """Return the sum over checkpoints of each group's learning rates."""
    groups = zip_longest(*(one.learning_rate_sums for one in checkpoints), fillvalue=0.0)
    return tuple(math.fsum(rates) for rates in groups)
