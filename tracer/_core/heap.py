"""Memory that was freed and that the C library keeps."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # systems without such a library, or that have no name for it
        return None
    return found


def return_freed_memory() -> None:
    """Give freed memory back to the system; do nothing if the C library has no call for that.

    glibc keeps freed blocks of up to 32 MB, between others that are in use. What a pass over a long row leaves behind
    would add to the memory of the next pass. It takes milliseconds for each gigabyte.
    """
    if (trim := _trim()) is not None:
        trim(0)
