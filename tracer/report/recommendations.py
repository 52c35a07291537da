"""What to do next, as far as the numbers of a report say so: each advice names the number it follows from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tracer.report.charts import number
from tracer.report.content import ReportContent
from tracer.report.health import Z
from tracer.report.summaries import ClassSummary

MIN_ROWS = 5
"""Fewer rows support no advice."""

PAIR_SHARE = 0.2
CLASS_FACTOR = 2.0
CONCENTRATION = 0.2
SMALL_CLASS = 0.2
OMNIPRESENT = 0.25
HARMED_TARGETS = 0.2


@dataclass(frozen=True)
class Advice:
    """One recommendation.

    Attributes:
        what: What to do.
        why: The number it follows from.
        link: The part of the page that shows it.
    """

    what: str
    why: str
    link: str


def recommendations(data: ReportContent) -> list[Advice]:
    """Return the advice that the numbers support, most pressing first; often none.

    Args:
        data: What is reported.

    Returns:
        At most one advice of each kind.
    """
    kinds: tuple[Callable[[ReportContent], Advice | None], ...] = (
        _wrong_labels, _worst_class, _confused_pair, _concentration, _omnipresent_row, _small_class, _harmed_targets,
    )  # fmt: skip
    found = [kind(data) for kind in kinds]
    return [advice for advice in found if advice is not None]


def _wrong_labels(data: ReportContent) -> Advice | None:
    """Labels are to be checked where the estimate's interval lies above zero."""
    health = data.health
    if health is None or health.low <= 0 or health.num_contradicted < MIN_ROWS:
        return None
    return Advice(
        f"Check the labels of the {health.num_contradicted:,} contradicted rows, highest self-influence first.",
        f"An estimated {health.share:.1%} of the labels are wrong; the interval, {health.low:.1%} to "
        f"{health.high:.1%}, lies above zero.",
        "suspects",
    )


def _worst_class(data: ReportContent) -> Advice | None:
    """A class stands out where its share of contradicted rows is far above that of the others together."""
    classes = _contradicting_classes(data)
    codes = _train_codes(data)
    if classes is None or codes is None:
        return None
    wrong = np.bincount(codes[classes.contradicted], minlength=len(classes.train_counts))
    counts = classes.train_counts
    best: tuple[float, int, float, float] | None = None
    for place in np.flatnonzero(wrong >= MIN_ROWS).tolist():
        others = int(counts.sum() - counts[place])
        if not others:
            continue
        here, there = wrong[place] / counts[place], (wrong.sum() - wrong[place]) / others
        pooled = wrong.sum() / counts.sum()
        error = (pooled * (1 - pooled) * (1 / counts[place] + 1 / others)) ** 0.5
        # the threshold is divided among the classes that could have stood out (Bonferroni, roughly)
        if here > CLASS_FACTOR * there and here - there > (Z + np.log10(len(counts))) * error:
            best = max(best or (0.0, 0, 0.0, 0.0), (float(here), place, float(here), float(there)))
    if best is None:
        return None
    name = data.class_names[best[1]]
    return Advice(
        f"Look at how rows of class {name} were labelled.",
        f"{best[2]:.1%} of its {counts[best[1]]:,} rows are contradicted, against {best[3]:.1%} of all others.",
        "classes",
    )


def _confused_pair(data: ReportContent) -> Advice | None:
    """A pair of classes stands out where it holds a large part of all contradicted rows."""
    classes = _contradicting_classes(data)
    codes = _train_codes(data)
    if classes is None or codes is None:
        return None
    mask = classes.contradicted & (classes.harmed != codes)
    pairs = codes[mask] * len(data.class_names) + classes.harmed[mask]
    if not len(pairs):
        return None
    values, counts = np.unique(pairs, return_counts=True)
    most = int(counts.argmax())
    if counts[most] < MIN_ROWS or counts[most] < PAIR_SHARE * len(pairs):
        return None
    given, other = (data.class_names[place] for place in divmod(int(values[most]), len(data.class_names)))
    return Advice(
        f"Settle what tells class {given} from class {other}, and check rows labelled {given}.",
        f"{counts[most]:,} of the {len(pairs):,} contradicted rows are labelled {given} and harm {other} most.",
        "classes",
    )


def _concentration(data: ReportContent) -> Advice | None:
    """Few rows are to be looked at where they hold a large part of all self-influence."""
    values = np.clip(data.self_influence, 0, None)[data.order]
    count = max(1, len(values) // 100)
    total = float(values.sum())
    if count < MIN_ROWS or total <= 0 or values[:count].sum() < CONCENTRATION * total:
        return None
    return Advice(
        f"Look at the {count:,} rows of highest self-influence: wrong, rare or hard.",
        f"This 1 % of the rows holds {values[:count].sum() / total:.0%} of all self-influence.",
        "suspects",
    )


def _omnipresent_row(data: ReportContent) -> Advice | None:
    """A single row among the strongest of many targets is a sign of its large gradient."""
    num_targets = data.target.size
    if num_targets < 4 * MIN_ROWS or data.settings.get("estimator") == "cosine":
        return None
    k = data.proponents.indices.shape[1]
    if k * 10 > data.num_rows:  # with few rows to choose from it means nothing
        return None
    rows = np.concatenate([data.proponents.indices, data.opponents.indices], axis=1)
    counts = np.bincount(rows.ravel(), minlength=data.num_rows)
    row = int(counts.argmax())
    if counts[row] < OMNIPRESENT * num_targets:
        return None
    return Advice(
        'Compare with estimator="cosine", which divides the size of gradients out.',
        f"Row {row} is among the strongest rows of {counts[row] / num_targets:.0%} of the targets, which points to its "
        "large gradient.",
        "targets",
    )


def _small_class(data: ReportContent) -> Advice | None:
    """A class with few rows is named where the others have many times more."""
    classes = None if data.summary is None else data.summary.classes
    if classes is None:
        return None
    present = np.flatnonzero(classes.train_counts)
    counts = classes.train_counts[present]
    least, mean = int(counts.argmin()), float(counts.mean())
    if len(present) < 2 or counts[least] >= SMALL_CLASS * mean:
        return None
    name = data.class_names[int(present[least])]
    return Advice(
        f"Collect more rows of class {name}.",
        f"It has {counts[least]:,} training rows; the classes have {mean:,.0f} on average.",
        "classes",
    )


def _harmed_targets(data: ReportContent) -> Advice | None:
    """Targets that training moved the wrong way are named where they are many."""
    if data.summary is None or data.settings.get("estimator", "tracin") not in ("tracin", "cosine"):
        return None
    harmed = int((data.summary.target_mean < 0).sum())
    if harmed < MIN_ROWS or harmed < HARMED_TARGETS * data.target.size:
        return None
    return Advice(
        "Look at the targets of negative mean score: their kind may be missing in training, or their label wrong.",
        f"{harmed:,} of {data.target.size:,} targets ({harmed / data.target.size:.0%}) have a negative mean score: "
        f"the least is {number(float(data.summary.target_mean.min()))}.",
        "targets",
    )


def _contradicting_classes(data: ReportContent) -> ClassSummary | None:
    """Return what scores say by class where the interval of wrong labels lies above zero.

    Below that, contradicted rows may all be rightly labelled, and where they gather says nothing of labels.
    """
    if data.health is None or data.health.low <= 0 or data.summary is None:
        return None
    return data.summary.classes


def _train_codes(data: ReportContent) -> np.ndarray | None:
    """Return the class of each training row, as the summary counts them."""
    if data.train.labels is None or not data.class_names:
        return None
    places = {name: place for place, name in enumerate(data.class_names)}
    return np.array([places[name] for name in data.train.labels], dtype=np.int64)
