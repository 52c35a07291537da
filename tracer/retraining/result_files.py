"""Results of runs in files, so that interrupted retraining can be resumed.

    save_dir/<digest of the settings>/settings.json     the settings, for people
                                      <random>.npz      runs [K], outputs [K, M], losses [K, M]

A file is written for each group of models, under another name first, and never changed. Other data, recipes or models
have another digest, and so another folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from tracer._core.files import disk_errors, sweep, write_whole
from tracer.data.batches import leaves
from tracer.errors import StoreError
from tracer.retraining.models import Examples
from tracer.retraining.subsets import Run, RunKey
from tracer.retraining.training import Trainer
from tracer.training.checkpoints import weights_fingerprint

_VERSION = 1  # of how models are trained: another number, other results


def settings_of(trainer: Trainer, targets: Examples, paired: bool) -> dict[str, Any]:
    """Return the settings that determine the results of all runs, apart from masks and seeds, as JSON values."""
    return {
        "version": _VERSION,
        "model": re.sub(r" at 0x[0-9a-f]+", "", repr(trainer.reference)),
        "weights": weights_fingerprint(trainer.reference.state_dict()),
        "task": trainer.task.settings(),
        **trainer.settings(),
        "paired": paired,
        "train": _fingerprint_of(trainer.data),
        "targets": _fingerprint_of(targets),
    }


def _fingerprint_of(rows: Examples) -> str:
    """Return a digest of all values of a batch with their paths."""
    tensors = {path: leaf for path, leaf in leaves(rows.batch) if isinstance(leaf, Tensor)}
    others = [(path, leaf) for path, leaf in leaves(rows.batch) if not isinstance(leaf, Tensor)]
    return _digest(weights_fingerprint(tensors) + repr(others))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _name(run: Run) -> str:
    return f"{run.subset} {run.seed} {hashlib.blake2b(run.mask.tobytes(), digest_size=16).hexdigest()}"


class ResultFiles:
    """The results of runs with the same settings, in a folder that may hold results of other settings."""

    def __init__(self, save_dir: Path, settings: Mapping[str, Any]) -> None:
        text = json.dumps(settings, indent=2, sort_keys=True)
        self._folder = save_dir / _digest(text)
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            sweep(self._folder)
            described = self._folder / "settings.json"
            if not described.exists():
                write_whole(described, lambda file: file.write(text.encode()))

    def read(self, runs: Sequence[Run]) -> dict[RunKey, tuple[np.ndarray, np.ndarray]]:
        """Return outputs and losses ``[M]`` of the stored runs, by subset and seed."""
        stored: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for path in sorted(self._folder.glob("*.npz")):
            try:
                with np.load(path, allow_pickle=False) as file:
                    names, outputs, losses = (file[key] for key in ("runs", "outputs", "losses"))
                stored.update(zip(names.tolist(), zip(outputs, losses, strict=True), strict=True))
            except Exception as error:  # a damaged file can raise nearly anything out of zip and numpy
                raise StoreError(
                    f"{path} cannot be read ({type(error).__name__}: {error}): it is damaged; remove it, and its "
                    f"models are trained again"
                ) from error
        return {run.key: stored[_name(run)] for run in runs if _name(run) in stored}

    def write(self, runs: Sequence[Run], outputs: np.ndarray, losses: np.ndarray) -> None:
        """Write outputs ``[K, M]`` and losses ``[K, M]`` of K runs."""
        names, path = np.array([_name(run) for run in runs]), self._folder / f"{uuid.uuid4().hex}.npz"
        with disk_errors(path):
            write_whole(path, lambda file: np.savez(file, runs=names, outputs=outputs, losses=losses))
