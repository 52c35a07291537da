"""Checks before scoring: checkpoints are finalized, targets are complete, learning rates are known."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from tracer._core.progress import tqdm
from tracer._core.validation import as_list, bar_disabled, check_model_id, complete_rates
from tracer.errors import CallOrderError, IncompleteError, InputError, nearest_name
from tracer.store import RowTable, ScoreArray, Store
from tracer.store.revisions import Revisions

logger = logging.getLogger("tracer")


def finalize_features(store: Store, model_ids: list[int] | None, progress: bool | None = None) -> None:
    """Mark checkpoints (None: all) as finalized, or raise `IncompleteError` if training examples are missing."""
    disable = bar_disabled(progress)
    for model_id in tqdm(checkpoint_ids(store, model_ids), desc="finalize", unit="checkpoint", disable=disable):
        table = store.checkpoint(model_id)
        missing = table.remaining()
        if len(missing):
            raise IncompleteError(
                f"Checkpoint {model_id} lacks {len(missing)} of {table.num_rows} training examples, first "
                f"{missing[:5].tolist()}. Featurize them (tracer.remaining({model_id}) lists them all) and "
                f"finalize again."
            )
        if not table.attributes.get("finalized"):
            table.set_attributes(finalized=True)


def check_finalized(store: Store, model_id: int) -> None:
    """Raise `CallOrderError` if a checkpoint is not finalized, `IncompleteError` if files of it are gone since then."""
    if not store.catalog.has_checkpoint(model_id):
        known = store.catalog.checkpoint_ids()
        raise CallOrderError(
            f"Checkpoint {model_id} is not in the store, which has {known}. Featurize all training examples at it and "
            f"call tracer.finalize_features() before scoring."
        )
    _check_table(store.checkpoint(model_id), model_id)


def _check_table(table: RowTable, model_id: int) -> None:
    if not table.attributes.get("finalized"):
        raise CallOrderError(
            f"Checkpoint {model_id} is not finalized; call tracer.finalize_features() once all training examples are "
            f"featurized ({len(table.remaining())} are missing), or choose other checkpoints by model_ids=. A "
            f"checkpoint that was loaded by mistake is removed with its directory {table.path}."
        )
    missing = table.num_rows - table.num_done
    if missing:
        raise IncompleteError(
            f"Checkpoint {model_id} was finalized and now lacks {missing} of {table.num_rows} training examples: files "
            f"are gone. Restore them, or call tracer.replace(tracer.remaining({model_id})), which removes what was "
            f"computed from these examples too, featurize them and finalize again."
        )


def checkpoint_ids(store: Store, model_ids: list[int] | None) -> list[int]:
    """Return the chosen checkpoints (None: all in the store), each of which must be in the store and chosen once."""
    known = store.catalog.checkpoint_ids()
    if not known:
        raise CallOrderError("The store has no checkpoint; call load_checkpoint and featurize first.")
    if model_ids is None:
        store.catalog.check_documents()
        return known
    chosen = [check_model_id(model_id) for model_id in as_list(model_ids, "model_ids")]
    unknown = [model_id for model_id in chosen if model_id not in known]
    if not chosen:
        raise InputError(f"model_ids={chosen} chooses no checkpoint; the store has {known}, and None chooses all.")
    if unknown:
        raise InputError(f"model_ids={chosen}: {unknown} is not in the store, which has {known}.")
    if len(set(chosen)) < len(chosen):
        raise InputError(f"model_ids={chosen} has a checkpoint more than once; each counts once.")
    return chosen


def finalized_revisions(store: Store, model_ids: list[int] | None, exp_name: str | None = None) -> Revisions:
    """Return the revisions of the chosen checkpoints (None: all) and a target set, after `check_finalized`."""
    chosen = checkpoint_ids(store, model_ids)
    if exp_name is not None:
        for model_id in chosen:
            _check_scored(store, exp_name, model_id)
    # Before anything is checked or read: if a table changes from here on, `Revisions.check` fails.
    revisions = Revisions(store, chosen, exp_name)
    for model_id, table in zip(chosen, revisions.checkpoints, strict=True):
        _check_table(table, model_id)
    return revisions


def learning_rates(store: Store, model_ids: Sequence[int]) -> list[float]:
    """Return each checkpoint's learning rate, read now so that a corrected one counts; 1 for all if none has one."""
    rates = [store.table_attributes(model_id).get("learning_rate") for model_id in model_ids]
    advice = "Pass it: tracer.load_checkpoint(checkpoint, model_id=..., learning_rate=...)."
    return complete_rates(model_ids, rates, advice)


def target_table(store: Store, exp_name: str, model_id: int) -> RowTable:
    """Return the targets of an experiment at a checkpoint, some of which may be missing."""
    _check_scored(store, exp_name, model_id)
    return store.targets(exp_name, model_id)


def _check_scored(store: Store, exp_name: str, model_id: int) -> None:
    if not store.catalog.has_targets(exp_name, model_id):
        known = store.catalog.exp_names()
        if not known:
            raise InputError("the store has no targets; pass targets to attribute, or score some with a Tracer.")
        if exp_name not in known:
            raise InputError(f"exp_name={exp_name!r} was never scored; {nearest_name(exp_name, known)}.")
        scored = [each for each in store.catalog.checkpoint_ids() if store.catalog.has_targets(exp_name, each)]
        raise IncompleteError(
            f"Targets {exp_name!r} were not scored at checkpoint {model_id}. Call start_scoring_checkpoint and "
            f"score for it, or choose the checkpoints {scored} by model_ids=."
        )


def complete_targets(store: Store, exp_name: str, model_ids: Sequence[int]) -> list[RowTable]:
    """Return the targets of an experiment at each checkpoint, or raise `IncompleteError` if any is missing."""
    tables = []
    for model_id in model_ids:
        targets = target_table(store, exp_name, model_id)
        missing = targets.remaining()
        if len(missing):
            raise IncompleteError(
                f"{len(missing)} of {targets.num_rows} targets {exp_name!r} are missing at checkpoint {model_id}, "
                f"first {missing[:5].tolist()}. Score them and finalize again."
            )
        tables.append(targets)
    return tables


def complete_cosines(store: Store, exp_name: str, model_id: int, targets: RowTable) -> list[tuple[int, ScoreArray]]:
    """Return the blocks of exact cosines at a checkpoint, each with its first target; all targets must have them."""
    blocks = store.results.cosines(exp_name, Revisions(store, [model_id], exp_name))
    end = sum(block.shape[1] for _, block in blocks if block.complete)
    if end < targets.num_rows:
        raise IncompleteError(
            f"Of {targets.num_rows} targets {exp_name!r} at checkpoint {model_id}, {end} were compared with all "
            f"training examples. With storage='none' features are not stored, so tracer.score_exactly (or attribute) "
            f"needs training examples and targets together; call it again for this checkpoint."
        )
    return blocks


def warn_of_processes(store: Store, count: int) -> None:
    """Log a warning if a store is opened by one of several processes and was made for another number of them."""
    made_for = store.manifest.layout["processes"]
    if count > 1 and count != made_for:
        logger.warning(
            "%s was made for %d processes and this is one of %d: parts of processes that still work as one of %d "
            "would overlap with this one's",
            store.path,
            made_for,
            count,
            made_for,
        )
