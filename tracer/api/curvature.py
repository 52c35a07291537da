"""The Kronecker-factored curvature of a checkpoint, from training examples, which gradients are whitened with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from tracer._core.processes import Process
from tracer.api.featurizer import Featurizer
from tracer.api.featurizer_factory import FeaturizerFactory, LoadedCheckpoint
from tracer.api.session import FEATURIZE, in_role
from tracer.api.shared_sums import SharedSums, as_stored
from tracer.data.datasets import DataSource
from tracer.data.sampled_labels import example_keys
from tracer.errors import CallOrderError, InputError, NonFiniteError
from tracer.gradients import Sink
from tracer.gradients.joint import joint_shapes
from tracer.gradients.kronecker import KroneckerSums, SquareSums
from tracer.gradients.preconditioning import KRONECKER, KroneckerPreconditioner, PreconditioningSink
from tracer.store import Store
from tracer.store.curvature import remove_curvatures, save_curvature
from tracer.types import Batch

if TYPE_CHECKING:
    from tracer.api.tracer import Tracer

logger = logging.getLogger("tracer")

_LEAST, _MOST = 256, 16384

S = TypeVar("S", KroneckerSums, SquareSums)


def fit_curvature(
    _tracer: Tracer, train: Any, batch_size: int = 64, collate_fn: Callable[[list], Batch] | None = None
) -> None:
    """Compute the curvature of the loaded checkpoint, which `featurize` whitens gradients with.

    Only for ``preconditioner="kfac"`` and ``"ekfac"``, between `load_checkpoint` and `featurize`. The curvature is
    the Fisher information of labels drawn from the model's predictions for ``curvature_examples`` of the training
    examples, Kronecker-factored by parameter. It is stored; called again, this resumes or does nothing. Processes
    share the work.

    Args:
        train: All training examples: a map-style data set, a tuple of tensors, or a `DataLoader`, list or other
            iterable that yields the same batches or examples each time.
        batch_size: The batch size, for data sets and tensors. Default: 64.
        collate_fn: Makes a batch of a data set's examples.

    Raises:
        CallOrderError: If no checkpoint is loaded, or gradients are not whitened.
        InputError: If ``train`` has another number of examples than ``train_set_size``.
        NonFiniteError: If a gradient is NaN or infinite.
    """
    session = in_role(_tracer._session, FEATURIZE)
    if _tracer._factory.settings.preconditioner not in KRONECKER:
        raise CallOrderError("fit_curvature is for preconditioner='kfac' and 'ekfac'; this Tracer has neither.")
    source = _tracer._factory.training_source(train, _tracer.train_set_size, batch_size, collate_fn)
    fit = CurvatureFit(_tracer._factory, _tracer.store, session.loaded, int(session.table.path.name), _tracer.process)
    session.flush()
    fit.run(source)
    session.reopen()


class CurvatureFit:
    """Computes the curvature of a checkpoint unless the store has it.

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
        self._sums = SharedSums(store, model_id, self._inputs, process, factory.device, self._settings.progress)
        engine, joints = factory.curvature_engine, tuple(factory.joints.values())
        self._featurizer = Featurizer(engine, loaded.weights, None, factory.device, joints=joints)

    def run(self, source: DataSource) -> None:
        """Compute and store the curvature."""
        if self._process.agreed(self._sums.is_done):
            return
        rows, others = _spread(len(source), self._settings.curvature_examples)
        count = len(rows) * self._settings.curvature_samples
        factors = self._sums.sum("factors", KroneckerSums, rows, source, partial(self._batch, KroneckerSums, None))
        if factors is None:
            return
        if not any(factors.squares.values()):
            raise InputError(
                f"The gradients of all {len(rows)} examples that the curvature comes from are zero at checkpoint "
                f"{self._model_id}; expected a model whose loss depends on the selected parameters."
            )
        joints, damping = self._factory.joints, self._settings.chosen_damping
        curvatures = factors.curvatures(count, joint_shapes(self._factory.shapes, joints.values()))
        if self._settings.preconditioner == "kfac":
            found = KroneckerPreconditioner.kfac(curvatures, damping, joints)
        else:
            rotation = KroneckerPreconditioner.rotation(curvatures, joints).to(self._factory.dtype)
            # Of the gradients that the eigenvectors come from, the squares along the last of them are too small.
            squares = self._sums.sum(
                "eigenvalues", SquareSums, others, source, partial(self._batch, SquareSums, rotation)
            )
            if squares is None:
                return
            means = {name: each / count for name, each in squares.squares.items()}
            found = rotation.ekfac(means, curvatures, damping)
        self._process.rank_zero_only(lambda: self._save(found.to(self._factory.dtype).state()))

    def _save(self, tensors: Mapping[str, Tensor]) -> None:
        """Store the curvature, and forget its parts and whatever was whitened by an earlier one, which is gone."""
        store, model_id = self._store, self._model_id
        if self._sums.is_done:
            return  # another process was faster, and may have written rows since
        if forgotten := store.invalidate_checkpoint(model_id):
            logger.warning("the curvature of checkpoint %d was lost: %d examples are forgotten", model_id, forgotten)
        save_curvature(store, model_id, self._inputs, as_stored(tensors, {}))
        remove_curvatures(store, model_id, except_for=[self._inputs])

    def _batch(
        self, kind: type[S], preconditioner: KroneckerPreconditioner | None, batch: Batch, inds: np.ndarray
    ) -> S:
        """Return the sums over a batch, of all samples of labels."""
        total, samples = kind(), self._settings.curvature_samples
        for sample in range(samples) if preconditioner is None else range(samples, 2 * samples):
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
            total.merge(sums)
        return total


def _spread(num_rows: int, count: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of examples, spread evenly, and those of as many that lie between them if there are."""
    if count is None:
        count = min(max(num_rows // 4, _LEAST), _MOST)
    count = min(num_rows, count)
    places = np.arange(count, dtype=np.int64)
    return places * num_rows // count, (2 * places + 1) * num_rows // (2 * count)
