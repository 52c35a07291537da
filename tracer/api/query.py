"""Queries: the strongest training examples of targets that are not in the store."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tracer.api.featurizer_factory import check_weights
from tracer.data.batches import check_batch_size, count_samples
from tracer.data.indices import ExampleSelection
from tracer.errors import CallOrderError
from tracer.gradients import GradientsChanged
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import InMemoryTable
from tracer.scoring.scorer import Labels
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
        estimator: As in `finalize_scores`.
        model_ids: The checkpoints. Default: all in the store.
        rows: Only these training examples, as in `top`.
        labels: Only training examples of these classes.
        target: As in `finalize_scores`.
        regularization: As in `finalize_scores`.
        checkpoint_dirs: The folders below which the store's paths of checkpoints are followed, since a store may come
            from others. Default: the folder that holds the store.

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
    factory, store = _tracer._factory, _tracer.store
    instead = "call tracer.score_exactly(checkpoint, model_id, train, targets, exp_name) and tracer.top, or "
    store.manifest.feature_storage.require_features("query", instead)
    if factory.backend.is_sharded:
        raise CallOrderError(
            "query() got an FSDP model; call it with the plain model, in one process, on the same save_dir, or score "
            "the targets and call tracer.top."
        )
    _tracer.flush()
    chosen, indices = _tracer.reader.check_query(k, kind, estimate, model_ids, rows, labels)
    batch = factory.form_of("targets").batch(batch)
    num_rows, targets = count_samples(batch), []
    check_batch_size(batch, num_rows)
    for model_id in chosen:
        table = store.checkpoint(model_id)
        loaded = factory.read(_tracer._sources.find(model_id, table, checkpoint_dirs))
        check_weights(table, loaded.fingerprint, model_id)
        featurizer = factory.make(loaded, model_id, store, factory.target_engine)
        with factory.target_engine.using_weights(loaded.fingerprint):
            try:
                values = featurizer.compute(batch, num_rows)
            except GradientsChanged as change:
                factory.forget(store, change)
                raise
        assert values.features is not None  # there is a projector
        fresh = values.features, values.loss_grad, values.gradient_norm
        targets.append(InMemoryTable(*fresh, store.manifest.feature_storage.of_targets))  # rounded as stored rows are
    return _tracer.reader.query(targets, chosen, indices, k, kind, estimate)
