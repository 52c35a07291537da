"""Several processes that share one store: the number of this one, and its share of the rows.

Processes share nothing but the store. Under `torchrun`, if ``torch.distributed`` is initialized, they also wait for
each other; jobs of an array need not even run at the same time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
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
        count: The number of processes.
        together: Whether they run at the same time and can wait for each other, through ``torch.distributed``.

    >>> [Process(rank, 3).part(10) for rank in range(3)]
    [range(0, 3), range(3, 6), range(6, 10)]
    """

    rank: int = 0
    count: int = 1
    together: bool = False

    def part(self, number: int) -> range:
        """Return this process's share of ``range(number)``: consecutive, and equal up to one."""
        return range(number * self.rank // self.count, number * (self.rank + 1) // self.count)

    def rows(self, num_rows: int, chunk_rows: int) -> range:
        """Return this process's rows: whole chunks, so that no two processes write to one file; maybe none."""
        chunks = self.part(-(-num_rows // chunk_rows))
        return range(min(chunks.start * chunk_rows, num_rows), min(chunks.stop * chunk_rows, num_rows))

    def wait(self) -> None:
        """Wait for the other processes if they run at the same time."""
        if self.together:
            dist.barrier()

    def agreed(self, value: T) -> T:
        """Return the first process's value in all of them; if they do not run together, this process's own."""
        if not self.together:
            return value
        shared = [value]
        dist.broadcast_object_list(shared, src=0)
        return shared[0]

    def all_reduce(self, values: Tensor, operation: str = "SUM") -> Tensor:
        """Return the sum (or ``"MAX"``) of a tensor over processes that run together, in place; alone, as it is."""
        if self.together:
            dist.all_reduce(values, getattr(dist.ReduceOp, operation))
        return values

    def same(self, numbers: Sequence[float], device: torch.device) -> bool:
        """Tell whether numbers are the same in all processes that run together; alone, they are."""
        if not self.together:
            return True
        ends = torch.tensor([[*numbers], [-each for each in numbers]], dtype=torch.float64, device=device)
        return bool((self.all_reduce(ends, "MAX").sum(0) == 0).all())

    def first(self, flag: bool, device: torch.device) -> bool:
        """Return the first process's flag in all processes that run together; alone, this process's own."""
        if not self.together:
            return flag
        return bool(self.all_reduce(torch.tensor(float(flag and self.rank == 0), device=device)))

    def rank_zero_only(self, call: Callable[[], T]) -> T | None:
        """Call a function in the first process while the rest wait and then return None; all raise its error."""
        if not self.together:
            return call()
        result, error = None, None
        if self.rank == 0:
            try:
                result = call()
            except Exception as caught:
                error = caught
        shared = [None if error is None else (type(error).__name__, str(error), isinstance(error, TracerError))]
        dist.broadcast_object_list(shared, src=0)
        if error is not None:
            raise error
        if shared[0] is not None:
            _raise_shared(*shared[0])
        return result


def _raise_shared(name: str, text: str, is_ours: bool) -> NoReturn:
    """Raise the first process's error, as far as it can be built from its name and text."""
    if is_ours:
        raise getattr(errors, name, TracerError)(text)
    raise RuntimeError(f"the first process failed with {name}: {text}")


def this_process(process: ProcessChoice = None, environment: Mapping[str, str] = os.environ) -> Process:
    """Return the number of this process and of all.

    Args:
        process: The number of this process and of all; or ``"slurm"``: from the variables of a SLURM job array
            (``SLURM_ARRAY_TASK_ID``, ``_MIN``, ``_MAX``, ``_STEP``, ``_COUNT``), which has to be said, since the jobs
            of an array may as well be different runs. None: from ``torch.distributed`` if it is initialized, else
            alone.
        environment: The environment variables.

    Returns:
        The process.

    Raises:
        InputTypeError: If ``process`` is not a pair of integers.
        InputError: If the number is not below the count, or this is no job of an array.

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
            "expected a job of an array with process='slurm', but SLURM_ARRAY_TASK_ID is not set. Submit it with "
            "sbatch --array, or pass process=(number, how_many)."
        )
    number, first, last, step = (
        int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
        for name, default in (("ID", ""), ("MIN", "0"), ("MAX", environment["SLURM_ARRAY_TASK_ID"]), ("STEP", "1"))
    )
    count = (last - first) // step + 1
    if int(environment.get("SLURM_ARRAY_TASK_COUNT", count)) != count:
        raise InputError(
            f"expected an array without gaps, got {environment['SLURM_ARRAY_TASK_COUNT']} jobs among the "
            f"numbers {first} to {last}: no process would compute the rows of the missing ones. Submit consecutive "
            f"numbers (after failures the whole array again), or pass process=(number, how_many)."
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
