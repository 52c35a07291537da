"""``tracer init``: a commented file of settings."""

from __future__ import annotations

import textwrap
from pathlib import Path

import click

from tracer.cli.help import ExampleCommand
from tracer.cli.settings import SETTINGS
from tracer.errors import InputError

EXAMPLES = """
tracer init
$EDITOR tracer.toml
tracer run tracer.toml --dry-run
"""

_HEAD = """\
# Settings of `tracer run`. Each is also a flag, which overrides the file: proj_dim = 1024 is --proj-dim 1024.
# Paths, and the modules in module:callable, are relative to the directory in which tracer is called.
# Lines behind # show all other settings; without them the library's defaults hold.
"""


@click.command("init", cls=ExampleCommand, examples=EXAMPLES)
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default="tracer.toml")
@click.option("--force", is_flag=True, help="Replace an existing file.")
def command(path: Path, force: bool) -> None:
    """Write a commented configuration for `tracer run`.

    PATH is tracer.toml by default. Settings that a run needs come first, with made-up values to replace; all others are
    comments.
    """
    _write(path, force)
    click.echo(f"Wrote {path}. Fill in model and data, then: tracer run {path} --dry-run")


def _write(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise InputError(f"{path} exists already; choose another name, or pass --force to replace it.")
    path.write_text(template(), encoding="utf-8")


def template() -> str:
    """Return the text of the file: required settings as keys, all others as comments."""
    parts, section = [_HEAD], ""
    for setting in SETTINGS:
        if setting.section != section:
            section = setting.section
            parts.append(f"# --- {section} ---\n")
        about = setting.help + (f" One of: {', '.join(setting.choices)}." if setting.choices else "")
        comment = textwrap.fill(about, 110, initial_indent="# ", subsequent_indent="# ")
        parts.append(f"{comment}\n{'' if setting.required else '# '}{setting.name} = {setting.example}\n")
    return "\n".join(parts)
