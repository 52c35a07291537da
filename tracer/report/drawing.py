"""PNG files for slides and papers: drawing with matplotlib without touching its global state.

The page has charts of its own, see charts.py. Every function that draws returns a `Figure`; `png` makes a file of it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tracer.errors import MissingDependencyError
from tracer.report.charts import bins, map_classes
from tracer.report.recovery import recovery_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160

MAX_NAME = 24
"""Names of classes are cut after so many characters."""


@dataclass(frozen=True)
class Theme:
    """The colours of figures.

    Attributes:
        background: Behind everything.
        text: Titles and captions.
        muted: Axes, ticks and what is only for comparison.
        grid: Thin lines behind the data.
        main: Self-influence and clean rows; proponents.
        alert: Mislabelled rows.
        others: Further rankings, in order; the first also opponents.
    """

    background: str
    text: str
    muted: str
    grid: str
    main: str
    alert: str
    others: tuple[str, ...]


THEME = Theme("#ffffff", "#17202b", "#5c6776", "#e4e8ee", "#1f6fc5", "#c2500b", ("#6b3fa0", "#0b7a5b", "#8a6100"))


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` by ``height`` inches.

    Args:
        width: In inches.
        height: In inches.

    Returns:
        A figure that no window and no pyplot state knows.

    Raises:
        MissingDependencyError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "Reports need matplotlib, which is not installed. Install it: pip install tracin[report]"
        ) from error
    return Figure(figsize=(width, height), dpi=DPI, facecolor=THEME.background)


def png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes; the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _plot_axes(figure: Figure, place: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    """Return styled axes at a place (rows, columns, number) of the figure."""
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot(*place)
    axes.set_facecolor(THEME.background)
    axes.grid(True, color=THEME.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=THEME.muted, labelsize=10, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(THEME.grid)
    axes.xaxis.label.set(color=THEME.text, size=11)
    axes.yaxis.label.set(color=THEME.text, size=11)
    return axes


def self_influence_histogram(self_influence: np.ndarray, known_mislabelled: np.ndarray | None) -> Figure:
    """Draw the distribution of self-influence, of clean and mislabelled rows apart where these are known.

    Args:
        self_influence: ``[N]``.
        known_mislabelled: ``[N]``, bool, or None.

    Returns:
        The figure; each group's bars add up to 100 %.
    """
    figure = new_figure(8, 3.9)
    axes = _plot_axes(figure)
    found, logarithmic = bins(self_influence)
    edges = found.tolist()
    groups = [("all training rows", np.ones(len(self_influence), dtype=bool), THEME.main)]
    if known_mislabelled is not None:
        groups = [("clean", ~known_mislabelled, THEME.main), ("known mislabelled", known_mislabelled, THEME.alert)]
    for name, members, color in groups:
        values = np.clip(self_influence[members], edges[0], edges[-1])
        if not values.size:
            continue
        weights = np.full(len(values), 100.0 / len(values))
        label = f"{name} ({len(values):,})"
        axes.hist(values, bins=edges, weights=weights, color=color, alpha=0.28)
        axes.hist(values, bins=edges, weights=weights, color=color, histtype="step", linewidth=1.8, label=label)
        axes.axvline(float(np.median(values)), color=color, linewidth=1.2, linestyle=(0, (4, 3)))
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel("self-influence (dashed: median)")
    axes.set_ylabel("share of the group's rows, %")
    axes.margins(y=0.12)
    axes.legend(loc="upper left", frameon=False, fontsize=10.5, labelcolor=THEME.text)
    return figure


def recovery_figure(rankings: Mapping[str, np.ndarray], known_mislabelled: np.ndarray) -> Figure:
    """Draw which share of the mislabelled rows each ranking finds, beside chance and the best possible.

    Args:
        rankings: Scores ``[N]`` by name, higher is checked earlier; the first is drawn strongest.
        known_mislabelled: ``[N]``, bool, with at least one row.

    Returns:
        The figure: all rows at the left, the top of the rankings enlarged at the right.
    """
    figure = new_figure(8.6, 4.5)
    whole, top = _plot_axes(figure, (1, 2, 1)), _plot_axes(figure, (1, 2, 2))
    for axes in (whole, top):
        _recovery_lines(axes, rankings, known_mislabelled)
        axes.set_xlabel("training rows checked, %")
    share = 100.0 * float(known_mislabelled.mean())
    counts = recovery_curve(next(iter(rankings.values())), known_mislabelled)
    floor = 100.0 * counts[round(0.5 * share / 100 * (len(counts) - 1))] / counts[-1]
    whole.set(xlim=(0, 100), ylim=(0, 103))
    top.set(xlim=(0.5 * share, min(100.0, 2.5 * share)), ylim=(min(0.9 * floor, 90.0), 101))
    whole.set_ylabel("mislabelled rows found, %")
    top.set_title("enlarged", color=THEME.muted, fontsize=10, loc="right")
    whole.set_title("all rows", color=THEME.muted, fontsize=10, loc="right")
    handles, names = whole.get_legend_handles_labels()
    order = [len(names) - 2 - place for place in range(len(names) - 1)] + [len(names) - 1]  # self-influence first
    figure.legend(
        [handles[place] for place in order],
        [names[place] for place in order],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=10.5,
        labelcolor=THEME.text,
    )
    for text in figure.legends[0].get_texts():
        text.set_parse_math(False)
    return figure


def _recovery_lines(axes: Axes, rankings: Mapping[str, np.ndarray], known_mislabelled: np.ndarray) -> None:
    """Draw the curve of each ranking, the best possible and chance."""
    total = int(known_mislabelled.sum())
    checked = np.linspace(0.0, 100.0, len(known_mislabelled) + 1)
    best = 100.0 * np.minimum(np.arange(len(checked)) / total, 1.0)
    axes.plot(checked, best, color=THEME.muted, linewidth=1.2, linestyle=(0, (1, 2)), label="best possible")
    styles = ("-", (0, (6, 2)), (0, (3, 1.5)), (0, (6, 2, 1, 2)))
    for number, (name, scores) in reversed(list(enumerate(rankings.items()))):
        color = THEME.main if number == 0 else THEME.others[(number - 1) % len(THEME.others)]
        share = 100.0 * recovery_curve(scores, known_mislabelled) / total
        width = 2.8 if number == 0 else 1.7
        axes.plot(checked, share, color=color, linewidth=width, linestyle=styles[min(number, 3)], label=name)
    axes.plot([0, 100], [0, 100], color=THEME.muted, linewidth=1.4, linestyle="--", label="chance")


def score_histogram(edges: np.ndarray, counts: np.ndarray) -> Figure:
    """Draw the distribution of scores, logarithmic on both sides of zero.

    Args:
        edges: ``[B + 1]``, as in `tracer.report.summaries.ScoreSummary`.
        counts: ``[B]``.

    Returns:
        The figure.
    """
    figure = new_figure(8, 3.9)
    axes = _plot_axes(figure)
    middle = len(counts) // 2
    places = np.arange(len(counts))
    colors = [THEME.alert if place < middle else THEME.main if place > middle else THEME.muted for place in places]
    axes.bar(places, 100.0 * counts / max(1, int(counts.sum())), width=0.9, color=colors, alpha=0.7)
    wanted = [place for place in np.linspace(0, len(counts) - 1, 9).round().astype(int).tolist() if place != middle]
    ticks = sorted([*wanted, middle])
    axes.set_xticks(ticks, ["0" if place == middle else f"{edges[place + (place > middle)]:.2g}" for place in ticks])
    axes.set_xlabel("score")
    axes.set_ylabel("share of the scores, %")
    return figure


def class_figure(influence: np.ndarray, names: Sequence[str], train_counts: np.ndarray) -> Figure:
    """Draw the class by class map of mean scores.

    Args:
        influence: ``[C, C]``, train class by target class; NaN is left empty.
        names: The classes.
        train_counts: ``[C]``, which classes are kept where there are many.

    Returns:
        The figure.
    """
    kept = map_classes(train_counts)
    values = influence[np.ix_(kept, kept)]
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    side = min(9.0, 3.2 + 0.32 * len(kept))
    figure = new_figure(side + 1.2, side)
    axes = _plot_axes(figure)
    axes.grid(False)
    image = axes.imshow(values, cmap="PuOr", vmin=-(largest or 1.0), vmax=largest or 1.0)
    labels = [names[place][:MAX_NAME] for place in kept.tolist()]
    rotation = 90 if max(map(len, labels)) > 3 else 0
    for text in (
        *axes.set_xticks(range(len(kept)), labels, rotation=rotation),
        *axes.set_yticks(range(len(kept)), labels),
    ):
        text.label1.set_parse_math(False)
    axes.set_xlabel("targets of class")
    axes.set_ylabel("training rows of class")
    bar = figure.colorbar(image, ax=axes, label="mean score", shrink=0.8)
    bar.ax.tick_params(colors=THEME.muted, labelsize=9)
    return figure
