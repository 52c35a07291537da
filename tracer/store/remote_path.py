"""Keys of a remote store (``s3://…``, ``gs://…``, ``memory://…``), with the parts of `pathlib.Path` that a store needs.

Objects are written whole or not at all, which is how object stores work. Every call that fails for a passing reason
is tried again, ever more slowly. Directories are prefixes: they need not be made, and are there while they hold
something.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

from tracer.errors import InputError, MissingDependencyError, StoreError

ATTEMPTS = 6
"""How often a call is tried."""
FIRST_PAUSE = 0.2
"""Seconds before the second try; each pause is twice the one before."""
_LASTING = (
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
        url: The same with the protocol, for messages.
    """

    def __init__(self, filesystem: Any, key: str, url: str) -> None:
        self._filesystem, self._key, self._url = filesystem, key.rstrip("/"), url.rstrip("/")

    @classmethod
    def of(cls, url: str) -> RemotePath:
        """Return the key that a URL names.

        Args:
            url: Such as ``s3://bucket/run``; options come from the environment, as the file system reads them.

        Returns:
            The key.

        Raises:
            InputError: The protocol is not known.
            MissingDependencyError: The package for the protocol is not installed.
        """
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

    def with_name(self, name: str) -> RemotePath:
        """Return the key with another last part."""
        return self.parent / name

    def exists(self) -> bool:
        """Tell whether there is an object of this key, or one below it."""
        return bool(self._call(self._filesystem.exists, self._key))

    def is_dir(self) -> bool:
        """Tell whether there is an object below this key."""
        return bool(self._call(self._filesystem.isdir, self._key))

    def read_bytes(self) -> bytes:
        """Return the object.

        Returns:
            Its bytes.

        Raises:
            FileNotFoundError: There is none.
        """
        return bytes(self._call(self._filesystem.cat_file, self._key))

    def write_bytes(self, data: bytes) -> None:
        """Write the object whole, in place of what is there."""
        self._call(self._filesystem.pipe_file, self._key, data)

    def create_bytes(self, data: bytes) -> None:
        """Write the object unless there is one; of several processes that try at once, one succeeds.

        Where the service has no conditional writes, the race is not covered.
        """
        with contextlib.suppress(FileExistsError):
            try:
                self._call(self._filesystem.pipe_file, self._key, data, mode="create")
            except (NotImplementedError, TypeError, ValueError):
                if not self.exists():
                    self.write_bytes(data)

    def children(self) -> list[str]:
        """Return the names of what lies directly below, sorted."""
        try:
            entries = self._call(self._filesystem.ls, self._key, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {entry.rstrip("/").rpartition("/")[2] for entry in entries if entry.rstrip("/") != self._key}
        return sorted(names - {""})

    def remove(self) -> None:
        """Remove the object and everything below it; nothing where there is nothing."""
        with contextlib.suppress(FileNotFoundError):
            self._call(self._filesystem.rm, self._key, recursive=True)

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Call the file system; a failure that may pass is tried again.

        Args:
            function: A method of the file system.
            *args: Its arguments.
            **options: More of them.

        Returns:
            What it returns.

        Raises:
            StoreError: It failed each time.
        """
        for attempt in range(ATTEMPTS):
            try:
                return function(*args, **options)
            except _LASTING:
                raise
            except Exception as error:  # each service has its own
                name = getattr(function, "__name__", "call")
                if attempt == ATTEMPTS - 1:
                    raise StoreError(
                        f"{name} of {self._url} failed {ATTEMPTS} times, last with {type(error).__name__}: {error}. "
                        "Look at the network and the permissions, and run it again: what was uploaded by then is kept"
                    ) from error
                pause = FIRST_PAUSE * 2**attempt
                logger.warning("%s of %s failed (%r), trying again in %.1f s", name, self._url, error, pause)
                time.sleep(pause)
