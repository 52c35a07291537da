"""The store: files of features, targets, scores and top-k parts in one zarr version 3 hierarchy."""

from tracer.store.row_table import RowTable
from tracer.store.score_array import ScoreArray
from tracer.store.store import Store
from tracer.store.verify import Damage, Verification, verify

__all__ = ["Damage", "RowTable", "ScoreArray", "Store", "Verification", "verify"]
