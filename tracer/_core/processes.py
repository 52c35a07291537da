"""Several processes that share one store: which of them this one is, and which rows are its part.

Processes share nothing but the store. Under `torchrun`, where ``torch.distributed`` is initialised, they also wait for
each other; jobs of an array do not even run at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch.distributed as dist
from torch import Tensor

from tracer import errors
from tracer.errors import InputError, InputTypeError, TracerError

T = TypeVar("T")

ProcessChoice = tuple[int, int] | str | None
"""What ``process=`` takes."""


@dataclass(frozen=True)
class Process:
    """One of the processes that share the work.

    Attributes:
        rank: Its number, from 0.
        count: How many there are.
        together: Whether they run at the same time and can wait for each other, through ``torch.distributed``.

    >>> [Process(rank, 3).part(10) for rank in range(3)]
    [range(0, 3), range(3, 6), range(6, 10)]
    """

    rank: int = 0
    count: int = 1
    together: bool = False

    def part(self, number: int) -> range:
        """Return which of a number of things are this process's: an equal share of consecutive ones."""
        return range(number * self.rank // self.count, number * (self.rank + 1) // self.count)

    def rows(self, num_rows: int, chunk_rows: int) -> range:
        """Return this process's rows: whole chunks, so that no two processes write to one file.

        Args:
            num_rows: N.
            chunk_rows: The rows of a chunk.

        Returns:
            Consecutive rows; none if there are fewer chunks than processes before this one.
        """
        chunks = self.part(-(-num_rows // chunk_rows))
        return range(min(chunks.start * chunk_rows, num_rows), min(chunks.stop * chunk_rows, num_rows))

    def wait(self) -> None:
        """Wait for the other processes where they run at the same time."""
        if self.together:
            dist.barrier()

    def agreed(self, value: T) -> T:
        """Return the first process's value in all of them; alone, and in a job of an array, the own one."""
        if not self.together:
            return value
        told = [value]
        dist.broadcast_object_list(told, src=0)
        return told[0]

    def all_reduce(self, values: Tensor) -> Tensor:
        """Return the sum over processes of a tensor that each has of its own, in place; alone the tensor itself."""
        if self.together:
            dist.all_reduce(values)
        return values

    def first_only(self, call: Callable[[], T]) -> T | None:
        """Let the first process do something while the others wait; an error there is raised by all.

        Args:
            call: What to do.

        Returns:
            What it returned, in the process that called it; None in the others.

        Raises:
            TracerError: It failed in the first process.
        """
        if not self.together:
            return call()
        result, error = None, None
        if self.rank == 0:
            try:
                result = call()
            except Exception as caught:
                error = caught
        told = [None if error is None else (type(error).__name__, str(error), isinstance(error, TracerError))]
        dist.broadcast_object_list(told, src=0)
        if error is not None:
            raise error
        if told[0] is not None:
            _raise_again(*told[0])
        return result


def _raise_again(name: str, text: str, is_ours: bool) -> NoReturn:
    """Raise what the first process raised, as far as it can be made again."""
    if is_ours:
        raise getattr(errors, name, TracerError)(text)
    raise RuntimeError(f"the first process failed with {name}: {text}")


def this_process(process: ProcessChoice = None, environment: Mapping[str, str] = os.environ) -> Process:
    """Return which of several processes this one is.

    Args:
        process: Its number and how many there are; or ``"slurm"``: as the variables of a SLURM job array say
            (``SLURM_ARRAY_TASK_ID``, ``_MIN``, ``_MAX``, ``_STEP``, ``_COUNT``), which is not assumed, since the jobs
            of an array may as well be different runs. None: as ``torch.distributed`` says where it is initialised, else
            alone.
        environment: Where the variables are.

    Returns:
        The process.

    Raises:
        InputTypeError: ``process`` is not a pair of integers.
        InputError: The number is not below the count, or this is no job of an array.

    >>> this_process("slurm", {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_MAX": "8"})
    Process(rank=2, count=4, together=False)
    """
    if isinstance(process, str):
        return _of_array(process, environment)
    if process is not None:
        return _explicit(process)
    if dist.is_available() and dist.is_initialized():
        return Process(dist.get_rank(), dist.get_world_size(), together=dist.get_world_size() > 1)
    return Process()


def _of_array(process: str, environment: Mapping[str, str]) -> Process:
    if process != "slurm":
        raise InputError(f"process={process!r} is not known; expected (number, how many), 'slurm' or None.")
    if "SLURM_ARRAY_TASK_ID" not in environment:
        raise InputError(
            "process='slurm' came and SLURM_ARRAY_TASK_ID is not set: this is no job of an array. Submit it with "
            "sbatch --array, or pass process=(number, how_many)."
        )
    number, first, last, step = (
        int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", ""), ("MIN", "0"), ("MAX", environment["SLURM_ARRAY_TASK_ID"]), ("STEP", "1"))
    )
    count = (last - first) // step + 1
    if int(environment.get("SLURM_ARRAY_TASK_COUNT", count)) != count:
        raise InputError(
            f"process='slurm' came in an array of {environment['SLURM_ARRAY_TASK_COUNT']} jobs with gaps among the "
            f"numbers {first} to {last}: parts of rows would be nobody's. Submit consecutive numbers (after failures "
            f"the whole array again), or pass process=(number, how_many)."
        )
    return _explicit(((number - first) // step, count))


def _explicit(process: tuple[int, int]) -> Process:
    pair = tuple(process) if isinstance(process, (tuple, list)) else ()
    if len(pair) != 2 or not all(isinstance(value, int) and not isinstance(value, bool) for value in pair):
        raise InputTypeError(f"process is {process!r}: expected (number, how many), such as (0, 4), or 'slurm'.")
    rank, count = pair
    if not 0 <= rank < count:
        raise InputError(f"process is {process!r}: expected a number from 0 to {count - 1} (of {count} processes).")
    return Process(rank, count)
