"""The content of a recording and its files.

    directory/
      recording.json                  the record, which names complete files only
      step_00000100.safetensors       the model's state dict after 100 steps
      step_00000100.optimizer.pt      the optimizer's second moments, if requested

Files are written before ``recording.json`` names them, and removed after it stopped doing so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tracer._core.files import write_whole
from tracer._core.text import listing
from tracer._core.validation import check_choice, check_integer
from tracer.errors import InputError, StoreError
from tracer.training.adam import optimizer_path

FILE = "recording.json"
FORMAT = "tracer recording"
FORMAT_VERSION = 1
RATES = ("sum", "last")  # the values of ``learning_rate=``


@dataclass(frozen=True)
class CheckpointRecord:
    """One checkpoint of a recorded run, which represents the steps since the previous one.

    Attributes:
        path: The weights after the step, ``.safetensors``.
        model_id: Its number, in the order of saving; never reused.
        step: The number of optimizer steps taken.
        epoch: The epoch last passed to the recorder, or None.
        loss: The loss last passed to the recorder; None if it was NaN or infinite.
        learning_rates: The learning rate of each parameter group at the step.
        learning_rate_sums: The sum of each group's learning rates over the steps since the previous checkpoint, each
            over 1 − momentum: a gradient moves the weights again at the steps that follow.
        second_moments: Whether the optimizer's second moments were saved too.
        level: The schedule's level, by which recordings are thinned.
        schedule: The schedule's state.
    """

    path: Path
    model_id: int
    step: int
    epoch: float | None
    loss: float | None
    learning_rates: tuple[float, ...]
    learning_rate_sums: tuple[float, ...]
    second_moments: bool
    level: int
    schedule: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> list[Path]:
        """The files of the checkpoint."""
        return [self.path, optimizer_path(self.path)] if self.second_moments else [self.path]


@dataclass(frozen=True)
class Recording:
    """A recorded training run, as read by `open_recording`.

    Attributes:
        directory: Its directory.
        checkpoints: The checkpoints in the order of training.
        groups: The names of the model's parameters in each parameter group of the optimizer, without frozen ones.
        untrained: Parameters that require a gradient and are in no group, so the optimizer never moves them.
        every: The schedule's settings.
        stride: The number of schedule levels per checkpoint.
        shapes: The shapes of everything in the model's state dict, by name.
        identity: The recording's unique name.
        next_model_id: The ``model_id`` of the next checkpoint.
        trained: The parameters that the last step trained, by the number of their group.
        owner: The recorder that writes it; another one that resumes it ends the first.
        uneven: Parameters that were trained at some steps and frozen at others, while their group was trained.
    """

    directory: Path
    checkpoints: list[CheckpointRecord]
    groups: list[list[str]]
    untrained: list[str]
    every: dict[str, Any]
    stride: int
    shapes: dict[str, list[int]]
    identity: str
    next_model_id: int = 0
    owner: str = ""
    uneven: list[str] = field(default_factory=list)
    trained: dict[str, list[str]] = field(default_factory=dict)

    def learning_rates(self, learning_rate: str = "sum", group: int | None = None) -> list[float]:
        """Return the learning rate that each checkpoint represents.

        Args:
            learning_rate: ``sum``: over the steps since the previous checkpoint, each over 1 − momentum. ``last``: that
                of the step itself.
            group: The parameter group. Default: all, which must have had equal rates.

        Returns:
            One rate per checkpoint.

        Raises:
            InputError: If ``learning_rate`` or ``group`` is unknown, or groups had different rates.
            InputTypeError: If ``group`` is not an int.
        """
        if self.uneven:
            raise InputError(
                f"{self.directory}: parameters were frozen for a while inside a group that was trained, so that the "
                f"group's rates are not theirs: {listing([repr(name) for name in self.uneven])}. Train again with them "
                f"in groups of their own, and take the groups one by one: load_checkpoints(..., group=0)"
            )
        check_choice("learning_rate", learning_rate, RATES)
        rates = [one.learning_rate_sums if learning_rate == "sum" else one.learning_rates for one in self.checkpoints]
        held = [number for number, names in enumerate(self.groups) if names]
        if group is not None:
            held = [check_integer(group, "group", 0, len(self.groups) - 1)]
        # Groups may be added on the way.
        columns = [[row[number] if number < len(row) else 0.0 for row in rates] for number in held]
        if group is None and (self.untrained or any(column != columns[0] for column in columns)):
            parts = [
                f"group {number} ({listing([repr(name) for name in self.groups[number]])}) from {min(column):.4g} to "
                f"{max(column):.4g}"
                for number, column in zip(held, columns, strict=True)
            ]
            if self.untrained:
                parts.append(f"no group, so never trained: {listing([repr(name) for name in self.untrained])}")
            raise InputError(
                f"{self.directory}: a checkpoint has one learning rate, and parameters were trained with different "
                f"ones: {'; '.join(parts)}. Take one group and its parameters only: load_checkpoints(directory, group="
                f"{held[0]}) with params=open_recording(directory).groups[{held[0]}]; scores of several groups, each "
                f"with a save_dir of its own, add up"
            )
        return columns[0]


def open_recording(directory: str | os.PathLike[str]) -> Recording:
    """Read a recorder's directory.

    Args:
        directory: The directory.

    Returns:
        The recording.

    Raises:
        StoreError: If there is no recording, or it is damaged or of a newer version.
    """
    directory = Path(directory)
    path = directory / FILE
    if not path.exists():
        raise StoreError(
            f"{directory} holds no recording ({FILE} is missing): pass the directory of a CheckpointRecorder that has "
            f"saved a checkpoint (now in {Path.cwd()})"
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = int(document.pop("format_version"))
        if version <= FORMAT_VERSION:
            return _from_document(directory, document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} cannot be read as a recording ({error!r}): it is damaged, or of something else; restore it, or "
            f"pass the paths of the checkpoints with their learning rates yourself"
        ) from error
    raise StoreError(f"{path} has format version {version}, this package knows up to {FORMAT_VERSION}: upgrade it")


def _from_document(directory: Path, document: dict[str, Any]) -> Recording:
    kind = document.pop("format")
    if kind != FORMAT:
        raise ValueError(f"its format is {kind!r}")
    checkpoints = []
    for entry in document.pop("checkpoints"):
        name = entry.pop("file")
        if Path(name).name != name:
            raise ValueError(f"a checkpoint's file is {name!r}, which is not in the directory")
        entry.update({key: tuple(map(float, entry[key])) for key in ("learning_rates", "learning_rate_sums")})
        checkpoints.append(CheckpointRecord(path=directory / name, **entry))
    return Recording(directory=directory, checkpoints=checkpoints, **document)


def check_owner(recording: Recording) -> None:
    """Raise StoreError if another recorder has begun or resumed the recording."""
    there = open_recording(recording.directory)
    if (there.identity, there.owner) != (recording.identity, recording.owner):
        raise StoreError(
            f"{recording.directory} is being recorded by another recorder, which began or resumed it after this one: "
            f"give each recorder a directory of its own"
        )


def write_recording(recording: Recording, replace: bool = True) -> None:
    """Write a recording whole or not at all; with ``replace=False`` an existing one is left unchanged."""
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(recording)}
    del document["directory"]
    for entry in document["checkpoints"]:
        entry["file"] = entry.pop("path").name
    text = json.dumps(document, indent=1, allow_nan=False).encode()
    write_whole(recording.directory / FILE, lambda file: file.write(text), replace=replace)


def load_checkpoints(
    directory: str | os.PathLike[str], learning_rate: str = "sum", group: int | None = None
) -> list[tuple[Path, float]]:
    """Return the checkpoints of a recorded run in the form that `attribute` accepts.

    A checkpoint represents the steps since the previous one (Pruthi et al. 2020, section 3.3); its weights are those
    after the last of them.

    Args:
        directory: The directory of a `CheckpointRecorder`.
        learning_rate: ``sum``: the sum over these steps, each over 1 − momentum, which is right for uneven checkpoints
            too. For SGD on the mean loss of a batch, scores divided by the number of training examples then estimate
            how much an example lowered a target's loss. ``last``: the rate of the step itself, as in the paper with a
            checkpoint per epoch.
        group: The parameter group whose rates to use; pass its parameters' names as ``params=`` to `attribute`.
            Default: all groups, which must have had equal rates.

    Returns:
        Paths and learning rates, in the order of training.

    Raises:
        StoreError: If there is no recording, it is damaged, or one of its files is missing.
        InputError: If an argument is unknown, or parameter groups had different rates.

    >>> import tempfile, torch
    >>> from tracer import CheckpointRecorder
    >>> model = torch.nn.Linear(1, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with CheckpointRecorder(model, optimizer, folder, every=2) as recorder:
    ...         for _ in range(5):
    ...             optimizer.step()
    ...             recorder.step()
    ...     [(path.name, rate) for path, rate in load_checkpoints(folder)]
    [('step_00000002.safetensors', 0.5), ('step_00000004.safetensors', 0.5), ('step_00000005.safetensors', 0.25)]
    """
    recording = open_recording(directory)
    if not recording.checkpoints:
        raise StoreError(f"{recording.directory} holds a recording without checkpoints; train and record again")
    missing = [str(one.path.name) for one in recording.checkpoints if not one.path.exists()]
    if missing:
        raise StoreError(
            f"{recording.directory} lacks files that its recording names: {listing(missing)}; put them back, or pass "
            f"the paths and learning rates of the others yourself"
        )
    rates = recording.learning_rates(learning_rate, group)
    return [(one.path, rate) for one, rate in zip(recording.checkpoints, rates, strict=True)]


def add_rates(left: Sequence[float], right: Sequence[float]) -> tuple[float, ...]:
    """Return the sums of two sequences of rates by group, either of which may have fewer groups."""
    return tuple(one + other for one, other in zip_longest(left, right, fillvalue=0.0))


def total_rates(checkpoints: Sequence[CheckpointRecord]) -> tuple[float, ...]:
    """Return the sum over checkpoints of each group's learning rates."""
    return tuple(map(math.fsum, zip_longest(*(one.learning_rate_sums for one in checkpoints), fillvalue=0.0)))
