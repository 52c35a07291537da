"""The page: sections with figures and tables of numbers, as HTML from templates/ with autoescape.

It embeds the style sheet, the scripts and their data, so it loads nothing.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tracer.report import charts
from tracer.report.content import ReportContent
from tracer.report.health import CHECKED_SHARES, checked_counts, recovered, recovery_table
from tracer.report.payload import MAX_TABLE_EXAMPLES, MAX_TARGETS, payload
from tracer.report.plot import round_ticks
from tracer.report.recommendations import recommendations
from tracer.report.text import asset, number

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)

SCRIPTS = ("data.js", "inputs.js", "verdicts.js", "suspects.js", "targets.js", "main.js")
"""The page's scripts, in the order in which they depend on each other."""


def render_page(title: str, data: ReportContent, directory: Path) -> str:
    """Return an HTML document that loads nothing, with links that hold in a directory."""
    mask, found = data.known_mislabelled, None
    if mask is not None:
        found = {"total": mask.sum(), "checked": checked_counts(len(mask))[0]}
        found["count"] = recovered(all_rankings(data)[data.order_by], mask)[0]
    return _environment().get_template("page.html").render(
        title=title,
        found=found,
        sections=_sections(data),
        report=data,
        data=payload(data, directory),
        style=Markup(asset("report.css")),
        script=Markup("\n".join(asset(name) for name in SCRIPTS)),
    )  # fmt: skip


@cache
def _environment() -> Environment:
    """Return the templates: every value is escaped, and a missing one raises."""
    environment = Environment(
        loader=PackageLoader("tracer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda value, digits=1: f"{value:.{digits}%}"
    # NaN is no JSON; the scripts would fail to parse it in the reader's browser
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment


def _sections(data: ReportContent) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the template, the heading and the values of each section, without those whose numbers are missing."""
    has_top = data.target.size and (data.proponents.indices.size or data.opponents.indices.size)
    found: tuple[tuple[str, str, dict[str, Any] | None], ...] = (
        ("overview", "Overview", _overview(data)),
        ("distributions", "Distributions", _distributions(data)),
        ("recovery", "Finding mislabelled examples", _recovery(data)),
        ("suspects", "Suspects", {"limit": MAX_TABLE_EXAMPLES}),
        ("targets", "Proponents and opponents", {"limit": MAX_TARGETS} if has_top else None),
        ("classes", "Classes", _classes(data)),
        ("reading", "How to read this", {}),
    )
    return [(name, heading, view) for name, heading, view in found if view is not None]


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
    largest = max(data.estimate.high if data.estimate else 0.0, known or 0.0)
    end = max(0.1, min(1.0, np.ceil(largest * 10.5) / 10))
    return {
        "known": known,
        "end": end,
        "ticks": round_ticks(0.0, end, 5),
        "advice": recommendations(data),
    }


def _distributions(data: ReportContent) -> dict[str, Any]:
    """Return the histograms of self-influence, scores and targets, and their quantiles."""
    groups, summary = self_influence_groups(data), data.summary
    figures = [charts.histogram(groups, "self-influence", "% of each group")]
    columns = {f"self-influence, {name}": values for name, values in groups.items()}
    if summary is not None:
        figures.append(charts.signed_histogram(summary.edges, summary.counts))
        figures.append(charts.histogram({"targets": summary.target_mean}, "mean score of a target", "% of targets"))
        columns["mean score of a training example"] = summary.train_mean
        columns["mean score of a target"] = summary.target_mean
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
    counts = zip(CHECKED_SHARES, checked_counts(len(mask)), strict=True)
    return {
        "figures": [charts.recovery_chart(rankings, mask, enlarged=enlarged) for enlarged in (False, True)],
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
    codes = data.train_codes
    sums = np.bincount(codes, weights=data.self_influence, minlength=len(names))
    wrong = None if data.suspects is None else np.bincount(codes[data.suspects], minlength=len(names))
    lines = []
    for place in np.flatnonzero(classes.train_counts + classes.target_counts).tolist():
        count = int(classes.train_counts[place])
        line = [names[place], f"{count:,}", f"{int(classes.target_counts[place]):,}"]
        line += [number(sums[place] / count) if count else "", number(classes.influence[place, place])]
        if wrong is not None:
            line.append(f"{wrong[place]:,} ({wrong[place] / count:.1%})" if count else "")
        lines.append(line)
    header = ["class", "training examples", "targets", "mean self-influence", "score on own class"]
    return {
        "map": charts.class_map(classes.influence, names, classes.train_counts),
        "map_header": ["", *(names[b] for b in shown)],
        "map_lines": [[names[a], *(number(classes.influence[a, b]) for b in shown)] for a in shown],
        "header": header if wrong is None else [*header, "suspects"],
        "lines": lines,
    }
