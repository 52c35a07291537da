"""Queries: the strongest training examples of targets that are not in the store."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from tracer._core.validation import check_count, check_integer
from tracer.api.featurizer import Featurizer
from tracer.api.featurizer_factory import LoadedCheckpoint, check_weights
from tracer.api.sinks import RowValues
from tracer.data.batches import check_batch_size, count_samples
from tracer.data.indices import ExampleSelection
from tracer.errors import CallOrderError, InputError
from tracer.gradients import GradientsChanged
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import InMemoryTable
from tracer.scoring.scorer import Labels
from tracer.scoring.search_index import check_indexed
from tracer.types import Batch, TopK

if TYPE_CHECKING:
    from tracer.api.tracer import Tracer


def query(
    _tracer: Tracer,
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
    checkpoint_dirs: Sequence[str | os.PathLike[str]] | None = None,
    candidates: int = 0,
) -> TopK:
    """Return the strongest training examples of a few targets at once, without storing anything.

    The answer is that of `score` and `top`, from one pass over the stored features. Each checkpoint's weights come from
    the path that `load_checkpoint` or `start_scoring_checkpoint` was given, which the store remembers for other
    processes, or from the state dict that was passed in this process, which stays in memory. A session that is
    featurizing or scoring is not disturbed.

    Args:
        batch: The targets, as the task takes them, on any device.
        k: The number of training examples for each target.
        kind: As in `top`.
        estimator: As in `finalize_scores`; with ``trackstar`` gradients are whitened by the second moments of the
            training examples alone, since a batch's own would make an answer depend on what else is in the batch.
        model_ids: The checkpoints. Default: all in the store.
        rows: Only these training examples, as in `top`.
        labels: Only training examples of these classes.
        target: As in `finalize_scores`.
        regularization: As in `finalize_scores`.
        checkpoint_dirs: The folders below which the store's paths of checkpoints are followed, since a store may come
            from others. Default: the folder that holds the store.
        candidates: Rank only so many training examples for each target, which the index of `build_index` finds; a
            thousand or so hold nearly all of the hundred strongest ones. 0: rank all of them.

    Returns:
        Indices and scores, ``[B, k]`` each, strongest first.

    Raises:
        InputError: If a name is unknown, or ``k`` or ``rows`` is out of range.
        CallOrderError: If a checkpoint is not finalized, its weights are not known or not in ``checkpoint_dirs``, or
            ``storage`` is ``none``.
        MismatchError: If a checkpoint's weights have changed.
        BatchError: If the batch does not fit the model or the task.
        NonFiniteError: If a target's gradient is NaN or infinite.
        GradientsChanged: If stored gradients turn out to be wrong: they are forgotten, and to be computed again.
    """
    estimate = Estimate(estimator, target, regularization)
    store = _tracer.store
    instead = "call tracer.score_exactly(checkpoint, model_id, train, targets, exp_name) and tracer.top, or "
    store.manifest.feature_storage.require_features("query", instead)
    check_plain(_tracer, "query()")
    _tracer.flush()
    chosen, indices = _tracer.reader.check_query(k, kind, estimate, model_ids, rows, labels)
    if check_integer(candidates, "candidates", 0):
        check_candidates(candidates, k, estimate)
        if rows is not None or labels is not None:
            raise InputError("candidates= are found among all training examples; leave out rows= and labels=.")
    batch = _tracer._factory.form_of("targets").batch(batch)
    num_rows = check_count(count_samples(batch), "the number of examples in the batch")
    check_batch_size(batch, num_rows)
    targets = fresh_targets(_tracer, [(batch, num_rows)], chosen, checkpoint_dirs)
    return _tracer.reader.query(targets, chosen, indices, k, kind, estimate, candidates)


def check_candidates(candidates: int, k: int, estimate: Estimate) -> None:
    """Raise InputError if candidates are fewer than what is asked for, or the estimator has no index."""
    check_indexed(estimate)
    if candidates < k:
        raise InputError(f"candidates={candidates} is less than k={k}; expected at least k, better ten times as many.")


def check_plain(tracer: Tracer, call: str) -> None:
    """Raise `CallOrderError` if the model is sharded."""
    if tracer._factory.backend.is_sharded:
        raise CallOrderError(
            f"{call} got an FSDP model; call it with the plain model, in one process, on the same save_dir, or score "
            "the targets and call tracer.top."
        )


def loaded_checkpoint(
    tracer: Tracer, model_id: int, checkpoint_dirs: Sequence[str | os.PathLike[str]] | None
) -> LoadedCheckpoint:
    """Return a checkpoint of the store with its weights, from where they were; see `query` for errors."""
    table = tracer.store.checkpoint(model_id)
    loaded = tracer._factory.read(tracer._sources.find(model_id, table, checkpoint_dirs))
    check_weights(table, loaded.fingerprint, model_id)
    return loaded


@contextmanager
def featurizing(
    tracer: Tracer, loaded: LoadedCheckpoint, model_id: int, exp_name: str | None = "targets"
) -> Iterator[Featurizer]:
    """Make a featurizer of targets, or of training examples (None), for a block, which disturbs no session."""
    factory = tracer._factory
    engine = factory.engine_of(exp_name)
    with engine.using_weights(loaded.fingerprint):
        try:
            yield factory.make(loaded, model_id, tracer.store, engine)
        except GradientsChanged as change:
            factory.forget(tracer.store, change)
            raise


def fresh_targets(
    tracer: Tracer,
    batches: Iterable[tuple[Batch, int]],
    model_ids: Sequence[int],
    checkpoint_dirs: Sequence[str | os.PathLike[str]] | None,
    alike: bool = False,
) -> list[InMemoryTable]:
    """Return the features of targets at each checkpoint, from batches and their sizes.

    They are rounded as stored rows are; with ``alike`` equal ones are rounded alike, whatever their place.
    """
    batches, storage = list(batches), tracer.store.manifest.feature_storage.of_targets
    targets = []
    for model_id in model_ids:
        with featurizing(tracer, loaded_checkpoint(tracer, model_id, checkpoint_dirs), model_id) as featurizer:
            values = [featurizer.compute(batch, num_rows) for batch, num_rows in batches]
        targets.append(_table(values, storage, alike))
    return targets


def _table(values: Sequence[RowValues], storage: str, alike: bool) -> InMemoryTable:
    features = np.concatenate([each.features for each in values if each.features is not None])  # there is a projector
    loss_grad, norm = (np.concatenate([getattr(each, name) for each in values]) for name in _COLUMNS)
    rows = np.zeros(len(features), np.int64) if alike else np.arange(len(features))
    return InMemoryTable(features, loss_grad, norm, storage, rows)


_COLUMNS = "loss_grad", "gradient_norm"
