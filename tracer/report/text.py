"""Numbers and names as readers see them, and the style sheet and scripts of the page."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any


def number(value: float, *, signed: bool = False) -> str:
    """Format a number to three significant digits, with a true minus sign, and NaN as nothing."""
    sign = "+" if signed else ""
    form = ",.0f" if abs(value) >= 1000 else ".3g"
    if value != 0 and (abs(value) >= 1e7 or abs(value) < 1e-4):
        form = ".2e"
    return "" if value != value else f"{value:{sign}{form}}".replace("-", "−")


def as_text(value: Any) -> str:
    r"""Return a name that can be drawn and written; characters that UTF-8 cannot encode become escapes.

    >>> as_text("ant \ud800")
    'ant \\ud800'
    """
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def shortened(text: str, length: int) -> str:
    """Cut a text to ``length`` characters, the last of which is then an ellipsis."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


@cache
def asset(name: str) -> str:
    """Return a style sheet or a script of this package."""
    return files("tracer.report").joinpath("assets", name).read_text(encoding="utf-8")
