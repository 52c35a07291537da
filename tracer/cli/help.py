"""Help with worked examples for every command."""

from __future__ import annotations

import inspect
from typing import Any

import click


class ExampleCommand(click.Command):
    """A command whose help ends with examples, printed line by line as they are."""

    def __init__(self, *args: Any, examples: str, **options: Any) -> None:
        super().__init__(*args, **options)
        self.examples = inspect.cleandoc(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        write_examples(formatter, "Examples", self.examples)


def write_examples(formatter: click.HelpFormatter, heading: str, text: str) -> None:
    """Write lines under a heading without wrapping them."""
    with formatter.section(heading):
        for line in text.splitlines():
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")
