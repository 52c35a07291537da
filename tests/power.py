"""A disk that loses power: it keeps what was synced, and of everything else nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tracer._core import syncing


class Power:
    """What of a directory would survive a power failure now, from the calls that make files durable.

    A file that was not synced is empty, and a name in a directory that was not synced is missing.

    Args:
        root: The directory.
        monkeypatch: Replaces the calls.
        together: Whether the system can sync a whole file system.
        after: Called after each sync.
        begin: Whether what the directory has now is durable.

    Attributes:
        calls: The number of calls, each of which waits for the disk.
    """

    def __init__(
        self, root: Path, monkeypatch, together: bool, after: Callable[[], None] = lambda: None, begin: bool = False
    ) -> None:
        self.root, self.calls, self._after = root, 0, after
        self._content: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        for path in [root, *root.rglob("*")] if begin else ():
            self._keep(path)
        monkeypatch.setattr(os, "fsync", self._fsync)
        monkeypatch.setattr(syncing, "_syncfs", self._syncfs)
        monkeypatch.setattr(syncing, "_waiting_bytes", lambda: 0)
        monkeypatch.setattr(syncing, "_reports_errors", lambda device: together)

    def _fsync(self, descriptor: int) -> None:
        self.calls += 1
        self._keep(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        self._after()

    def _syncfs(self, descriptor: int) -> None:
        self.calls += 1
        for path in [self.root, *self.root.rglob("*")]:
            self._keep(path)
        self._after()

    def _keep(self, path: Path) -> None:
        number = path.stat().st_ino
        if path.is_dir():
            self._names[number] = {child.name: child.stat().st_ino for child in path.iterdir()}
            self._content.pop(number, None)
        else:
            self._content[number] = path.read_bytes()
            self._names.pop(number, None)

    def fail(self, survivors: Path, luck: np.random.Generator | None = None) -> None:
        """Write what survives into a new directory; with ``luck`` some of what was not synced, as disks may do."""
        there = {path.stat().st_ino: path for path in [self.root, *self.root.rglob("*")]}

        def lucky() -> bool:
            return luck is not None and bool(luck.random() < 0.5)

        def restore(number: int, path: Path) -> None:
            now = there.get(number)
            if number in self._names or (now is not None and now.is_dir()):
                path.mkdir()
                names = dict(self._names.get(number, {}))
                for child in now.iterdir() if now is not None else ():
                    if lucky():
                        names[child.name] = child.stat().st_ino
                for name, child in names.items():
                    restore(child, path / name)
            else:
                content = self._content.get(number, b"")
                path.write_bytes(now.read_bytes() if now is not None and lucky() else content)

        restore(self.root.stat().st_ino, survivors)
