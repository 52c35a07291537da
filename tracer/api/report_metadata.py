"""Labels, losses and settings that a store has for a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracer.report.samples import as_array
from tracer.store import RowTable, Store
from tracer.store.table_schema import NO_LABEL


@dataclass(frozen=True)
class StoreFacts:
    """Labels, losses and settings of a store.

    Attributes:
        train_labels: ``[N]``, int64; None if a training example has no label.
        target_labels: ``[M]``, int64; None if a target has no label.
        train_predictions: ``[N]``, int64, the classes that the last checkpoint predicts; None if they are unknown.
        target_predictions: ``[M]``, the same of targets.
        train_ids: The id of each training example; None if none has one.
        target_ids: The id of each target; None if none has one.
        losses: ``[N]``, float64, the loss of each training example, mean over checkpoints; None if one is not finite.
        settings: How the scores were computed, as texts and numbers to be shown.
    """

    train_labels: np.ndarray | None
    target_labels: np.ndarray | None
    train_predictions: np.ndarray | None
    target_predictions: np.ndarray | None
    train_ids: Sequence[str | int] | None
    target_ids: Sequence[str | int] | None
    losses: np.ndarray | None
    settings: dict[str, Any]

    @classmethod
    def of(cls, store: Store, exp_name: str, model_ids: Sequence[int] | None = None) -> StoreFacts:
        """Read a store whose features are finalized; ``model_ids`` of None means all checkpoints."""
        chosen = list(store.catalog.checkpoint_ids() if model_ids is None else model_ids)
        tables = [store.checkpoint(model_id) for model_id in chosen]
        losses = np.mean([table.column("loss").astype(np.float64) for table in tables], axis=0)
        return cls(
            train_labels=class_labels(tables[0]),
            target_labels=class_labels(store.targets(exp_name, chosen[0])),
            train_predictions=predicted_classes(tables[-1]),
            target_predictions=predicted_classes(store.targets(exp_name, chosen[-1])),
            train_ids=store.ids().listed(len(losses)),
            target_ids=store.ids(exp_name).listed(store.num_rows(exp_name)),
            losses=losses if np.isfinite(losses).all() else None,
            settings=_settings(store, chosen, exp_name),
        )

    def defaults(self, *labels: Any) -> dict[str, Any]:
        """Return ids for a report and, unless labels are given that are no class indices, predictions."""
        found: dict[str, Any] = {"train_ids": self.train_ids, "target_ids": self.target_ids}
        if all(each is None or as_array(each, "labels").dtype.kind in "iu" for each in labels):
            found |= {"train_predictions": self.train_predictions, "target_predictions": self.target_predictions}
        return found


def predicted_classes(table: RowTable) -> np.ndarray | None:
    """Return the class of greatest probability for each example ``[n]``, int64; None if the store does not tell."""
    label, rival = class_labels(table), table.column("rival")
    if label is None or (rival == NO_LABEL).any():
        return None
    own = np.exp(-table.column("loss").astype(np.float64))
    # Of soft labels and losses that are no cross-entropies, |Q| is not the probability of all other classes.
    if not np.allclose(np.abs(table.column("loss_grad")), 1 - own, atol=1e-3):
        return None
    others = (1 - own) * table.column("rival_share")
    return np.where(own >= others, label, rival).astype(np.int64)


def class_labels(table: RowTable) -> np.ndarray | None:
    """Return the labels of a table ``[N]``, int64; None if one is missing."""
    labels = table.column("label")
    return None if (labels == NO_LABEL).any() else labels.astype(np.int64)


def _settings(store: Store, model_ids: Sequence[int], exp_name: str) -> dict[str, Any]:
    """Return checkpoints, learning rates, settings, versions and the path of a store."""
    manifest = store.manifest
    settings = manifest.settings
    rates = [store.table_attributes(model_id).get("learning_rate") for model_id in model_ids]
    shown: dict[str, Any] = {"checkpoints": len(model_ids)}
    if all(rate is not None for rate in rates):
        shown["learning rates"] = ", ".join(dict.fromkeys(f"{rate:g}" for rate in rates))
    of_targets = store.table_attributes(model_ids[0], exp_name).get("target_task")
    if of_targets:
        shown["target task"] = _words(of_targets)
    for name in ("task", "projector", "preconditioner"):
        if settings.get(name):
            shown[name] = _words(settings[name])
    shown["numbers per example"] = f"{manifest.feature_dim:,}, {manifest.storage}"
    if settings.get("params"):
        count = sum(math.prod(shape) for shape in settings["params"].values())
        shown["parameters"] = f"{count:,} in {len(settings['params'])} tensors"
    shown["run alone"] = str(store.audited(model_ids))
    shown |= {name: value for name, value in manifest.info.items() if isinstance(value, str)}
    shown["versions"] = _words(manifest.versions)
    shown["store"] = str(store.path)
    return shown


def _words(value: Any) -> str:
    """Return a setting as text, mappings without braces.

    >>> _words({"name": "sketch", "seed": 0})
    'sketch, seed 0'
    """
    if not isinstance(value, Mapping):
        return str(value)
    return ", ".join(str(each) if name in ("name", "kind") else f"{name} {each}" for name, each in value.items())


def labels_or(stored: np.ndarray | None, given: Any, others: Any) -> Any:
    """Return the given labels, else the store's, unless the other side's are names."""
    if given is not None or others is None:
        return stored if given is None else given
    return stored if as_array(others, "labels").dtype.kind in "iu" else None
