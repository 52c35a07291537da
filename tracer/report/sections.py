"""The sections of a report: the figures, and tables of numbers, that templates show."""

from __future__ import annotations

from typing import Any

import numpy as np

from tracer.report import charts
from tracer.report.content import ReportContent
from tracer.report.figure import Figure
from tracer.report.health import CHECKED_SHARES, MIN_CLASSES, checked_counts, count_classes, recovered, recovery_table
from tracer.report.page import Section
from tracer.report.payload import MAX_TABLE_EXAMPLES, MAX_TARGETS
from tracer.report.plot import legend_figure, round_ticks
from tracer.report.recommendations import recommendations
from tracer.report.text import number

RECOVERY_SIZE = (420, 260)
QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)


def build_sections(data: ReportContent) -> list[Section]:
    """Return the sections in order, without those whose numbers are missing."""
    has_top = data.target.size and (data.proponents.indices.size or data.opponents.indices.size)
    headings: tuple[tuple[str, str, dict[str, Any] | None], ...] = (
        ("overview", "Overview", _overview(data)),
        ("distributions", "Distributions", _distributions(data)),
        ("recovery", "Finding mislabelled examples", _recovery(data)),
        ("suspects", "Suspects", {"limit": MAX_TABLE_EXAMPLES}),
        ("targets", "Proponents and opponents", {"limit": MAX_TARGETS} if has_top else None),
        ("classes", "Classes", _classes(data)),
        ("reading", "How to read this", {}),
    )
    return [Section(anchor, heading, view) for anchor, heading, view in headings if view is not None]


def lead(data: ReportContent) -> str:
    """Return the paragraph below the title."""
    sizes = f"{data.num_train:,} training examples and {data.target.size:,} targets"
    if data.known_mislabelled is None:
        return f"{sizes}."
    count, total = checked_counts(data.num_train)[0], int(data.known_mislabelled.sum())
    found = recovered(data.self_influence, data.known_mislabelled)[0]
    return (
        f"{sizes}; {total:,} training examples are known to be mislabelled. The {count:,} examples with the highest "
        f"self-influence contain {found:,} of them ({found / total:.0%}); chance would find "
        f"{total * count / data.num_train:.0f}."
    )


def self_influence_groups(data: ReportContent) -> dict[str, np.ndarray]:
    """Return self-influence of clean and of mislabelled examples if these are known, else of all."""
    mask, values = data.known_mislabelled, data.self_influence
    if mask is None or mask.all():
        return {"all training examples": values}
    return {"clean": values[~mask], "known mislabelled": values[mask]}


def all_rankings(data: ReportContent) -> dict[str, np.ndarray]:
    """Return the scores ``[N]`` of self-influence and of the other rankings by name."""
    return {"self-influence": data.self_influence, **data.rankings}


def _overview(data: ReportContent) -> dict[str, Any]:
    """Return recommendations, and the scale of the estimate of wrong labels."""
    known = None if data.known_mislabelled is None else float(data.known_mislabelled.mean())
    largest = max(data.health.high if data.health else 0.0, known or 0.0)
    end = max(0.1, min(1.0, np.ceil(largest * 10.5) / 10))
    return {
        "known": known,
        "end": end,
        "ticks": round_ticks(0.0, end, 5),
        "num_classes": None if data.classes is None else count_classes(data.classes),
        "min_classes": MIN_CLASSES,
        "advice": recommendations(data),
    }


def _distributions(data: ReportContent) -> dict[str, Any]:
    """Return the histograms of self-influence, scores and targets, and their quantiles."""
    groups = self_influence_groups(data)
    figure = charts.histogram(groups, "self-influence", "% of each group")
    figures = [_titled(figure, "Self-influence", "Dashed: median of each group.")]
    columns = {f"self-influence, {name}": values for name, values in groups.items()}
    if data.summary is not None:
        step = data.summary.train_step
        sampled = "" if step == 1 else f" One in {step} training examples is counted."
        figure = charts.signed_histogram(data.summary.edges, data.summary.counts)
        figures.append(
            _titled(figure, "Scores", f"A positive score helps the target, a negative one harms it.{sampled}")
        )
        figure = charts.histogram({"targets": data.summary.target_mean}, "mean score of a target", "% of targets")
        caption = "Mean over all training examples. Below zero, their scores add up to harm."
        figures.append(_titled(figure, "Average influence per target", caption))
        columns["mean score of a training example"] = data.summary.train_mean
        columns["mean score of a target"] = data.summary.target_mean
    lines = [
        [name, f"{len(values):,}", *(number(float(value)) for value in np.quantile(values, QUANTILES))]
        for name, values in columns.items()
        if len(values)
    ]
    return {"figures": figures, "quantiles": lines}


def _recovery(data: ReportContent) -> dict[str, Any] | None:
    """Return how many mislabelled examples each ranking finds, or None if they are not known."""
    mask = data.known_mislabelled
    if mask is None:
        return None
    rankings = all_rankings(data)
    legend = charts.recovery_keys(list(rankings))
    size = (RECOVERY_SIZE[0], RECOVERY_SIZE[1] + int(legend_figure(legend, RECOVERY_SIZE[0]).height))
    counts = zip(CHECKED_SHARES, checked_counts(len(mask)), strict=True)
    return {
        "figures": [charts.recovery_chart(rankings, mask, size, legend, enlarged=part) for part in (False, True)],
        "caption": f"Mislabelled examples found, of {mask.sum()}",
        "header": ["ranking", *(f"top {share:.0%} ({count:,})" for share, count in counts)],
        "lines": recovery_table(rankings, mask),
    }


def _classes(data: ReportContent) -> dict[str, Any] | None:
    """Return the map of classes and their table, or None without classes."""
    classes = data.classes
    if classes is None:
        return None
    names, shown = data.class_names, charts.map_classes(classes.train_counts).tolist()
    drawn = np.abs(classes.influence[np.ix_(shown, shown)])
    largest = float(np.nanmax(drawn)) if np.isfinite(drawn).any() else 0.0
    figure = charts.class_map(classes.influence, names, classes.train_counts)
    figure.caption = (
        "Mean score of the training examples of a class on the targets of a class: blue helps, orange harms."
    )
    if len(shown) <= charts.MAP_NUMBERS:
        figure.caption += f" Numbers are in percent of the largest, {number(largest)}."
    codes = data.train_codes
    sums = np.bincount(codes, weights=data.self_influence, minlength=len(names))
    wrong = None if data.contradicted is None else np.bincount(codes[data.contradicted], minlength=len(names))
    lines = []
    for place in np.flatnonzero(classes.train_counts + classes.target_counts).tolist():
        count = int(classes.train_counts[place])
        line = [names[place], f"{count:,}", f"{int(classes.target_counts[place]):,}"]
        line += [number(sums[place] / count) if count else "", _number_or_empty(classes.influence[place, place])]
        if wrong is not None:
            line.append(f"{wrong[place]:,} ({wrong[place] / count:.1%})" if count else "")
        lines.append(line)
    header = ["class", "training examples", "targets", "mean self-influence", "score on own class"]
    return {
        "map": figure,
        "map_header": ["", *(names[b] for b in shown)],
        "map_lines": [[names[a], *(_number_or_empty(classes.influence[a, b]) for b in shown)] for a in shown],
        "header": header if wrong is None else [*header, "contradicted"],
        "lines": lines,
    }


def _titled(figure: Figure, title: str, caption: str) -> Figure:
    """Return the figure with a heading and a line below it."""
    figure.title, figure.caption = title, caption
    return figure


def _number_or_empty(value: float) -> str:
    """Format a number, and NaN as nothing."""
    return number(float(value)) if np.isfinite(value) else ""
