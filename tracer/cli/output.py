"""What commands print: JSON for scripts, aligned text for people."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

_STDOUT = "tracer.stdout"
"""Where a command's context keeps the standard output while it is redirected."""


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--json`` to a command, as its argument ``as_json``.

    With it the standard output has the JSON object alone: what code of the user prints goes to the standard error.

    Args:
        command: The command's function.

    Returns:
        The function with the option.
    """

    @functools.wraps(command)
    def quiet(*args: Any, as_json: bool, **options: Any) -> Any:
        if not as_json:
            return command(*args, as_json=False, **options)
        click.get_current_context().meta[_STDOUT] = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            return command(*args, as_json=True, **options)

    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for scripts.")(quiet)


def show(as_json: bool, found: dict[str, Any], text: str) -> None:
    """Print what a command found.

    Args:
        as_json: As JSON.
        found: The JSON object; numpy values are converted, NaN and infinity become null.
        text: What people read instead.
    """
    if as_json:
        click.echo(json.dumps(plain(found), allow_nan=False), file=click.get_current_context().meta[_STDOUT])
    else:
        click.echo(text)


def plain(value: Any) -> Any:
    """Return a copy of a value that JSON can say.

    Args:
        value: Containers of numbers, texts, paths and numpy values.

    Returns:
        The copy.

    >>> plain({"rate": float("nan"), "ids": (1, 2)})
    {'rate': None, 'ids': [1, 2]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays and scalars of numpy
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return lines of aligned columns: numbers to the right, as their header, the rest to the left.

    Args:
        headers: The columns' names.
        rows: Cells; floats are printed with four significant digits, None as a dash.

    Returns:
        The lines.

    >>> print(table(["row", "score", "class"], [(12, 0.51234567, "cat"), (3, -2.0, None)]))
    row   score  class
     12  0.5123  cat
      3      -2  -
    """
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [_is_numeric([right for _, right in column]) for column in zip(*cells, strict=True)]
    numeric = numeric or [False] * len(headers)
    texts = [list(headers), *([text for text, _ in row] for row in cells)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for row in texts:
        parts = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def _is_numeric(cells: Sequence[bool | None]) -> bool:
    return any(cells) and False not in cells


def _cell(value: object) -> tuple[str, bool | None]:
    """Return a cell's text, and whether it is a number; None where there is no value."""
    if value is None:
        return "-", None
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return f"{value:.4g}", True
    return str(value), isinstance(value, int) and not isinstance(value, bool)


def size_text(num_bytes: float) -> str:
    """Return a number of bytes for people.

    Args:
        num_bytes: The number.

    Returns:
        Three significant digits with a decimal unit.

    >>> size_text(512), size_text(65_536), size_text(8.2e9)
    ('512 B', '65.5 kB', '8.20 GB')
    """
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    power = min(len(units) - 1, int(math.log10(num_bytes) // 3)) if num_bytes >= 1 else 0
    value = num_bytes / 1000**power
    decimals = 2 - min(2, int(math.log10(value))) if power else 0
    return f"{value:.{decimals}f} {units[power]}"


def time_text(seconds: float) -> str:
    """Return a time for people.

    >>> time_text(0.05), time_text(75), time_text(7322)
    ('0.1 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{max(seconds, 0.1):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
