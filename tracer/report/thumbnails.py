"""Thumbnails of many images in a few sheets, so that a page of thousands of rows stays small.

A sheet is one PNG or JPEG with thumbnails side by side, given as an address that holds the picture itself; the page
decodes a sheet when the first of its thumbnails is shown.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from tracer.errors import MissingDependencyError
from tracer.report.samples import Samples

MAX_SIDE = 96
"""Larger images are scaled down to so many pixels."""

MAX_PIXELS = 20_000_000
"""All thumbnails of one kind of rows together; with more images they are scaled down further."""

MIN_SIDE = 32

LOSSLESS_SIDE = 16
"""Images up to so many pixels are shown pixel by pixel, so they stay exact."""

SHEET_PIXELS = 1_000_000
JPEG_QUALITY = 88


def pil_image(pixels: np.ndarray) -> Any:
    """Return an image between 0 and 1, ``[H, W]`` or ``[H, W, C]``, as a Pillow image of 8 bits a channel.

    Args:
        pixels: The image.

    Returns:
        The Pillow image; transparency is laid over white.

    Raises:
        MissingDependencyError: If Pillow is not installed.
    """
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
    buffer = io.BytesIO()
    pil_image(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def thumbnail_size(height: int, width: int, count: int) -> tuple[int, int]:
    """Return height and width of the thumbnails of ``count`` images.

    >>> thumbnail_size(8, 8, 1000), thumbnail_size(480, 640, 100), thumbnail_size(480, 640, 100_000)
    ((8, 8), (72, 96), (24, 32))
    """
    side = min(MAX_SIDE, max(MIN_SIDE, int((MAX_PIXELS / max(1, count)) ** 0.5)))
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def sprite_sheets(samples: Samples, rows: Sequence[int]) -> dict[str, Any]:
    """Draw thumbnails of rows into sheets.

    Args:
        samples: Rows that are images.
        rows: Which of them, in the order of their places.

    Returns:
        JSON values: ``width`` and ``height`` of a thumbnail, ``columns`` and ``per_sheet``, and ``sheets`` as data
        addresses. Row number i of ``rows`` is at place ``i % per_sheet`` of sheet ``i // per_sheet``.
    """
    first = samples.image(rows[0])
    height, width = thumbnail_size(first.shape[0], first.shape[1], len(rows))
    columns = max(1, int((SHEET_PIXELS / (height * width)) ** 0.5))
    per_sheet = columns * columns
    sheets = [
        _sheet(samples, rows[start : start + per_sheet], (height, width), columns)
        for start in range(0, len(rows), per_sheet)
    ]
    return {"width": width, "height": height, "columns": columns, "per_sheet": per_sheet, "sheets": sheets}


def _sheet(samples: Samples, rows: Sequence[int], size: tuple[int, int], columns: int) -> str:
    """Return one sheet as a data address: PNG where images are small or it is not much larger than JPEG."""
    height, width = size
    pictures = [pil_image(samples.image(row)) for row in rows]
    lines = -(-len(rows) // columns)
    sheet = pictures[0].resize((1, 1)).resize((columns * width, lines * height))
    for place, picture in enumerate(pictures):
        if picture.size != (width, height):
            picture = picture.resize((width, height), resample=1)  # Lanczos
        sheet.paste(picture, ((place % columns) * width, (place // columns) * height))
    best = b""
    for kind, allowed in (("PNG", 1.0), ("JPEG", 0.7)):  # JPEG blurs edges, so it must save something
        if kind == "JPEG" and max(size) <= LOSSLESS_SIDE:
            break
        buffer = io.BytesIO()
        sheet.save(buffer, format=kind, quality=JPEG_QUALITY)
        if not best or len(buffer.getvalue()) < allowed * len(best):
            best, chosen = buffer.getvalue(), kind.lower()
    return f"data:image/{chosen};base64,{base64.b64encode(best).decode('ascii')}"
