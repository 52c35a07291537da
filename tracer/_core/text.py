"""Lists of names and numbers as error messages print them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_MAX_NAMED = 6


def listing(items: Sequence[Any] | np.ndarray, most: int = _MAX_NAMED) -> str:
    """Return the first items, joined by commas, and how many more there are.

    >>> listing(["a", "b", "c"], most=2)
    'a, b, … (1 more)'
    """
    more = len(items) - most
    return ", ".join(str(item) for item in items[:most]) + (f", … ({more} more)" if more > 0 else "")
