"""Recommendations that the numbers of a report support; each states the number it follows from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from tracer.report.content import ReportContent
from tracer.report.label_noise import WrongLabels
from tracer.report.summaries import ClassSummary
from tracer.report.text import number

_Z = 1.959964  # half the width of a two-sided 95 % interval, in standard errors
MIN_EXAMPLES = 5  # fewer examples or targets support no recommendation
PAIR_SHARE = 0.2
CLASS_FACTOR = 2.0
CONCENTRATION = 0.2
SMALL_CLASS = 0.2
OMNIPRESENT = 0.25
HARMED_TARGETS = 0.2


@dataclass(frozen=True)
class Advice:
    """One recommendation, the number it follows from, and the anchor of the section that shows it."""

    action: str
    reason: str
    link: str


def recommendations(data: ReportContent) -> list[Advice]:
    """Return at most one recommendation of each kind, the most urgent first; often none."""
    found: list[Advice | None] = []
    # if the interval of wrong labels includes zero, all suspects may have correct labels
    if data.estimate is not None and data.estimate.low > 0:
        found.append(_wrong_labels(data, data.estimate))
        if data.classes is not None:
            found += [_worst_class(data, data.classes, data.estimate), _confused_pair(data, data.estimate)]
    found += [_concentration(data), _omnipresent_example(data), _small_class(data), _harmed_targets(data)]
    return [advice for advice in found if advice is not None]


def _wrong_labels(data: ReportContent, health: WrongLabels) -> Advice | None:
    """Check the labels of suspects."""
    count = int(health.suspects.sum())
    if count < MIN_EXAMPLES:
        return None
    return Advice(
        f"Check the labels of the {count:,} suspects, highest {data.order_by} first.",
        f"An estimated {health.share:.1%} of the labels are wrong; the interval, {health.low:.1%} to "
        f"{health.high:.1%}, is above zero.",
        "suspects",
    )


def _worst_class(data: ReportContent, classes: ClassSummary, health: WrongLabels) -> Advice | None:
    """Look at a class if far more of its examples are suspects than of all other classes together."""
    counts = classes.train_counts
    wrong = np.bincount(data.train_codes[health.suspects], minlength=len(counts))
    rest = counts.sum() - counts
    with np.errstate(divide="ignore", invalid="ignore"):  # classes without examples; they are not chosen
        here, there, pooled = wrong / counts, (wrong.sum() - wrong) / rest, wrong.sum() / counts.sum()
        error = (pooled * (1 - pooled) * (1 / counts + 1 / rest)) ** 0.5
    # every class could have stood out, so the threshold grows with their number (roughly Bonferroni)
    far = (here > CLASS_FACTOR * there) & (here - there > (_Z + np.log10(len(counts))) * error)
    found = np.flatnonzero((wrong >= MIN_EXAMPLES) & (rest > 0) & far).tolist()
    if not found:
        return None
    place = max(found, key=lambda place: (here[place], place))
    name, share, others = data.class_names[place], f"{here[place]:.1%}", f"{there[place]:.1%}"
    return Advice(
        f"Look at how examples of class {name} were labelled.",
        f"{share} of its {counts[place]:,} examples are suspects, against {others} in all other classes.",
        "classes",
    )


def _confused_pair(data: ReportContent, health: WrongLabels) -> Advice | None:
    """Look at a pair of classes if it has a large part of all suspects."""
    names = np.array(data.suggested, dtype=object)[health.suspects]
    given = np.array(data.train.labels, dtype=object)[health.suspects]
    pairs = Counter(zip(given.tolist(), names.tolist(), strict=True))
    if not pairs:
        return None
    (label, other), count = pairs.most_common(1)[0]
    if count < MIN_EXAMPLES or count < PAIR_SHARE * len(names):
        return None
    return Advice(
        f"Clarify what distinguishes class {label} from class {other}, and check examples labelled {label}.",
        f"{count:,} of the {len(names):,} suspects are labelled {label} and are more probably {other}.",
        "classes",
    )


def _concentration(data: ReportContent) -> Advice | None:
    """Look at the top of the ranking if few examples have a large part of all self-influence."""
    values = np.sort(np.clip(data.self_influence, 0, None))[::-1]
    count = max(1, len(values) // 100)
    total = float(values.sum())
    if count < MIN_EXAMPLES or total <= 0 or values[:count].sum() < CONCENTRATION * total:
        return None
    return Advice(
        f"Look at the {count:,} examples with the highest self-influence: they are wrong, rare or hard.",
        f"This 1 % of the training examples has {values[:count].sum() / total:.0%} of all self-influence.",
        "suspects",
    )


def _omnipresent_example(data: ReportContent) -> Advice | None:
    """Suggest cosine scores if one example with a large gradient is among the strongest of many targets."""
    num_targets = data.target.size
    if num_targets < 4 * MIN_EXAMPLES or data.settings.get("estimator") in ("cosine", "trackstar"):
        return None
    if data.proponents.indices.shape[1] * 10 > data.num_train:
        return None  # with few examples to choose from, each is often among the strongest
    strongest = np.concatenate([data.proponents.indices, data.opponents.indices], axis=1)
    counts = np.bincount(strongest.ravel(), minlength=data.num_train)
    index = int(counts.argmax())
    if counts[index] < OMNIPRESENT * num_targets:
        return None
    return Advice(
        'Compare with estimator="cosine", which ignores the size of gradients.',
        f"Training example {index} is among the strongest of {counts[index] / num_targets:.0%} of the targets, "
        "probably because its gradient is large.",
        "targets",
    )


def _small_class(data: ReportContent) -> Advice | None:
    """Collect more data for a class that is far smaller than the average."""
    if data.classes is None:
        return None
    present = np.flatnonzero(data.classes.train_counts)
    counts = data.classes.train_counts[present]
    least, mean = int(counts.argmin()), float(counts.mean())
    if len(present) < 2 or counts[least] >= SMALL_CLASS * mean:
        return None
    return Advice(
        f"Collect more examples of class {data.class_names[int(present[least])]}.",
        f"It has {counts[least]:,} training examples; the classes have {mean:,.0f} on average.",
        "classes",
    )


def _harmed_targets(data: ReportContent) -> Advice | None:
    """Look at targets that training moved in the wrong direction if they are many."""
    # only these two estimators add up steps of training, so only their mean says where training moved a target
    if data.summary is None or data.settings.get("estimator", "tracin") not in ("tracin", "cosine"):
        return None
    harmed = int((data.summary.target_mean < 0).sum())
    if harmed < MIN_EXAMPLES or harmed < HARMED_TARGETS * data.target.size:
        return None
    return Advice(
        "Look at the targets with a negative mean score: training may lack examples like them, or their labels are "
        "wrong.",
        f"{harmed:,} of {data.target.size:,} targets ({harmed / data.target.size:.0%}) have a negative mean score; "
        f"the lowest is {number(float(data.summary.target_mean.min()))}.",
        "targets",
    )
