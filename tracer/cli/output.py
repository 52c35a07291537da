"""Results on the standard output: JSON for scripts, aligned text for people."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import click

from tracer._core.text import printable
from tracer.cli.app import ExampleCommand

_STDOUT = "tracer.stdout"  # key of the real standard output in a command's context while it is redirected


class ResultCommand(ExampleCommand):
    """A command with ``--json``, which shows its result by `print_result`, and with the options in ``shared``."""

    shared: tuple[click.Option, ...] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        text = "Print one JSON object, for scripts."
        self.params += [*self.shared, click.Option(["--json", "as_json"], is_flag=True, help=text)]

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        if not ctx.params.pop("as_json"):
            return super().invoke(ctx)
        # The standard output must hold the JSON object alone, so prints of the user's code go to the standard error.
        ctx.meta[_STDOUT] = sys.stdout
        with contextlib.redirect_stdout(sys.stderr):
            return super().invoke(ctx)


def wants_json() -> bool:
    """Return whether the current command prints JSON."""
    return _STDOUT in click.get_current_context().meta


def print_result(result: dict[str, Any], text: str) -> None:
    """Print a command's result as JSON, or its text for people."""
    if wants_json():
        click.echo(json.dumps(json_value(result), allow_nan=False), file=click.get_current_context().meta[_STDOUT])
    else:
        click.echo(printable(text))


def json_value(value: Any) -> Any:
    """Return a value in types that JSON has: arrays become lists, NaN and infinity null, all else text.

    >>> json_value({"rate": float("nan"), "ids": (1, 2)})
    {'rate': None, 'ids': [1, 2]}
    """
    if isinstance(value, dict):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_value(item) for item in value]
    if hasattr(value, "tolist"):  # arrays and scalars of numpy
        return json_value(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def format_table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return aligned columns: numbers to the right with four significant digits, text to the left, None as a dash.

    >>> print(format_table(["index", "score", "class"], [(12, 0.51234567, "cat"), (3, -2.0, None)]))
    index   score  class
       12  0.5123  cat
        3      -2  -
    """
    cells = [[_cell(value) for value in row] for row in rows]
    columns = [[right for _, right in column] for column in zip(*cells, strict=True)] or [[]] * len(headers)
    to_right = [any(column) and False not in column for column in columns]
    texts = [list(headers), *([text for text, _ in row] for row in cells)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = []
    for row in texts:
        aligned = zip(row, widths, to_right, strict=True)
        lines.append("  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in aligned))
    return "\n".join(line.rstrip() for line in lines)


def _cell(value: object) -> tuple[str, bool | None]:
    """Return a cell's text and whether it is a number; None without a value."""
    if value is None:
        return "-", None
    if isinstance(value, bool):
        return "yes" if value else "no", False
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return f"{value:.4g}", True
    return _line(value), isinstance(value, int)


def _line(value: object) -> str:
    """Return a value's text in one line."""
    return printable(str(value)).replace("\n", "\\n")


def format_facts(facts: Iterable[tuple[str, object]]) -> str:
    """Return a line for each name and value."""
    return "\n".join(f"{name:<14} {_line(value)}" for name, value in facts)


def format_size(num_bytes: float) -> str:
    """Return a number of bytes with three significant digits and a decimal unit.

    >>> format_size(512), format_size(65_536), format_size(8.2e9)
    ('512 B', '65.5 kB', '8.20 GB')
    """
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    power = min(len(units) - 1, int(math.log10(num_bytes) // 3)) if num_bytes >= 1 else 0
    value = num_bytes / 1000**power
    decimals = 2 - min(2, int(math.log10(value))) if power else 0
    return f"{value:.{decimals}f} {units[power]}"


def format_time(seconds: float) -> str:
    """Return a duration in its two largest units.

    >>> format_time(0.05), format_time(75), format_time(7322)
    ('0.1 s', '1 min 15 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{max(seconds, 0.1):.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
