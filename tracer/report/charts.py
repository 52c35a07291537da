"""Charts as inline SVG: they take the page's colours, light or dark, and are sharp in print.

Every function returns one ``<svg>`` with a title and a description; numbers stand in a table beside it. Colours come
from CSS classes of assets/report.css alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

import numpy as np

from tracer.report.recovery import recovery_curve

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 42, 14, 10, 40
NUM_BINS = 44
DECADES = 8
"""Self-influence that is smaller than the greatest by more powers of ten is drawn at the left edge."""

MAX_CURVE_POINTS = 400
MAX_HEAT_CLASSES = 40
"""Of more classes, those with the most training rows are in the heat map; class_influence.csv has all."""

HEAT_NUMBERS = 12
"""With more classes the cells of the heat map hold no numbers."""


def number(value: float) -> str:
    """Return a number to three digits, with a true minus sign.

    >>> number(-0.012345), number(12345.0)
    ('−0.0123', '12,345')
    """
    if value != 0 and (abs(value) >= 1e7 or abs(value) < 1e-4):
        return f"{value:.2e}".replace("-", "−")
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace("-", "−")
    return f"{value:.3g}".replace("-", "−")


def bins(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return bin edges, and whether they are logarithmic: so where all is above zero but for few exact zeros."""
    low, high = float(values.min()), float(values.max())
    if low < 0 or high <= 0:
        edges = np.linspace(low, high, NUM_BINS + 1) if high > low else np.array([low - 0.5, low + 0.5])
        return edges, False
    low = max(float(values[values > 0].min()), high * 10.0**-DECADES)
    if high < 1.01 * low:
        low, high = low / 2, high * 2
    return np.geomspace(low, high, NUM_BINS + 1), True


def histogram(groups: Mapping[str, np.ndarray], label: str) -> str:
    """Return overlaid histograms; each group's bars add up to 100 %.

    Args:
        groups: Values by name, one or two groups: the second is drawn in the warning colour.
        label: What the values are.

    Returns:
        SVG.
    """
    whole = np.concatenate(list(groups.values()))
    edges, logarithmic = bins(whole)
    shares = {
        name: np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] * 100.0 / max(1, len(values))
        for name, values in groups.items()
    }
    top = max(1e-9, max(float(share.max()) for share in shares.values()))
    across = np.log(edges) if logarithmic else edges
    x = _scale(across[0], across[-1], LEFT, WIDTH - RIGHT)
    y = _scale(0.0, top * 1.06, HEIGHT - BOTTOM, TOP)
    parts = [_y_grid(y, _ticks(0.0, top * 1.06, 4), lambda value: f"{value:.3g} %")]
    ticks = _log_ticks(edges[0], edges[-1]) if logarithmic else _ticks(edges[0], edges[-1], 4)
    parts.append(_x_ticks([(x(np.log(tick) if logarithmic else tick), number(tick)) for tick in ticks], label))
    for place, (name, share) in enumerate(shares.items()):
        css = "series-alert" if place else "series-main"
        parts += [
            f'<rect class="{css} bar" x="{x(a):.1f}" y="{y(value):.1f}" width="{max(0.5, x(b) - x(a) - 0.6):.1f}" '
            f'height="{y(0.0) - y(value):.1f}"><title>{escape(name)}: {value:.2f} % from {number(low)} to '
            f"{number(high)}</title></rect>"
            for a, b, low, high, value in zip(across[:-1], across[1:], edges[:-1], edges[1:], share, strict=True)
            if value > 0
        ]
        values = groups[name]
        if len(values):
            middle = float(np.clip(np.median(values), edges[0], edges[-1]))
            at = x(np.log(middle) if logarithmic else middle)
            parts.append(f'<line class="{css} median" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    medians = ", ".join(f"{name} {number(float(np.median(v)))}" for name, v in groups.items() if len(v))
    return _svg(parts, f"Histogram of {label}", f"Medians: {medians}.")


def signed_histogram(edges: np.ndarray, counts: np.ndarray) -> str:
    """Return the distribution of scores: even in the logarithm of their size on both sides of a narrow middle.

    Args:
        edges: ``[B + 1]``, as in `tracer.report.summaries.ScoreSummary`.
        counts: ``[B]``.

    Returns:
        SVG.
    """
    total = max(1, int(counts.sum()))
    share = counts * 100.0 / total
    inner = np.flatnonzero(share > 0)
    first, last = (int(inner[0]), int(inner[-1])) if len(inner) else (0, len(counts) - 1)
    reach = max(len(counts) // 2 - first, last - len(counts) // 2, 1)
    middle = len(counts) // 2
    first, last = max(0, middle - reach), min(len(counts) - 1, middle + reach)
    top = max(1e-9, float(share.max()))
    x = _scale(first, last + 1, LEFT, WIDTH - RIGHT)
    y = _scale(0.0, top * 1.06, HEIGHT - BOTTOM, TOP)
    parts = [_y_grid(y, _ticks(0.0, top * 1.06, 4), lambda value: f"{value:.3g} %")]
    for place in range(first, last + 1):
        css = "series-pos" if place > middle else "series-neg" if place < middle else "series-muted"
        parts.append(
            f'<rect class="{css} bar" x="{x(place) + 0.3:.1f}" y="{y(share[place]):.1f}" '
            f'width="{max(0.5, x(place + 1) - x(place) - 0.6):.1f}" height="{y(0.0) - y(share[place]):.1f}">'
            f"<title>{share[place]:.2f} % from {number(edges[place])} to {number(edges[place + 1])}</title></rect>"
        )
    wanted = np.unique(np.linspace(first, last + 1, 5).round().astype(int))
    ticks = [(x(place), number(float(edges[place]))) for place in wanted.tolist() if place not in (middle, middle + 1)]
    parts.append(_x_ticks([*ticks, (x(middle + 0.5), "0")], "score (logarithmic on both sides of zero)"))
    positive = float(share[middle + 1 :].sum())
    return _svg(parts, "Histogram of scores", f"{positive:.0f} % lie above the middle bin.")


def recovery_chart(rankings: Mapping[str, np.ndarray], known: np.ndarray) -> str:
    """Return which share of the mislabelled rows each ranking finds, beside chance and the best possible.

    Args:
        rankings: Scores ``[N]`` by name, higher is checked earlier; the first is drawn strongest.
        known: ``[N]``, bool, with at least one row.

    Returns:
        SVG.
    """
    num_rows, total = len(known), int(known.sum())
    x, y = _scale(0, 100, LEFT, WIDTH - RIGHT), _scale(0, 102, HEIGHT - BOTTOM, TOP)
    parts = [_y_grid(y, [0, 25, 50, 75, 100], lambda value: f"{value:.0f} %")]
    parts.append(_x_ticks([(x(value), f"{value} %") for value in (0, 20, 40, 60, 80, 100)], "training rows checked"))
    best = 100.0 * total / num_rows
    parts.append(_path([(x(0), y(0)), (x(best), y(100)), (x(100), y(100))], "line muted dashed", "best possible"))
    parts.append(_path([(x(0), y(0)), (x(100), y(100))], "line muted dotted", "chance"))
    points = np.unique(np.linspace(0, num_rows, min(num_rows, MAX_CURVE_POINTS) + 1).round().astype(int))
    for place, (name, scores) in reversed(list(enumerate(rankings.items()))):
        curve = recovery_curve(scores, known)[points] * 100.0 / total
        line = [(x(100.0 * at / num_rows), y(found)) for at, found in zip(points, curve, strict=True)]
        parts.append(_path(line, f"line series{min(place, 3)}", name))
    return _svg(parts, "Mislabelled rows found", f"Share of {total} mislabelled rows found by share of rows checked.")


def map_classes(train_counts: np.ndarray) -> np.ndarray:
    """Return which classes are on the map, in order: all, or of many those with most training rows.

    >>> map_classes(np.array([3, 0, 5])).tolist()
    [0, 1, 2]
    """
    return np.sort(np.argsort(-train_counts, kind="stable")[:MAX_HEAT_CLASSES])


def heat_map(influence: np.ndarray, names: Sequence[str], train_counts: np.ndarray) -> str:
    """Return the class × class map of mean scores, blue where rows of a class help, orange where they harm.

    Args:
        influence: ``[C, C]``, train class by target class; NaN is left empty.
        names: The classes.
        train_counts: ``[C]``, which classes are kept where there are many.

    Returns:
        SVG, as wide as it needs.
    """
    kept = map_classes(train_counts)
    values = influence[np.ix_(kept, kept)]
    count = len(kept)
    labels = [_cut(names[place], 12) for place in kept]
    margin = 32 + 7 * max((len(label) for label in labels), default=1)
    cell = int(np.clip(420 / max(1, count), 14, 46))
    wide, high = margin + cell * count + 8, margin + cell * count + 8
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    parts = []
    upright = max(map(len, labels), default=0) <= cell // 8
    for a in range(count):
        middle = margin + cell * (a + 0.5)
        parts.append(_label(margin - 7, middle + 4, labels[a], "end"))
        if upright:
            parts.append(_label(middle, margin - 7, labels[a], "middle"))
        else:
            parts.append(_label(middle + 4, margin - 7, labels[a], "start", turned=True))
        for b in range(count):
            where = (margin + b * cell, margin + a * cell, cell)
            parts.append(_cell(values[a, b], largest, where, count, (labels[a], labels[b])))
    middle = margin + cell * count / 2
    parts.append(_label(middle, 11, "targets of class", "middle", css="axis"))
    parts.append(_label(11, middle, "training rows of class", "middle", css="axis", turned=True))
    return _svg(parts, "Class by class influence", "The table below has the numbers.", (wide, high), "heat")


def _label(x: float, y: float, text: str, anchor: str, *, css: str = "tick", turned: bool = False) -> str:
    """Return a text at a place, turned upwards if so wanted."""
    turn = f' transform="rotate(-90 {x:.0f} {y:.0f})"' if turned else ""
    return f'<text class="{css}" x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _cell(value: float, largest: float, where: tuple[float, float, float], count: int, names: tuple[str, str]) -> str:
    """Return one cell of a heat map, with its number where there is room."""
    x, y, side = where
    if not np.isfinite(value):
        return f'<rect class="empty" x="{x + 0.5}" y="{y + 0.5}" width="{side - 1}" height="{side - 1}"/>'
    part = abs(value) / largest if largest else 0.0
    css = "series-pos" if value >= 0 else "series-neg"
    title = f"<title>rows of {escape(names[0])} on targets of {escape(names[1])}: {number(value)}</title>"
    cell = (
        f'<rect class="{css}" x="{x + 0.5}" y="{y + 0.5}" width="{side - 1}" height="{side - 1}" rx="2" '
        f'fill-opacity="{0.04 + 0.86 * part**0.6:.3f}">{title}</rect>'
    )
    if count > HEAT_NUMBERS:
        return cell
    strong = " strong" if part**0.6 > 0.62 else ""
    text = f"{round(value / largest * 100)}".replace("-", "−") if largest else "0"
    return (
        f'{cell}<text class="cell{strong}" x="{x + side / 2}" y="{y + side / 2 + 4}" text-anchor="middle">{text}</text>'
    )


def interval(low: float, share: float, high: float, known: float | None) -> str:
    """Return an estimate with its interval on a line from 0 % on, and the true share where it is known."""
    end = max(0.1, min(1.0, np.ceil(max(high, share, known or 0.0) * 10.5) / 10))
    x = _scale(0.0, end, 14, 426)
    parts = [f'<line class="rule" x1="{x(0.0)}" x2="{x(end)}" y1="34" y2="34"/>']
    for tick in _ticks(0.0, end, 5):
        parts.append(f'<line class="rule" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="30" y2="38"/>')
        parts.append(f'<text class="tick" x="{x(tick):.1f}" y="54" text-anchor="middle">{tick * 100:.3g} %</text>')
    bar = f'x="{x(low):.1f}" y="26" width="{max(2, x(high) - x(low)):.1f}" height="16" rx="4"'
    parts.append(f'<rect class="series-main" fill-opacity="0.35" {bar}/>')
    parts.append(f'<circle class="series-main" cx="{x(share):.1f}" cy="34" r="6"/>')
    words = f"Estimate {share:.1%}, interval {low:.1%} to {high:.1%}."
    if known is not None:
        parts.append(
            f'<path class="series-alert" d="M{x(known):.1f} 22l-6 -10h12z"><title>known: {known:.1%}</title></path>'
        )
        words += f" Known: {known:.1%}."
    return _svg(parts, "Estimated share of wrong labels", words, (440, 60), "interval")


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Return the map from data to pixels."""
    span = (high - low) or 1.0
    return lambda value: float(start + (value - low) / span * (end - start))


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return round numbers between two bounds, about so many."""
    rough = (high - low) / max(1, count) or 1.0
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [
        float(value) for value in np.arange(np.ceil(low / step - 1e-9), np.floor(high / step + 1e-9) + 1) * step + 0.0
    ]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return powers of ten between two bounds, or round numbers where there are few."""
    powers = 10.0 ** np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + 1)
    if len(powers) >= 2:
        return [float(value) for value in powers[:: -(-len(powers) // 5)]]
    return [float(value) for value in np.geomspace(low, high, 4)]


def _y_grid(y: Callable[[float], float], ticks: Sequence[float], name: Callable[[float], str]) -> str:
    """Return horizontal lines with their numbers."""
    return "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{escape(name(tick))}</text>'
        for tick in ticks
    )


def _x_ticks(ticks: Sequence[tuple[float, str]], label: str) -> str:
    """Return numbers below the chart and the name of the axis."""
    numbers = "".join(
        f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(text)}</text>'
        for at, text in ticks
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'{numbers}<text class="axis" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(label)}</text>'


def _path(points: Sequence[tuple[float, float]], css: str, title: str) -> str:
    """Return a line through points."""
    line = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{css}" d="M{line}"><title>{escape(title)}</title></path>'


def _svg(
    parts: Sequence[str], title: str, words: str, size: tuple[float, float] = (WIDTH, HEIGHT), css: str = "plot"
) -> str:
    """Return the picture with what a reader who does not see it needs to know."""
    return (
        f'<svg class="chart {css}" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" role="img" '
        f'aria-label="{escape(f"{title}. {words}")}">{"".join(parts)}</svg>'
    )


def _cut(text: str, length: int) -> str:
    """Shorten a name."""
    return text if len(text) <= length else text[: length - 1] + "…"
