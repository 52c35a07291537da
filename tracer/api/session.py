"""A session: one checkpoint that is being featurized or scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from tracer.api.checkpoint_sources import CheckpointSources
from tracer.api.featurizer import Featurizer
from tracer.api.featurizer_factory import FeaturizerFactory, LoadedCheckpoint, check_weights
from tracer.data.batches import leaves
from tracer.data.example_ids import check_ids
from tracer.data.fingerprints import fingerprint_samples
from tracer.data.indices import ExampleIndices, IndexCursor
from tracer.data.tables import InputForm
from tracer.errors import CallOrderError, MismatchError
from tracer.gradients import GradientsChanged
from tracer.store import RowTable, Store
from tracer.store.example_ids import ExampleIds
from tracer.types import Batch, Checkpoint

logger = logging.getLogger("tracer")

HELD_BYTES = 64 << 20
"""The bytes of batches that are held, to be computed again if their gradients turn out to be wrong."""

FEATURIZE, SCORE = "featurize", "score"
_MISSING = {
    FEATURIZE: "featurize needs a checkpoint; call tracer.load_checkpoint(checkpoint, model_id=0, learning_rate=...) "
    "first (and again after scoring).",
    SCORE: "score needs a checkpoint and targets; call tracer.start_scoring_checkpoint(checkpoint, model_id=0, "
    "num_targets=..., exp_name=...) first.",
}


class Session:
    """One checkpoint from `Tracer.load_checkpoint` or `Tracer.start_scoring_checkpoint` to the next one or to `close`.

    Args:
        role: `FEATURIZE` or `SCORE`.
        table: The table that batches are written to.
        open_table: Opens it again.
        featurizer: Computes rows at the checkpoint.
        compared: A table of the same examples at another checkpoint, whose fingerprints must be equal, or None.
        forget: Forgets everything that was computed, since gradients turned out to be wrong.
        loaded: The checkpoint.
        form: How the model takes arrays and tables.
        ids: The ids of the examples.

    Attributes:
        role: As passed.
        loaded: As passed.
        table: The table that batches are written to, as it was opened last.
        featurizer: As passed.
    """

    def __init__(
        self,
        role: str,
        table: RowTable,
        open_table: Callable[[], RowTable],
        featurizer: Featurizer,
        compared: RowTable | None,
        forget: Callable[[GradientsChanged], None],
        loaded: LoadedCheckpoint,
        form: InputForm,
        ids: ExampleIds,
    ) -> None:
        self.role, self.table, self.featurizer, self.loaded = role, table, featurizer, loaded
        self._open_table, self._compared, self._forget = open_table, compared, forget
        self._backend, self._form = featurizer.engine.backend, form
        self._cursor = IndexCursor(self.table.num_rows, "train_set_size" if role == FEATURIZE else "num_targets")
        self._ids = ids
        self._name_rows()
        self._held: list[tuple[Batch, np.ndarray]] = []
        self._held_bytes = 0

    def write(self, batch: Batch, inds: ExampleIndices | None, num_samples: int | None, ids: Any = None) -> None:
        """Compute and store the rows of a batch that are not stored yet, and their ids if they are given."""
        with self._backend.step():
            batch, rows = self._form.batch(batch), self._cursor.indices(inds, num_samples)
            if ids is not None:
                self._ids.add(rows, check_ids(ids, len(rows)))
            todo = [(batch, rows)]
            while todo:
                try:
                    self.featurizer.write(self.table, *todo[0], self._compared)
                    todo.pop(0)
                except GradientsChanged as change:
                    todo = [*self._start_again(change), (batch, rows)]
            self._hold(batch, rows)
        self._cursor.advance(num_samples)

    def _hold(self, batch: Batch, rows: np.ndarray) -> None:
        """Hold the last batches, as long as they are small."""
        size = sum(leaf.nbytes for _, leaf in leaves(batch) if isinstance(leaf, Tensor))
        if self._held_bytes + size > HELD_BYTES or not self.featurizer.check_rows:
            self._held, self._held_bytes = [], 0
        if size <= HELD_BYTES and self.featurizer.check_rows:
            self._held.append((batch, rows))
            self._held_bytes += size

    def _start_again(self, change: GradientsChanged) -> list[tuple[Batch, np.ndarray]]:
        """Forget everything that was computed; return the held batches, which are computed again at once."""
        self.table.close()
        fingerprints = self.table.column("fingerprint")
        # A loader may have used a batch's memory again.
        same = [
            (batch, rows)
            for batch, rows in self._held
            if np.array_equal(fingerprint_samples(batch, len(rows)), fingerprints[rows])
        ]
        self._forget(change)
        self.table = self._open_table()
        self._name_rows()
        return same

    def _name_rows(self) -> None:
        for table in (self.table, self._compared):
            if table is not None:
                table.name_rows(self._ids.named)

    def flush(self) -> None:
        """Make everything that was computed durable."""
        self._ids.flush()
        self.table.flush()

    def reopen(self) -> None:
        """Open the table again, whose rows may have been forgotten."""
        self.table.close()
        self.table = self._open_table()
        self._name_rows()

    def join(self) -> None:
        """Run stand-ins until all ranks of a sharded model have written their batches."""
        self.featurizer.join()

    def close(self) -> None:
        """Make everything that was computed durable, and release the files."""
        self._ids.flush()
        self.table.close()
        self._backend.joined()

    def abandon(self, error: BaseException) -> None:
        """Announce an error to other ranks, and close without waiting for them."""
        self._backend.abandon(error)
        self.table.close()


def in_role(session: Session | None, role: str) -> Session:
    """Return the session if it has a role, or raise CallOrderError."""
    if session is None or session.role != role:
        raise CallOrderError(_MISSING[role])
    return session


def begin_featurizing(
    factory: FeaturizerFactory,
    store: Store,
    sources: CheckpointSources,
    checkpoint: Checkpoint,
    model_id: int,
    learning_rate: float | None,
) -> Session:
    """Begin to featurize at a checkpoint, which the store may know or not; see `tracer.Tracer.load_checkpoint`."""
    loaded = factory.read(checkpoint)
    agreed = (model_id, learning_rate, loaded.fingerprint)
    with factory.backend.rank_zero_first("model_id, learning_rate and weights", agreed):
        if store.catalog.has_checkpoint(model_id):
            table = store.checkpoint(model_id)
            check_weights(table, loaded.fingerprint, model_id)
            stored = table.attributes.get("learning_rate")
            if learning_rate is not None and learning_rate != stored:
                store.require_gradients(f"learning_rate={learning_rate} in place of {stored}")
                logger.info("checkpoint %d: learning rate %s replaces %s", model_id, learning_rate, stored)
                table.set_attributes(learning_rate=learning_rate)
        else:
            store.require_gradients("another checkpoint")
            sources.check_new(store, model_id, loaded.fingerprint)
            table = store.create_checkpoint(model_id, loaded.fingerprint, learning_rate)
        sources.remember(model_id, checkpoint, table)
    compared = store.other_checkpoint(model_id)
    return _session(factory, store, loaded, model_id, None, table, lambda: store.checkpoint(model_id), compared)


def begin_scoring(
    factory: FeaturizerFactory,
    store: Store,
    sources: CheckpointSources,
    checkpoint: Checkpoint,
    model_id: int,
    num_targets: int,
    exp_name: str,
) -> Session:
    """Begin to score targets at a finalized checkpoint; see `tracer.Tracer.start_scoring_checkpoint`."""
    loaded, known = factory.read(checkpoint), store.checkpoint(model_id)
    check_weights(known, loaded.fingerprint, model_id)
    agreed = (model_id, num_targets, exp_name, loaded.fingerprint)
    with factory.backend.rank_zero_first("arguments", agreed):
        table = target_table(store, exp_name, model_id, num_targets, factory.target_settings)
        sources.remember(model_id, checkpoint, known)
    compared = store.other_targets(exp_name, model_id)
    reopen = partial(store.targets, exp_name, model_id)
    return _session(factory, store, loaded, model_id, exp_name, table, reopen, compared)


def target_table(
    store: Store, exp_name: str, model_id: int, num_targets: int, task: Mapping[str, Any] | None
) -> RowTable:
    """Return the table of a set of targets at a checkpoint, new or existing.

    Raises:
        MismatchError: If the set has another number of targets, or another task of its own.
    """
    own = store.targets(exp_name, model_id) if store.catalog.has_targets(exp_name, model_id) else None
    for known in (own, store.other_targets(exp_name, model_id)):
        if known is not None and known.num_rows != num_targets:
            raise MismatchError(
                f"expected num_targets={known.num_rows}, as exp_name={exp_name!r} has at checkpoint {known.path.name}, "
                f"got num_targets={num_targets}; pass num_targets={known.num_rows}, or choose another exp_name."
            )
        stored = None if known is None else known.attributes.get("target_task")
        if known is not None and stored != task:
            raise MismatchError(
                f"expected target_task={_task_text(stored)}, as exp_name={exp_name!r} has at checkpoint "
                f"{known.path.name}, got {_task_text(task)}; pass the same one, or choose another exp_name."
            )
    if own is not None:
        return own
    return store.create_targets(exp_name, model_id, num_targets, target_task=task)


def _task_text(settings: Mapping[str, Any] | None) -> str:
    return "None (that of training examples)" if settings is None else str(dict(settings))


def _session(
    factory: FeaturizerFactory,
    store: Store,
    loaded: LoadedCheckpoint,
    model_id: int,
    exp_name: str | None,
    table: RowTable,
    open_table: Callable[[], RowTable],
    compared: RowTable | None,
) -> Session:
    engine = factory.engine_of(exp_name)
    engine.use_weights(loaded.fingerprint)
    factory.written.add(exp_name)
    role = FEATURIZE if exp_name is None else SCORE
    forget = partial(factory.forget, store)
    return Session(
        role,
        table,
        open_table,
        factory.make(loaded, model_id, store, engine),
        compared,
        forget,
        loaded,
        factory.form_of(exp_name),
        store.ids(exp_name),
    )
