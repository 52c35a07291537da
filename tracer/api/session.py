"""A session: one checkpoint that is being featurized or scored."""

from __future__ import annotations

import logging

from tracer.api.checkpoint_sources import CheckpointSources
from tracer.api.featurizer import Featurizer
from tracer.api.featurizer_factory import FeaturizerFactory, LoadedCheckpoint, check_weights
from tracer.data.indices import ExampleIndices, IndexCursor
from tracer.errors import CallOrderError, MismatchError
from tracer.store import RowTable, Store
from tracer.types import Batch, Checkpoint

logger = logging.getLogger("tracer")

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
        featurizer: Computes rows at the checkpoint.
        compared: A table of the same examples at another checkpoint, whose fingerprints must be equal, or None.

    Attributes:
        role: As passed.
        table: As passed.
        featurizer: As passed.
    """

    def __init__(self, role: str, table: RowTable, featurizer: Featurizer, compared: RowTable | None) -> None:
        self.role, self.table, self.featurizer = role, table, featurizer
        self._compared = compared
        self._backend = featurizer.engine.backend
        self._cursor = IndexCursor(table.num_rows, "train_set_size" if role == FEATURIZE else "num_targets")

    def write(self, batch: Batch, inds: ExampleIndices | None, num_samples: int | None) -> None:
        """Compute and store the rows of a batch that are not stored yet."""
        with self._backend.step():
            rows = self._cursor.indices(inds, num_samples)
            self.featurizer.write(self.table, batch, rows, self._compared)
        self._cursor.advance(num_samples)

    def flush(self) -> None:
        """Make everything that was computed durable."""
        self.table.flush()

    def join(self) -> None:
        """Run stand-ins until all ranks of a sharded model have written their batches."""
        self.featurizer.join()

    def close(self) -> None:
        """Make everything that was computed durable, and release the files."""
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
                logger.info("checkpoint %d: learning rate %s replaces %s", model_id, learning_rate, stored)
                table.set_attributes(learning_rate=learning_rate)
        else:
            sources.check_new(store, model_id, loaded.fingerprint)
            table = store.create_checkpoint(model_id, loaded.fingerprint, learning_rate)
        sources.remember(model_id, checkpoint, table)
    return _session(FEATURIZE, factory, table, loaded, model_id, store.other_checkpoint(model_id))


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
        table = target_table(store, exp_name, model_id, num_targets)
        sources.remember(model_id, checkpoint, known)
    return _session(SCORE, factory, table, loaded, model_id, store.other_targets(exp_name, model_id))


def target_table(store: Store, exp_name: str, model_id: int, num_targets: int) -> RowTable:
    """Return the table of a set of targets at a checkpoint, new or existing, or raise MismatchError by their number."""
    own = store.targets(exp_name, model_id) if store.catalog.has_targets(exp_name, model_id) else None
    for known in (own, store.other_targets(exp_name, model_id)):
        if known is not None and known.num_rows != num_targets:
            raise MismatchError(
                f"expected num_targets={known.num_rows}, as exp_name={exp_name!r} has at checkpoint {known.path.name}, "
                f"got num_targets={num_targets}; pass num_targets={known.num_rows}, or choose another exp_name."
            )
    if own is not None:
        return own
    return store.create_targets(exp_name, model_id, num_targets)


def _session(
    role: str,
    factory: FeaturizerFactory,
    table: RowTable,
    loaded: LoadedCheckpoint,
    model_id: int,
    compared: RowTable | None,
) -> Session:
    factory.engine.use_weights(loaded.fingerprint)
    return Session(role, table, factory.make(loaded, model_id), compared)
