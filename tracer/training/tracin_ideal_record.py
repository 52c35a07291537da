"""Recorded steps for TracInIdeal as plain arrays: the examples of each step and its effect on losses."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tracer._core.files import write_whole
from tracer._core.validation import check_choice
from tracer.errors import InputError, StoreError

FORMAT_VERSION = 1


@dataclass(frozen=True)
class IdealRecord:
    """The record of ``T`` steps and ``M`` targets.

    Attributes:
        train_set_size: The number of training examples ``N``.
        rows: The training examples that each step used: ``T`` arrays ``[B_t]``, int64.
        loss_changes: ``[T, M]``, float64: each target's loss before a step minus after it; positive if the step lowered
            it.
    """

    train_set_size: int
    rows: list[np.ndarray]
    loss_changes: np.ndarray

    def influence(self, share: str | Sequence[np.ndarray] = "equal") -> np.ndarray:
        """Return TracInIdeal: how much the steps that used a training example lowered each target's loss.

        For steps with one example it is exact. A step with several examples lowered the loss by their joint effect, and
        its division among them is a convention. The sum over all training examples is the total fall of the loss over
        the recorded steps, however it is divided (completeness, Pruthi et al. 2020, lemma 3.1).

        Args:
            share: ``equal``: an equal share for every example of a step's batch. Or one array ``[B_t]`` per step, the
                shares of its examples, which sum to 1.

        Returns:
            ``[N, M]``, float64, in units of the loss. Positive: a proponent. Examples that no step used have zeros.

        Raises:
            InputError: If ``share`` is unknown, does not fit the steps, or does not sum to 1.

        >>> record = IdealRecord(3, [np.array([0, 2]), np.array([2])], np.array([[0.5], [0.25]]))
        >>> record.influence()[:, 0]
        array([0.25, 0.  , 0.5 ])
        """
        if isinstance(share, str):
            check_choice("share", share, ("equal",), ", or an array a step")
            share = [np.full(len(rows), 1.0 / len(rows)) for rows in self.rows]
        shares = [np.asarray(part, dtype=np.float64) for part in share]
        if len(shares) != len(self.rows):
            raise InputError(f"share has {len(shares)} arrays; expected one for each of the {len(self.rows)} steps.")
        for step, (part, rows) in enumerate(zip(shares, self.rows, strict=True)):
            if part.shape != rows.shape or not abs(part.sum() - 1.0) <= 1e-6:
                raise InputError(
                    f"share[{step}] has shape {part.shape} and sums to {part.sum():.6g}; expected {len(rows)} numbers, "
                    f"one for each row of the step, that sum to 1."
                )
        total = np.zeros((self.train_set_size, self.loss_changes.shape[1]))
        for rows, change, part in zip(self.rows, self.loss_changes, shares, strict=True):
            np.add.at(total, rows, part[:, None] * change)  # a row may be in a batch twice
        return total


def read_ideal(path: str | os.PathLike[str]) -> IdealRecord:
    """Read a file written by `IdealRecorder.save`, without a model.

    Args:
        path: The file.

    Returns:
        The recorded steps.

    Raises:
        StoreError: If the file is missing, damaged, not a recording, or of a newer version.
    """
    return read_with_context(path)[1]


def read_with_context(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], IdealRecord]:
    """Return the arrays that describe a recording's targets, task and weights; and its record."""
    path = Path(path)
    if not path.exists():
        raise StoreError(f"{path} does not exist: pass the path that IdealRecorder.save wrote (now in {Path.cwd()})")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        version = int(arrays["format_version"])
        if version > FORMAT_VERSION:
            raise StoreError(
                f"{path} has format version {version}, this package knows up to {FORMAT_VERSION}: upgrade it"
            )
        rows = np.split(arrays["rows"], np.cumsum(arrays["batch_sizes"])[:-1]) if len(arrays["batch_sizes"]) else []
        about = {name: arrays[name] for name in ("target_fingerprints", "task", "weights_fingerprint")}
        record = IdealRecord(int(arrays["train_set_size"]), rows, arrays["loss_changes"])
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise StoreError(
            f"{path} cannot be read as a recording ({error!r}): it is damaged, or of something else; pass the path "
            f"that IdealRecorder.save wrote"
        ) from error
    return about, record


def write_ideal(path: str | os.PathLike[str], record: IdealRecord, more: Mapping[str, np.ndarray]) -> None:
    """Write a record and arrays about its targets, task and weights to an ``.npz`` file, whole or not at all."""
    arrays: dict[str, Any] = {
        "format_version": np.array(FORMAT_VERSION),
        "train_set_size": np.array(record.train_set_size),
        "rows": np.concatenate([*record.rows, np.zeros(0, np.int64)]),
        "batch_sizes": np.array([len(rows) for rows in record.rows], np.int64),
        "loss_changes": record.loss_changes,
        **more,
    }
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, lambda file: np.savez(file, **arrays))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written ({error}). What was recorded is still in memory: free space or choose another "
            f"path, and save it again"
        ) from error
