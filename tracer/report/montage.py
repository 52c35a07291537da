"""Montages of images: targets beside their proponents and opponents, and rows in the order of a ranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tracer.report.drawing import THEME, new_figure
from tracer.report.samples import Samples
from tracer.types import TopK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CAPTION = 14
MAX_TILES = 5
"""More proponents or opponents of a target would be too small to see; the tables list all."""

GAP = 0.35
"""The space between two groups of columns, in columns."""


def influence_montage(
    train: Samples,
    target: Samples,
    proponents: TopK,
    opponents: TopK,
    shown: Sequence[int],
    known_mislabelled: np.ndarray | None,
) -> Figure:
    """Draw each target beside its five strongest proponents and opponents.

    Args:
        train: The training rows, images.
        target: The targets, images.
        proponents: Row indices and scores ``[num_targets, k]``.
        opponents: Likewise.
        shown: Which targets are drawn, one a line.
        known_mislabelled: ``[N]``, bool; these rows get a frame. Or None.

    Returns:
        The figure.
    """
    groups = [TopK(top.indices[:, :MAX_TILES], top.scores[:, :MAX_TILES]) for top in (proponents, opponents)]
    widths = [1.0]
    for group in groups:
        widths += [GAP] + [1.0] * group.indices.shape[1]
    figure = new_figure(0.86 * sum(widths), 1.22 * len(shown) + 0.5)
    header = 0.34 / figure.get_figheight()
    grid = figure.add_gridspec(
        len(shown), len(widths), width_ratios=widths, wspace=0.12, hspace=0.5,
        left=0.01, right=0.99, top=1 - header - 0.22 / figure.get_figheight(), bottom=0.22 / figure.get_figheight(),
    )  # fmt: skip
    for line, number in enumerate(shown):
        axes = figure.add_subplot(grid[line, 0])
        _tile(axes, target.image(number), row_heading(target, number), f"target {number}")
        column = 1
        for group, sign in zip(groups, (1, -1), strict=True):
            column += 1
            for row, score in zip(group.indices[number], group.scores[number], strict=True):
                if sign * score <= 0:  # the strongest that there are, but they do not help, or harm
                    column += 1
                    continue
                axes = figure.add_subplot(grid[line, column])
                flagged = known_mislabelled is not None and bool(known_mislabelled[row])
                _tile(axes, train.image(int(row)), train.label(int(row)), _signed(score), flagged=flagged)
                column += 1
    _headers(figure, [group.indices.shape[1] for group in groups], widths)
    return figure


def _headers(figure: Figure, counts: Sequence[int], widths: Sequence[float]) -> None:
    """Write the names of the groups above their columns."""
    y = 1 - 0.1 / figure.get_figheight()
    total = sum(widths)
    start = 0.0
    for name, color, count in (
        ("target", THEME.text, 1),
        ("proponents", THEME.main, counts[0]),
        ("opponents", THEME.others[0], counts[1]),
    ):
        x = 0.01 + 0.98 * (start + count / 2) / total
        figure.text(x, y, name, ha="center", va="top", color=color, fontsize=11, fontweight="bold")
        start += count + GAP


def ranking_montage(
    train: Samples,
    rows: np.ndarray,
    scores: np.ndarray,
    known_mislabelled: np.ndarray | None,
    num_columns: int = 8,
) -> Figure:
    """Draw training rows in the order given, with label, prediction and score.

    Args:
        train: The training rows, images.
        rows: Row indices ``[R]``, at least one.
        scores: ``[N]``, the score of each training row.
        known_mislabelled: ``[N]``, bool; these rows get a frame. Or None.
        num_columns: How many stand side by side.

    Returns:
        The figure.
    """
    num_lines = -(-len(rows) // num_columns)
    figure = new_figure(8.6, 1.45 * num_lines + 0.1)
    height = figure.get_figheight()
    grid = figure.add_gridspec(
        num_lines, num_columns, wspace=0.25, hspace=0.6,
        left=0.02, right=0.98, top=1 - 0.3 / height, bottom=0.25 / height,
    )  # fmt: skip
    for place, row in enumerate(rows):
        axes = figure.add_subplot(grid[place // num_columns, place % num_columns])
        flagged = known_mislabelled is not None and bool(known_mislabelled[row])
        _tile(axes, train.image(row), row_heading(train, row), f"{scores[row]:.3g}", flagged=flagged)
    return figure


def _tile(axes: Axes, image: np.ndarray, title: str, caption: str, *, flagged: bool = False) -> None:
    """Draw one image with a line above and a line below it; flagged ones in a strong frame."""
    axes.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(_cut(title), parse_math=False, color=THEME.alert if flagged else THEME.text, fontsize=9.5, pad=3)
    axes.set_xlabel(caption, color=THEME.muted, fontsize=8.5, labelpad=3)
    for spine in axes.spines.values():
        spine.set_color(THEME.alert if flagged else THEME.grid)
        spine.set_linewidth(2.6 if flagged else 0.8)


def row_heading(samples: Samples, row: int) -> str:
    """Return a row's label, and where it differs what the model predicts."""
    label, prediction = samples.label(row), samples.prediction(row)
    if not prediction or prediction == label:
        return label
    return f"{label} → {prediction}"


def _signed(score: float) -> str:
    """Return a score to two digits, with its sign."""
    return f"{score:+.2g}".replace("-", "−")


def _cut(text: str) -> str:
    """Shorten a caption to the width of a tile."""
    return text if len(text) <= MAX_CAPTION else text[: MAX_CAPTION - 1] + "…"
