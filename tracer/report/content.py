"""What a report shows, checked once so that nothing further down needs to ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracer.errors import InputError
from tracer.report.samples import Samples, as_array
from tracer.types import TopK

NUM_SHOWN_TARGETS = 6


@dataclass(frozen=True)
class ReportContent:
    """Arrays of N training rows and M targets that fit each other.

    Attributes:
        self_influence: ``[N]``, float64.
        order: ``[N]``, int64, row indices by descending self-influence.
        proponents: ``[M, k]``.
        opponents: ``[M, k']``.
        train: How the training rows are shown.
        target: How the targets are shown.
        known_mislabelled: ``[N]``, bool, at least one of them set; or None.
        rankings: Scores ``[N]`` by name, float64.
        settings: What is listed as settings.
        shown_targets: Indices of the targets that are shown.
        num_top_rows: How many rows of highest self-influence are shown.
    """

    self_influence: np.ndarray
    order: np.ndarray
    proponents: TopK
    opponents: TopK
    train: Samples
    target: Samples
    known_mislabelled: np.ndarray | None
    rankings: Mapping[str, np.ndarray]
    settings: Mapping[str, Any]
    shown_targets: Sequence[int]
    num_top_rows: int

    def is_mislabelled(self, row: int) -> bool:
        """Return whether the row is known to be mislabelled."""
        return self.known_mislabelled is not None and bool(self.known_mislabelled[row])


def check_scores(scores: Any, name: str, num_rows: int | None = None) -> np.ndarray:
    """Return scores as ``[N]``, float64.

    Args:
        scores: What came.
        name: Its name, for messages.
        num_rows: The N that is expected; None where these scores define it.

    Returns:
        The scores.

    Raises:
        InputError: If they are not N finite numbers.
    """
    array = as_array(scores, name)
    if array.ndim != 1 or array.dtype.kind not in "biuf" or array.size == 0:
        raise InputError(f"{name} has shape {list(array.shape)} and dtype {array.dtype}; expected one number a row.")
    if num_rows is not None and len(array) != num_rows:
        raise InputError(f"{name} has {len(array)} rows; expected {num_rows}, one for each train row.")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise InputError(
            f"{name} is NaN or infinite in {bad.size} rows, first {bad[:5].tolist()}; leave these rows out."
        )
    return array.astype(np.float64)


def check_top(top: TopK, name: str, num_rows: int, num_targets: int) -> TopK:
    """Return a `TopK` of arrays that fit.

    Args:
        top: What came.
        name: Its name, for messages.
        num_rows: The number of training rows N.
        num_targets: The number of targets M.

    Returns:
        Indices (int64) and scores (float64), ``[M, k]``.

    Raises:
        InputError: If shapes differ from each other or from M, or an index is out of range.
    """
    indices, scores = np.asarray(top.indices), np.asarray(top.scores, dtype=np.float64)
    if indices.ndim != 2 or indices.shape != scores.shape or len(indices) != num_targets:
        raise InputError(
            f"{name} has indices {list(indices.shape)} and scores {list(scores.shape)}; expected both "
            f"[{num_targets}, k], one line for each target, as Tracer.top returns them."
        )
    outside = indices[(indices < 0) | (indices >= num_rows)]
    if outside.size:
        raise InputError(f"{name} names train row {outside[0]}, but there are {num_rows} rows (0 to {num_rows - 1}).")
    return TopK(indices.astype(np.int64), scores)


def check_mask(mask: Any, num_rows: int) -> np.ndarray | None:
    """Return which rows are known to be mislabelled, None where none is.

    Args:
        mask: ``[N]``, bool, or None.
        num_rows: The number of training rows N.

    Returns:
        The mask, or None if no row is set.

    Raises:
        InputError: If it is not one bool a row.
    """
    if mask is None:
        return None
    array = as_array(mask, "known_mislabelled")
    if array.dtype != bool or array.shape != (num_rows,):
        raise InputError(
            f"known_mislabelled has shape {list(array.shape)} and dtype {array.dtype}; expected [{num_rows}] of bool. "
            "From row indices: mask = np.zeros(N, dtype=bool); mask[indices] = True."
        )
    return array if array.any() else None


def check_rankings(rankings: Mapping[str, Any], num_rows: int) -> dict[str, np.ndarray]:
    """Return the scores ``[N]`` of each ranking, float64."""
    return {name: check_scores(scores, f"rankings[{name!r}]", num_rows) for name, scores in rankings.items()}


def check_shown(shown: Sequence[int] | None, num_targets: int) -> list[int]:
    """Return which targets are shown.

    Args:
        shown: Their indices; None for a few, spread evenly.
        num_targets: The number of targets M.

    Returns:
        The indices.

    Raises:
        InputError: If one is out of range.
    """
    if shown is None:
        count = min(NUM_SHOWN_TARGETS, num_targets)
        return [number * num_targets // count for number in range(count)]
    for number in shown:
        if not 0 <= number < num_targets:
            raise InputError(
                f"shown_targets names target {number}, but there are {num_targets} (0 to {num_targets - 1})."
            )
    return [int(number) for number in shown]
