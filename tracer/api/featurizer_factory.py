"""Featurizers at checkpoints, of one model, task and settings."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tracer._core.sharding import layer_type
from tracer._core.validation import check_autocast, check_device, check_model, wrapped_autocast
from tracer.api.featurizer import Featurizer
from tracer.api.settings import FeatureSettings
from tracer.data.datasets import DataSource, as_training_source
from tracer.data.model_outputs import ModelOutputTask
from tracer.data.named_tasks import make_task
from tracer.data.sampled_labels import HiddenTask, LabelDraws, SampledTask
from tracer.data.tables import InputForm
from tracer.data.tasks import LowerPrecision, Task
from tracer.errors import CallOrderError, MismatchError
from tracer.gradients import GradientEngine, GradientsChanged, select_parameters
from tracer.gradients.backend import find_backend
from tracer.gradients.joint import find_joints
from tracer.gradients.preconditioning import (
    CURVATURE_VERSION,
    KRONECKER,
    DiagonalPreconditioner,
    KroneckerPreconditioner,
    Preconditioner,
    check_preconditioner,
)
from tracer.projection import Projector, make_projector
from tracer.store import RowTable, Store
from tracer.store.curvature import load_curvature
from tracer.store.feature_storage import FeatureStorage
from tracer.store.manifest import Manifest, json_value
from tracer.training.adam import read_training_checkpoint
from tracer.training.lend_weights import LoadedWeights
from tracer.types import Batch, Checkpoint

logger = logging.getLogger("tracer")


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint's weights for the model, and their fingerprint."""

    weights: LoadedWeights
    fingerprint: str


class FeaturizerFactory:
    """Reads checkpoints for one model and makes a `Featurizer` of each.

    Args:
        model: The model.
        task: As in `Tracer`.
        settings: The settings.

    Attributes:
        model: The model without wrappers.
        task: The task of training examples.
        target_task: The task of targets, if it is another one; else None.
        device: The device to compute on.
        backend: How the model runs.
        engine: Computes per-sample gradients of training examples.
        target_engine: Computes per-sample gradients of targets; the same engine if they have the same task.
        settings: As passed.
        shapes: The shape of each selected parameter.
        dtype: The dtype of whitened gradients: float64 if a selected parameter is, else float32.
        joints: The weights that are whitened together with their bias, by name; none without whitening.
        written: The sets of examples that features were computed of; None is the training set.
        compared: Those whose stored examples were compared with the data.
        num_restarts: How often everything that was computed was forgotten, since gradients had been wrong.
    """

    def __init__(self, model: nn.Module, task: Any, settings: FeatureSettings) -> None:
        self.model, self.settings = check_model(model), settings
        self.device = check_device(settings.device, self.model)
        self.backend = find_backend(self.model, self.device)
        check_preconditioner(settings.preconditioner, sharded=self.backend.is_sharded)
        dtype = check_autocast(settings.autocast)
        if dtype is None and (dtype := wrapped_autocast(self.model)) is not None:
            logger.info("the model's forward is wrapped in torch.autocast: recorded as autocast=%s", dtype)
        self._autocast = dtype
        self.task = self._in_precision(make_task(task))
        self.target_task = (
            None if settings.target_task is None else self._in_precision(make_task(settings.target_task, "target_task"))
        )
        names = select_parameters(self.model, settings.params)
        parameters: Mapping[str, torch.Tensor] = dict(self.model.named_parameters())
        self.shapes = {name: tuple(parameters[name].shape) for name in names}
        dtypes = [parameters[name].dtype for name in names]
        self.dtype = functools.reduce(torch.promote_types, dtypes, torch.float32)
        self.engine = self.target_engine = self._engine(self.task)
        if self.target_task is not None:
            self.target_engine = self._engine(self.target_task)
        whitens = settings.preconditioner in KRONECKER
        self.joints = {joint.weight: joint for joint in find_joints(self.model, names)} if whitens else {}
        self.written: set[str | None] = set()
        self.compared: set[str | None] = set()
        self.num_restarts = 0
        self._hidden_engines: dict[type[LabelDraws], GradientEngine] = {}
        self._projectors: tuple[int | None, Projector] | None = None  # of the checkpoint used last
        self._whitening: tuple[tuple[int, str], Preconditioner] | None = None  # of that checkpoint too

    def _engine(self, task: Task, for_sums: bool = False) -> GradientEngine:
        method, inner = self.settings.gradients, task
        while isinstance(inner, (LowerPrecision, SampledTask)):
            inner = inner.task
        if method == "auto" and isinstance(inner, ModelOutputTask):
            method = "functional"  # get_output runs each example alone: layer rules would see batches of one
        return GradientEngine(self.model, task, list(self.shapes), method, self.device, self.backend, for_sums)

    def _in_precision(self, task: Task) -> Task:
        return task if self._autocast is None else LowerPrecision(task, self._autocast, self.device)

    def engine_of(self, exp_name: str | None) -> GradientEngine:
        """Return the engine for targets of a name, or for training examples (None)."""
        return self.engine if exp_name is None else self.target_engine

    def use_fallback(self, reasons: Mapping[str, str]) -> None:
        """Compute some parameters by the fallback, since capture was wrong for them before."""
        for engine in {self.engine, self.target_engine}:
            engine.use_fallback(reasons)

    def form_of(self, exp_name: str | None) -> InputForm:
        """Return the form in which the model takes arrays and tables of targets, or of training examples (None)."""
        return InputForm.of(self.model, self.task if exp_name is None else self.target_task or self.task)

    def training_source(
        self, train: Any, size: int, batch_size: int, collate_fn: Callable[[list], Batch] | None
    ) -> DataSource:
        """Return an adapter for all of ``size`` training examples, in the form that the model takes."""
        return as_training_source(
            train, size, batch_size, collate_fn, bool(self.settings.check_rows), self.form_of(None)
        )

    @property
    def target_settings(self) -> dict[str, Any] | None:
        """The settings of the targets' task, as a store keeps them; None if it is that of training examples."""
        if self.target_task is None:
            return None
        settings = json_value(self.target_task.settings(), "target_task")
        return None if settings == json_value(self.task.settings(), "task") else settings

    def manifest(self, train_set_size: int) -> Manifest:
        """Return the manifest of a store for the features of ``train_set_size`` examples."""
        projector = self._projector(None)
        settings = {
            "train_set_size": train_set_size,
            "task": self.task.settings(),
            "params": {name: list(shape) for name, shape in self.shapes.items()},
            "projector": projector.settings(),
            "feature_dim": projector.dim,
            **self.settings.manifest_entries(),
        }
        return Manifest(settings, info={"model": layer_type(self.model).__name__})

    def read(self, checkpoint: Checkpoint) -> LoadedCheckpoint:
        """Return a checkpoint fitted to the model, or raise `CheckpointError`."""
        with torch.inference_mode(False):
            settings = self.settings
            read = read_training_checkpoint(
                checkpoint, self.model, list(self.shapes), settings.preconditioner, settings.checkpoint_key
            )
            weights = LoadedWeights(self.model, read.state, self.device, read.scales())
            return LoadedCheckpoint(weights, read.fingerprint())

    @functools.cached_property
    def curvature_engine(self) -> GradientEngine:
        """Computes per-sample gradients of the losses of drawn labels."""
        if type(self.own_task).sampled_outputs is Task.sampled_outputs:
            logger.warning(
                "the task %s does not draw labels from the model's predictions (see Task.sampled_outputs): the "
                "curvature is that of its loss_hess, or else of the given labels, which predicts less",
                self.task.name,
            )
        return self._engine(self._in_precision(SampledTask(self.own_task)), for_sums=True)

    def hidden_engine(self, draws: type[LabelDraws]) -> GradientEngine:
        """Return what computes per-sample gradients of `Task.hidden_outputs`."""
        if draws not in self._hidden_engines:
            self._hidden_engines[draws] = self._engine(self._in_precision(HiddenTask(self.own_task, draws)))
        return self._hidden_engines[draws]

    @property
    def own_task(self) -> Task:
        """The task without autocast."""
        return self.task.task if isinstance(self.task, LowerPrecision) else self.task

    def curvature_inputs(self, loaded: LoadedCheckpoint) -> dict[str, Any]:
        """Return everything, apart from what the manifest says, that a checkpoint's curvature is computed from."""
        biases = {name: joint.bias for name, joint in self.joints.items()}
        return {"version": CURVATURE_VERSION, "weights": loaded.fingerprint, "joined": biases}

    def _curvature(self, loaded: LoadedCheckpoint, model_id: int, store: Store) -> Preconditioner:
        """Return a checkpoint's whitening from the store, or raise `CallOrderError`."""
        key = model_id, loaded.fingerprint
        if self._whitening is None or self._whitening[0] != key:
            found = load_curvature(store, model_id, self.curvature_inputs(loaded))
            if found is None:
                raise CallOrderError(
                    f"preconditioner={self.settings.preconditioner!r} needs the curvature of checkpoint {model_id}; "
                    f"call tracer.fit_curvature(train) after tracer.load_checkpoint(checkpoint, {model_id})."
                )
            tensors = {name: torch.from_numpy(each).to(self.device) for name, each in found.tensors.items()}
            self._whitening = key, KroneckerPreconditioner.restored(tensors, self.joints)
        return self._whitening[1]

    def make(
        self, loaded: LoadedCheckpoint, model_id: int, store: Store, engine: GradientEngine | None = None
    ) -> Featurizer:
        """Return the featurizer of a checkpoint, of training examples unless it gets another engine."""
        projector = None
        if FeatureStorage(self.settings.storage).stores_features:
            projector = self.projector(model_id)

        def preconditioner() -> Preconditioner | None:
            if self.settings.preconditioner in KRONECKER:
                return self._curvature(loaded, model_id, store)
            scales = loaded.weights.scales
            return None if scales is None else DiagonalPreconditioner(scales)

        check_rows = bool(self.settings.check_rows)
        rotates = FeatureStorage(self.settings.storage).is_binary
        joints = tuple(self.joints.values())
        return Featurizer(
            engine or self.engine, loaded.weights, projector, self.device, check_rows, preconditioner, rotates, joints
        )

    def projector(self, model_id: int) -> Projector:
        """Return the projector of a checkpoint."""
        key = None if self.settings.shared_projection else model_id
        if self._projectors is None or self._projectors[0] != key:
            self._projectors = (key, self._projector(key))
        return self._projectors[1]

    def forget(self, store: Store, reason: GradientsChanged) -> None:
        """Forget the features that may be wrong, and remember in the store which parameters capture is wrong for."""
        for exp_name in self.written:
            rows = store.num_rows(exp_name)
            logger.warning(
                "%s All %d %s are forgotten.", reason, rows, "training examples" if exp_name is None else "targets"
            )
            store.invalidate_rows(np.arange(rows), exp_name)
        store.set_info(fallback={**self.engine.fallback, **self.target_engine.fallback})
        self.num_restarts += 1

    def _projector(self, model_id: int | None) -> Projector:
        # Each checkpoint has a matrix of its own, so that errors average out over checkpoints, unless one is shared.
        seed = int(self.settings.seed)
        if model_id is not None:
            seed = int(np.random.SeedSequence([seed, model_id]).generate_state(1, np.uint64)[0] >> 1)
        projector = make_projector(self.settings.projector, self.shapes, self.settings.proj_dim, seed, self.device)
        projector.adds_norms = self.settings.norms == "exact"
        return projector


def check_weights(table: RowTable, fingerprint: str, model_id: int) -> None:
    """Raise `MismatchError` unless a checkpoint has the weights, and Adam's second moments, stored under its number."""
    stored = str(table.attributes["weights_fingerprint"])
    if stored != fingerprint:
        what = "second moments" if stored.partition("+")[0] == fingerprint.partition("+")[0] else "weights"
        raise MismatchError(
            f"The store holds other {what} under model_id={model_id} (fingerprint {stored}, now {fingerprint}). "
            f"Pass the checkpoint that was featurized, or use a new model_id for this one."
        )
