"""`Tracer`: a thin shell over a session, which featurizes or scores, and a store reader, which answers questions."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack

from torch import nn
from torch.utils.data import Subset

from tracer._core.processes import this_process
from tracer._core.validation import check_count, check_model_id, check_rate
from tracer.api import curvature, exact_scores, hidden_curvature, query
from tracer.api.checkpoint_sources import CheckpointSources
from tracer.api.featurizer_factory import FeaturizerFactory
from tracer.api.session import FEATURIZE, SCORE, Session, begin_featurizing, begin_scoring, in_role
from tracer.api.settings import FeatureOptions, FeatureSettings, feature_settings, takes_settings
from tracer.api.store_reader import StoreReader
from tracer.data.indices import ExampleIndices
from tracer.scoring.readiness import check_finalized
from tracer.store import Store
from tracer.types import Batch, Checkpoint

logger = logging.getLogger("tracer")

P = ParamSpec("P")
Answer = TypeVar("Answer")


def _asks(
    method: Callable[Concatenate[StoreReader, P], Answer], prepare: Callable[[Tracer], None]
) -> Callable[Concatenate[Tracer, P], Answer]:
    """Return a method of `Tracer` that makes everything computed durable, and then asks the store reader."""

    @functools.wraps(method)
    def ask(self: Tracer, /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        prepare(self)
        return method(self.reader, *args, **kwargs)

    return ask


def _says_default(method: Callable[Concatenate[Tracer, P], Answer]) -> Callable[Concatenate[Tracer, P], Answer]:
    """Return ``finalize_scores``, which says once that it gives TracIn to whoever chose neither estimator nor rates."""

    @functools.wraps(method)
    def ask(self: Tracer, /, *args: P.args, **kwargs: P.kwargs) -> Answer:
        if len(args) < 2 and "estimator" not in kwargs and not self._said_default:
            self._said_default = True
            catalog = self.store.catalog
            if all(self.store.table_attributes(each).get("learning_rate") is None for each in catalog.checkpoint_ids()):
                logger.warning(
                    "finalize_scores() gives TracIn with weight 1 for each checkpoint; pass estimator='trak' for TRAK "
                    "(Park et al. 2023), 'influence' for what training without an example would change, or 'tracin' to "
                    "silence this."
                )
        return method(self, *args, **kwargs)

    return ask


@takes_settings(FeatureOptions)
class Tracer:
    """Traces a model's behavior to training examples, from checkpoints of its training (TracIn, Pruthi et al. 2020).

    First all training examples are featurized at every checkpoint, then all targets are scored at the same checkpoints.
    Scores are sums over checkpoints of learning-rate-weighted inner products of loss gradients. Everything is stored in
    ``save_dir``, and resumed from there. The model is not changed: weights, modes, flags, hooks and random state.

    Args:
        model: The model. Its own weights do not matter: each checkpoint's are lent to it for each batch.
        task: A name (``classification``, ``image_classification``, ``text_classification``,
            ``binary_classification``, ``regression``, ``language_modeling``, ``masked_language_modeling``, ``seq2seq``,
            ``token_classification``, ``question_answering``), a function ``(model, batch) -> loss [B]``, a loss of
            ``(outputs, labels)`` such as `torch.nn.CrossEntropyLoss`, or a `Task`.
        train_set_size: The number of training examples ``N``.
        save_dir: The directory or URL of the store, which is created if it does not exist.
        proj_dim: The number of values ``k`` stored of an example's gradient; inner products have a relative RMS error
            of about ``1/sqrt(k)``. Ignored by ``projector="none"``. Default: 4096.
        **options: The settings.

    Attributes:
        model: The model without wrappers.
        reader: The store reader, which answers questions without a model.
        store: The store.
        device: The device to compute on.
        process: This process among those that share the work.

    Raises:
        InputError: If a setting is unknown or out of range.
        InputTypeError: If a setting has an invalid type or an unknown name.
        MismatchError: If the store in ``save_dir`` was made with other settings.
        StoreError: If ``save_dir`` holds something else, or a store of another format version.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Any,
        train_set_size: int,
        save_dir: str | os.PathLike[str],
        proj_dim: int = FeatureSettings.proj_dim,
        **options: Unpack[FeatureOptions],
    ) -> None:
        settings = feature_settings({"proj_dim": proj_dim, **options}, "Tracer")
        self._factory = FeaturizerFactory(model, task, settings)
        self._backend = self._factory.backend
        process = this_process(settings.process)
        manifest = self._factory.manifest(check_count(train_set_size, "train_set_size"))

        def opened(resume: bool) -> Store:
            return Store.open(save_dir, manifest, resume=resume, processes=process.count)

        # Several processes may create the store at once. If it must not exist, only the first one looks.
        if self._backend.is_sharded:
            with self._backend.rank_zero_first() as first:
                store = opened(settings.resume or not first)
        else:
            if not settings.resume:
                process.rank_zero_only(lambda: opened(False))
            store = opened(settings.resume or process.together)
        self.reader = StoreReader(store, self._factory.device, process, settings.memory_bytes, settings.progress)
        self.model, self.device, self.process = self._factory.model, self._factory.device, process
        self._factory.use_fallback(store.manifest.info.get("fallback", {}))
        self._sources = CheckpointSources()
        self._session: Session | None = None
        self._said_default = False

    open = StoreReader.open

    @property
    def store(self) -> Store:
        """The store."""
        return self.reader.store

    @property
    def train_set_size(self) -> int:
        """The number of training examples ``N``."""
        return self.reader.train_set_size

    def load_checkpoint(self, checkpoint: Checkpoint, model_id: int, learning_rate: float | None = None) -> None:
        """Select the checkpoint for `featurize`, and reset the count of ``num_samples`` to 0.

        Args:
            checkpoint: A mapping with the model's state dict, or the path of a file (read with ``weights_only=True``)
                or a directory of Hugging Face or peft with one. With a ``preconditioner``, it holds the optimizer's
                state dict too.
            model_id: The checkpoint's number in the store, 0 or more.
            learning_rate: The weight of the checkpoint's scores. Another value for a known checkpoint replaces the
                stored one; None keeps it, or gives all checkpoints the weight 1.

        Raises:
            CheckpointError: If it cannot be read safely, or does not fit the model.
            MismatchError: If the store holds other weights under this ``model_id``.
            InputError: If the store holds the same weights under another ``model_id``.
        """
        model_id, rate = check_model_id(model_id), check_rate(learning_rate)
        with self._all_ranks():
            self._start(begin_featurizing(self._factory, self.store, self._sources, checkpoint, model_id, rate))

    def featurize(
        self, batch: Batch, inds: ExampleIndices | None = None, num_samples: int | None = None, ids: Any = None
    ) -> None:
        """Compute and store the features of a batch of training examples at the loaded checkpoint.

        Stored examples are recognized and not computed again.

        Args:
            batch: The batch, as the task takes it, on any device.
            inds: The indices of its examples in the training set, ``[B]``; or
            num_samples: the number of examples ``B``, counted on from the batch before.
            ids: The id of each example, ``[B]``: texts, integers or paths. They are stored and shown with the indices;
                pass them at one checkpoint, or all at once by `set_ids`.

        Raises:
            CallOrderError: If no checkpoint is loaded.
            InputError: If both or neither of ``inds`` and ``num_samples`` are passed, or an id names two examples.
            BatchError: If the batch does not fit the indices, the model or the task.
            MismatchError: If an example's inputs, or its id, differ from those stored for its index.
            NonFiniteError: If a gradient is NaN or infinite; nothing of the batch is stored.
        """
        in_role(self._session, FEATURIZE).write(batch, inds, num_samples, ids)

    def start_scoring_checkpoint(self, checkpoint: Checkpoint, model_id: int, num_targets: int, exp_name: str) -> None:
        """Select the checkpoint and the set of targets for `score`, and reset the count of ``num_samples`` to 0.

        Args:
            checkpoint: The checkpoint that was featurized under ``model_id``.
            model_id: Its number in the store.
            num_targets: The number of targets ``M``.
            exp_name: The name of this set of targets.

        Raises:
            CallOrderError: If the checkpoint was not featurized and finalized.
            MismatchError: If the weights differ, or ``exp_name`` has another number of targets.
            CheckpointError: If the checkpoint cannot be read safely, or does not fit the model.
        """
        model_id, num_targets = check_model_id(model_id), check_count(num_targets, "num_targets")
        with self._all_ranks():
            check_finalized(self.store, model_id)
            given = (checkpoint, model_id, num_targets, exp_name)
            self._start(begin_scoring(self._factory, self.store, self._sources, *given))

    def score(
        self, batch: Batch, inds: ExampleIndices | None = None, num_samples: int | None = None, ids: Any = None
    ) -> None:
        """Compute and store the features of a batch of targets; arguments and errors as for `featurize`.

        Args:
            batch: The batch, as the task takes it, on any device.
            inds: The indices of its examples among the targets, ``[B]``; or
            num_samples: the number of examples ``B``, counted on from the batch before.
            ids: The id of each target, ``[B]``.
        """
        in_role(self._session, SCORE).write(batch, inds, num_samples, ids)

    def flush(self) -> None:
        """Make everything that was computed durable."""
        if self._session is not None:
            self._session.flush()

    def close(self) -> None:
        """Flush and release the store's files; `load_checkpoint` opens them again.

        Raises:
            RankError: If the model is sharded and another rank failed. All ranks must call this, and wait here until
                the last one has written its batches.
        """
        if self._session is not None:
            self._session.join()
            session, self._session = self._session, None
            session.close()

    def __enter__(self) -> Tracer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._session is not None:
            session, self._session = self._session, None
            session.abandon(error)
        self.close()

    def shard(self, dataset: Any) -> Subset:
        """Return this process's share; see `StoreReader.shard`. While targets are scored, of as many targets."""
        session = self._session
        if session is not None and session.role == SCORE and session.table.num_rows == len(dataset):
            return Subset(dataset, self.process.rows(len(dataset), session.table.chunk_rows))
        return self.reader.shard(dataset)

    def _finish_batches(self) -> None:
        # The ranks of a sharded model may be at different batches, whose rows are needed too.
        self.close() if self._backend.is_sharded else self.flush()

    finalize_features = _asks(StoreReader.finalize_features, _finish_batches)
    finalize_scores = _says_default(_asks(StoreReader.finalize_scores, _finish_batches))
    top = _asks(StoreReader.top, _finish_batches)
    self_influence = _asks(StoreReader.self_influence, _finish_batches)
    changes_without = _asks(StoreReader.changes_without, _finish_batches)
    regularization = _asks(StoreReader.regularization, _finish_batches)
    build_index = _asks(StoreReader.build_index, _finish_batches)
    remaining = _asks(StoreReader.remaining, flush)
    ids = _asks(StoreReader.ids, flush)
    set_ids = _asks(StoreReader.set_ids, flush)
    grow = _asks(StoreReader.grow, close)
    replace = _asks(StoreReader.replace, close)
    fit_curvature = curvature.fit_curvature
    fit_kernel = hidden_curvature.fit_kernel
    score_exactly = exact_scores.score_exactly
    query = query.query

    def _start(self, session: Session) -> None:
        if self._session is not None:
            self._session.table.close()
        self._session = session

    @contextmanager
    def _all_ranks(self) -> Iterator[None]:
        """End the batches of all ranks of a sharded model before the block, and fail in it together."""
        self._finish_batches()
        with self._backend.step():
            yield
