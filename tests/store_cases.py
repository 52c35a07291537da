"""A small store and rows whose content depends on their index only, for the tests of the store."""

from __future__ import annotations

from typing import Any

import numpy as np

from tracer.store import RowTable
from tracer.store.manifest import Manifest
from tracer.store.table_schema import VALUES

N, DIM = 23, 5


def manifest(**changes: Any) -> Manifest:
    return Manifest({"train_set_size": N, "feature_dim": DIM, "storage": "float32", "seed": 0, **changes})


def stored_features(table: RowTable, start: int, stop: int) -> np.ndarray:
    """Features of rows from start to stop as scores use them: [stop - start, dim], float32, times their scale."""
    raw = [view.astype(np.float32) for _, view in table.raw_features(start, stop)]
    scale = table.column("scale", start, stop)[:, None]
    return np.concatenate([np.empty((0, table.dim), np.float32), *raw]) * scale


def batch(rows: np.ndarray, seed: int = 0, dim: int = DIM) -> dict[str, np.ndarray]:
    """Rows whose content depends on their index only, not on how they are batched."""
    rng = np.random.default_rng(seed)
    table = {name: rng.standard_normal(1000).astype(np.float32)[rows] for name in VALUES}
    features = rng.standard_normal((1000, dim)).astype(np.float32)[rows]
    return {"rows": rows, "features": features, "fingerprint": rows.astype(np.uint64) + np.uint64(2**63), **table}
