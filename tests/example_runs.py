"""How tests run examples: their modules, as a script would import them."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from pathlib import Path
from types import ModuleType

import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    """A module of the examples, with its neighbours importable as they are for a script."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


def run_example(name: str, *arguments: str) -> str:
    """What an example prints; torch's random state is put back."""
    printed = io.StringIO()
    with torch.random.fork_rng(), contextlib.redirect_stdout(printed):
        example(name).main(arguments)
    return printed.getvalue()


def newest(directory: Path) -> int:
    """When a file below was last written, in nanoseconds."""
    return max(path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file())
