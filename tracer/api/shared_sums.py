"""Sums over training examples at a checkpoint: in parts that processes share, stored and resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from tracer._core.processes import Process
from tracer._core.progress import tqdm
from tracer._core.validation import bar_disabled
from tracer.data.datasets import DataSource, exact_batches
from tracer.gradients import GradientsChanged
from tracer.store import Store
from tracer.store.curvature import StoredCurvature, load_curvature, save_curvature
from tracer.types import Batch

_SAVE_SECONDS = 60.0


class Mergeable(Protocol):
    """Sums that begin empty, take up others, and can be stored as tensors and plain JSON values."""

    def merge(self, other: Any) -> None:
        """Take up other sums."""

    def state(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Return the sums as tensors and plain JSON values."""

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Any:
        """Return sums of a state."""


S = TypeVar("S", bound=Mergeable)


class SharedSums:
    """Computes sums over chosen training examples unless the store has the result that they are for.

    The examples are divided into as many parts as the store has processes. Each process sums up its own part first.
    Processes that run together wait for each other then; others, which may never meet, sum up what is missing.

    Args:
        store: The store.
        model_id: The checkpoint.
        inputs: What the result is computed from, under which it will be stored.
        process: This process.
        device: The device of the sums.
        progress: Whether to show progress bars.
    """

    def __init__(
        self,
        store: Store,
        model_id: int,
        inputs: Mapping[str, Any],
        process: Process,
        device: torch.device,
        progress: bool | None,
    ) -> None:
        self._store, self._model_id, self._inputs = store, model_id, dict(inputs)
        self._process, self._device, self._progress = process, device, progress

    @property
    def is_done(self) -> bool:
        """Whether the store has the result."""
        return load_curvature(self._store, self._model_id, self._inputs) is not None

    def sum(
        self,
        stage: str,
        kind: type[S],
        rows: np.ndarray,
        source: DataSource,
        compute: Callable[[Batch, np.ndarray], S],
        choice: str = "",
    ) -> S | None:
        """Return the sums over all parts; None if another process has stored the result meanwhile.

        Args:
            stage: A name for these sums, under which parts of them are stored.
            kind: The class of the sums.
            rows: The indices of the examples, ascending.
            source: All training examples.
            compute: Returns the sums over a batch with its indices.
            choice: Names what else decides the sums: parts of another choice are not taken up.
        """
        process = self._process
        count = process.count if process.together else self._store.manifest.layout["processes"]
        parts = [part for part in np.array_split(rows, count) if len(part)]
        own = process.rank if process.together else process.rank % len(parts)
        found: dict[int, S | None] = {}
        if own < len(parts):
            found[own] = self._part(stage, kind, own, parts, source, compute, choice)
            if found[own] is None:
                return None
        process.wait()
        total = kind()
        for number in range(len(parts)):  # in one order, so that all processes get the same
            if number not in found:
                found[number] = self._part(stage, kind, number, parts, source, compute, choice)
            sums = found.pop(number)
            if sums is None:
                return None
            total.merge(sums)
        return total

    def _part(
        self,
        stage: str,
        kind: type[S],
        number: int,
        parts: Sequence[np.ndarray],
        source: DataSource,
        compute: Callable[[Batch, np.ndarray], S],
        choice: str,
    ) -> S | None:
        """Return the sums over a part, from where the store has them; None if the result is stored."""
        rows = parts[number]
        inputs = {
            **self._inputs,
            "stage": stage,
            "part": [number, len(parts)],
            "choice": choice,
            "train_set_size": len(source),
        }
        sums, done = kind(), 0
        stored = load_curvature(self._store, self._model_id, inputs)
        if stored is not None:
            tensors = {name: torch.from_numpy(each).to(self._device) for name, each in stored.tensors.items()}
            sums, done = kind.restored(tensors, stored.numbers["sums"]), int(stored.numbers["done"])
        if done == len(rows):
            return sums

        def save() -> None:
            save_curvature(self._store, self._model_id, inputs, as_stored(*sums.state(), done=done))

        last = -1  # what is saved holds the first rows, also of a source that yields them in another order
        saved, disable = time.monotonic(), bar_disabled(self._progress)
        with tqdm(total=len(rows), initial=done, unit="row", desc=f"{stage} {self._model_id}", disable=disable) as bar:
            while done < len(rows):
                try:
                    for batch, inds in exact_batches(source, rows[done:]):
                        sums.merge(compute(batch, inds))
                        done, last = done + len(inds), max(last, int(inds.max()))
                        bar.update(len(inds))
                        is_due = time.monotonic() - saved > _SAVE_SECONDS
                        if is_due and done < len(rows) and last == rows[done - 1]:
                            save()
                            saved = time.monotonic()
                except GradientsChanged:
                    sums, done, last = kind(), 0, -1
        if not self._process.together and self.is_done:
            return None
        save()
        return sums


def as_stored(tensors: Mapping[str, Tensor], sums: Mapping[str, Any], **numbers: Any) -> StoredCurvature:
    """Return the state of sums, and other numbers, as they are stored."""
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    return StoredCurvature(arrays, {"sums": dict(sums), **numbers})
