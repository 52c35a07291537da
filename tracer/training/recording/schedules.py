"""Schedules, which turn a training run into rising levels.

A run begins at level 0, and a checkpoint is due when it reaches a new level. To save fewer, every second level is
skipped, then three of four, and so on: the stride between levels doubles.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

from tracer._core.validation import check_choice, check_count
from tracer.errors import InputError, InputTypeError
from tracer.training.recording.record import CheckpointRecord, add_rates


class Schedule(ABC):
    """The progress of a run as a level.

    Attributes:
        name: Its name in recordings.
        needs_loss: Whether it needs the loss of every step.
    """

    name: ClassVar[str]
    needs_loss: ClassVar[bool] = False
    _seen: Mapping[str, float] = MappingProxyType({})  # replaced, never changed

    @abstractmethod
    def level(self, step: int, loss: float | None) -> int:
        """Return the level after a step; it never falls.

        Args:
            step: The number of steps taken, at least 1; never fewer than before.
            loss: The loss of the step, or None.
        """

    def settings(self) -> dict[str, Any]:
        """Return the schedule's name and arguments as JSON values, equal for equal schedules."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]  # schedules are dataclasses

    def state(self) -> dict[str, float]:
        """Return its state, as JSON values."""
        return dict(self._seen)

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue from the return value of `state`."""
        self._seen = dict(state)


@dataclass
class Even(Schedule):
    """A checkpoint every few steps: level ``floor(t / steps)`` after step t.

    Attributes:
        steps: The number of steps between two checkpoints.

    Raises:
        InputTypeError: If ``steps`` is not an int.
        InputError: If it is below 1.

    >>> [Even(3).level(step, None) for step in range(1, 8)]
    [0, 0, 1, 1, 1, 2, 2]
    """

    name: ClassVar[str] = "even"
    steps: int

    def __post_init__(self) -> None:
        self.steps = check_count(self.steps, "every")

    def level(self, step: int, loss: float | None) -> int:
        """Return ``floor(t / steps)``."""
        return step // self.steps


@dataclass
class Geometric(Schedule):
    """Checkpoints at growing distances: ``t_1 = 1``, ``t_{i+1} = max(t_i + 1, ceil(ratio * t_i))``.

    About ``log(T) / log(ratio)`` of T steps are saved, for any length of the run.

    Attributes:
        ratio: The ratio of one step to the previous one, above 1. Default: 2.

    Raises:
        InputError: If the ratio is not above 1.

    >>> schedule = Geometric()
    >>> [step for step in range(1, 40) if schedule.level(step, None) > Geometric().level(step - 1, None)]
    [1, 2, 4, 8, 16, 32]
    """

    name: ClassVar[str] = "geometric"
    ratio: float = 2.0

    def __post_init__(self) -> None:
        if not 1 < self.ratio < math.inf:
            raise InputError(f"ratio is {self.ratio!r}; expected a number above 1, such as 2 or 1.5.")
        self.ratio = float(self.ratio)

    def level(self, step: int, loss: float | None) -> int:
        """Return how many of the steps ``t_i`` were taken."""
        level, due = int(self._seen.get("level", 0)), int(self._seen.get("due", 1))
        if step >= due:
            while step >= due:
                level, due = level + 1, max(due + 1, math.ceil(self.ratio * due))
            self._seen = {"level": level, "due": due}
        return level


@dataclass
class LossDecrease(Schedule):
    """Checkpoints as the smoothed loss falls: level ``floor(log(m_1 / m_t) / -log(1 - fraction))``.

    ``m_t`` is the lowest of the exponential moving averages ``(1 - beta) * sum_i beta^i * L_{t-i} / (1 - beta^t)`` so
    far. Checkpoints are dense while progress is fast, and none are saved once the loss stops falling.

    Attributes:
        fraction: The relative fall of the loss between checkpoints, between 0 and 1. Default: 0.1.
        beta: The weight of the previous average at each step, from 0 to below 1. Default: 0.95.

    Raises:
        InputError: If one of them is out of range.

    >>> schedule = LossDecrease(fraction=0.5, beta=0.0)
    >>> [schedule.level(step, loss) for step, loss in enumerate([8.0, 5.0, 4.0, 9.0, 1.0], start=1)]
    [0, 0, 1, 1, 3]
    """

    name: ClassVar[str] = "loss"
    needs_loss: ClassVar[bool] = True
    fraction: float = 0.1
    beta: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise InputError(f"fraction is {self.fraction!r}; expected a number between 0 and 1, such as 0.1.")
        if not 0 <= self.beta < 1:
            raise InputError(f"beta is {self.beta!r}; expected a number from 0 to below 1, such as 0.95.")
        self.fraction, self.beta = float(self.fraction), float(self.beta)

    def level(self, step: int, loss: float | None) -> int:
        """Return how many times the smoothed loss has fallen by the fraction; NaN and infinite losses are ignored."""
        seen = self._seen
        if loss is not None and math.isfinite(loss):
            if not seen and loss <= 0:
                raise InputError(
                    f"every='loss' came with a first loss of {loss:.6g}, which cannot fall by a fraction of itself; "
                    f"expected a positive loss. Pass every=100 or every='geometric'."
                )
            keep = self.beta ** (step - int(seen.get("step", 0)))  # a loss counts for all steps since the last one
            weight = keep * seen.get("weight", 0.0) + 1.0 - keep
            total = keep * seen.get("total", 0.0) + (1.0 - keep) * loss
            mean = total / weight
            first = seen.get("first", mean)
            lowest = min(seen.get("lowest", mean), mean)
            self._seen = {"step": step, "weight": weight, "total": total, "first": first, "lowest": lowest}
        if not self._seen:
            return 0
        first, lowest = self._seen["first"], max(self._seen["lowest"], 1e-300)
        # A loss of exactly (1 - fraction)^i must reach level i whatever the logarithm's last bit is.
        return min(int(math.log(first / lowest) / -math.log1p(-self.fraction) + 1e-9), 10**9)  # the loss may be near 0


_NAMED: dict[str, type[Schedule]] = {"geometric": Geometric, "loss": LossDecrease}


def make_schedule(every: int | str | Schedule | Mapping[str, Any]) -> Schedule:
    """Return a new schedule from ``every=``, or from a schedule's settings.

    Raises:
        InputTypeError: If it has another type.
        InputError: If it is unknown, or below 1.

    >>> make_schedule("geometric"), make_schedule(100)
    (Geometric(ratio=2.0), Even(steps=100))
    """
    if isinstance(every, Schedule):
        fresh = copy.copy(every)
        fresh.restore({})
        return fresh
    if isinstance(every, Mapping):
        kinds: dict[str, Any] = {"even": Even, **_NAMED}
        return kinds[every["name"]](**{key: value for key, value in every.items() if key != "name"})
    if isinstance(every, str):
        check_choice("every", every, _NAMED, ", or a number of steps")
        return _NAMED[every]()
    if isinstance(every, bool) or not hasattr(every, "__index__"):
        raise InputTypeError(f"every is {every!r}; expected a number of steps, 'geometric', 'loss' or a schedule.")
    return Even(int(every))


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
