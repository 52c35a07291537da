"""Directories and files of a store on a local disk, with the calls of `RemotePath`."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Callable, Mapping
from typing import ClassVar

from tracer._core.files import disk_errors, partial_path, publish, sweep, sync, write_whole
from tracer._core.syncing import SyncGroup
from tracer.errors import StoreError

if sys.platform == "win32":
    from pathlib import WindowsPath as _NativePath
else:
    from pathlib import PosixPath as _NativePath

_UP = f"{os.sep}.."
_is_junction: Callable[[str], bool] | None = getattr(os.path, "isjunction", None)
"""Whether a directory is one of Windows' links to directories, which Python knows from 3.12 on."""


class LocalPath(_NativePath):
    """A `pathlib.Path` with the calls that a store makes on local and remote paths alike."""

    __slots__ = ()

    roots: ClassVar[set[str]] = set()
    """The directories of stores. A path below one is refused if a part of it below that directory is a link."""
    feature_chunk_bytes = 64 << 20
    """How many bytes of features one file holds at most."""
    score_chunk_bytes: int | None = None
    """How many bytes of scores one file holds at most; None: any number, since a memory map shows it."""

    def checked(self) -> LocalPath:
        """Return this path after checking that from its store's directory on, nothing is a link or a device.

        A store that comes from elsewhere could otherwise read, write and remove files outside of it.

        Raises:
            StoreError: If something is.
        """
        path, below = str(self), []
        while path not in self.roots:
            below.append(path)
            path = path.rpartition(os.sep)[0]
            if not path:  # not below the directory of a store
                return self
        if any(part.endswith(_UP) for part in below):
            raise StoreError(f"{self} may lead out of its store: a document in it has a wrong name")
        with disk_errors(self):
            for part in below:
                try:
                    mode = stat.S_IFMT(os.lstat(part).st_mode)
                except (FileNotFoundError, NotADirectoryError):
                    continue
                if mode not in (stat.S_IFDIR, stat.S_IFREG) or (_is_junction and _is_junction(part)):
                    raise StoreError(f"{part} is a link or a device: a store must not have any; put the files there")
        return self

    def read_bytes(self, limit: int = -1) -> bytes:
        """Return the file's bytes, at most ``limit`` if that is not negative."""
        with self.checked().open("rb") as file:
            return file.read(limit)

    def write_whole(self, data: bytes, *, replace: bool = True) -> None:
        """Write the file so that readers and crashes see all of it or none; without ``replace`` an existing one stays.

        Missing parent directories are created, and their names made durable.
        """
        changed = self.checked()._make_parent()
        # A synced file is still lost in a power failure if the name of a directory above it is not on the disk.
        for directory in changed:
            sync(directory)
        self.parent.remove_stale()
        write_whole(self, lambda file: file.write(data), replace=replace)

    @staticmethod
    def write_all(files: Mapping[LocalPath, bytes], *, replace: bool = True) -> None:
        """Write files whole, of which the last one is seen only once all are durable.

        Without ``replace`` an existing last one stays. Its name is durable with the next sync of its directory.
        """
        *others, last = files
        changed = {directory for path in files for directory in [*path.checked()._make_parent(), path.parent]}
        partials = {path: partial_path(path.parent) for path in files}
        try:
            with SyncGroup(last.parent) as group:
                for path, partial in partials.items():
                    partial.write_bytes(files[path])
                for path in others:
                    partials[path].replace(path)
                group.sync([*others, partials[last], *sorted(changed, reverse=True)])
            partials[last].replace(last) if replace else publish(partials[last], last)
        finally:
            for partial in partials.values():
                partial.unlink(missing_ok=True)

    def _make_parent(self) -> list[LocalPath]:
        """Create missing parent directories; return those that got a new name, to be synced."""
        missing = [self.parent]
        while not missing[-1].exists():
            missing.append(missing[-1].parent)
        if len(missing) > 1:
            self.parent.mkdir(parents=True, exist_ok=True)
        return missing[1:]

    def children(self) -> list[str]:
        """Return the names of all entries, sorted; an empty list if this is not a directory."""
        try:
            return sorted(os.listdir(self.checked()))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def remove(self) -> None:
        """Remove the file, or the directory with everything in it; do nothing if it does not exist."""
        if self.checked().is_dir():
            shutil.rmtree(self)
        else:
            self.unlink(missing_ok=True)

    def remove_stale(self) -> None:
        """Remove unfinished files that a crash left in this directory more than ten minutes ago."""
        sweep(self.checked())

    def change_stamp(self) -> object:
        """Return a value that differs from the last one if the file was written in between."""
        found = self.stat()
        return found.st_ino, found.st_mtime_ns

    def total_bytes(self) -> int | None:
        """Return the bytes of all files below this directory."""
        files = (os.path.join(root, name) for root, _, names in os.walk(self) for name in names)
        return sum(os.lstat(file).st_size for file in files)
