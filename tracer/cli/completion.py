"""``tracer completion``: completion of commands and options by the shell."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from tracer.cli.help import ExampleCommand

EXAMPLES = """
bash:  mkdir -p ~/.local/share/bash-completion/completions
       tracer completion bash > ~/.local/share/bash-completion/completions/tracer
zsh:   tracer completion zsh > "${fpath[1]}/_tracer"       then start a new shell
fish:  tracer completion fish > ~/.config/fish/completions/tracer.fish
"""


@click.command("completion", cls=ExampleCommand, examples=EXAMPLES)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    Save it once in the shell's directory of completions. The script asks the installed program, so it stays correct
    when the program changes. bash needs version 4.4 or newer.
    """
    found = get_completion_class(shell)
    assert found is not None  # click has these three
    click.echo(found(ctx.find_root().command, {}, "tracer", "_TRACER_COMPLETE").source())
