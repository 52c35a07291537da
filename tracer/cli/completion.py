"""``tracer completion``: commands and options completed by the shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from tracer.cli.help import TaughtCommand

EXAMPLES = """
bash:  mkdir -p ~/.local/share/bash-completion/completions
       tracer completion bash > ~/.local/share/bash-completion/completions/tracer
zsh:   tracer completion zsh > "${fpath[1]}/_tracer"       then start a new shell
fish:  tracer completion fish > ~/.config/fish/completions/tracer.fish
"""


@click.command("completion", cls=TaughtCommand, examples=EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands and options in a shell.

    Put it where the shell looks for completions, once. The script asks the installed program, so it stays right when
    the program changes. bash needs version 4.4 or newer.
    """
    found = get_completion_class(shell)
    assert found is not None  # click has these three
    click.echo(found(ctx.find_root().command, {}, "tracer", "_TRACER_COMPLETE").source())
