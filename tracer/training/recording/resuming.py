"""Begin a recording, or continue one after its last checkpoint or from a point that the training returned to."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracer._core.files import sweep
from tracer._core.text import listing
from tracer.errors import CheckpointError, InputError, InputTypeError, MismatchError, StoreError
from tracer.training.load_state import load_state
from tracer.training.recording.record import (
    FILE,
    CheckpointRecord,
    Recording,
    check_owner,
    open_recording,
    total_rates,
    write_recording,
)
from tracer.training.recording.snapshots import model_state, parameter_groups, shapes_of

logger = logging.getLogger("tracer")

OWN_FILE = re.compile(r"step_\d{8,}\.(safetensors|optimizer\.pt)")  # all other files are the user's
State = Mapping[str, Any]  # from CheckpointRecorder.state_dict
_KEYS = ("recording", "step", "learning_rates", "learning_rate_totals", "schedule", "epoch", "loss")
_START = CheckpointRecord(Path(), -1, 0, None, None, (), (), second_moments=False, level=0)


def begin_recording(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer, every: dict[str, Any], resume: bool | State
) -> tuple[Recording, State]:
    """Return the recording that a recorder writes, without checkpoints of later steps than its state, and the state."""
    if not isinstance(resume, (bool, Mapping)):
        raise InputTypeError(f"resume is {resume!r}; expected True, False, or what recorder.state_dict() returned.")
    given = resume if isinstance(resume, Mapping) and resume else None
    lacking = [repr(key) for key in _KEYS if given is not None and key not in given]
    if lacking:
        raise InputError(
            f"resume= came with a state without {listing(lacking)}; pass all that recorder.state_dict() returned."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(f"{directory} cannot be made ({error}): choose another directory") from error
    sweep(directory)
    if not (directory / FILE).exists():
        if given is not None:
            raise MismatchError(
                f"resume= came with the state of a recording, and {directory} holds none: pass the directory that it "
                f"was recorded in, or resume=False to begin a new one."
            )
        strange = sorted(path.name for path in directory.iterdir() if OWN_FILE.fullmatch(path.name))
        if strange:
            raise StoreError(
                f"{directory} holds no recording, but files that a recorder would replace: {listing(strange)}; choose "
                f"another directory, or move them"
            )
        groups = parameter_groups(optimizer, model)
        fresh = Recording(directory, [], *groups, every, 1, shapes_of(model_state(model)), uuid.uuid4().hex)
        fresh = _claim(fresh, exists=False)
        return fresh, _last_state(fresh, model)
    recording = open_recording(directory)
    if not resume:
        last = [_START, *recording.checkpoints][-1].step
        raise StoreError(
            f"{directory} holds a recording of {len(recording.checkpoints)} checkpoints up to step {last}: pass "
            f"resume=True to continue it, choose another directory, or remove it"
        )
    _check_same(recording, model, optimizer, every)
    state = _last_state(recording, model) if given is None else given
    if state.get("recording") != recording.identity:
        raise MismatchError(
            f"resume= came with the state of another recording than that in {directory}: pass the directory that it "
            f"was recorded in, or resume=False and another directory to begin a new one."
        )
    return _truncate(recording, state), state


def _truncate(recording: Recording, state: State) -> Recording:
    """Remove checkpoints of later steps than a state from a recording and its directory."""
    kept = [one for one in recording.checkpoints if one.step <= int(state["step"])]
    removed = len(recording.checkpoints) - len(kept)
    if removed:
        logger.info("%s: %d checkpoints after step %d are removed", recording.directory, removed, int(state["step"]))
    uneven, trained = state.get("uneven", recording.uneven), state.get("trained", {})
    recording = replace(recording, checkpoints=kept, uneven=list(uneven), trained=dict(trained))
    recording = _claim(recording, exists=True)
    named = {path for one in kept for path in one.files}
    for path in list(recording.directory.iterdir()):  # also files that a process did not remove before it was killed
        if path not in named and OWN_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)
    return recording


def _claim(recording: Recording, exists: bool) -> Recording:
    """Write a recording with a new owner, unless another recorder is faster."""
    recording = replace(recording, owner=uuid.uuid4().hex)
    try:
        write_recording(recording, replace=exists)
    except OSError as error:
        raise StoreError(f"{recording.directory} cannot be written ({error}): choose another directory") from error
    check_owner(recording)
    return recording


def _last_state(recording: Recording, model: nn.Module) -> dict[str, Any]:
    """Return the state at the last checkpoint, whose weights the model must have, or at the start of the training."""
    if recording.checkpoints:
        last = recording.checkpoints[-1]
        try:
            there = load_state(model, last.path)
        except CheckpointError as error:
            raise MismatchError(f"the last checkpoint of {recording.directory} does not fit: {error}") from error
        if not all(same_values(value, there[name]) for name, value in model_state(model).items()):
            raise MismatchError(
                f"resume=True continues after the last checkpoint, and the model does not have its weights: load "
                f"{last.path} (after {last.step} steps) into the model first, or pass the recorder.state_dict() that "
                f"was saved with the training's own checkpoint, resume=state."
            )
    return state_after(recording, [_START, *recording.checkpoints])


def state_after(recording: Recording, checkpoints: Sequence[CheckpointRecord]) -> dict[str, Any]:
    """Return the state for ``resume=``, as JSON values, after the last of some checkpoints."""
    last = checkpoints[-1]
    return {
        "recording": recording.identity,
        "step": last.step,
        "learning_rates": list(last.learning_rates),
        "learning_rate_totals": list(total_rates(checkpoints)),
        "schedule": last.schedule,
        "epoch": last.epoch,
        "loss": last.loss,
        "trained": recording.trained,
        "uneven": recording.uneven,
    }


def same_values(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors are equal, with NaN equal to itself, on whatever device."""
    right = right.to(left)
    if left.shape != right.shape:
        return False
    return torch.equal(left, right) or bool(((left == right) | ((left != left) & (right != right))).all())


def _check_same(
    recording: Recording, model: nn.Module, optimizer: torch.optim.Optimizer, every: dict[str, Any]
) -> None:
    """Raise MismatchError if model, parameter groups or schedule differ from the recording's."""
    there, now = recording.shapes, shapes_of(model_state(model))
    differing = [name for name in sorted({*now, *there}) if now.get(name) != there.get(name)]
    groups, _ = parameter_groups(optimizer, model, recording.groups)
    if differing:
        some = [f"{name!r} {there.get(name, 'missing')} there, {now.get(name, 'missing')} now" for name in differing]
        wrong = f"another model: {listing(some)}"
    elif len(groups) != len(recording.groups) or not all(
        set(before) <= set(after) for before, after in zip(recording.groups, groups, strict=True)
    ):  # parameters may have been unfrozen
        sizes = [[len(names) for names in some] for some in (recording.groups, groups)]
        wrong = f"another optimizer: groups of {sizes[0]} parameters there, {sizes[1]} now, or of other names"
    elif every != recording.every:
        wrong = f"another schedule: {recording.every} there, {every} now"
    else:
        return
    raise MismatchError(
        f"{recording.directory} was recorded with {wrong}. Continue it with what it was begun with, or choose another "
        f"directory."
    )
