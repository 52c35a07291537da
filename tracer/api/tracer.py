"""The facade: a stateful scorer that composes gradients, projection, store and scoring, and computes nothing itself."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, cast

import numpy as np
import torch
from torch import nn

from tracer._core.processes import Process, ProcessChoice, this_process
from tracer._core.sharding import layer_type
from tracer._core.validation import (
    check_autocast,
    check_count,
    check_device,
    check_model,
    check_model_id,
    check_rate,
    check_seed,
)
from tracer.api.checkpoint_sources import CheckpointSources
from tracer.api.exact_scores import CosineWriter
from tracer.api.featurizer import Featurizer
from tracer.api.fsdp_featurizer import SharedFeaturizer
from tracer.api.store_reader import StoreReader
from tracer.data.batches import check_batch_size, count_samples
from tracer.data.datasets import as_data_source
from tracer.data.indices import ExampleIndices, ExampleSelection, IndexCursor
from tracer.data.tasks import LowerPrecision, make_task
from tracer.errors import CallOrderError, InputError, MismatchError
from tracer.gradients import GradientEngine, ParamSelection, select_parameters
from tracer.gradients.fsdp import find_ranks, one_by_one
from tracer.projection import Projector, make_projector
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import InMemoryTable
from tracer.scoring.readiness import check_finalized
from tracer.scoring.scorer import Labels
from tracer.store import RowTable, Store
from tracer.store.manifest import Manifest
from tracer.training.adam import check_preconditioner, read_training_checkpoint
from tracer.training.checkpoints import read_checkpoint, weights_fingerprint
from tracer.training.fit_state import fit_state
from tracer.training.lend_weights import LoadedWeights
from tracer.types import Batch, Checkpoint, TopK

logger = logging.getLogger("tracer")
_Arguments = ParamSpec("_Arguments")


def _collective(
    method: Callable[Concatenate[Tracer, _Arguments], None],
) -> Callable[Concatenate[Tracer, _Arguments], None]:
    """Let all ranks of a sharded model end their batches before a method, and fail in it together."""

    @functools.wraps(method)
    def together(self: Tracer, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        if self._ranks is None:
            return method(self, *args, **kwargs)
        self.close()
        with self._ranks.step():
            return method(self, *args, **kwargs)

    return cast(Any, together)  # mypy: "self" has a name


class Tracer(StoreReader):
    """Traces a model's behaviour to its training rows, from checkpoints of its training (TracIn, Pruthi et al. 2020).

    First every train row is featurized at every checkpoint, then every target row is scored at the same checkpoints;
    scores are then sums over checkpoints of learning-rate-weighted dot products of loss gradients. Everything lies in
    ``save_dir`` and is resumed from there. The model is left as found: weights, modes, flags, hooks and random state.

    Args:
        model: The model. Its own weights do not matter; each checkpoint's are put in for each batch only.
        task: A name (``image_classification``, ``text_classification``, ``binary_classification``, ``regression``,
            ``language_modeling``), a function ``(model, batch) -> loss [B]``, or a `Task`.
        train_set_size: The number of train rows ``N``.
        save_dir: Where the store lies or is to be made.
        proj_dim: The number of values ``k`` kept of a row's gradient; inner products have a relative RMS error of
            about ``1/sqrt(k)``. Ignored by ``projector="none"``.
        projector: ``sketch`` (default), ``none`` (exact gradients), ``rademacher``, ``gaussian``, ``factored`` or
            ``fast_jl``.
        gradients: ``auto`` (layer rules, ``torch.func`` where there is none), ``capture`` (layer rules only) or
            ``functional`` (``torch.func`` only).
        params: Name patterns of the parameters that count, a function ``(name, parameter) -> bool``, or None for all
            trainable ones.
        storage: ``float16`` or ``int8`` (relative to a float32 scale a row), ``float32``, or, with
            ``projector="none"``, ``none``: gradients are not stored, only losses, slopes and norms; scores come from
            `score_exactly`.
        device: Where to compute; by default where the model is.
        autocast: ``bfloat16`` or ``float16``: forwards and backwards run under ``torch.autocast`` in this dtype, as
            mixed-precision training does; None: in the model's own.
        seed: The projection's seed.
        resume: Open the store that lies in ``save_dir``; with False it must not exist.
        check_rows: Recognise rows by a fingerprint of their inputs, so that a shuffled loader is an error.
        preconditioner: ``adam``: inner products of gradients are those of Adam's steps (as in LESS, Xia et al. 2024),
            ``<g / (sqrt(v̂) + eps), g'>`` with the second moments v̂ of each checkpoint, which then holds the optimizer's
            state dict beside the model's. None: plain inner products, as SGD has them.
        memory_bytes: How much scoring holds, about, whatever the numbers of rows and targets; in `score_exactly` more
            means fewer passes over the train rows.
        process: Of several processes that share the work and the store: this one's number and how many there are, or
            ``"slurm"`` in a job of an array. None: as ``torch.distributed`` says where it is initialised, else alone.
            A Tracer that one rank of several makes for itself takes ``(0, 1)``.
        progress: Show progress bars; None: on a terminal only.

    Raises:
        InputError: A setting is not known or out of range.
        MismatchError: The store in ``save_dir`` was made with other settings.
        StoreError: ``save_dir`` holds something else, or a store of a newer version.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        train_set_size: int,
        save_dir: str | os.PathLike[str],
        proj_dim: int = 4096,
        projector: str = "sketch",
        gradients: str = "auto",
        params: ParamSelection = None,
        storage: str = "float16",
        device: str | torch.device | None = None,
        seed: int = 0,
        resume: bool = True,
        *,
        check_rows: bool = True,
        autocast: str | torch.dtype | None = None,
        preconditioner: str | None = None,
        memory_bytes: int = 1 << 30,
        process: ProcessChoice = None,
        progress: bool | None = None,
    ) -> None:
        self.model = check_model(model)
        self.task = make_task(task)
        device = check_device(device, self.model)
        self._ranks = find_ranks(self.model, device)
        self._preconditioner = check_preconditioner(preconditioner, sharded=self._ranks is not None)
        dtype = check_autocast(autocast)
        if dtype is not None:
            self.task = LowerPrecision(self.task, dtype, device)
        self._seed = check_seed(seed)
        names = select_parameters(self.model, params)
        parameters = dict(self.model.named_parameters())
        self._shapes = {name: tuple(parameters[name].shape) for name in names}
        self._projection = (projector, proj_dim)
        if storage == "none" and projector != "none":
            raise InputError(
                f"storage='none' came with projector={projector!r}: without stored features scores are computed from "
                f"exact gradients; pass projector='none', or storage='float16'."
            )
        self._engine = GradientEngine(self.model, self.task, names, gradients, device, self._ranks)
        self._check_rows = bool(check_rows)
        mine = this_process(process)
        manifest = self._manifest(check_count(train_set_size, "train_set_size"), storage, device)
        if self._ranks is None:
            store = _open_store(save_dir, manifest, resume, mine)
        else:
            with one_by_one(self._ranks) as first:
                store = Store.open(save_dir, manifest, resume=resume or not first, processes=mine.count)
        super().__init__(store, device, mine, check_count(memory_bytes, "memory_bytes"), progress)
        self._featurizer: Featurizer | None = None
        self._projectors: tuple[int, Projector] | None = None
        self._sources = CheckpointSources()
        self._table: RowTable | None = None
        self._same_rows: RowTable | None = None
        self._role = ""
        self._cursor = IndexCursor(self.train_set_size, "train_set_size")

    @_collective
    def load_checkpoint(self, checkpoint: Checkpoint, model_id: int, learning_rate: float | None = None) -> None:
        """Choose the checkpoint at which `featurize` computes, and put the row count back to 0.

        Args:
            checkpoint: A state dict, or the path of a ``.pt``/``.pth`` (read with ``weights_only=True``) or
                ``.safetensors`` file. With a ``preconditioner``: a mapping, or the path of a ``.pt`` file of one, that
                holds the model's state dict under one key and the optimizer's under another.
            model_id: The checkpoint's number in the store, 0 or more.
            learning_rate: The learning rate at the checkpoint, which weighs its scores. Another value for a known
                checkpoint replaces the stored one; None keeps it, or gives all checkpoints the weight 1.

        Raises:
            CheckpointError: It cannot be read safely, or does not fit the model.
            MismatchError: The store holds other weights under this ``model_id``.
        """
        model_id = check_model_id(model_id)
        rate = check_rate(learning_rate)
        weights, fingerprint = self._read(checkpoint)
        self.flush()
        with one_by_one(self._ranks, "model_id, learning_rate and weights", (model_id, rate, fingerprint)):
            if self.store.has_checkpoint(model_id):
                table = self.store.checkpoint(model_id)
                self._check_weights(table, fingerprint, model_id)
                stored = table.attributes.get("learning_rate")
                if rate is not None and rate != stored:
                    logger.info("checkpoint %d: learning rate %s replaces %s", model_id, rate, stored)
                    table.set_attributes(learning_rate=rate)
            else:
                table = self.store.create_checkpoint(model_id, fingerprint, rate)
            self._sources.remember(model_id, checkpoint, table)
        self._start(table, weights, model_id, IndexCursor(self.train_set_size, "train_set_size"), "featurize")
        self._same_rows = self.store.other_checkpoint(model_id)

    def featurize(self, batch: Batch, inds: ExampleIndices | None = None, num_samples: int | None = None) -> None:
        """Compute and store the features of a batch of train rows at the loaded checkpoint.

        Rows that are stored already are recognised and not computed again.

        Args:
            batch: The batch, as the task takes it, on any device.
            inds: The rows' indices in the train set, ``[B]``; or
            num_samples: the number of rows ``B``, counted on from the batch before.

        Raises:
            CallOrderError: No checkpoint is loaded.
            InputError: Both or neither of ``inds`` and ``num_samples`` are given.
            BatchError: The batch does not fit the indices, the model or the task.
            MismatchError: A row's inputs differ from those stored for its index.
            NonFiniteError: A row's gradient is NaN or infinite; nothing of the batch is stored.
        """
        if self._role != "featurize":
            raise CallOrderError(
                "featurize needs a checkpoint; call tracer.load_checkpoint(checkpoint, model_id=0, learning_rate=...) "
                "first (and again after scoring)."
            )
        self._write(batch, inds, num_samples)

    def flush(self) -> None:
        """Make everything that was computed durable."""
        if self._table is not None:
            self._table.flush()

    def close(self) -> None:
        """Flush and release the store's files; `load_checkpoint` opens them again.

        Raises:
            RankError: The model is sharded and another rank failed; all ranks must call this, and wait here until the
                last has featurized or scored its batches.
        """
        featurizer, table = self._featurizer, self._table
        if isinstance(featurizer, SharedFeaturizer):
            featurizer.join()
        self._table, self._featurizer, self._role = None, None, ""
        if table is not None:
            table.close()
        if isinstance(featurizer, SharedFeaturizer):
            featurizer.ranks.joined()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(self._featurizer, SharedFeaturizer) and error is not None:
            self._featurizer.ranks.abandon(error)
            self._featurizer = None  # which would wait for the others
        self.close()

    @_collective
    def start_scoring_checkpoint(self, checkpoint: Checkpoint, model_id: int, num_targets: int, exp_name: str) -> None:
        """Choose the checkpoint and the targets for `score`, and put the row count back to 0.

        Args:
            checkpoint: The checkpoint that was featurized under ``model_id``.
            model_id: Its number in the store.
            num_targets: The number of target rows ``M``.
            exp_name: The name of this set of targets.

        Raises:
            CallOrderError: The checkpoint was not featurized and finalized.
            MismatchError: The weights are others, or ``exp_name`` has another number of targets.
            CheckpointError: The checkpoint cannot be read safely, or does not fit the model.
        """
        model_id = check_model_id(model_id)
        num_targets = check_count(num_targets, "num_targets")
        self.flush()
        check_finalized(self.store, model_id)
        weights, fingerprint = self._read(checkpoint)
        self._check_weights(self.store.checkpoint(model_id), fingerprint, model_id)
        with one_by_one(self._ranks, "arguments", (model_id, num_targets, exp_name, fingerprint)):
            table = self._target_table(exp_name, model_id, num_targets)
            self._sources.remember(model_id, checkpoint, self.store.checkpoint(model_id))
        self._start(table, weights, model_id, IndexCursor(num_targets, "num_targets"), "score")
        self._same_rows = self.store.other_targets(exp_name, model_id)

    def score(self, batch: Batch, inds: ExampleIndices | None = None, num_samples: int | None = None) -> None:
        """Compute and store the features of a batch of target rows; as `featurize`, for targets.

        Args:
            batch: The batch, as the task takes it, on any device.
            inds: The rows' indices among the targets, ``[B]``; or
            num_samples: the number of rows ``B``, counted on from the batch before.

        Raises:
            CallOrderError: No checkpoint was chosen for scoring.
            InputError: Both or neither of ``inds`` and ``num_samples`` are given.
            BatchError: The batch does not fit the indices, the model or the task.
            MismatchError: A row's inputs differ from those stored for its index.
            NonFiniteError: A row's gradient is NaN or infinite; nothing of the batch is stored.
        """
        if self._role != "score":
            raise CallOrderError(
                "score needs a checkpoint and targets; call tracer.start_scoring_checkpoint(checkpoint, model_id=0, "
                "num_targets=..., exp_name=...) first."
            )
        self._write(batch, inds, num_samples)

    def score_exactly(
        self,
        checkpoint: Checkpoint,
        model_id: int,
        train: Any,
        targets: Any,
        exp_name: str,
        batch_size: int = 64,
        collate_fn: Callable[[list], Batch] | None = None,
    ) -> None:
        """Compare exact gradients of all train rows and targets at a checkpoint, without storing gradients.

        Only for ``storage="none"``. It takes the place of `featurize` and `score`: one pass over the targets and, for
        every ``memory_bytes`` of their gradients, one over the train rows. Called again, it continues. Then
        `finalize_features` and `finalize_scores` or `top` give the scores.

        Args:
            checkpoint: The checkpoint that was loaded under ``model_id`` by `load_checkpoint`.
            model_id: Its number in the store.
            train: All train rows: a map-style data set, a tuple of tensors, a `DataLoader` with ``shuffle=False``, or
                a list of batches.
            targets: All targets, likewise.
            exp_name: The name of this set of targets.
            batch_size: For data sets and tensors.
            collate_fn: How rows of a data set become a batch.

        Raises:
            CallOrderError: The store's storage is another, or the checkpoint was never loaded.
            InputError: ``train`` has another number of rows than ``train_set_size``.
            MismatchError: The weights or a row's inputs are others than those stored. (Rows whose scores are complete
                are not read again.)
            NonFiniteError: A row's gradient is NaN or infinite.
        """
        if self.store.manifest.storage != "none":
            raise CallOrderError(
                f"score_exactly is for storage='none'; this store has storage={self.store.manifest.storage!r}, whose "
                f"scores come from featurize, score and finalize_scores."
            )
        if self._ranks is not None:
            raise CallOrderError(
                "score_exactly compares all train rows with all targets in one process; with a model that fully_shard "
                "divides, use featurize, score and finalize_scores with storage='float32' or 'float16'."
            )
        model_id = check_model_id(model_id)
        batch_size = check_count(batch_size, "batch_size")
        train_rows = as_data_source(train, "train", batch_size, collate_fn)
        target_rows = as_data_source(targets, "targets", batch_size, collate_fn)
        if len(train_rows) != self.train_set_size:
            raise InputError(f"train has {len(train_rows)} rows; expected train_set_size={self.train_set_size}.")
        weights, fingerprint = self._read(checkpoint)
        self._check_weights(self.store.checkpoint(model_id), fingerprint, model_id)
        self.close()
        self._target_table(exp_name, model_id, len(target_rows))
        self._engine.use_weights(fingerprint)
        featurizer = Featurizer(self.model, weights, self._engine, None, self.device, self._check_rows)
        writer = CosineWriter(featurizer, self.store, exp_name, model_id, self._memory_bytes, self._progress)
        writer.run(train_rows, target_rows)

    def query(
        self,
        batch: Batch,
        k: int,
        *,
        kind: str = "proponents",
        estimator: str = "tracin",
        model_ids: list[int] | None = None,
        rows: ExampleSelection | None = None,
        labels: Labels | None = None,
        target: str | None = None,
        regularization: float | str = "auto",
    ) -> TopK:
        """Return the strongest train rows of a few targets at once, without storing anything.

        The answer is that of `score` and `top`. It takes one pass over the stored features. Each checkpoint's weights
        are taken from where `load_checkpoint` or `start_scoring_checkpoint` had them: a path, which the store
        remembers for other processes, or the state dict that was passed in this process, which is kept for that. What
        `featurize` and `score` are doing is not disturbed.

        Args:
            batch: The targets, as the task takes them, on any device.
            k: How many rows for each target.
            kind: As in `top`.
            estimator: As in `finalize_scores`.
            model_ids: The checkpoints; None: all in the store.
            rows: Only these train rows, as in `top`.
            labels: Only train rows of these classes.
            target: As in `finalize_scores`.
            regularization: As in `finalize_scores`.

        Returns:
            Indices and scores, ``[B, k]`` each, strongest first.

        Raises:
            InputError: A name is not known, or ``k`` or ``rows`` is out of range.
            CallOrderError: A checkpoint is not finalized, its weights are not known, or ``storage`` is ``none``.
            MismatchError: A checkpoint's weights have changed.
            BatchError: The batch does not fit the model or the task.
            NonFiniteError: A target's gradient is NaN or infinite.
        """
        estimate = Estimate(estimator, target, regularization)
        storage = self.store.manifest.storage
        if storage == "none":
            raise CallOrderError(
                "query needs stored features and this store has storage='none'; call tracer.score_exactly(checkpoint, "
                "model_id, train, targets, exp_name) and tracer.top, or featurize with another storage."
            )
        if self._ranks is not None:
            raise CallOrderError(
                "query came for a model that fully_shard divides among processes; call it with the plain model, in one "
                "process, on the same save_dir, or score the targets and call tracer.top."
            )
        self.flush()
        chosen, indices = self._scorer.check_query(k, kind, estimate, model_ids, rows, labels)
        num_rows, targets = count_samples(batch), []
        check_batch_size(batch, num_rows)
        for model_id in chosen:
            table = self.store.checkpoint(model_id)
            weights, fingerprint = self._read(self._sources.find(model_id, table))
            self._check_weights(table, fingerprint, model_id)
            featurizer = self._make_featurizer(weights, model_id)
            with self._engine.using_weights(fingerprint):
                values = featurizer.compute(batch, num_rows)
            assert values.features is not None  # there is a projector
            targets.append(InMemoryTable(values.features, values.loss_grad, values.gradient_norm, storage))
        return self._scorer.query(targets, chosen, indices, k, kind, estimate)

    def _block_rows_of(self, size: int) -> int:
        """Return the rows of a block, of the targets that are being scored if there are so many of them."""
        if self._role == "score" and self._table is not None and size == self._table.num_rows:
            return self._table.block_rows
        return super()._block_rows_of(size)

    def _settle(self) -> None:
        """Make durable what was computed; of a sharded model on all ranks, whose rows are asked for too."""
        if self._ranks is None:
            self.flush()
        else:
            self.close()

    def _manifest(self, train_set_size: int, storage: str, device: torch.device) -> Manifest:
        projector = self._projector(None, device)
        settings = {
            "train_set_size": train_set_size,
            "task": self.task.settings(),
            "params": {name: list(shape) for name, shape in self._shapes.items()},
            "projector": projector.settings(),
            "feature_dim": projector.dim,
            "storage": storage,
            "check_rows": self._check_rows,
        }
        if self._preconditioner is not None:  # stores without one stay as they always were
            settings["preconditioner"] = self._preconditioner
        return Manifest(settings, info={"model": layer_type(self.model).__name__})

    def _projector(self, model_id: int | None, device: torch.device) -> Projector:
        """Return a checkpoint's projector; each has a matrix of its own, so that errors average over checkpoints."""
        kind, proj_dim = self._projection
        seed = self._seed
        if model_id is not None:
            seed = int(np.random.SeedSequence([self._seed, model_id]).generate_state(1, np.uint64)[0] >> 1)
        return make_projector(kind, self._shapes, proj_dim, seed, device)

    def _read(self, checkpoint: Checkpoint) -> tuple[LoadedWeights, str]:
        with torch.inference_mode(False):
            if self._preconditioner is not None:
                training = read_training_checkpoint(checkpoint, self.model, list(self._shapes))
                weights = LoadedWeights(self.model, training.state, self.device, training.scales())
                return weights, training.fingerprint()
            state = fit_state(self.model, read_checkpoint(checkpoint))
            return LoadedWeights(self.model, state, self.device), weights_fingerprint(state)

    def _check_weights(self, table: RowTable, fingerprint: str, model_id: int) -> None:
        stored = table.attributes["weights_fingerprint"]
        if stored != fingerprint:
            what = "second moments" if stored.partition("+")[0] == fingerprint.partition("+")[0] else "weights"
            raise MismatchError(
                f"The store holds other {what} under model_id={model_id} (fingerprint {stored}, now {fingerprint}). "
                f"Pass the checkpoint that was featurized, or use a new model_id for this one."
            )

    def _target_table(self, exp_name: str, model_id: int, num_targets: int) -> RowTable:
        for other in self.store.target_ids(exp_name):
            stored = self.store.targets(exp_name, other).num_rows
            if stored != num_targets:
                raise MismatchError(
                    f"exp_name={exp_name!r} has {stored} targets at checkpoint {other}; num_targets={num_targets} "
                    f"came. Pass num_targets={stored}, or choose another exp_name."
                )
        if self.store.has_targets(exp_name, model_id):
            return self.store.targets(exp_name, model_id)
        return self.store.create_targets(exp_name, model_id, num_targets)

    def _start(self, table: RowTable, weights: LoadedWeights, model_id: int, cursor: IndexCursor, role: str) -> None:
        self._engine.use_weights(self.store.checkpoint(model_id).attributes["weights_fingerprint"])
        self._featurizer = self._make_featurizer(weights, model_id)
        if self._table is not None:
            self._table.close()
        self._table, self._cursor, self._role = table, cursor, role

    def _make_featurizer(self, weights: LoadedWeights, model_id: int) -> Featurizer:
        projector = None
        if self.store.manifest.storage != "none":
            if self._projectors is None or self._projectors[0] != model_id:
                self._projectors = (model_id, self._projector(model_id, self.device))
            projector = self._projectors[1]
        settings = (weights, self._engine, projector, self.device, self._check_rows)
        return Featurizer(self.model, *settings) if self._ranks is None else SharedFeaturizer(self._ranks, *settings)

    def _write(self, batch: Batch, inds: ExampleIndices | None, num_samples: int | None) -> None:
        assert self._featurizer is not None and self._table is not None  # both are set with the role
        with nullcontext() if self._ranks is None else self._ranks.step():
            rows = self._cursor.indices(inds, num_samples)
            self._featurizer.write(self._table, batch, rows, self._same_rows)
        self._cursor.advance(num_samples)


def _open_store(save_dir: str | os.PathLike[str], manifest: Manifest, resume: bool, process: Process) -> Store:
    """Open the store, which several processes may make at once; where it must be new, the first one looks."""
    if not resume:
        process.first_only(lambda: Store.open(save_dir, manifest, resume=False, processes=process.count))
    return Store.open(save_dir, manifest, resume=resume or process.together, processes=process.count)
