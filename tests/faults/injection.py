"""Processes that are killed, paused, or lose their power or their disk's free space at a chosen moment."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from power import Power

import tracer
from tracer import TracerError

processes = multiprocessing.get_context("fork")  # a new interpreter takes seconds to import torch
WATCHED = tuple(str(Path(tracer.__file__).parent / room) + os.sep for room in ("store", "_core"))
SECONDS = 300


class Moments:
    """Counts the calls that the code of the store makes, and acts at one of them.

    Args:
        number: The moment to act at, counted from 1; 0 for never.
        act: The action.
    """

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self.number, self.act, self.count = number, act, 0

    def __call__(self, frame: Any, event: str, _: Any) -> None:
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(WATCHED):
            self.count += 1
            if self.count == self.number:
                self.act()


class Child:
    """A process that runs a function, and does something at a moment of it.

    Args:
        function: The function; its result, or its error, is sent back.
        moment: The moment, see `Moments`.
        act: What happens then: ``kill``, ``pause`` or ``power failure``.
        root: The directory that loses its power.
        seed: Of what survives.
        free: The bytes that the disk has left; None: enough.
    """

    def __init__(
        self,
        function: Callable[[], Any],
        moment: int = 0,
        act: str = "kill",
        root: Path | None = None,
        seed: int = 0,
        free: int | None = None,
    ) -> None:
        self._here, there = processes.Pipe()
        self._process = processes.Process(target=self._run, args=(there, function, moment, act, root, seed, free))
        self._process.start()
        there.close()
        self.state, self.value = "running", None

    @staticmethod
    def _run(pipe: Any, function: Callable[[], Any], moment: int, act: str, root: Path, seed: int, free: int) -> None:
        power = Power(root, pytest.MonkeyPatch(), bool(seed % 2), begin=True) if act == "power failure" else None
        disk = None if free is None else FullDisk(free, pytest.MonkeyPatch())

        def pause() -> None:
            pipe.send(("paused", None))
            pipe.recv()

        def end() -> None:
            if power is not None:
                power.fail(root.with_name("survivors"), np.random.default_rng(seed))
            os.kill(os.getpid(), signal.SIGKILL)

        moments = Moments(moment, pause if act == "pause" else end)
        if moment or disk:
            sys.setprofile(moments)
        try:
            found = "right", function()
        except TracerError as error:
            found = "refused", f"{type(error).__name__}: {error}"
        except BaseException:
            found = "foreign", traceback.format_exc()
        sys.setprofile(None)
        with contextlib.suppress(BrokenPipeError):
            pipe.send((*found, moments.count, disk.used if disk else 0))

    def wait(self) -> str:
        """Wait until it is paused, or ends; return its state: ``right``, ``refused``, ``foreign``, ``killed``…"""
        if self.state in ("running", "paused"):
            self.state, self.value = "hangs", None
            if self._here.poll(SECONDS):
                try:
                    self.state, self.value, *counts = self._here.recv()
                    self.moments, self.bytes = counts or (0, 0)
                except EOFError:
                    self.state = "killed"
        if self.state == "hangs":
            self._process.kill()
        if self.state != "paused":
            self._process.join()
            if self._process.exitcode not in (0, -signal.SIGKILL):
                self.state, self.value = "foreign", f"the process ended with {self._process.exitcode}: {self.value}"
        return self.state

    def go(self) -> str:
        """Let a paused process go on, and wait for its end."""
        if self.state == "paused":
            self._here.send("go")
        return self.wait()


class FullDisk:
    """A disk with a number of free bytes, of which new files and new names take some.

    Attributes:
        used: The bytes that were taken.
    """

    def __init__(self, free: int, patch: Any) -> None:
        self.free, self.used = free, 0
        reserve, write, opened = os.posix_fallocate, os.pwrite, Path.open
        patch.setattr(os, "posix_fallocate", lambda file, start, size: (self._take(size), reserve(file, start, size)))
        patch.setattr(os, "pwrite", lambda file, data, start: (self._take(0), write(file, data, start))[1])
        for name in ("mkdir", "link", "replace", "fsync"):
            patch.setattr(os, name, self._taking(getattr(os, name), 0 if name == "fsync" else 64))

        def open_file(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            file = opened(path, mode, *args, **kwargs)
            if set(mode) & set("wxa"):
                file.write = self._taking_data(file.write)
            return file

        patch.setattr(Path, "open", open_file)

    def _take(self, size: int) -> None:
        self.used += size
        if self.used > self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _taking(self, call: Callable[..., Any], size: int) -> Callable[..., Any]:
        def taken(*args: Any, **kwargs: Any) -> Any:
            self._take(size)
            return call(*args, **kwargs)

        return taken

    def _taking_data(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def taken(data: Any) -> Any:
            half = len(data) if self.used + len(data) <= self.free else max(0, self.free - self.used)
            written = write(data[:half])
            self._take(len(data))
            return written

        return taken
