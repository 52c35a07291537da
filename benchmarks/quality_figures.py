"""Pictures of the quality benchmark: recovery curves, LDS against cost, and LDS against the regularization."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GROUPS = {
    "tracer tracin": {"color": "#1f5fbf", "marker": "o"},
    "tracer cosine": {"color": "#7fb2e5", "marker": "o"},
    "tracer trak": {"color": "#e0457b", "marker": "o"},
    "tracer influence": {"color": "#a3142a", "marker": "o"},
    "captum": {"color": "#d9730d", "marker": "s"},
    "traker": {"color": "#2e9e6b", "marker": "^"},
    "dattri": {"color": "#8a4fbf", "marker": "D"},
    "kronfluence": {"color": "#b08900", "marker": "P"},
    "bergson": {"color": "#5c4033", "marker": "X"},
    "logix": {"color": "#4f7f86", "marker": "v"},
    "baseline": {"color": "#8a949e", "marker": "x"},
}
"""How each library's methods are drawn, and each of tracer's estimators; what belongs to none is a baseline."""

OTHERS = ("captum", "traker", "dattri", "kronfluence", "bergson", "logix", "baseline")
"""All but tracer's estimators."""

CROWD = ("k=256", "k=4096", "exact", "3 runs", "last checkpoint", "target")
"""Variants whose recovery curves lie on those of others."""

Row = dict[str, Any]


def group_of(method: str) -> str:
    """Return how a method is drawn: a key of `GROUPS`.

    >>> group_of("captum TracInCP"), group_of("tracer trak, k=256"), group_of("loss, last checkpoint")
    ('captum', 'tracer trak', 'baseline')
    """
    return next((group for group in GROUPS if f"{method} ".replace(",", " ").startswith(f"{group} ")), "baseline")


def defaults(rows: Sequence[Row], key: str) -> Iterator[Row]:
    """Yield the rows of methods with their default setting that have a value under ``key``."""
    for row in rows:
        if "method" in row and not row.get("setting") and row.get(key) is not None:
            yield row


def ranking_of(row: Row) -> str:
    """Return which of a row's rankings is drawn: its own one where it has one."""
    return "own" if "auc_own" in row else "harm"


def best_settings(rows: Sequence[Row], task: str, group: str) -> list[Row]:
    """Return the best row of each method of a task and a library, where its default is not the best."""
    best: dict[str, Row] = {}
    for row in rows:
        if row["task"] == task and "lds" in row and group_of(row["method"]) == group:
            known = best.setdefault(row["method"], row)
            best[row["method"]] = max(known, row, key=lambda one: one["lds"])
    return [row for row in best.values() if row["setting"]]


def plain_axes(axes: Any) -> None:
    """Take away what a reader does not need."""
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def titles(rows: Sequence[Row]) -> dict[str, str]:
    """Return the title of each task by its name."""
    return {row["task"]: row["title"] for row in rows if "title" in row}


def draw_recovery(rows: Sequence[Row], path: Path) -> bool:
    """Draw how many flipped labels each method finds; return whether there was anything to draw."""
    from matplotlib.figure import Figure

    found = [*defaults(rows, "auc_own"), *(row for row in defaults(rows, "auc_harm") if "auc_own" not in row)]
    found = [
        row for row in found if not (row["method"].startswith("tracer") and any(c in row["method"] for c in CROWD))
    ]
    if not found:
        return False
    found.sort(key=lambda row: -row[f"auc_{ranking_of(row)}"])
    figure = Figure(figsize=(11, max(5.0, 0.2 * len(found) + 1.0)), layout="constrained")
    axes = figure.subplots()
    dashes = ["-", "--", ":", "-.", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (7, 3))]
    seen: dict[str, int] = {}
    for row in found:
        group = group_of(row["method"])
        number = seen[group] = seen.get(group, -1) + 1
        which = ranking_of(row)
        curve, label = row[f"curve_{which}"], row["method"] + (", by harm" if which == "harm" else "")
        shares = np.linspace(0, 100, len(curve))
        line = {"color": GROUPS[group]["color"], "linestyle": dashes[number % len(dashes)]}
        axes.plot(shares, 100 * np.array(curve), label=f"{row[f'auc_{which}']:.3f}  {label}", linewidth=1.3, **line)
    axes.set_xlabel("training rows checked, %")
    axes.set_ylabel("flipped labels found, %")
    axes.set_xlim(0, 40)  # beyond it most curves are at the top
    axes.set_title(titles(rows)[found[0]["task"]], fontsize=12, loc="left")
    plain_axes(axes)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, title="area under the curve, method")
    figure.savefig(path, dpi=150)
    return True


def draw_costs(rows: Sequence[Row], path: Path) -> bool:
    """Draw LDS against time and against stored bytes; hollow: the best of the settings that were tried."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    names = [name for name in titles(rows) if any(row["task"] == name for row in defaults(rows, "lds"))]
    if not names:
        return False
    figure = Figure(figsize=(10, 3.3 * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), 2, squeeze=False, sharey="row")
    for name, pair in zip(names, panels, strict=True):
        mine = [row for row in defaults(rows, "lds") if row["task"] == name]
        for axes, key, label in zip(pair, ("ratio", "row_bytes"), ("time in plain passes", "bytes a row"), strict=True):
            for group, style in GROUPS.items():
                points = [row for row in mine if group_of(row["method"]) == group and row[key] > 0]
                axes.scatter([p[key] for p in points], [p["lds"] for p in points], label=group, s=26, **style)
                tuned = [row for row in best_settings(rows, name, group) if row[key] > 0]
                hollow = {"marker": style["marker"], "facecolors": "none", "edgecolors": style["color"]}
                if tuned:
                    axes.scatter([p[key] for p in tuned], [p["lds"] for p in tuned], s=26, **hollow)
            named = [[row for row in mine if row["method"].startswith("tracer") and row[key] > 0]]
            named += [[row for row in mine if group_of(row["method"]) == group and row[key] > 0] for group in OTHERS]
            for points in filter(None, named):
                best = max(points, key=lambda row: row["lds"])
                side = -1 if best[key] > 1 else 1  # the cheapest are at the left edge
                place = {"xytext": (5 * side, 4), "textcoords": "offset points", "fontsize": 7}
                axes.annotate(best["method"], (best[key], best["lds"]), ha="right" if side < 0 else "left", **place)
            if any(row[key] > 0 for row in mine):
                axes.set_xscale("log")
                axes.xaxis.set_minor_formatter(NullFormatter())  # whose labels overlap where a panel spans little
            axes.set_xlabel(label)
            axes.axhline(0, color="#333333", linewidth=0.8)
            plain_axes(axes)
        pair[0].set_ylabel("LDS")
        pair[0].set_title(titles(rows)[name], fontsize=11, loc="left")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
    return True


def sweeps(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Return the rows of tracer's methods for which several values of λ were tried, by task and method."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if "lds" in row and "regularization" in row["setting"] and row["method"].startswith("tracer"):
            found.setdefault((row["task"], row["method"]), []).append(row)
    return found


def draw_sweeps(rows: Sequence[Row], path: Path) -> bool:
    """Draw LDS against λ, a panel for each task; a dot is at the λ that tracer chooses."""
    from matplotlib.figure import Figure

    found = sweeps(rows)
    names = [name for name in titles(rows) if any(task == name for task, _ in found)]
    if not names:
        return False
    figure = Figure(figsize=(4.6 * min(3, len(names)), 4.2 * -(-len(names) // 3)), layout="constrained")
    panels = figure.subplots(-(-len(names) // 3), min(3, len(names)), squeeze=False).ravel()
    for axes, name in zip(panels, names, strict=False):
        for (task, method), points in found.items():
            if task != name:
                continue
            color, dash = GROUPS[group_of(method)]["color"], "--" if "3 runs" in method else "-"
            points.sort(key=lambda row: row["setting"]["regularization"])
            values = [row["setting"]["regularization"] for row in points]
            axes.semilogx(values, [row["lds"] for row in points], dash, color=color, label=method, linewidth=1.5)
            for chosen in (row for row in defaults(rows, "lds") if (row["task"], row["method"]) == (name, method)):
                axes.plot(chosen["regularization"], chosen["lds"], "o", color=color, markersize=7)
        axes.set_title(titles(rows)[name], fontsize=11, loc="left")
        axes.set_xlabel("λ (dots: as tracer chooses it)")
        axes.legend(frameon=False, fontsize=7)
        plain_axes(axes)
    panels[0].set_ylabel("LDS")
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=150)
    return True


def draw(rows: Sequence[Row], stem: Path) -> list[Path]:
    """Draw all pictures that the rows allow.

    Args:
        rows: As `benchmarks/quality.py` writes them.
        stem: The start of the files' names.

    Returns:
        The paths of what was written.
    """
    written = []
    for name, picture in (("recovery", draw_recovery), ("cost", draw_costs), ("lambda", draw_sweeps)):
        path = stem.with_name(f"{stem.name}_{name}.png")
        if picture(rows, path):
            written.append(path)
    return written
