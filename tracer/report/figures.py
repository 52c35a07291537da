"""Drawing with matplotlib, in a light and a dark theme, without touching its global state.

Every function that draws takes a `Theme` and returns a `Figure`; `render` draws one in both themes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tracer.errors import MissingDependencyError
from tracer.report.recovery import recovery_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 160
NUM_BINS = 45
DECADES = 8
"""Self-influence that is smaller than the greatest by more powers of ten is drawn at the left edge."""


@dataclass(frozen=True)
class Theme:
    """The colours of a figure; `background` is that of the page's cards.

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


LIGHT = Theme("#ffffff", "#17202b", "#5c6776", "#e4e8ee", "#0b63c4", "#c4420c", ("#6b3fa0", "#0b7a5b", "#8a6100"))
DARK = Theme("#171c24", "#e7ebf1", "#9da8b7", "#2b333f", "#69b1ff", "#ff935c", ("#c4a1ff", "#4fd1a5", "#e5bd55"))


@dataclass(frozen=True)
class Picture:
    """One figure as PNG bytes in both themes."""

    light: bytes
    dark: bytes


def new_figure(theme: Theme, width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` by ``height`` inches.

    Args:
        theme: Its colours.
        width: In inches; the page shows 120 pixels an inch at most.
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
    return Figure(figsize=(width, height), dpi=DPI, facecolor=theme.background)


def render(draw: Callable[[Theme], Figure]) -> Picture:
    """Draw a figure in both themes."""
    return Picture(_png(draw(LIGHT)), _png(draw(DARK)))


def _png(figure: Figure) -> bytes:
    """Return the figure as PNG bytes; the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _plot_axes(figure: Figure, theme: Theme, place: tuple[int, int, int] = (1, 1, 1)) -> Axes:
    """Return styled axes at a place (rows, columns, number) of the figure."""
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot(*place)
    axes.set_facecolor(theme.background)
    axes.grid(True, color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=theme.muted, labelsize=10, length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)
    axes.xaxis.label.set(color=theme.text, size=11)
    axes.yaxis.label.set(color=theme.text, size=11)
    return axes


def self_influence_histogram(self_influence: np.ndarray, known_mislabelled: np.ndarray | None, theme: Theme) -> Figure:
    """Draw the distribution of self-influence, of clean and mislabelled rows apart where these are known.

    Args:
        self_influence: ``[N]``.
        known_mislabelled: ``[N]``, bool, or None.
        theme: The colours.

    Returns:
        The figure; each group's bars add up to 100 %.
    """
    figure = new_figure(theme, 8, 3.9)
    axes = _plot_axes(figure, theme)
    edges, logarithmic = _bins(self_influence)
    bins = edges.tolist()
    groups = [("all training rows", np.ones(len(self_influence), dtype=bool), theme.main)]
    if known_mislabelled is not None:
        groups = [("clean", ~known_mislabelled, theme.main), ("known mislabelled", known_mislabelled, theme.alert)]
    for name, members, color in groups:
        values = np.clip(self_influence[members], bins[0], bins[-1])
        if not values.size:
            continue
        weights = np.full(len(values), 100.0 / len(values))
        label = f"{name} ({len(values):,})"
        axes.hist(values, bins=bins, weights=weights, color=color, alpha=0.28)
        axes.hist(values, bins=bins, weights=weights, color=color, histtype="step", linewidth=1.8, label=label)
        axes.axvline(float(np.median(values)), color=color, linewidth=1.2, linestyle=(0, (4, 3)))
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlim(bins[0], bins[-1])
    axes.set_xlabel("self-influence (dashed: median)")
    axes.set_ylabel("share of the group's rows, %")
    axes.margins(y=0.12)
    axes.legend(loc="upper left", frameon=False, fontsize=10.5, labelcolor=theme.text)
    return figure


def _bins(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return bin edges, and whether they are logarithmic: so where all is above zero but for few exact zeros."""
    low, high = float(values.min()), float(values.max())
    if low < 0 or high <= 0:
        edges = np.linspace(low, high, NUM_BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
        return edges, False
    low = max(float(values[values > 0].min()), high * 10.0**-DECADES)
    if high < 1.01 * low:
        low, high = low / 2, high * 2
    return np.geomspace(low, high, NUM_BINS + 1), True


def recovery_figure(rankings: Mapping[str, np.ndarray], known_mislabelled: np.ndarray, theme: Theme) -> Figure:
    """Draw which share of the mislabelled rows each ranking finds, beside chance and the best possible.

    Args:
        rankings: Scores ``[N]`` by name, higher is checked earlier; the first is drawn strongest.
        known_mislabelled: ``[N]``, bool, with at least one row.
        theme: The colours.

    Returns:
        The figure: all rows at the left, the top of the rankings enlarged at the right.
    """
    figure = new_figure(theme, 8.6, 4.5)
    whole, top = _plot_axes(figure, theme, (1, 2, 1)), _plot_axes(figure, theme, (1, 2, 2))
    for axes in (whole, top):
        _recovery_lines(axes, rankings, known_mislabelled, theme)
        axes.set_xlabel("training rows checked, %")
    share = 100.0 * float(known_mislabelled.mean())
    counts = recovery_curve(next(iter(rankings.values())), known_mislabelled)
    floor = 100.0 * counts[round(0.5 * share / 100 * (len(counts) - 1))] / counts[-1]
    whole.set(xlim=(0, 100), ylim=(0, 103))
    top.set(xlim=(0.5 * share, min(100.0, 2.5 * share)), ylim=(min(0.9 * floor, 90.0), 101))
    whole.set_ylabel("mislabelled rows found, %")
    top.set_title("enlarged", color=theme.muted, fontsize=10, loc="right")
    whole.set_title("all rows", color=theme.muted, fontsize=10, loc="right")
    handles, names = whole.get_legend_handles_labels()
    order = [len(names) - 2 - place for place in range(len(names) - 1)] + [len(names) - 1]  # self-influence first
    figure.legend(
        [handles[place] for place in order],
        [names[place] for place in order],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=10.5,
        labelcolor=theme.text,
    )
    return figure


def _recovery_lines(
    axes: Axes, rankings: Mapping[str, np.ndarray], known_mislabelled: np.ndarray, theme: Theme
) -> None:
    """Draw the curve of each ranking, the best possible and chance."""
    total = int(known_mislabelled.sum())
    checked = np.linspace(0.0, 100.0, len(known_mislabelled) + 1)
    best = 100.0 * np.minimum(np.arange(len(checked)) / total, 1.0)
    axes.plot(checked, best, color=theme.muted, linewidth=1.2, linestyle=(0, (1, 2)), label="best possible")
    styles = ("-", (0, (6, 2)), (0, (3, 1.5)), (0, (6, 2, 1, 2)))
    for number, (name, scores) in reversed(list(enumerate(rankings.items()))):
        color = theme.main if number == 0 else theme.others[(number - 1) % len(theme.others)]
        share = 100.0 * recovery_curve(scores, known_mislabelled) / total
        width = 2.8 if number == 0 else 1.7
        axes.plot(checked, share, color=color, linewidth=width, linestyle=styles[min(number, 3)], label=name)
    axes.plot([0, 100], [0, 100], color=theme.muted, linewidth=1.4, linestyle="--", label="chance")
