"""The curvature of a checkpoint, from training examples: summed up in parts, stored, and shared by processes."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tracer._core.processes import Process
from tracer._core.progress import tqdm
from tracer._core.validation import bar_disabled
from tracer.api.featurizer import Featurizer
from tracer.api.featurizer_factory import FeaturizerFactory, LoadedCheckpoint
from tracer.data.datasets import DataSource, exact_batches
from tracer.data.sampled_labels import example_keys
from tracer.errors import InputError, NonFiniteError
from tracer.gradients import GradientsChanged, Sink
from tracer.gradients.kronecker import KroneckerSums, SquareSums
from tracer.gradients.preconditioning import KroneckerPreconditioner, PreconditioningSink
from tracer.store import Store
from tracer.store.curvature import StoredCurvature, load_curvature, remove_curvatures, save_curvature
from tracer.types import Batch

logger = logging.getLogger("tracer")

_SAVE_SECONDS = 60.0
_LEAST, _MOST = 256, 16384

S = TypeVar("S", KroneckerSums, SquareSums)


class CurvatureFit:
    """Computes the curvature of a checkpoint unless the store has it.

    The chosen examples are divided into as many parts as the store has processes. Each process sums up its own part
    first. Processes that run together wait for each other then; others, which may never meet, sum up what is missing.

    Args:
        factory: Makes engines and knows the settings.
        store: The store.
        loaded: The checkpoint.
        model_id: Its number.
        process: This process.
    """

    def __init__(
        self, factory: FeaturizerFactory, store: Store, loaded: LoadedCheckpoint, model_id: int, process: Process
    ) -> None:
        self._factory, self._settings = factory, factory.settings
        self._store, self._model_id, self._process = store, model_id, process
        self._inputs = factory.curvature_inputs(loaded)
        self._featurizer = Featurizer(factory.curvature_engine, loaded.weights, None, factory.device)

    def run(self, source: DataSource) -> None:
        """Compute and store the curvature."""
        if self._process.agreed(self._load(self._inputs) is not None):
            return
        rows = _spread(len(source), self._settings.curvature_examples)
        num_parts = self._process.count if self._process.together else self._store.manifest.layout["processes"]
        parts = [part for part in np.array_split(rows, num_parts) if len(part)]
        count = len(rows) * self._settings.curvature_samples
        factors = self._sum("factors", KroneckerSums, parts, source)
        if factors is None:
            return
        if not any(factors.squares.values()):
            raise InputError(
                f"The gradients of all {len(rows)} examples that the curvature comes from are zero at checkpoint "
                f"{self._model_id}; expected a model whose loss depends on the selected parameters."
            )
        curvatures, damping = factors.curvatures(count, self._factory.shapes), self._settings.damping
        if self._settings.preconditioner == "kfac":
            found = KroneckerPreconditioner.kfac(curvatures, damping)
        else:
            rotation = KroneckerPreconditioner.rotation(curvatures).to(self._factory.dtype)
            squares = self._sum("eigenvalues", SquareSums, parts, source, rotation)
            if squares is None:
                return
            means = {name: each / count for name, each in squares.squares.items()}
            found = rotation.ekfac(means, curvatures, damping)
        self._process.rank_zero_only(lambda: self._save(found.to(self._factory.dtype).state()))

    def _save(self, tensors: Mapping[str, Tensor]) -> None:
        """Store the curvature, and forget its parts and whatever was whitened by an earlier one, which is gone."""
        store, model_id = self._store, self._model_id
        if self._load(self._inputs) is not None:
            return  # another process was faster, and may have written rows since
        if forgotten := store.invalidate_checkpoint(model_id):
            logger.warning("the curvature of checkpoint %d was lost: %d examples are forgotten", model_id, forgotten)
        save_curvature(store, model_id, self._inputs, _as_stored(tensors, {}))
        remove_curvatures(store, model_id, except_for=self._inputs)

    def _sum(
        self,
        stage: str,
        kind: type[S],
        parts: Sequence[np.ndarray],
        source: DataSource,
        preconditioner: KroneckerPreconditioner | None = None,
    ) -> S | None:
        """Return sums over all parts; None if another process has stored the curvature meanwhile."""
        own = self._process.rank if self._process.together else self._process.rank % len(parts)
        found: dict[int, S | None] = {}
        if own < len(parts):
            found[own] = self._part(stage, kind, own, parts, source, preconditioner)
            if found[own] is None:
                return None
        self._process.wait()
        total = kind()
        for number in range(len(parts)):  # in one order, so that all processes get the same
            if number not in found:
                found[number] = self._part(stage, kind, number, parts, source, preconditioner)
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
        preconditioner: KroneckerPreconditioner | None,
    ) -> S | None:
        """Return the sums over a part, from where the store has them; None if the curvature is stored."""
        rows, samples = parts[number], self._settings.curvature_samples
        inputs = {**self._inputs, "stage": stage, "part": [number, len(parts)], "train_set_size": len(source)}
        sums, done = kind(), 0
        stored = self._load(inputs)
        if stored is not None:
            tensors = {name: torch.from_numpy(each).to(self._factory.device) for name, each in stored.tensors.items()}
            sums, done = kind.restored(tensors, stored.numbers["sums"]), int(stored.numbers["done"])
        if done == len(rows):
            return sums
        last = -1  # what is saved holds the first rows, also of a source that yields them in another order
        saved, disable = time.monotonic(), bar_disabled(self._settings.progress)
        with tqdm(total=len(rows), initial=done, unit="row", desc=f"{stage} {self._model_id}", disable=disable) as bar:
            while done < len(rows):
                try:
                    for batch, inds in exact_batches(source, rows[done:]):
                        for sample in range(samples):
                            sums.merge(self._batch(kind, batch, inds, sample, preconditioner))
                        done, last = done + len(inds), max(last, int(inds.max()))
                        bar.update(len(inds))
                        is_due = time.monotonic() - saved > _SAVE_SECONDS
                        if is_due and done < len(rows) and last == rows[done - 1]:
                            save_curvature(self._store, self._model_id, inputs, _as_stored(*sums.state(), done=done))
                            saved = time.monotonic()
                except GradientsChanged:
                    sums, done, last = kind(), 0, -1
        if not self._process.together and self._load(self._inputs) is not None:
            return None
        save_curvature(self._store, self._model_id, inputs, _as_stored(*sums.state(), done=done))
        return sums

    def _batch(
        self,
        kind: type[S],
        batch: Batch,
        inds: np.ndarray,
        sample: int,
        preconditioner: KroneckerPreconditioner | None,
    ) -> S:
        """Return the sums over a batch."""
        sums = kind()
        sink: Sink = sums if preconditioner is None else PreconditioningSink(sums, preconditioner)
        keys = example_keys(int(self._settings.seed), self._model_id, sample, inds)
        with torch.inference_mode(False):
            self._featurizer.run((batch, keys), len(inds), sink)
        if not sums.finite:
            raise NonFiniteError(
                f"The curvature got gradients that are NaN or infinite from rows {inds[:5].tolist()} and others of "
                f"their batch. Look at these rows' inputs, or at the checkpoint's weights."
            )
        return sums

    def _load(self, inputs: Mapping[str, Any]) -> StoredCurvature | None:
        return load_curvature(self._store, self._model_id, inputs)


def _spread(num_rows: int, count: int | None) -> np.ndarray:
    """Return the indices of examples, spread evenly."""
    if count is None:
        count = min(max(num_rows // 4, _LEAST), _MOST)
    return np.linspace(0, num_rows - 1, min(num_rows, count)).round().astype(np.int64)


def _as_stored(tensors: Mapping[str, Tensor], sums: Mapping[str, float], **numbers: Any) -> StoredCurvature:
    arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
    return StoredCurvature(arrays, {"sums": dict(sums), **numbers})
