"""Find checkpoints by a path: a file, a directory of weights, a folder of checkpoints, a recording or a glob."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from tracer._core.text import listing
from tracer.errors import InputError
from tracer.training.adam import optimizer_path
from tracer.training.checkpoints import weights_files
from tracer.training.recording.record import FILE, load_checkpoints

WeightedPaths = list[tuple[Path, float | None]]  # paths, each with its learning rate or, if that is unknown, None

_SUFFIXES = {".safetensors", ".pt", ".pth", ".bin", ".ckpt"}


def checkpoints_at(pattern: str | os.PathLike[str]) -> WeightedPaths:
    """Return the checkpoints of a path or glob, sorted by the numbers in their names; raise InputError if none is."""
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


def natural_key(path: Path) -> list[tuple[int, int | str]]:
    """Return a sort key that compares the numbers in names as numbers.

    >>> sorted(map(Path, ["epoch_10.pt", "epoch_2.pt", "best.pt"]), key=natural_key)[1].name
    'epoch_2.pt'
    """
    parts = re.split(r"(\d+)", str(path))
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]
