"""Image files: figures for slides, drawn by matplotlib without its global state, and images of examples by Pillow."""

from __future__ import annotations

import io
import re
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from tracer.errors import MissingDependencyError
from tracer.report.figure import Figure, Line, Rect, Text
from tracer.report.text import asset

if TYPE_CHECKING:
    from matplotlib.axes import Axes

JPEG_QUALITY = 88
SCALE = 2  # pixels of the file for each pixel of the figure
_DOTS_PER_INCH = 100
_POINTS = 72 / _DOTS_PER_INCH  # matplotlib measures text and lines in points
_PADDING = 10


@cache
def light_colors() -> dict[str, str]:
    """Return the colors of the page's light theme by name, from its style sheet."""
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]+)", asset("report.css").split("}")[0]))


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file; equal figures give equal bytes."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as Canvas
    except ImportError as error:
        raise MissingDependencyError(
            "write_report(figures=True) needs matplotlib, which is not installed. Install it: "
            "pip install tracin[report]; or pass figures=False."
        ) from error
    width, height = figure.width + 2 * _PADDING, figure.height + 2 * _PADDING
    canvas = Canvas((width / _DOTS_PER_INCH, height / _DOTS_PER_INCH), dpi=_DOTS_PER_INCH * SCALE)
    canvas.set_facecolor(light_colors()["card"])
    axes = canvas.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    for mark in figure.marks:
        if isinstance(mark, Text):
            _draw_text(axes, mark)
        elif isinstance(mark, (Rect, Line)):
            _draw_shape(axes, mark)
        else:
            edges = (mark.x, mark.x + mark.width, mark.y + mark.height, mark.y)
            axes.imshow(mark.pixels, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest", extent=edges)
    # imshow sets limits of its own, so these come last
    axes.set(xlim=(-_PADDING, width - _PADDING), ylim=(height - _PADDING, -_PADDING), aspect="auto")
    buffer = io.BytesIO()
    FigureCanvasAgg(canvas).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _draw_text(axes: Axes, mark: Text) -> None:
    """Draw a text on its baseline, without reading $ as a formula."""
    axes.text(
        mark.x,
        mark.y,
        mark.text,
        color=light_colors()[mark.color],
        fontsize=mark.size * _POINTS,
        fontweight="bold" if mark.bold else "normal",
        ha={"start": "left", "middle": "center", "end": "right"}[mark.anchor],
        va="baseline",
        rotation=90 if mark.turned else 0,
        rotation_mode="anchor",
        parse_math=False,
    )


def _draw_shape(axes: Axes, mark: Rect | Line) -> None:
    """Draw a rectangle, a line or a polygon."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    color = light_colors()[mark.color]
    if isinstance(mark, Rect):
        corner = (mark.x, mark.y)
        axes.add_patch(Rectangle(corner, mark.width, mark.height, facecolor=color, alpha=mark.opacity, linewidth=0))
        return
    width = mark.width * _POINTS
    # matplotlib counts dashes in widths of the line, SVG in pixels
    dash = (0.0, [length / mark.width for length in mark.dash]) if mark.dash else None
    across, down = zip(*mark.points, *mark.points[: mark.closed], strict=True)
    line = Line2D(across, down, color=color, linewidth=width, linestyle=dash)
    line.set_solid_capstyle("projecting" if mark.closed else "butt")
    axes.add_line(line)


def pil_image(pixels: np.ndarray) -> Any:
    """Return an image between 0 and 1, ``[H, W]`` or ``[H, W, C]``, as a Pillow image on white."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingDependencyError(
            "Reports of images need Pillow, which is not installed. Install it: pip install tracin[report]"
        ) from error
    if pixels.ndim == 3 and pixels.shape[-1] == 4:
        pixels = pixels[..., :3] * pixels[..., 3:] + 1 - pixels[..., 3:]
    return Image.fromarray(np.round(pixels * 255).astype(np.uint8))


def png_bytes(pixels: np.ndarray) -> bytes:
    """Return an image between 0 and 1 as a PNG file."""
    return encoded(pil_image(pixels), "PNG")


def encoded(image: Any, format_: str) -> bytes:
    """Return a Pillow image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=format_, quality=JPEG_QUALITY)
    return buffer.getvalue()
