"""Times measured side by side: the contenders alternate in one process, medians are compared."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import platform
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], Any]


def alternate(
    contenders: Mapping[str, Work], rounds: int, warmup: int = 1, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Run the contenders in turn and return the seconds of each round.

    Args:
        contenders: Functions by name.
        rounds: How many timed rounds.
        warmup: How many rounds before them.
        clock: Gives seconds.

    Returns:
        ``rounds`` durations for each name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + rounds):
        for name, work in contenders.items():
            synchronize()
            start = clock()
            work()
            synchronize()
            if number >= warmup:
                seconds[name].append(clock() - start)
    return seconds


def compute_clock() -> Callable[[], float]:
    """Return the process's own processor time, which other processes do not change; of a GPU the wall clock."""
    return time.perf_counter if torch.cuda.is_available() else time.process_time


def peak_mb(work: Work, every: float = 0.001) -> float:
    """Run work and watch the process's own memory, files left out.

    Args:
        work: What to run.
        every: How many seconds lie between two looks.

    Returns:
        By how many megabytes (1e6 bytes) it rose at most; NaN where there is no ``/proc``.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")

    def own_memory() -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        return 1024 * int(found.group(1)) if found else 0

    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # what glibc keeps of earlier work would hide this one's
        ctypes.CDLL(None).malloc_trim(0)
    before = most = own_memory()
    stop = threading.Event()

    def watch() -> None:
        nonlocal most
        while not stop.wait(every):
            most = max(most, own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        stop.set()
        watcher.join()
    return (most - before) / 1e6


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """Return the median over rounds of ``name``'s time over ``base``'s of the same round."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def machine() -> dict[str, Any]:
    """Return what a figure depends on: processor, cores, threads and package versions."""
    packages = ["torch", "numpy", "zarr", "tracin", "captum", "traker", "dattri", "bergson", "kronfluence"]
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": found,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def write_results(directory: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows and the machine as JSON and return the path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table.

    Args:
        rows: Values by key.
        columns: From key to header, in order.

    Returns:
        The table's text.
    """
    cells = [[_cell(row.get(key)) for key in columns] for row in rows]
    widths = [max([len(header), *(len(line[i]) for line in cells)]) for i, header in enumerate(columns.values())]
    lines = [[header.ljust(width) for header, width in zip(columns.values(), widths, strict=True)]]
    lines.append(["-" * width for width in widths])
    lines += [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
