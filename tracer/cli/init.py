"""``tracer init``: a file of settings to fill in."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from tracer.cli.help import TaughtCommand
from tracer.cli.settings import SETTINGS
from tracer.errors import InputError

EXAMPLES = """
tracer init
$EDITOR tracer.toml
tracer run tracer.toml --dry-run
"""

_HEAD = """\
# Settings of `tracer run`. Each is also a flag, which wins: proj_dim = 1024 is --proj-dim 1024.
# Paths, and the modules in module:callable, are looked for from the directory in which tracer is called.
# Lines behind # show what else there is; without them the library's defaults hold.
"""


@click.command("init", cls=TaughtCommand, examples=EXAMPLES)
@click.argument("path", type=click.Path(dir_okay=False), default="tracer.toml")
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def command(path: str, force: bool) -> None:
    """Write a commented configuration for `tracer run`.

    PATH is tracer.toml where none is given. Settings that a run needs come first, with made-up values to replace; all
    others are there as comments.
    """
    _write(Path(path), force)
    click.echo(f"{path} is written. Fill in model and data, then: tracer run {path} --dry-run")


def _write(path: Path, force: bool) -> None:
    """Write the template; a file that is there is replaced only by force."""
    if path.exists() and not force:
        raise InputError(f"{path} is there already; choose another name, or pass --force to replace it.")
    path.write_text(template(), encoding="utf-8")


def template() -> str:
    """Return the text of a file of settings: what is required as keys, the rest as comments."""
    parts, section = [_HEAD], ""
    for setting in SETTINGS:
        if setting.section != section:
            section = setting.section
            parts.append(f"# --- {section} ---\n")
        about = setting.help + (f" One of: {', '.join(setting.choices)}." if setting.choices else "")
        comment = textwrap.fill(about, 110, initial_indent="# ", subsequent_indent="# ")
        line = f"{setting.name} = {setting.example}"
        parts.append(f"{comment}\n{line}\n" if setting.in_template else f"{comment}\n# {line}\n")
    return "\n".join(parts)
