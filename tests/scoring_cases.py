"""Stores with made-up rows, and their scores in float64, for tests of scoring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from store_cases import stored_features

from tracer.scoring.scorer import Scorer
from tracer.store import RowTable, Store
from tracer.store.manifest import Manifest

RATES = (0.5, 0.25)


def fill(table: RowTable, seed: int, magnitude: float = 1.0) -> None:
    """Write rows that depend on a seed only, and finalize them."""
    rng, count = np.random.default_rng(seed), table.num_rows
    features = (magnitude * rng.standard_normal((count, table.dim))).astype(np.float32)
    columns = {name: rng.standard_normal(count).astype(np.float32) for name in ("loss", "loss_grad", "output_change")}
    columns["loss_hess"] = rng.uniform(0.01, 0.25, count).astype(np.float32)
    norm = np.linalg.norm(features.astype(np.float64), axis=1).astype(np.float32)
    columns["label"] = rng.integers(0, 3, count)
    table.write(np.arange(count), features, gradient_norm=norm, fingerprint=np.zeros(count, np.uint64), **columns)
    table.set_attributes(finalized=True)


def scorer(
    path: Path,
    num_rows: int,
    num_targets: int,
    dim: int,
    storage: str = "float32",
    magnitude: float = 1.0,
    processes: int = 1,
    rates: Sequence[float | None] = RATES,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Scorer:
    """A scorer of a store with a checkpoint for each rate and the targets ``test``."""
    manifest = Manifest({"train_set_size": num_rows, "feature_dim": dim, "storage": storage, **(settings or {})})
    store = Store.open(path, manifest, processes=processes)
    for model_id, rate in enumerate(rates):
        with store.create_checkpoint(model_id, "a", rate) as table:
            fill(table, model_id, magnitude)
        with store.create_targets("test", model_id, num_targets) as table:
            fill(table, 100 + model_id, 1 / magnitude)
    return Scorer(store, torch.device("cpu"), False, **options)


def expected(found: Scorer, estimator: str = "tracin") -> np.ndarray:
    """Scores of what is stored, in float64."""
    total = np.zeros((found.num_rows, found.store.targets("test", 0).num_rows))
    for model_id, rate in enumerate(RATES):
        sides = []
        for table in (found.store.checkpoint(model_id), found.store.targets("test", model_id)):
            weight = table.column("loss_grad").astype(np.float64)
            if estimator == "cosine":
                weight = np.sign(weight) / table.column("gradient_norm")
            sides.append(stored_features(table, 0, table.num_rows).astype(np.float64) * weight[:, None])
        total += rate * sides[0] @ sides[1].T
    return total


def slow_leave_one_out(features, w, output_change, loss_grad, rows, regularization) -> np.ndarray:
    """The leave-one-out formula for some rows, from the matrix of the smoother."""
    own = w * output_change - loss_grad
    values, vectors = np.linalg.eigh(features.T @ (w[:, None] * features))
    values = np.maximum(values, 1e-200)
    smoother = features @ (vectors * (-np.expm1(-values / regularization) / values)) @ vectors.T @ features.T
    leverage = np.diagonal(smoother)[rows]
    rest = 1 - w[rows] * leverage
    return (
        (smoother[rows] @ own - leverage * own[rows]) / np.maximum(rest, 1e-4) if rest.mean() >= 0.2 else np.nan * rest
    )


def strongest(scores: np.ndarray, k: int, kind: str, rows: np.ndarray | None = None) -> np.ndarray:
    """Indices by a stable sort: ``[M, k]``."""
    rows = np.arange(len(scores)) if rows is None else np.unique(rows)
    signed = scores[rows] if kind == "opponents" else -scores[rows]
    return rows[np.argsort(signed, axis=0, kind="stable")[:k]].T
