"""Evidence on the labels of a store: predictions without what the model learned from each example, and its quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tracer.report.label_noise import MIN_HELD_OUT, MIN_KAPPA, LabelEvidence, WrongLabels, estimate_wrong_labels
from tracer.store import RowTable, Store
from tracer.store.table_schema import NO_LABEL

_MARGIN = 0.1  # checkpoints whose held-out agreement is within this of the best one's are used

_MAX_GAP = 0.03  # with more, the step without an example does not undo what the model learned from it
_OTHERWISE = (
    "Or estimate the share by cross-validation, which holds for weak models too (tracer.retraining.cross_validate), or "
    "pass out-of-sample probabilities as train_probabilities."
)
_FLAT = 0.01  # losses that differ less on average, relative to the largest mean, are the same
_FITTED = 0.02  # how far the loss must be below that of a constant prediction


def evidence_of(table: RowTable, change: np.ndarray | float = 0.0) -> LabelEvidence | None:
    """Return the evidence of one checkpoint, with f moved by ``change [n]``; None if an example has no classes."""
    label, rival = table.column("label"), table.column("rival")
    if (label == NO_LABEL).any() or (rival == NO_LABEL).any():
        return None
    return LabelEvidence.of_losses(label, table.column("loss"), rival, table.column("rival_share"), change)


def held_out_evidence(store: Store, exp_name: str, model_ids: Sequence[int]) -> list[LabelEvidence] | None:
    """Return the evidence on targets that are no training examples at each checkpoint; None without classes."""
    if exp_name not in store.catalog.exp_names():
        return None
    known = store.checkpoint(model_ids[0]).column("fingerprint")
    targets = store.targets(exp_name, model_ids[0]).column("fingerprint")
    new = (targets == 0) | ~np.isin(targets, known)  # a fingerprint of 0 was not taken
    found = [evidence_of(store.targets(exp_name, model_id)) for model_id in model_ids]
    return None if None in found else [each.select(new) for each in found if each is not None]


def _gap(train: LabelEvidence, held_out: LabelEvidence) -> float:
    """Return by how much more training labels than held-out ones are predicted, beyond two standard errors."""
    (share, _), (other, _) = train.accuracy(), held_out.accuracy()
    pooled = max(share * (1 - share) / len(train.label) + other * (1 - other) / len(held_out.label), 0.0)
    return share - other - 2 * pooled**0.5


def label_health(
    store: Store, exp_name: str, model_ids: Sequence[int], changes: Callable[[list[int]], list[np.ndarray]] | None
) -> WrongLabels | str:
    """Return the estimate of wrong labels, or the reason why there is none.

    Args:
        store: A store whose features are finalized.
        exp_name: The name of the targets.
        model_ids: The checkpoints.
        changes: Returns, for each of the checkpoints, how f of each training example would change without the example,
            ``[N]``; None if the store has no features.
    """
    held_out = held_out_evidence(store, exp_name, model_ids)
    plain = [evidence_of(store.checkpoint(model_id)) for model_id in model_ids]
    if held_out is None or None in plain:
        return "it needs training examples and targets of a classification task."
    size = len(held_out[0].label)
    if size < MIN_HELD_OUT:
        return (
            f"it needs {MIN_HELD_OUT} targets or more that are no training examples, and there are {size}. {_OTHERWISE}"
        )
    agreement = np.array([each.kappa() for each in held_out])
    best = held_out[int(agreement.argmax())]
    if not best.tells_classes_apart():
        share, chance = best.accuracy()
        return (
            f"the scores do not tell classes apart. At its best checkpoint the model predicts {share:.0%} of the "
            f"labels of {size:,} held-out targets; chance predicts {chance:.0%}, and an estimate needs "
            f"{chance + MIN_KAPPA * (1 - chance):.0%}. {_OTHERWISE}"
        )
    if changes is None:
        return (
            'the store has no features (storage="none"), so what the model learned from each label itself is unknown. '
            f"Store them. {_OTHERWISE}"
        )
    gaps = [_gap(part, other) for part, other in zip(plain, held_out, strict=True) if part is not None]
    used = np.flatnonzero((agreement >= agreement.max() - _MARGIN) & (np.array(gaps) <= _MAX_GAP)).tolist()
    if not used:
        return (
            "the model has learned training labels by heart: it predicts far more of them than of held-out labels at "
            f"each checkpoint that tells classes apart. Save earlier checkpoints. {_OTHERWISE}"
        )
    if store.manifest.is_collected:
        return (
            "the store has sums over the steps of a training, collected by GradientCollector, from which it is unknown "
            f"what the model learned from each label itself. {_OTHERWISE}"
        )
    moved = changes(list(model_ids))
    corrected = [evidence_of(store.checkpoint(model_ids[place]), moved[place]) for place in used]
    return estimate_wrong_labels(
        LabelEvidence.mean([each for each in corrected if each is not None]),
        LabelEvidence.mean([held_out[place] for place in used]),
        LabelEvidence.mean([each for place, each in enumerate(plain) if each is not None and place in used]),
    )


def model_warnings(store: Store, exp_name: str, model_ids: Sequence[int]) -> list[str]:
    """Return sentences that say why scores of this model mean little; none for a model that has learned something."""
    tables = [store.checkpoint(model_id) for model_id in model_ids]
    columns = [table.column("loss").astype(np.float64) for table in tables]
    losses = [float(column.mean()) for column in columns]
    found = []
    # Examples whose losses rise and fall may leave the mean as it is.
    changes = [float(np.abs(column - columns[-1]).mean()) for column in columns]
    if len(losses) > 1 and max(changes) < _FLAT * abs(max(losses)):
        found.append(
            f"The training examples have the same losses, on average {losses[-1]:.4g}, at all {len(losses)} "
            "checkpoints: training has changed nothing, or the checkpoints are the same."
        )
    parts = [evidence_of(table) for table in tables]
    train = [part for part in parts if part is not None]
    if len(train) < len(parts):
        return found
    frequencies = np.unique(train[0].label, return_counts=True)[1] / len(train[0].label)
    constant = -float(frequencies @ np.log(frequencies))
    if min(losses) > (1 - _FITTED) * constant > 0:
        share, chance = max(part.accuracy() for part in train)
        found.append(
            f"The model has not fitted the labels: the mean loss of the training examples is {min(losses):.3g} at "
            f"best, and {constant:.3g} if every prediction is the class frequencies. It predicts {share:.0%} of the "
            f"labels; chance predicts {chance:.0%}. Scores of such a model say little."
        )
    held_out = held_out_evidence(store, exp_name, model_ids)
    if held_out is not None and len(held_out[0].label) >= MIN_HELD_OUT and len(np.unique(held_out[0].label)) > 1:
        best = max(held_out, key=LabelEvidence.kappa)
        share, chance = best.accuracy()
        if share - chance < 2 * (chance * (1 - chance) / len(best.label)) ** 0.5:
            found.append(
                f"The model is no better than chance on targets: it predicts {share:.0%} of the labels of the "
                f"{len(best.label):,} that are no training examples; chance predicts {chance:.0%}."
            )
    return found
