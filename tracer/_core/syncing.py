"""Making many files durable: by one call for their whole file system if that is safe, else by one call for each."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from tracer._core.files import disk_errors, sync

_KNOWN = {"ext4", "xfs", "f2fs", "tmpfs"}
"""File systems whose syncfs waits for the disk and reports every error; of overlay and FUSE it does not."""
_FEW = 2
_BUSY_BYTES = 1 << 30


class SyncGroup:
    """Files of one file system that are made durable together. Begin it before they are written.

    A small store has dozens of files a checkpoint, and a disk takes milliseconds for each fsync. Linux's syncfs is one
    call for all of them. It also waits for what other programs wrote, so it is used only if that is little, and only
    where it reports errors: those that happen while its descriptor is open.

    Args:
        directory: A directory of the file system.
    """

    def __init__(self, directory: Path) -> None:
        self._open: weakref.finalize[[int], SyncGroup] | None = None
        with disk_errors(directory):
            if _reports_errors(os.stat(directory).st_dev):
                self._descriptor = os.open(directory, os.O_RDONLY)
                self._open = weakref.finalize(self, os.close, self._descriptor)

    def sync(self, paths: Sequence[Path]) -> None:
        """Make the content of these files, and the names in these directories, durable."""
        usable = self._open is not None and self._open.alive  # the garbage collector may have closed it already
        if usable and len(paths) > _FEW and _waiting_bytes() < _BUSY_BYTES:
            with disk_errors(paths[0]):
                _syncfs(self._descriptor)
            return
        for path in paths:
            with disk_errors(path):
                sync(path)

    def close(self) -> None:
        """End the group; a second call does nothing."""
        if self._open is not None:
            self._open()

    def __enter__(self) -> SyncGroup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _syncfs(descriptor: int) -> None:
    """Wait until the whole file system of an open file is durable, or raise OSError."""
    if _libc().syncfs(descriptor):
        raise OSError(ctypes.get_errno(), f"syncfs: {os.strerror(ctypes.get_errno())}")


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


@functools.lru_cache(64)
def _reports_errors(device: int) -> bool:
    """Return whether syncfs of a device waits for the disk and reports errors, as Linux does from 5.8 on."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        version = tuple(int(part) for part in os.uname().release.split(".")[:2])
        if version < (5, 8) or not hasattr(_libc(), "syncfs"):
            return False
        number = f"{os.major(device)}:{os.minor(device)}"
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            mount, _, kind = line.partition(" - ")
            if mount.split()[2] == number:
                return kind.split()[0] in _KNOWN
    except (OSError, ValueError, IndexError):  # a system that hides what it is
        pass
    return False


def _waiting_bytes() -> int:
    """Return how many bytes of all programs wait to be written to disks."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {name: value.split()[0] for name, _, value in (line.partition(":") for line in lines) if value}
        return 1024 * (int(kilobytes["Dirty"]) + int(kilobytes["Writeback"]))
    except (OSError, KeyError, ValueError):
        return _BUSY_BYTES
