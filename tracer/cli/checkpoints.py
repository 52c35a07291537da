"""Checkpoints of a run: their files in order, and their learning rates."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from tracer._core.validation import complete_rates
from tracer.errors import InputError
from tracer.training.recording import FILE, load_checkpoints

WeightedPaths = list[tuple[Path, float | None]]  # paths, each with its learning rate or, if that is unknown, None


def find_checkpoints(patterns: Sequence[str], learning_rate: float | Sequence[float] | None) -> WeightedPaths:
    """Find checkpoint files and their learning rates: the given ones, else those that a recorder wrote."""
    found = _all_matches(patterns)
    seen: set[Path] = set()
    for path, _ in found:
        if path.resolve() in seen:
            raise InputError(f"checkpoints names {path} more than once; name each checkpoint once.")
        seen.add(path.resolve())
    if learning_rate is None:
        paths, known = [path.name for path, _ in found], [rate for _, rate in found]
        complete_rates(paths, known, "Give learning_rate, one for all or one for each in the order of the checkpoints.")
        return found
    rates = [learning_rate] * len(found) if isinstance(learning_rate, (int, float)) else list(learning_rate)
    if len(rates) != len(found):
        names = ", ".join(path.name for path, _ in found)
        raise InputError(f"learning_rate has {len(rates)} values for {len(found)} checkpoints: {names}.")
    return [(path, float(rate)) for (path, _), rate in zip(found, rates, strict=True)]


def replaced_rates(patterns: Sequence[str], used: WeightedPaths) -> tuple[str, ...]:
    """Return a note if given learning rates replace recorded ones."""
    pairs = [(before, rate) for (_, before), (_, rate) in zip(_all_matches(patterns), used, strict=True)]
    replaced = [(before, rate) for before, rate in pairs if before is not None and before != rate]
    if not replaced:
        return ()
    recorded, given = (", ".join(f"{rate:.4g}" for rate in rates) for rates in zip(*replaced, strict=True))
    return (
        f"The given learning_rate replaces recorded rates of {len(replaced)} checkpoints ({recorded}) by ({given}); "
        f"leave learning_rate out to use the recorded rates.",
    )


def natural_key(path: Path) -> list[tuple[int, int | str]]:
    """Return a sort key that compares the numbers in names as numbers.

    >>> sorted(map(Path, ["epoch_10.pt", "epoch_2.pt", "best.pt"]), key=natural_key)[1].name
    'epoch_2.pt'
    """
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _all_matches(patterns: Sequence[str]) -> WeightedPaths:
    return [found for pattern in patterns for found in _matches(pattern)]


def _matches(pattern: str) -> WeightedPaths:
    path = Path(pattern)
    if path.is_dir():
        if not (path / FILE).exists():
            raise InputError(
                f"checkpoints={pattern!r} is a directory that CheckpointRecorder did not write (there is no {FILE} in "
                f"it); for other files pass a glob, such as '{path}/*.pt'."
            )
        return list(load_checkpoints(path))
    if path.is_file():
        return [(path, None)]
    files = sorted((Path(name) for name in glob.glob(pattern, recursive=True)), key=natural_key)
    files = [file for file in files if file.is_file()]
    if not files:
        raise InputError(
            f"checkpoints={pattern!r} finds no file in {Path.cwd()}; expected a file, a glob such as "
            f"'checkpoints/*.pt', or a directory that CheckpointRecorder wrote."
        )
    return [(file, None) for file in files]
