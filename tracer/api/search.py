"""The index of training examples for approximate search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tracer._core.validation import check_count
from tracer.scoring.estimators import Estimate
from tracer.scoring.search_index import DIMS

if TYPE_CHECKING:
    from tracer.api.store_reader import StoreReader


def build_index(
    _reader: StoreReader, estimator: str = "cosine", model_ids: list[int] | None = None, *, dims: int = DIMS
) -> None:
    """Store an index of the training examples, by which ``candidates=`` of questions finds the strongest ones.

    It keeps the leading ``dims`` principal components of their weighted features over all checkpoints, one byte each,
    and belongs to the examples as they are now: once some are replaced or added, questions refuse it.

    Args:
        estimator: ``cosine``, as `Attribution.explain` ranks by default, or ``tracin``; each has an index of its own.
        model_ids: The checkpoints of the questions. Default: all in the store.
        dims: The number of components.

    Raises:
        InputError: If the estimator has a kernel, or a checkpoint is not known.
        CallOrderError: If a checkpoint is not finalized, or the store has no features.
    """
    _reader._scorer.build_index(Estimate(estimator), model_ids, check_count(dims, "dims"))
