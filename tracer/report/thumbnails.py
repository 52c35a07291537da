"""Thumbnails of many images in a few sheets, so that a page of thousands of images stays small.

A sheet is one PNG or JPEG image with thumbnails side by side, as a data URL; the page decodes a sheet when the first of
its thumbnails is shown.
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
"""Larger images are scaled down to this many pixels."""

MAX_PIXELS = 20_000_000
"""The pixels of all training or all target thumbnails; more images are scaled down further."""

MIN_SIDE = 32

LOSSLESS_SIDE = 16
"""Images up to this many pixels stay exact, because the page enlarges their pixels."""

SHEET_PIXELS = 1_000_000
JPEG_QUALITY = 88


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
    return _encoded(pil_image(pixels), "PNG")


def thumbnail_size(height: int, width: int, count: int) -> tuple[int, int]:
    """Return height and width of the thumbnails of ``count`` images.

    >>> thumbnail_size(8, 8, 1000), thumbnail_size(480, 640, 100), thumbnail_size(480, 640, 100_000)
    ((8, 8), (72, 96), (24, 32))
    """
    side = min(MAX_SIDE, max(MIN_SIDE, int((MAX_PIXELS / max(1, count)) ** 0.5)))
    scale = min(1.0, side / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def sprite_sheets(samples: Samples, indices: Sequence[int]) -> dict[str, Any]:
    """Return sheets as data URLs; image ``i`` is at place ``i % per_sheet`` of sheet ``i // per_sheet``."""
    first = samples.image(indices[0])
    height, width = thumbnail_size(first.shape[0], first.shape[1], len(indices))
    columns = max(1, int((SHEET_PIXELS / (height * width)) ** 0.5))
    per_sheet = columns * columns
    sheets = []
    for start in range(0, len(indices), per_sheet):
        images = [pil_image(samples.image(index)) for index in indices[start : start + per_sheet]]
        sheet = images[0].resize((1, 1)).resize((columns * width, -(-len(images) // columns) * height))
        for place, image in enumerate(images):
            if image.size != (width, height):
                image = image.resize((width, height), resample=1)  # Lanczos
            sheet.paste(image, ((place % columns) * width, (place // columns) * height))
        best, chosen = _encoded(sheet, "PNG"), "png"
        if max(height, width) > LOSSLESS_SIDE:
            # JPEG blurs edges, so it must be much smaller
            smaller = _encoded(sheet, "JPEG")
            if len(smaller) < 0.7 * len(best):
                best, chosen = smaller, "jpeg"
        sheets.append(f"data:image/{chosen};base64,{base64.b64encode(best).decode('ascii')}")
    return {"width": width, "height": height, "columns": columns, "per_sheet": per_sheet, "sheets": sheets}


def _encoded(image: Any, format_: str) -> bytes:
    """Return a Pillow image as a file."""
    buffer = io.BytesIO()
    image.save(buffer, format=format_, quality=JPEG_QUALITY)
    return buffer.getvalue()
