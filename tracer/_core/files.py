"""Local files that are complete or absent, no matter when the process that writes them is interrupted.

A file with its final name is complete: it is written under a name that starts with `PARTIAL` and renamed once it is on
the disk. A process killed at any moment leaves the old file or the new one, and perhaps a partial one that nobody
reads; `sweep` removes those later.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tracer.errors import StoreError

PARTIAL = ".partial-"


_STALE_SECONDS = 600


_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS, errno.ENODEV}


@contextlib.contextmanager
def disk_errors(path: object) -> Iterator[None]:
    """Turn an OSError of the file system into a `StoreError` that names the path and says what to do."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"writing or reading {path} failed: {error}. {_advice(error)}: what was done by then is kept, the rest is "
            "written again"
        ) from error


def is_refused(error: BaseException | None) -> bool:
    """Return whether an error of the system says that this user may not write there."""
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)


def _advice(error: OSError) -> str:
    """Return what to do about an error of the system."""
    if is_refused(error):
        return "Give this user the right to write there, or copy the store to where it may, and open it again"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        return "The store was removed or moved, or something else is in its way: put it back and open it again"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "Allow the process more open files (ulimit -n), or close some, and open the store again"
    return "Free space or mend the disk and open the store again"


def partial_path(directory: Path) -> Path:
    """Return an unused name in a directory for an unfinished file or directory."""
    return directory / f"{PARTIAL}{uuid.uuid4().hex}"


def write_whole(path: Path, write: Callable[[BinaryIO], object], *, replace: bool = True) -> None:
    """Write a local file that is seen whole or not at all; without ``replace`` an existing file stays."""
    partial = partial_path(path.parent)
    try:
        with partial.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            partial.replace(path)
        else:
            publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def publish(partial: Path, path: Path) -> None:
    """Give a finished file its name; an existing file of that name stays, even if two processes race."""
    try:
        os.link(partial, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links: only the race is not covered
        if not path.exists():
            partial.replace(path)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a directory, durable; do nothing if the system cannot sync directories."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(path: Path) -> None:
    """Remove unfinished files and directories that a crash left here more than ten minutes ago."""
    for partial in path.glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            own = re.fullmatch("[0-9a-f]{32}", partial.name.removeprefix(PARTIAL))
            if own and time.time() - partial.lstat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(partial) if partial.is_dir() and not partial.is_symlink() else partial.unlink()


def create_file(path: Path, data_bytes: int, tail: bytes = b"") -> None:
    """Create a file of zeros with a tail, which has its full size as soon as it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path.parent)
    try:
        with partial.open("xb") as file:
            _reserve(file.fileno(), data_bytes + len(tail))
            file.seek(data_bytes)
            file.write(tail)
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _reserve(descriptor: int, size: int) -> None:
    """Give a new file its size, and reserve its blocks if the file system can."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # macOS, Windows
        os.truncate(descriptor, size)
    except OSError as error:
        if error.errno not in _CANNOT_RESERVE:
            raise
        os.truncate(descriptor, size)
