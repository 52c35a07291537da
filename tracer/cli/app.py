"""The program: its commands, imported when they are asked for, and what becomes of errors."""

from __future__ import annotations

import errno
import importlib
import logging
import shlex
import traceback
from typing import Any

import click

from tracer.cli.help import write_examples
from tracer.errors import TracerError

FINDING, BAD_INPUT, UNEXPECTED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes beside 0: something was found; the call or its input is wrong; an error of other code; Ctrl-C."""

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Find flipped labels among handwritten digits, on data that is built in."),
    "init": ("init", "Write a commented configuration for `tracer run`."),
    "run": ("run", "Trace targets to training rows over the checkpoints of a training run."),
    "info": ("info", "Show what a store holds: settings, checkpoints, rows, targets, sizes."),
    "verify": ("verify", "Read everything that a store holds and say what is damaged."),
    "top": ("top", "Show the strongest training rows of targets."),
    "self-influence": ("self_influence", "Show the training rows of highest self-influence."),
    "export": ("export", "Write scores, top rows or summaries as CSV, Parquet or a numpy matrix."),
    "report": ("report", "Write a page that shows what was found."),
    "compare": ("compare", "Compare the rankings of two runs, or of two estimators."),
    "completion": ("completion", "Print the script that completes commands and options in a shell."),
}
"""Each command's module and first line of help, which stand here so that the list needs no module."""


FIRST_STEPS = """\
A first look, on built-in data:
  tracer demo
Your own model:
  tracer init                    writes tracer.toml; name your model and data in it
  tracer run tracer.toml --dry-run
  tracer run tracer.toml
  tracer top tracer.toml -k 5    the strongest training rows of each target
  tracer report tracer.toml --output-dir report
"""


class OtherCodeError(Exception):
    """Code of the user that a setting names has failed; the message says which and how."""


class Program(click.Group):
    """A group whose commands are modules of this package, and that turns exceptions into messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names, in the order in which one meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command, or return None where there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"tracer.cli.{COMMANDS[cmd_name][0]}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write how to begin."""
        write_examples(formatter, "First steps", FIRST_STEPS)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember what was typed, for messages that say how to go on."""
        ctx.meta["tracer.typed"] = f"{ctx.info_name} {shlex.join(args)}"
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; the library's errors become one message, all become an exit code."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            code = INTERRUPTED
        except TracerError as error:
            code = _complain(ctx, f"Error: {error}", BAD_INPUT)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader, such as head, has seen enough; click ends quietly
                raise
            code = _complain(ctx, f"Error: {error}", BAD_INPUT)
        except OtherCodeError as error:
            code = _complain(ctx, f"Error: {error}", UNEXPECTED)
        except (Exception, SystemExit) as error:
            what = f"Unexpected {type(error).__name__}: {error}"
            if not ctx.params.get("debug"):
                what += f"\nFor the traceback: {debug_command(ctx)}"
            code = _complain(ctx, what, UNEXPECTED)
        ctx.exit(code)


def _complain(ctx: click.Context, message: str, code: int) -> int:
    """Print an error, with its traceback if that was asked for, and return the exit code."""
    if ctx.params.get("debug"):
        click.echo(traceback.format_exc(), err=True)
    click.echo(message, err=True)
    return code


def typed_command(ctx: click.Context) -> str:
    """Return the command line that was typed, as a shell takes it."""
    return str(ctx.meta.get("tracer.typed", ctx.command_path))


def debug_command(ctx: click.Context) -> str:
    """Return the command line that was typed, with ``--debug``."""
    name = str(ctx.find_root().info_name)
    return f"{name} --debug{typed_command(ctx).removeprefix(name)}"


def _print_version(ctx: click.Context, parameter: click.Parameter, asked: bool) -> None:
    if asked:
        from tracer import __version__

        click.echo(f"tracer {__version__}")
        ctx.exit()


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("-v", "--verbose", is_flag=True, help="Show what the library logs.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
def main(debug: bool, verbose: bool) -> None:
    """Which training examples made a PyTorch model do this?

    Every command's --help has an example. Exit codes: 0 all is well, 1 something was found (damage), 2 the call or
    its input is wrong, 3 an error in other code, 130 interrupted by Ctrl-C.
    """
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("tracer").setLevel(logging.INFO)
