"""What arrays keep in memory of their chunks, all of them together up to a limit."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
Key = tuple[int, int, bool]
"""An owner's number, a chunk, and whether it may be written."""


class Kept(Generic[T]):
    """Things of arrays, the least recently used of which are dropped when they are too much; for any thread.

    Args:
        limit: Tells how much all things may be together; the last one that came stays in any case.

    Attributes:
        size: How much they are.
    """

    def __init__(self, limit: Callable[[], int]) -> None:
        self._limit, self.size = limit, 0
        self._lock = threading.RLock()  # a finalizer may run anywhere, also in here
        self._known: OrderedDict[Key, tuple[int, T]] = OrderedDict()
        self._numbers = itertools.count()

    def number(self, owner: object) -> int:
        """Return a number for an owner, whose things go when it does."""
        number = next(self._numbers)
        weakref.finalize(owner, self.forget, number).atexit = False
        return number

    def get(self, key: Key) -> T | None:
        """Return a thing if it is kept."""
        with self._lock:
            if key not in self._known:
                return None
            self._known.move_to_end(key)
            return self._known[key][1]

    def get_or_make(self, key: Key, size: int, make: Callable[[], T]) -> T:
        """Return a thing, which is made now if it is not kept."""
        with self._lock:
            found = self.get(key)
            if found is None:
                found = make()
                self.put(key, found, size)
            return found

    def put(self, key: Key, thing: T, size: int = 1) -> None:
        """Keep a thing, in the place of the one that is kept."""
        with self._lock:
            self.drop(key)
            self._known[key] = size, thing
            self.size += size
            while self.size > self._limit() and len(self._known) > 1:
                self.drop(next(iter(self._known)))

    def drop(self, key: Key) -> None:
        """Forget a thing."""
        with self._lock:
            if key in self._known:
                self.size -= self._known.pop(key)[0]

    def forget(self, owner: int) -> None:
        """Forget all things of an owner."""
        with self._lock:
            for key in [key for key in self._known if key[0] == owner]:
                self.drop(key)

    def __len__(self) -> int:
        return len(self._known)
