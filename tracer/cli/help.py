"""Help that teaches: every command has worked examples."""

from __future__ import annotations

import inspect
from typing import Any

import click


class TaughtCommand(click.Command):
    """A command whose help ends with examples.

    Args:
        *args: As `click.Command` takes them.
        examples: Lines of a shell, as they are to be printed.
        **options: As `click.Command` takes them.
    """

    def __init__(self, *args: Any, examples: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.examples = inspect.cleandoc(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, line by line as they are."""
        write_examples(formatter, "Examples", self.examples)


def write_examples(formatter: click.HelpFormatter, heading: str, text: str) -> None:
    """Write lines under a heading without wrapping them.

    Args:
        formatter: Takes the text.
        heading: The heading.
        text: The lines.
    """
    with formatter.section(heading):
        for line in text.splitlines():
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
