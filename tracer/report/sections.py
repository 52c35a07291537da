"""The parts of a report: each joins a figure, its numbers and the words that explain them."""

from __future__ import annotations

from functools import partial

import numpy as np

from tracer.report.content import ReportContent
from tracer.report.figures import Picture, recovery_figure, render, self_influence_histogram
from tracer.report.montage import influence_montage, ranking_montage
from tracer.report.page import Flag, Section, figure, folded, paragraph, side_by_side, subheading, table
from tracer.report.recovery import SHARES, recovery_curve, rows_checked

Pictures = dict[str, Picture]

SELF = "self-influence"

MEANING = (
    (
        "Self-influence adds up, over the checkpoints, learning rate times the squared norm of the row's loss "
        "gradient: how hard training pulled on this row. Rows that contradict the others stand high: wrong labels, and "
        "also rare or hard rows that are right."
    ),
    (
        "A proponent is a training row whose steps lowered the target's loss (score above zero), an opponent one whose "
        "steps raised it (below zero). Scores can be compared within a target, hardly between targets: large "
        "gradients give large scores. Rows with large gradients appear for many targets; the cosine estimator divides "
        "the gradients' norms out."
    ),
    (
        "Scores follow single gradient steps at a few checkpoints. They say little about what would happen if a row "
        "were left out and the model trained anew, and they ignore momentum, weight decay and data augmentation."
    ),
)


def summary(data: ReportContent) -> str:
    """Return the paragraph below the title."""
    parts = f"{len(data.order):,} training rows, {data.target.size:,} targets"
    if data.known_mislabelled is None:
        return parts + "."
    count = rows_checked(len(data.order), SHARES[0])
    total = int(data.known_mislabelled.sum())
    found = int(recovery_curve(data.self_influence, data.known_mislabelled)[count])
    return (
        f"{parts}, {total:,} rows known to be mislabelled. The {count:,} rows of highest self-influence hold "
        f"{found:,} of them ({found / total:.0%}); by chance they would hold {total * count / len(data.order):.0f}."
    )


def build(data: ReportContent) -> tuple[list[Section], Pictures]:
    """Draw everything once.

    Args:
        data: What is reported.

    Returns:
        The sections in order, and the pictures by file name without ``.png``.
    """
    pictures: Pictures = {}
    parts = [
        _recovery(data, pictures) if data.known_mislabelled is not None else None,
        _distribution(data, pictures),
        _top_rows(data, pictures),
        _influence(data, pictures) if data.shown_targets else None,
        Section("reading", "How to read this", "".join(paragraph(text) for text in MEANING)),
        _settings(data) if data.settings else None,
    ]
    return [part for part in parts if part is not None], pictures


def _recovery(data: ReportContent, pictures: Pictures) -> Section:
    """Build the section that compares rankings by the mislabelled rows they find."""
    mask = data.known_mislabelled
    assert mask is not None
    rankings = {SELF: data.self_influence, **data.rankings}
    pictures["recovery"] = render(partial(recovery_figure, rankings, mask))
    total, num_rows = int(mask.sum()), len(mask)
    counts = [rows_checked(num_rows, share) for share in SHARES]
    curves = {name: recovery_curve(scores, mask)[counts] for name, scores in rankings.items()}
    rows = [[name, *(f"{found} ({found / total:.0%})" for found in curve)] for name, curve in curves.items()]
    rows.append(
        ["chance (expected)", *(f"{total * count / num_rows:.0f} ({count / num_rows:.0%})" for count in counts)]
    )
    header = ["ranking", *(f"top {share:.0%} ({count:,})" for share, count in zip(SHARES, counts, strict=True))]
    alt = (
        f"Recovery curve. In its first 10, 20 and 30 percent of {num_rows} rows, self-influence finds "
        f"{', '.join(str(found) for found in curves[SELF])} of {total} mislabelled rows."
    )
    caption = "Share of the mislabelled rows that are found when rows are checked from the top of each ranking."
    body = figure(pictures["recovery"], alt, caption)
    body += table(f"Mislabelled rows found, of {total}", header, rows, numeric=range(1, len(header)))
    return Section("recovery", "Finding mislabelled rows", body)


def _distribution(data: ReportContent, pictures: Pictures) -> Section:
    """Build the section on how self-influence is distributed."""
    mask, values = data.known_mislabelled, data.self_influence
    pictures["self_influence"] = render(partial(self_influence_histogram, values, mask))
    groups = {"all rows": values}
    if mask is not None:
        groups |= {"clean": values[~mask], "known mislabelled": values[mask]}
    quantiles = (0.0, 0.1, 0.5, 0.9, 1.0)
    rows = [
        [name, f"{len(group):,}", *(_number(value) for value in np.quantile(group, quantiles))]
        for name, group in groups.items()
        if len(group)
    ]
    medians = ", ".join(f"{row[0]} {row[4]}" for row in rows)
    alt = f"Histogram of self-influence. Medians: {medians}."
    body = figure(pictures["self_influence"], alt, "How many rows of each group have which self-influence.")
    body += table(
        "Self-influence", ["rows", "count", "least", "10 %", "median", "90 %", "greatest"], rows, numeric=range(1, 7)
    )
    return Section("distribution", "Distribution of self-influence", body)


def _top_rows(data: ReportContent, pictures: Pictures) -> Section:
    """Build the section on the rows of highest self-influence."""
    rows = data.order[: data.num_top_rows]
    header = ["rank", "row", SELF]
    known = [
        ("label", data.train.labels is not None),
        ("prediction", data.train.predictions is not None),
        ("known mislabelled", data.known_mislabelled is not None),
        ("input", data.train.kind in ("texts", "vectors")),
    ]
    header += [name for name, present in known if present]
    lines: list[list[object]] = []
    for rank, row in enumerate(rows.tolist(), start=1):
        flag = Flag("yes") if data.is_mislabelled(row) else "no"
        cells = {
            "label": data.train.label(row),
            "prediction": data.train.prediction(row),
            "known mislabelled": flag,
            "input": data.train.describe(row),
        }
        lines.append([rank, row, _number(data.self_influence[row]), *(cells[name] for name in header[3:])])
    listing = table("", header, lines, numeric=range(3))
    if data.train.kind != "images" or not len(rows):
        return Section("top-rows", "Rows of highest self-influence", listing)
    draw = partial(ranking_montage, data.train, rows, data.self_influence, data.known_mislabelled)
    pictures["top_self_influence"] = render(draw)
    above = "" if data.train.labels is None else "label"
    if data.train.predictions is not None:
        above = "label (→ what the model predicts, where it differs)"
    caption = (f"Above each image its {above}, below it" if above else "Below each image") + " its self-influence."
    alt = f"The {len(rows)} training images of highest self-influence."
    if data.known_mislabelled is not None:
        count = int(data.known_mislabelled[rows].sum())
        caption += " Known mislabelled rows are framed."
        alt += f" {count} of them are known to be mislabelled."
    body = figure(pictures["top_self_influence"], alt, caption) + folded("The same as a table", listing)
    return Section("top-rows", "Rows of highest self-influence", body)


def _influence(data: ReportContent, pictures: Pictures) -> Section:
    """Build the section on the proponents and opponents of some targets."""
    listing = "".join(_target_tables(data, number) for number in data.shown_targets)
    heading = "Proponents and opponents"
    note = f"{len(data.shown_targets)} of {data.target.size:,} targets, the strongest training rows first."
    if data.train.kind != "images" or data.target.kind != "images":
        return Section("influence", heading, paragraph(note, "note") + listing)
    draw = partial(
        influence_montage, data.train, data.target, data.proponents, data.opponents, data.shown_targets,
        data.known_mislabelled,
    )  # fmt: skip
    pictures["influence"] = render(draw)
    alt = f"{len(data.shown_targets)} target images, each beside its strongest proponents and opponents."
    above = "Above each image its label, below it" if data.train.labels is not None else "Below each image"
    caption = f"{note} {above} its score."
    if data.target.predictions is not None:
        caption += " Above a target → what the model predicts, where it differs."
    if data.known_mislabelled is not None:
        caption += " Known mislabelled rows are framed."
    body = figure(pictures["influence"], alt, caption) + folded("All that were asked for, as tables", listing)
    return Section("influence", heading, body)


def _target_tables(data: ReportContent, number: int) -> str:
    """Return one target's heading and its two tables, side by side."""
    tables = []
    for name, top in (("Proponents", data.proponents), ("Opponents", data.opponents)):
        header = ["row", "score"]
        header += ["label"] if data.train.labels is not None else []
        header += ["input"] if data.train.kind in ("texts", "vectors") else []
        lines: list[list[object]] = []
        for row, score in zip(top.indices[number].tolist(), top.scores[number], strict=True):
            label = data.train.label(row)
            cells = {
                "label": Flag(f"{label} (mislabelled)") if data.is_mislabelled(row) else label,
                "input": data.train.describe(row),
            }
            lines.append([row, f"{score:+.3g}", *(cells[column] for column in header[2:])])
        tables.append(table(name, header, lines, numeric=range(2)))
    label, prediction = data.target.label(number), data.target.prediction(number)
    words = [f"Target {number}"]
    words += [f"label {label}"] if label else []
    words += [f"predicted {prediction}"] if prediction else []
    described = data.target.describe(number)
    heading = subheading(f"target-{number}", " · ".join(words))
    return heading + (paragraph(described) if described else "") + side_by_side(*tables)


def _settings(data: ReportContent) -> Section:
    """Build the table of settings."""
    rows = [[name, value] for name, value in data.settings.items()]
    return Section("settings", "Settings", table("", ["setting", "value"], rows))


def _number(value: float) -> str:
    """Return a number to three digits."""
    return f"{value:.3g}"
