"""Keys of a remote store (``s3://…``, ``gs://…``, ``memory://…``), with the calls of `LocalPath`.

Objects are written whole or not at all, which is how object stores work. Directories are prefixes: they need not be
created, and they exist as long as an object below them does.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from tracer.errors import InputError, MissingDependencyError, StoreError

ATTEMPTS = 6
"""How often a call is tried."""
FIRST_PAUSE = 0.2
"""Seconds before the second attempt; each pause is twice as long as the one before."""
_RELOOK_SECONDS = 5.0
_PERMANENT = (
    FileNotFoundError,
    FileExistsError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ValueError,
    TypeError,
)

logger = logging.getLogger("tracer")


class RemotePath:
    """A key below the root of a remote store.

    Args:
        filesystem: An fsspec file system.
        key: The key, without the protocol.
        url: The key with the protocol, for messages.
    """

    feature_chunk_bytes = 16 << 20  # a few of them are held in memory
    """How many bytes of features one object holds at most."""
    score_chunk_bytes: int | None = 32 << 20
    """How many bytes of scores one object holds at most, unless a single row has more."""

    def __init__(self, filesystem: Any, key: str, url: str) -> None:
        self._filesystem, self._key, self._url = filesystem, key.rstrip("/"), url.rstrip("/")

    @classmethod
    def of(cls, url: str) -> RemotePath:
        """Return the key of a URL such as ``s3://bucket/run``; its file system reads options from the environment."""
        import fsspec

        protocol = url.partition("://")[0]
        try:
            # Listings must not come from a cache: other processes write too.
            filesystem = fsspec.filesystem(protocol, use_listings_cache=False)
        except ImportError as error:
            raise MissingDependencyError(
                f"save_dir is {url!r}, and the package for {protocol}:// is not installed ({error}); for S3 install it "
                f"with: pip install 'tracin[s3]'"
            ) from error
        except ValueError as error:
            raise InputError(
                f"save_dir is {url!r}: fsspec knows no protocol {protocol!r}; pass a directory, or a URL such as "
                f"s3://bucket/run ({error})"
            ) from error
        return cls(filesystem, filesystem._strip_protocol(url), url)

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(self._filesystem, f"{self._key}/{name}", f"{self._url}/{name}")

    def __str__(self) -> str:
        return self._url

    def __repr__(self) -> str:
        return f"RemotePath({self._url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and other._url == self._url

    def __hash__(self) -> int:
        return hash(self._url)

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self._key.rpartition("/")[2]

    @property
    def parent(self) -> RemotePath:
        """The key without its last part."""
        return RemotePath(self._filesystem, self._key.rpartition("/")[0], self._url.rpartition("/")[0])

    def exists(self) -> bool:
        """Tell whether there is an object with this key, or one below it."""
        return bool(self._call(self._filesystem.exists, self._key))

    def is_dir(self) -> bool:
        """Tell whether there is an object below this key."""
        return bool(self._call(self._filesystem.isdir, self._key))

    def read_bytes(self, limit: int = -1) -> bytes:
        """Return the object's bytes, at most ``limit`` if that is not negative, or raise FileNotFoundError."""
        part = {} if limit < 0 else {"end": limit}
        return bytes(self._call(self._filesystem.cat_file, self._key, **part))

    def write_whole(self, data: bytes, *, replace: bool = True) -> None:
        """Write the object; without ``replace`` an existing one stays, and of several processes one succeeds."""
        if replace:
            self._call(self._filesystem.pipe_file, self._key, data)
            return
        with contextlib.suppress(FileExistsError):
            try:
                self._call(self._filesystem.pipe_file, self._key, data, mode="create")
            except (NotImplementedError, TypeError, ValueError):
                # A service without conditional writes: two processes that create at the same instant may both write.
                if not self.exists():
                    self.write_whole(data)

    @staticmethod
    def write_all(files: Mapping[RemotePath, bytes], *, replace: bool = True) -> None:
        """Write objects one after another; without ``replace`` an existing last one stays."""
        *others, last = files
        for path in others:
            path.write_whole(files[path])
        last.write_whole(files[last], replace=replace)

    def children(self) -> list[str]:
        """Return the names directly below the key, sorted."""
        try:
            entries = self._call(self._filesystem.ls, self._key, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {entry.rstrip("/").rpartition("/")[2] for entry in entries if entry.rstrip("/") != self._key}
        return sorted(names - {""})

    def remove(self) -> None:
        """Remove the object and everything below it; do nothing if it does not exist."""
        with contextlib.suppress(FileNotFoundError):
            self._call(self._filesystem.rm, self._key, recursive=True)

    def remove_stale(self) -> None:
        """Do nothing: an upload that was interrupted leaves no object."""

    def change_stamp(self) -> object:
        """Return a value that changes every few seconds: asking the service costs as much as reading the object."""
        return time.monotonic() // _RELOOK_SECONDS

    def total_bytes(self) -> int | None:
        """Return None: counting would list every object."""
        return None

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call a method of the file system; retry errors that may be temporary, then raise a StoreError."""
        for attempt in range(ATTEMPTS):
            try:
                return function(*args, **options)
            except _PERMANENT:
                raise
            except Exception as error:  # each service has exceptions of its own
                name = getattr(function, "__name__", "call")
                if attempt == ATTEMPTS - 1:
                    raise StoreError(
                        f"{name} of {self._url} failed {ATTEMPTS} times, last with {type(error).__name__}: {error}. "
                        "Check the network and the permissions, and run it again: what was uploaded so far is stored"
                    ) from error
                pause = FIRST_PAUSE * 2**attempt
                logger.warning("%s of %s failed (%r), trying again in %.1f s", name, self._url, error, pause)
                time.sleep(pause)
