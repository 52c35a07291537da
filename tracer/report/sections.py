"""The parts of a report: each joins a chart, its numbers and the words that explain them."""

from __future__ import annotations

from html import escape

import numpy as np

from tracer.report import charts
from tracer.report.charts import number
from tracer.report.content import ReportContent
from tracer.report.health import MIN_CLASSES, count_classes
from tracer.report.page import (
    Section,
    figure,
    folded,
    legend,
    paragraph,
    side_by_side,
    subheading,
    table,
    tiles,
)
from tracer.report.payload import MAX_TABLE_ROWS, MAX_TARGETS
from tracer.report.recommendations import recommendations
from tracer.report.recovery import SHARES, recovery_curve, rows_checked

SELF = "self-influence"

SELF_MEANING = (
    "Self-influence adds up, over the checkpoints, learning rate times the squared norm of the row's loss "
    "gradient: how hard training pulled on this row. Rows that contradict the others stand high: wrong labels, and "
    "also rare or hard rows that are right."
)

LOSS_MEANING = (
    "A proponent is a training row whose steps lowered the target's loss (score above zero), an opponent one whose "
    "steps raised it (below zero). Scores can be compared within a target, hardly between targets: large "
    "gradients give large scores."
)

OUTPUT_MEANING = (
    "A proponent is a training row whose steps moved the model's output for the target in the direction in which "
    "the target's loss falls (score above zero), an opponent one whose steps moved it the other way (below zero). "
    "Scores can be compared within a target, hardly between targets: large gradients give large scores."
)

CONTRADICTED_MEANING = (
    "A contradicted row harms the targets of one class about as much as it helps those of another, far more than "
    "is usual for these rows: what it teaches goes against what that class says. Its label may be wrong; it may "
    "also be a hard row that is right."
)

ESTIMATOR_MEANING = (
    "With the estimators tracin and cosine, scores follow single gradient steps at a few checkpoints. They say "
    "little about what would happen if a row were left out and the model trained anew; the estimators influence "
    "and trak aim at that."
)

HEALTH = (
    "A row is contradicted where its harm to one class (the negated least of its mean scores on the targets of each "
    "class, each target's scores divided by their root mean square) over its help (the greatest of them) is above the "
    "median by more than 1.25 times the distance from the 10 % quantile to the median, in logarithms. The estimate "
    "corrects the share of contradicted rows for right rows that are contradicted and wrong ones that are not, as "
    "measured on handwritten digits with known flips (Rogan & Gladen 1978). The interval covers chance and the range "
    "of these rates there; other data may differ, and labels that are wrong in the same way in training rows and "
    "targets do not show."
)


def summary(data: ReportContent) -> str:
    """Return the paragraph below the title."""
    parts = f"{data.num_rows:,} training rows and {data.target.size:,} targets"
    if data.known_mislabelled is None:
        return parts + "."
    count = rows_checked(data.num_rows, SHARES[0])
    total = int(data.known_mislabelled.sum())
    found = int(recovery_curve(data.self_influence, data.known_mislabelled)[count])
    return (
        f"{parts}; {total:,} rows are known to be mislabelled. The {count:,} rows of highest self-influence hold "
        f"{found:,} of them ({found / total:.0%}); by chance they would hold {total * count / data.num_rows:.0f}."
    )


def build(data: ReportContent) -> list[Section]:
    """Return the sections in order."""
    parts = [
        _overview(data),
        _distributions(data),
        _recovery(data),
        _suspects(data),
        _targets(data),
        _classes(data),
        Section("reading", "How to read this", _meaning(data) + _files(data)),
    ]
    return [part for part in parts if part is not None]


def _meaning(data: ReportContent) -> str:
    """Return what the numbers of this report mean."""
    texts = [SELF_MEANING, OUTPUT_MEANING if data.settings.get("target") == "output" else LOSS_MEANING]
    if data.contradicted is not None:
        texts.append(CONTRADICTED_MEANING)
    return "".join(paragraph(text) for text in (*texts, ESTIMATOR_MEANING))


def _overview(data: ReportContent) -> Section:
    """Build key figures, the state of the labels, what to do, and settings."""
    figures = [("training rows", f"{data.num_rows:,}"), ("targets", f"{data.target.size:,}")]
    figures += [(name, str(data.settings[name])) for name in ("checkpoints", "estimator") if name in data.settings]
    if data.train.has_classes:
        figures.append(("classes", f"{len(set(data.train.labels or ())):,}"))
    disagrees = data.disagrees
    if disagrees is not None:
        figures.append(("rows whose label the model does not predict", f"{disagrees.mean():.1%}"))
    if data.known_mislabelled is not None:
        figures.append(("known mislabelled", f"{int(data.known_mislabelled.sum()):,}"))
    body = tiles(figures) + side_by_side(_health(data), _advice(data))
    if data.settings:
        settings = [[name, value] for name, value in data.settings.items()]
        body += folded("Settings and the store", table("What the scores come from", ["setting", "value"], settings))
    return Section("overview", "Overview", body)


def _health(data: ReportContent) -> str:
    """Return the estimate of wrong labels, or what it would need."""
    heading = subheading("Label health")
    health = data.health
    if health is None and data.summary is not None and data.summary.classes is not None:
        return heading + paragraph(
            f"No estimate of wrong labels: it is calibrated for {MIN_CLASSES} classes or more, and here "
            f"{count_classes(data.summary.classes)} have training rows and targets; with few classes a right row "
            "between two of them looks like a wrong label."
        )
    if health is None:
        return heading + paragraph(
            "No estimate of wrong labels: it needs scores, and labels of training rows and targets."
        )
    known = None if data.known_mislabelled is None else float(data.known_mislabelled.mean())
    chart = charts.interval(health.low, health.share, health.high, known)
    words = f"of the labels are likely wrong; interval {health.low:.1%} to {health.high:.1%}"
    line = (
        f"{health.num_contradicted:,} rows ({health.contradicted:.1%} ± {health.error:.1%}, one standard error) are "
        "contradicted by the targets."
    )
    if known is not None:
        line += f" Known to be wrong: {known:.1%} (the triangle)."
    return f'{heading}<p class="big">{health.share:.1%}</p>{paragraph(words)}{chart}{paragraph(line)}' + folded(
        "How this is estimated", paragraph(HEALTH)
    )


def _advice(data: ReportContent) -> str:
    """Return what the numbers recommend."""
    found = recommendations(data)
    if not found:
        return subheading("Recommendations") + paragraph("None of the numbers of this report calls for one.")
    items = "".join(
        f"<li><strong>{escape(advice.what)}</strong>"
        f'<span>{escape(advice.why)} <a href="#{advice.link}">Show</a></span></li>'
        for advice in found
    )
    return f'{subheading("Recommendations")}<ol class="advice">{items}</ol>'


def _distributions(data: ReportContent) -> Section:
    """Build the section on how self-influence, scores and targets are distributed."""
    mask, values = data.known_mislabelled, data.self_influence
    groups = {"all rows": values}
    if mask is not None and not mask.all():
        groups = {"clean": values[~mask], "known mislabelled": values[mask]}
    entries = [("series-alert" if place else "series-main", name) for place, name in enumerate(groups)]
    chart = charts.histogram(groups, "self-influence")
    caption = "Share of each group's rows by self-influence; dashed: medians."
    parts = [subheading("Self-influence") + (legend(entries) if len(entries) > 1 else "") + figure(chart, caption)]
    if data.summary is not None:
        chart = charts.signed_histogram(data.summary.edges, data.summary.counts)
        every = "" if data.summary.row_step == 1 else f" Of every {data.summary.row_step}th training row."
        caption = f"Share of all scores; blue helps the target, orange harms it.{every}"
        parts.append(
            subheading("Scores")
            + legend([("series-pos", "positive"), ("series-neg", "negative")])
            + figure(chart, caption)
        )
        means = data.summary.target_mean
        chart = charts.histogram({"targets": means}, "mean score of a target over all training rows")
        parts.append(
            subheading("Average influence per target")
            + figure(chart, "Share of targets; below zero, the scores of all training rows add up to harm.")
        )
    body = side_by_side(*parts, narrow=True) + folded("Numbers", _quantiles(data, groups))
    return Section("distributions", "Distributions", body)


def _quantiles(data: ReportContent, groups: dict[str, np.ndarray]) -> str:
    """Return a table of quantiles."""
    rows_of = {f"self-influence, {name}": values for name, values in groups.items() if len(values)}
    if data.summary is not None:
        rows_of["mean score of a training row"] = data.summary.row_mean
        rows_of["mean score of a target"] = data.summary.target_mean
    quantiles = (0.0, 0.1, 0.5, 0.9, 1.0)
    rows = [
        [name, f"{len(values):,}", *(number(float(value)) for value in np.quantile(values, quantiles))]
        for name, values in rows_of.items()
    ]
    return table(
        "Quantiles", ["what", "count", "least", "10 %", "median", "90 %", "greatest"], rows, numeric=range(1, 7)
    )


def _recovery(data: ReportContent) -> Section | None:
    """Build the section that compares rankings by the mislabelled rows they find."""
    mask = data.known_mislabelled
    if mask is None:
        return None
    rankings = {SELF: data.self_influence, **data.rankings}
    total, num_rows = int(mask.sum()), len(mask)
    counts = [rows_checked(num_rows, share) for share in SHARES]
    curves = {name: recovery_curve(scores, mask)[counts] for name, scores in rankings.items()}
    rows = [[name, *(f"{found} ({found / total:.0%})" for found in curve)] for name, curve in curves.items()]
    rows.append(
        ["chance (expected)", *(f"{total * count / num_rows:.0f} ({count / num_rows:.0%})" for count in counts)]
    )
    header = ["ranking", *(f"top {share:.0%} ({count:,})" for share, count in zip(SHARES, counts, strict=True))]
    entries = [(f"series{min(place, 3)}", name) for place, name in enumerate(rankings)]
    caption = "Rows are checked from the top of each ranking. Dashed: the best possible; dotted: chance."
    chart = legend(entries) + figure(charts.recovery_chart(rankings, mask), caption)
    listing = table(f"Mislabelled rows found, of {total}", header, rows, numeric=range(1, len(header)))
    return Section("recovery", "Finding mislabelled rows", side_by_side(chart, listing))


def _suspects(data: ReportContent) -> Section:
    """Build the controls of the table of training rows; the scripts fill it."""
    note = "Training rows, those of highest self-influence first."
    if data.num_rows > MAX_TABLE_ROWS:
        note += f" The {MAX_TABLE_ROWS:,} first of {data.num_rows:,}; influence_summary.csv has all."
    flags = [("", "all rows")]
    if data.contradicted is not None:
        note += " Of contradicted rows, “harms” names the class whose targets they harm most."
        flags += [("contradicted", "contradicted")]
    if data.disagrees is not None:
        flags += [("disagrees", "the model says another label")]
    if data.known_mislabelled is not None:
        flags += [("known", "known mislabelled"), ("not-known", "not known to be mislabelled")]
    controls = _field(
        "Search", '<input type="search" data-control="search" placeholder="row, label or text">', grow=True
    )
    if data.train.has_classes:
        controls += _field("Label", '<select data-control="label"><option value="">all</option></select>')
    if len(flags) > 1:
        controls += _field("Show", _select("flag", flags))
    controls += _field("Sort by", '<select data-control="sort"></select>')
    controls += _field("Rows a page", _select("size", [("24", "24"), ("60", "60"), ("120", "120")]))
    if data.train.kind == "images":
        controls += (
            '<span class="group" role="group" aria-label="View"><button type="button" data-view="cards">Cards</button>'
            '<button type="button" data-view="table">Table</button></span>'
        )
    pager = (
        '<div class="pager" role="group" aria-label="Pages of training rows">'
        '<button type="button" data-control="first">First</button>'
        '<button type="button" data-control="previous">Previous</button>'
        '<label>Page <input type="number" min="1" value="1" data-control="page"></label>'
        '<span class="status" data-control="pages"></span>'
        '<button type="button" data-control="next">Next</button>'
        '<button type="button" data-control="last">Last</button></div>'
    )
    body = (
        f'{paragraph(note)}<div class="toolbar" role="search" aria-label="Training rows">{controls}</div>'
        f'<p class="status" role="status" data-control="status"></p><div data-rows></div>{pager}'
    )
    return Section("suspects", "Suspects", body)


def _targets(data: ReportContent) -> Section | None:
    """Build the controls of the view of one target; the scripts fill it."""
    if not data.target.size or not (data.proponents.indices.size or data.opponents.indices.size):
        return None
    note = "Arrow keys go from target to target while this part has the focus."
    if data.target.size > MAX_TARGETS:
        note = f"{MAX_TARGETS:,} of {data.target.size:,} targets; influence_scores.csv has all. {note}"
    controls = (
        '<span class="group"><button type="button" data-control="previous">← Previous</button>'
        '<button type="button" data-control="next">Next →</button></span>'
    )
    controls += _field("Target", f'<input type="number" min="0" max="{data.target.size - 1}" data-control="number">')
    controls += _field(
        "Search", '<input type="search" data-control="search" placeholder="number, label or text">', grow=True
    )
    if data.target.has_classes and data.target.predictions is not None:
        options = [("", "all targets"), ("wrong", "model is wrong"), ("right", "model is right")]
        controls += _field("Show", _select("which", options))
    body = (
        f'{paragraph(note)}<div class="toolbar" role="search" aria-label="Targets">{controls}</div>'
        '<p class="status" role="status" data-control="status"></p><ul class="strip" aria-label="Targets nearby"></ul>'
        "<div data-target></div>"
    )
    return Section("targets", "Proponents and opponents", body)


def _classes(data: ReportContent) -> Section | None:
    """Build the class by class map and the table of classes."""
    classes = None if data.summary is None else data.summary.classes
    if classes is None:
        return None
    kept = charts.map_classes(classes.train_counts)
    drawn = np.abs(classes.influence[np.ix_(kept, kept)])
    largest = float(np.nanmax(drawn)) if np.isfinite(drawn).any() else 0.0
    caption = (
        "Mean score of the training rows of a class on the targets of a class. "
        f"Numbers are in percent of the largest, {number(largest)}; blue helps, orange harms."
    )
    chart = figure(charts.heat_map(classes.influence, data.class_names, classes.train_counts), caption)
    places = {name: place for place, name in enumerate(data.class_names)}
    codes = np.array([places[name] for name in data.train.labels or ()], dtype=np.int64)
    wrong = (
        None if data.contradicted is None else np.bincount(codes[data.contradicted], minlength=len(data.class_names))
    )
    sums = np.bincount(codes, weights=data.self_influence, minlength=len(classes.train_counts))
    rows = []
    for place in np.flatnonzero(classes.train_counts + classes.target_counts).tolist():
        count = int(classes.train_counts[place])
        own = float(classes.influence[place, place])
        line = [
            data.class_names[place], f"{count:,}", f"{int(classes.target_counts[place]):,}",
            number(sums[place] / count) if count else "", _number_or_empty(own),
        ]  # fmt: skip
        if wrong is not None:
            line.append(f"{wrong[place]:,} ({wrong[place] / count:.1%})" if count else "")
        rows.append(line)
    header = ["class", "training rows", "targets", "mean self-influence", "on own class"]
    header += [] if wrong is None else ["contradicted"]
    listing = table("Classes", header, rows, numeric=range(1, len(header)))
    numbers = folded("The map as a table", _map_table(data, classes.influence, kept.tolist()))
    return Section("classes", "Classes", side_by_side(chart + numbers, listing))


def _map_table(data: ReportContent, influence: np.ndarray, shown: list[int]) -> str:
    """Return the mean scores of the classes on the map; cells of classes without rows or targets are empty."""
    cells = [[data.class_names[a], *(_number_or_empty(float(influence[a, b])) for b in shown)] for a in shown]
    return table(
        "Mean scores: training class (line) on target class (column)",
        ["", *(data.class_names[b] for b in shown)],
        cells,
        numeric=range(1, len(shown) + 1),
    )


def _number_or_empty(value: float) -> str:
    """Return a number as text, and nothing for NaN."""
    return number(value) if np.isfinite(value) else ""


def _files(data: ReportContent) -> str:
    """Return the list of the files beside the page."""
    rows = [["influence_summary.csv", "every training row: self-influence, labels, flags, mean scores"]]
    rows.append(["influence_scores.csv", "the proponents and opponents of every target, one a line"])
    if data.summary is not None:
        rows.append(["target_summary.csv", "every target: mean score and root mean square"])
    if data.summary is not None and data.summary.classes is not None:
        rows.append(["class_influence.csv", "the class by class map"])
        rows.append(["top_influences/", "by class, the training rows that help and harm its targets most, as files"])
    rows.append(["*.png", "charts and montages, for slides"])
    return subheading("Files beside this page") + table("", ["file", "what it holds"], rows)


def _field(label: str, control: str, *, grow: bool = False) -> str:
    """Return a control below its label."""
    return f'<label class="field{" grow" if grow else ""}">{escape(label)}{control}</label>'


def _select(name: str, options: list[tuple[str, str]]) -> str:
    """Return a choice among values with their names."""
    items = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
    return f'<select data-control="{name}">{items}</select>'
