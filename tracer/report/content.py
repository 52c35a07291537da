"""The content of a report: arrays that are checked once to fit each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64

from tracer.errors import InputError
from tracer.report.label_noise import WrongLabels
from tracer.report.samples import Samples, as_array
from tracer.report.summaries import ClassSummary, ScoreSummary
from tracer.report.text import as_text
from tracer.types import TopK

NUM_SHOWN_TARGETS = 6

COLUMNS = (
    "rank", "train_index", "id", "self_influence", "self-influence", "label", "prediction", "known_mislabelled",
    "mean_score", "mean_absolute_score", "suspect", "suggested_label", "wrong_probability",
)  # fmt: skip
"""Names that a ranking cannot have: the other columns of influence_summary.csv, and self-influence on the page."""


@dataclass(frozen=True)
class ReportContent:
    """Arrays of N training examples and M targets that fit each other; without scores there is no summary."""

    self_influence: Float64[np.ndarray, " N"]
    order: Int64[np.ndarray, " N"]  # indices by descending values of order_by
    order_by: str  # a ranking, or self-influence
    proponents: TopK
    opponents: TopK
    train: Samples
    target: Samples
    known_mislabelled: Bool[np.ndarray, " N"] | None  # at least one is True
    rankings: Mapping[str, np.ndarray]  # [N] each
    settings: Mapping[str, Any]
    shown_targets: Sequence[int]  # first in the page, and drawn in influence.png
    num_top_examples: int  # drawn in top_self_influence.png
    train_tokens: Sequence[Sequence[str]] | None
    target_tokens: Sequence[Sequence[str]] | None
    token_scores: Mapping[tuple[int, int], np.ndarray]  # of each token, by (target, training example)
    train_ids: Sequence[str] | None = None  # [N]
    target_ids: Sequence[str] | None = None  # [M]
    summary: ScoreSummary | None = None
    class_names: Sequence[str] = ()  # of the class indices in summary
    train_codes: Int64[np.ndarray, " _"] = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    health: WrongLabels | str = ""  # or the reason why there is no estimate
    warnings: Sequence[str] = ()  # shown first

    @property
    def num_train(self) -> int:
        """The number of training examples N."""
        return len(self.self_influence)

    @property
    def classes(self) -> ClassSummary | None:
        """The scores by class; None without scores or without classes on both sides."""
        return None if self.summary is None else self.summary.classes

    @property
    def estimate(self) -> WrongLabels | None:
        """The estimate of wrong labels; None without one."""
        return None if isinstance(self.health, str) else self.health

    @property
    def suspects(self) -> np.ndarray | None:
        """``[N]``, bool, examples whose label is more probably wrong than right; None without an estimate."""
        return None if self.estimate is None else self.estimate.suspects

    @property
    def suggested(self) -> list[str]:
        """The name of the class that each label is more probably, ``[N]``; of the class itself if no label has it."""
        found = self.estimate
        if found is None:
            return []
        labels = self.train.labels or list(map(str, found.label.tolist()))
        # the name that most examples of a class have: labels that were corrected meanwhile have another one
        common = Counter(zip(found.label.tolist(), labels, strict=True)).most_common()
        names = dict(pair for pair, _ in reversed(common))
        return [names.get(code, str(code)) for code in found.suggested.tolist()]

    @property
    def disagrees(self) -> np.ndarray | None:
        """``[N]``, bool, True if the model predicts another label than the given one; None without both."""
        if self.train.labels is None or self.train.predictions is None or not self.train.has_classes:
            return None
        return np.array([a != b for a, b in zip(self.train.labels, self.train.predictions, strict=True)])


def check_scores(scores: Any, name: str, num_train: int | None = None) -> np.ndarray:
    """Return finite scores as ``[N]``, float64; without ``num_train`` these scores define N."""
    array = as_array(scores, name)
    if array.ndim != 1 or array.dtype.kind not in "biuf" or array.size == 0:
        raise InputError(
            f"{name} has shape {list(array.shape)} and dtype {array.dtype}; expected one number per training example."
        )
    if num_train is not None and len(array) != num_train:
        raise InputError(f"{name} has {len(array)} values; expected {num_train}, one for each training example.")
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise InputError(
            f"{name} is NaN or infinite for {bad.size} training examples, first {bad[:5].tolist()}; leave them out."
        )
    return array.astype(np.float64)


def check_top(top: TopK, name: str, num_train: int, num_targets: int) -> TopK:
    """Return indices (int64, below N) and scores (float64), ``[M, k]`` each."""
    indices, scores = np.asarray(top.indices), np.asarray(top.scores, dtype=np.float64)
    if indices.ndim != 2 or indices.shape != scores.shape or len(indices) != num_targets:
        raise InputError(
            f"{name} has indices {list(indices.shape)} and scores {list(scores.shape)}; expected both "
            f"[{num_targets}, k], one line for each target, as Tracer.top returns them."
        )
    outside = indices[(indices < 0) | (indices >= num_train)]
    if outside.size:
        raise InputError(
            f"{name} contains the index {outside[0]}; expected indices of training examples, 0 to {num_train - 1}."
        )
    return TopK(indices.astype(np.int64), scores)


def check_mask(mask: Any, num_train: int) -> np.ndarray | None:
    """Return ``[N]``, bool, or None if no example is known to be mislabelled."""
    if mask is None:
        return None
    array = as_array(mask, "known_mislabelled")
    if array.dtype != bool or array.shape != (num_train,):
        raise InputError(
            f"known_mislabelled has shape {list(array.shape)} and dtype {array.dtype}; expected [{num_train}] of bool. "
            "From indices: mask = np.zeros(N, dtype=bool); mask[indices] = True."
        )
    return array if array.any() else None


def check_rankings(rankings: Mapping[str, Any], num_train: int) -> dict[str, np.ndarray]:
    """Return the scores ``[N]`` of each ranking, float64, by names that no other column has."""
    taken = [name for name in rankings if name in COLUMNS]
    if taken:
        raise InputError(
            f"rankings has the name {taken[0]!r}, which is that of a column of the report; rename it, for example to "
            f"'my {taken[0]}'."
        )
    return {as_text(name): check_scores(scores, f"rankings[{name!r}]", num_train) for name, scores in rankings.items()}


def check_health(health: WrongLabels | str, num_train: int) -> WrongLabels | str:
    """Return an estimate of wrong labels of N training examples, or the reason why there is none."""
    if not isinstance(health, str) and len(health.label) != num_train:
        raise InputError(f"health is of {len(health.label)} examples; expected {num_train}.")
    return health


def check_report_ids(ids: Sequence[str | int] | None, count: int, name: str) -> list[str] | None:
    """Return ids as texts, one for each example."""
    if ids is not None and len(ids) != count:
        raise InputError(f"{name} has {len(ids)} values; expected {count}, one for each example.")
    return None if ids is None else [as_text(each) for each in ids]


def check_shown(shown: Sequence[int] | None, num_targets: int) -> list[int]:
    """Return the targets that are shown first: a few spread evenly if ``shown`` is None."""
    if shown is None:
        count = min(NUM_SHOWN_TARGETS, num_targets)
        return [place * num_targets // count for place in range(count)]
    for target in shown:
        if not 0 <= target < num_targets:
            raise InputError(f"shown_targets contains {target}; expected indices of targets, 0 to {num_targets - 1}.")
    return [int(target) for target in shown]


def check_tokens(
    train: Any, target: Any, scores: Mapping | None, num_train: int, num_targets: int
) -> dict[tuple[int, int], np.ndarray]:
    """Return the scores of tokens, finite and one for each token."""
    for name, tokens, size in (("train_tokens", train, num_train), ("target_tokens", target, num_targets)):
        if tokens is not None and len(tokens) != size:
            raise InputError(f"{name} has {len(tokens)} lists; expected {size}, a list of tokens for each example.")
    if scores and train is None:
        raise InputError("token_scores needs train_tokens; pass the tokens that the scores belong to.")
    checked = {}
    for pair, values in (scores or {}).items():
        number, index = (int(each) for each in pair)
        if not (0 <= number < num_targets and 0 <= index < num_train):
            raise InputError(
                f"token_scores has the pair (target {number}, training example {index}); expected indices below "
                f"{num_targets} and {num_train}."
            )
        array = as_array(values, "token_scores")
        if array.shape != (len(train[index]),) or not np.isfinite(array).all():
            raise InputError(
                f"token_scores[{number}, {index}] has shape {list(array.shape)}; expected {len(train[index])} finite "
                f"numbers, one for each token of train_tokens[{index}]."
            )
        checked[number, index] = array.astype(np.float64)
    return checked
