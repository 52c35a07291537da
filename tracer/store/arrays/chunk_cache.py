"""A least-recently-used cache for chunks of arrays, with one limit for all arrays of a kind together."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
Key = tuple[int, int, bool]
"""An owner's number, a chunk, and whether it is writable."""


class ChunkCache(Generic[T]):
    """Values by key, of which the least recently used are dropped beyond a limit; safe for threads.

    Args:
        limit: Returns the largest total size; the value that was added last stays in any case.

    Attributes:
        size: The total size of all values.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit, self.size = limit, 0
        # Reentrant: the garbage collector may run an owner's finalizer, which calls `forget`, while this is locked.
        self._lock = threading.RLock()
        self._known: OrderedDict[Key, tuple[int, T]] = OrderedDict()
        self._numbers = itertools.count()

    def number(self, owner: object) -> int:
        """Return a number for an owner, whose values are dropped when it is garbage collected."""
        number = next(self._numbers)
        weakref.finalize(owner, self.forget, number).atexit = False
        return number

    def get(self, key: Key) -> T | None:
        """Return a value, or None if it is not cached."""
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key][1]

    def get_or_make(self, key: Key, size: int, make: Callable[[], T]) -> T:
        """Return a value, which is made now if it is not cached."""
        with self._lock:
            found = self.get(key)
            if found is None:
                found = make()
                self.put(key, found, size)
            return found

    def put(self, key: Key, value: T, size: int = 1) -> None:
        """Cache a value in place of the one that has this key."""
        with self._lock:
            self.drop(key)
            self._known[key] = size, value
            self.size += size
            while self.size > self._limit() and len(self._known) > 1:
                self.drop(next(iter(self._known)))

    def drop(self, key: Key) -> None:
        """Drop a value if it is cached."""
        with self._lock:
            if key in self._known:
                self.size -= self._known.pop(key)[0]

    def forget(self, owner: int) -> None:
        """Drop all values of an owner."""
        with self._lock:
            for key in [key for key in self._known if key[0] == owner]:
                self.drop(key)

    def __len__(self) -> int:
        return len(self._known)
