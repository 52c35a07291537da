"""Find checkpoints by a path: a file, a directory of weights, a folder of checkpoints, a recording or a glob."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from tracer._core.text import listing
from tracer._core.validation import complete_rates
from tracer.errors import InputError
from tracer.training.adam import optimizer_path
from tracer.training.checkpoints import weights_files
from tracer.training.recording.record import FILE, load_checkpoints
from tracer.training.trainer_state import trainer_rates

WeightedPaths = list[tuple[Path, float | None]]  # paths, each with its learning rate or, if that is unknown, None

_SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}


def checkpoints_at(pattern: str | os.PathLike[str]) -> WeightedPaths:
    """Return the checkpoints of a path or glob, sorted by the numbers in their names; raise InputError if none is."""
    return with_rates(find_paths(pattern))


def with_rates(found: WeightedPaths) -> WeightedPaths:
    """Return checkpoints with the rates that their trainer logged, if none is known otherwise."""
    if any(rate is not None for _, rate in found):
        return found
    paths = [path for path, _ in found]
    return list(zip(paths, trainer_rates(paths), strict=True))


def find_paths(pattern: str | os.PathLike[str]) -> WeightedPaths:
    """Return the checkpoints of a path or glob with recorded rates only; see `checkpoints_at`."""
    path = Path(pattern)
    if path.is_file():
        return [(path, None)]
    if path.is_dir():
        return _in_directory(path)
    found = sorted((Path(name) for name in glob.glob(os.fspath(pattern), recursive=True)), key=natural_key)
    found = [each for each in found if each.is_file() or weights_files(each)]
    if not found:
        raise InputError(
            f"checkpoints={os.fspath(pattern)!r} finds no file in {Path.cwd()}; expected a file, a glob such as "
            f"'checkpoints/*.pt', or a directory of checkpoints."
        )
    return [(each, None) for each in found]


def _in_directory(path: Path) -> WeightedPaths:
    if (path / FILE).exists():
        return list(load_checkpoints(path))
    entries = sorted(path.iterdir(), key=natural_key)
    directories = [each for each in entries if weights_files(each)]
    own = weights_files(path)
    if own and directories:
        names = listing([repr(each.name) for each in directories])
        raise InputError(
            f"checkpoints={str(path)!r} has weights of its own, {own[0].name!r}, and checkpoints in it, {names}; pass "
            f"the path of that file, or a glob such as '{directories[0].parent}/{directories[0].name.split('-')[0]}*'."
        )
    if own:
        return [(path, None)]
    files = [each for each in entries if each.is_file() and each.suffix in _SUFFIXES]
    optimizers = {optimizer_path(each) for each in files if each.suffix == ".safetensors"}
    found = sorted([*directories, *(each for each in files if each not in optimizers)], key=natural_key)
    if not found:
        raise InputError(
            f"checkpoints={str(path)!r} is a directory without checkpoints: expected a recording ({FILE}), weights as "
            f"Hugging Face names them, or files and directories of such; pass a glob, such as '{path}/*.pt'."
        )
    return [(each, None) for each in found]


def find_checkpoints(
    patterns: Sequence[str | os.PathLike[str]], learning_rate: float | Sequence[float] | None
) -> tuple[WeightedPaths, tuple[str, ...]]:
    """Find checkpoints and their learning rates: the given ones, else recorded ones; with a note if these differ."""
    found = with_rates([each for pattern in patterns for each in find_paths(pattern)])
    seen: set[Path] = set()
    for path, _ in found:
        if path.resolve() in seen:
            raise InputError(f"checkpoints names {path} more than once; name each checkpoint once.")
        seen.add(path.resolve())
    if learning_rate is None:
        paths, known = [path.name for path, _ in found], [rate for _, rate in found]
        complete_rates(paths, known, "Give learning_rate, one for all or one for each in the order of the checkpoints.")
        return found, ()
    rates = [learning_rate] * len(found) if isinstance(learning_rate, (int, float)) else list(learning_rate)
    if len(rates) != len(found):
        names = ", ".join(path.name for path, _ in found)
        raise InputError(f"learning_rate has {len(rates)} values for {len(found)} checkpoints: {names}.")
    used: WeightedPaths = [(path, float(rate)) for (path, _), rate in zip(found, rates, strict=True)]
    pairs = [(before, rate) for (_, before), rate in zip(found, rates, strict=True)]
    replaced = [(before, rate) for before, rate in pairs if before is not None and before != rate]
    if not replaced:
        return used, ()
    recorded, given = (", ".join(f"{rate:.4g}" for rate in each) for each in zip(*replaced, strict=True))
    return used, (
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
