"""What a report shows, checked once so that nothing further down needs to ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tracer.errors import InputError
from tracer.report.health import WrongLabels
from tracer.report.samples import Samples, as_array, as_text
from tracer.report.summaries import ScoreSummary
from tracer.types import TopK

NUM_SHOWN_TARGETS = 6

COLUMNS = (
    "rank", "row", "self_influence", "self-influence", "label", "prediction", "known_mislabelled", "mean_score",
    "mean_absolute_score", "harm_over_help", "contradicted", "harmed_class",
)  # fmt: skip
"""Names that a ranking cannot have: those of the other columns of the summary, and of self-influence on the page."""


@dataclass(frozen=True)
class Tokens:
    """Texts in tokens, and how much each token of a train row weighs for a target.

    Attributes:
        train: The tokens of each train row; None where they did not come.
        target: The tokens of each target, likewise.
        scores: By (target, train row): one number for each token of the train row.
    """

    train: Sequence[Sequence[str]] | None
    target: Sequence[Sequence[str]] | None
    scores: Mapping[tuple[int, int], np.ndarray]


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
        shown_targets: Indices of the targets that come first and are drawn in ``influence.png``.
        num_top_rows: How many rows of highest self-influence are drawn in ``top_self_influence.png``.
        tokens: Texts in tokens.
        summary: What all scores say; None where they did not come.
        class_names: The classes of ``summary``, by index.
        health: The estimate of wrong labels; None without classes, or with fewer than it is calibrated for.
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
    tokens: Tokens = Tokens(None, None, {})
    summary: ScoreSummary | None = None
    class_names: Sequence[str] = ()
    health: WrongLabels | None = None

    @property
    def num_rows(self) -> int:
        """The number of training rows N."""
        return len(self.self_influence)

    @property
    def contradicted(self) -> np.ndarray | None:
        """``[N]``, bool, which rows the targets contradict; None without an estimate of wrong labels."""
        if self.health is None or self.summary is None or self.summary.classes is None:
            return None
        return self.summary.classes.contradicted

    @property
    def disagrees(self) -> np.ndarray | None:
        """``[N]``, bool, where the model predicts another label than the given one; None without both."""
        if self.train.labels is None or self.train.predictions is None or not self.train.has_classes:
            return None
        return np.array([a != b for a, b in zip(self.train.labels, self.train.predictions, strict=True)])


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


def check_matrix(scores: Any, num_rows: int, num_targets: int) -> None:
    """Check the shape of all scores.

    Args:
        scores: What came.
        num_rows: The number of training rows N.
        num_targets: The number of targets M.

    Raises:
        InputError: If they are not ``[N, M]``.
    """
    shape = tuple(getattr(scores, "shape", ()))
    if shape != (num_rows, num_targets):
        raise InputError(
            f"scores have shape {list(shape)}; expected [{num_rows}, {num_targets}], a row for each train row and a "
            "column for each target, as Tracer.finalize_scores returns them."
        )


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
    """Return the scores ``[N]`` of each ranking, float64.

    Args:
        rankings: Scores by name.
        num_rows: The number of training rows N.

    Returns:
        The scores by name.

    Raises:
        InputError: If a name is that of another column, or scores are not N finite numbers.
    """
    taken = [name for name in rankings if name in COLUMNS]
    if taken:
        raise InputError(
            f"rankings has the name {taken[0]!r}, which is that of a column of the report; give it another name, for "
            f"example 'my {taken[0]}'."
        )
    return {as_text(name): check_scores(scores, f"rankings[{name!r}]", num_rows) for name, scores in rankings.items()}


def check_shown(shown: Sequence[int] | None, num_targets: int) -> list[int]:
    """Return which targets are shown first.

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


def check_tokens(train: Any, target: Any, scores: Mapping | None, num_rows: int, num_targets: int) -> Tokens:
    """Return tokens and their scores.

    Args:
        train: The tokens of each train row, or None.
        target: The tokens of each target, or None.
        scores: By (target, train row), one number a token of the train row, or None.
        num_rows: The number of training rows N.
        num_targets: The number of targets M.

    Returns:
        The tokens.

    Raises:
        InputError: If sizes disagree, a pair is out of range or a score is NaN or infinite.
    """
    for name, tokens, size in (("train_tokens", train, num_rows), ("target_tokens", target, num_targets)):
        if tokens is not None and len(tokens) != size:
            raise InputError(f"{name} has {len(tokens)} rows; expected {size}, a list of tokens for each.")
    if scores and train is None:
        raise InputError("token_scores came without train_tokens; pass the tokens that the scores belong to.")
    checked = {}
    for pair, values in (scores or {}).items():
        number, row = (int(index) for index in pair)
        if not (0 <= number < num_targets and 0 <= row < num_rows):
            raise InputError(
                f"token_scores has the pair (target {number}, train row {row}), but there are {num_targets} targets "
                f"and {num_rows} train rows."
            )
        array = as_array(values, "token_scores")
        if array.shape != (len(train[row]),) or not np.isfinite(array).all():
            raise InputError(
                f"token_scores[{number}, {row}] has shape {list(array.shape)}; expected {len(train[row])} finite "
                f"numbers, one for each token of train_tokens[{row}]."
            )
        checked[number, row] = array.astype(np.float64)
    return Tokens(train, target, checked)
