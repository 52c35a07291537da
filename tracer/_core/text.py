"""Text for people: lists in messages, and what files from elsewhere may not do to a terminal or a spreadsheet."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

_MAX_NAMED = 6
_TURNS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def listing(items: Sequence[Any] | np.ndarray, most: int = _MAX_NAMED) -> str:
    """Return the first items, joined by commas, and how many more there are.

    >>> listing(["a", "b", "c"], most=2)
    'a, b, … (1 more)'
    """
    more = len(items) - most
    return ", ".join(str(item) for item in items[:most]) + (f", … ({more} more)" if more > 0 else "")


def printable(text: str) -> str:
    """Return text with control characters escaped, apart from line feeds: a terminal would obey them.

    >>> printable("a" + chr(27) + "b") == "a" + chr(92) + "x1bb"
    True
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    """Return an escape for a control, a change of direction, half a surrogate pair, or a separator of lines."""
    turns = unicodedata.bidirectional(character) in _TURNS
    if character != "\n" and (turns or unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")):
        return character.encode("unicode_escape").decode()
    return character


def csv_cell(value: object) -> object:
    """Return a cell for a CSV file; text that a spreadsheet would take for a formula is quoted by an apostrophe.

    >>> csv_cell("=1+1"), csv_cell("cat"), csv_cell("-0.5"), csv_cell(-0.5)
    ("'=1+1", 'cat', '-0.5', -0.5)
    """
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r", "\n")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value
