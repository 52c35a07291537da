"""What a recorded training run holds, and how it lies in a directory.

    directory/
      recording.json                  what was recorded; it names whole files only
      step_00000100.safetensors       the model's state dict after 100 steps
      step_00000100.optimizer.pt      the optimizer's second moments, where they were asked for

Files are written before ``recording.json`` names them and removed after it stopped doing so.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tracer._core.files import write_whole
from tracer._core.text import listing
from tracer.errors import InputError, InputTypeError, StoreError, nearest_name
from tracer.training.adam import optimizer_path

FILE = "recording.json"
FORMAT = "tracer recording"
FORMAT_VERSION = 1
RATES = ("sum", "last")
"""What ``learning_rate=`` takes."""


@dataclass(frozen=True)
class CheckpointRecord:
    """One checkpoint of a recorded run, which stands for the steps since the one before.

    Attributes:
        path: Of the weights after the step, ``.safetensors``.
        model_id: Its number, in the order in which checkpoints were saved; never used for another one.
        step: How many optimizer steps had been taken.
        epoch: As it was last given to the recorder, or None.
        loss: Likewise; None where it was NaN or infinite.
        learning_rates: The learning rate of each parameter group at the step.
        learning_rate_sums: The sum of each group's learning rates over the steps since the checkpoint before.
        second_moments: Whether the optimizer's second moments lie beside the weights.
        level: Of the schedule, by which recordings are thinned.
        schedule: What the schedule had seen by then.
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
    """A recorded training run, as `open_recording` reads it.

    Attributes:
        directory: Where it lies.
        checkpoints: In the order of training.
        groups: The names of the model's parameters in each parameter group of the optimizer; frozen ones are left out.
        untrained: Parameters that require a gradient and are in no group: the optimizer never moves them.
        every: The schedule's settings.
        stride: Every how many levels of the schedule a checkpoint is kept.
        shapes: Of everything in the model's state dict, by name.
        identity: Tells this recording from others.
        next_model_id: What the next checkpoint gets.
        trained: The parameters of each group, by its number, that the last step trained.
        owner: Tells which recorder writes on it; another one that takes it over ends the first.
        uneven: Parameters that were trained at some steps and frozen at others at which their group was trained.
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
        """Return the learning rate that each checkpoint stands for.

        Args:
            learning_rate: ``sum``: over the steps since the checkpoint before. ``last``: that of the step itself.
            group: Of which parameter group; None: of all, which must have had the same.

        Returns:
            One for each checkpoint.

        Raises:
            InputError: ``learning_rate`` or ``group`` is not known, or groups had different rates.
            InputTypeError: ``group`` is no int.
        """
        if self.uneven:
            raise InputError(
                f"{self.directory}: parameters were frozen for a while inside a group that was trained, so that the "
                f"group's rates are not theirs: {listing([repr(name) for name in self.uneven])}. Train again with them "
                f"in groups of their own, and take the groups one by one: load_checkpoints(..., group=0)"
            )
        if learning_rate not in RATES:
            raise InputError(f"learning_rate={learning_rate!r} is not known; {nearest_name(learning_rate, RATES)}.")
        rates = [one.learning_rate_sums if learning_rate == "sum" else one.learning_rates for one in self.checkpoints]
        table = [[*row, *[0.0] * (len(self.groups) - len(row))] for row in rates]  # groups may be added on the way
        if group is not None:
            return [row[self._check_group(group)] for row in table]
        held = [number for number, names in enumerate(self.groups) if names]
        columns = [[row[number] for row in table] for number in held]
        if self.untrained or any(column != columns[0] for column in columns):
            raise InputError(self._refusal(held, columns))
        return columns[0]

    def _check_group(self, group: int) -> int:
        if isinstance(group, bool) or not isinstance(group, int):
            raise InputTypeError(f"group is {group!r}; expected the number of a parameter group, from 0.")
        if not 0 <= group < len(self.groups):
            raise InputError(f"group is {group}; the optimizer had {len(self.groups)} parameter groups, from 0.")
        return group

    def _refusal(self, held: Sequence[int], columns: Sequence[Sequence[float]]) -> str:
        """Say which parameters had which rates, and what to do."""
        parts = [
            f"group {number} ({listing([repr(name) for name in self.groups[number]])}) from {min(column):.4g} to "
            f"{max(column):.4g}"
            for number, column in zip(held, columns, strict=True)
        ]
        if self.untrained:
            parts.append(f"no group, so never trained: {listing([repr(name) for name in self.untrained])}")
        return (
            f"{self.directory}: a checkpoint has one learning rate, and parameters were trained with different ones: "
            f"{'; '.join(parts)}. Take one group and its parameters only: load_checkpoints(directory, group="
            f"{held[0]}) with params=open_recording(directory).groups[{held[0]}]; scores of several groups, each with "
            f"a save_dir of its own, add up"
        )


def open_recording(directory: str | os.PathLike[str]) -> Recording:
    """Read what a recorder wrote.

    Args:
        directory: The recorder's.

    Returns:
        The recording.

    Raises:
        StoreError: There is none, or it is damaged or of a newer version.
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
        version = int(document["format_version"])
        if version <= FORMAT_VERSION:
            return _from_document(directory, document)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"{path} cannot be read as a recording ({error!r}): it is damaged, or of something else; restore it, or "
            f"pass the paths of the checkpoints with their learning rates yourself"
        ) from error
    raise StoreError(f"{path} has format version {version}, this package knows up to {FORMAT_VERSION}: upgrade it")


def _from_document(directory: Path, document: dict[str, Any]) -> Recording:
    if document["format"] != FORMAT:
        raise ValueError(f"its format is {document['format']!r}")
    entries = [dict(entry) for entry in document.pop("checkpoints")]
    for entry in entries:
        name = entry.pop("file")
        if Path(name).name != name:
            raise ValueError(f"a checkpoint's file is {name!r}, which is not in the directory")
        entry["path"] = directory / name
        entry.update({key: tuple(map(float, entry[key])) for key in ("learning_rates", "learning_rate_sums")})
    rest = {key: value for key, value in document.items() if key not in ("format", "format_version")}
    return Recording(directory=directory, checkpoints=[CheckpointRecord(**entry) for entry in entries], **rest)


def check_owner(recording: Recording) -> None:
    """Refuse to write on a recording that another recorder has begun or taken over.

    Args:
        recording: As its recorder knows it.

    Raises:
        StoreError: The one in its directory is another's.
    """
    there = open_recording(recording.directory)
    if (there.identity, there.owner) != (recording.identity, recording.owner):
        raise StoreError(
            f"{recording.directory} is being recorded by another recorder, which began or resumed it after this one: "
            f"give each recorder a directory of its own"
        )


def write_recording(recording: Recording, replace: bool = True) -> None:
    """Write what was recorded, whole or not at all.

    Args:
        recording: The recording; its directory exists.
        replace: Whether one that is there is replaced; otherwise it stays.
    """
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(recording)}
    directory = document.pop("directory")
    document["checkpoints"] = []
    for one in recording.checkpoints:
        entry = asdict(one)
        entry["file"] = str(entry.pop("path").relative_to(directory))
        document["checkpoints"].append(entry)
    text = json.dumps(document, indent=1, allow_nan=False).encode()
    write_whole(recording.directory / FILE, lambda file: file.write(text), replace=replace)


def thin(
    checkpoints: Sequence[CheckpointRecord], stride: int, max_checkpoints: int | None, keep_last: bool
) -> tuple[list[CheckpointRecord], int, tuple[float, ...]]:
    """Leave out checkpoints until no more than a number remain, evenly in the schedule's levels.

    The stride doubles until there are few enough: a checkpoint remains where it is the first at its
    ``floor(level / stride)``, from 1 on. What stays stands for the steps of those that were left out before it.

    Args:
        checkpoints: In the order of training.
        stride: So far.
        max_checkpoints: How many may remain; None: all.
        keep_last: Whether the last one remains in any case.

    Returns:
        Those that remain; the new stride; and the sums of learning rates, by group, of those that were left out after
        the last that remains.
    """
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
    """Return the sums of two sequences of rates by group, of which one may have fewer groups.

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


def load_checkpoints(
    directory: str | os.PathLike[str], learning_rate: str = "sum", group: int | None = None
) -> list[tuple[Path, float]]:
    """Return the checkpoints of a recorded run as `attribute` takes them.

    A checkpoint stands for the steps since the one before (Pruthi et al. 2020, section 3.3): its weights are those
    after the last of them.

    Args:
        directory: Of a `CheckpointRecorder`.
        learning_rate: ``sum``: the sum over those steps, which weighs each checkpoint by what was done, also where they
            are not even. Scores divided by the number of train rows then estimate, for plain SGD on the mean loss of a
            batch, by how much a row lowered a target's loss. ``last``: the rate of the step itself, as in the paper,
            where checkpoints are an epoch apart.
        group: The parameter group whose rates count; pass its parameters' names as ``params=`` to `attribute`. None:
            all groups, which must have had the same rates.

    Returns:
        Paths and learning rates, in the order of training.

    Raises:
        StoreError: There is no recording, it is damaged, or a file of it is missing.
        InputError: An argument is not known, or parameter groups had different rates.

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
    return list(zip([one.path for one in recording.checkpoints], rates, strict=True))
