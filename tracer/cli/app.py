"""The program: its commands, imported on demand, their help, and the exit codes of errors."""

from __future__ import annotations

import errno
import importlib
import inspect
import logging
import shlex
import textwrap
import traceback
from typing import Any

import click
from click.shell_completion import get_completion_class

from tracer import __version__
from tracer._core.text import printable
from tracer.errors import TracerError

FINDING, BAD_INPUT, UNEXPECTED, INTERRUPTED = 1, 2, 3, 130
"""Exit codes besides 0: damage found; wrong call or input; an error in other code; Ctrl-C."""

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "Find flipped labels among handwritten digits, on built-in data."),
    "init": ("settings", "Write a commented configuration for `tracer run`."),
    "run": ("run", "Trace targets to training examples over the checkpoints of a training run."),
    "build": ("build", "Build the store of a language model from the names of model, data and checkpoints."),
    "info": ("info", "Show the contents of a store: settings, checkpoints, targets, sizes."),
    "verify": ("verify", "Read a whole store and report damage."),
    "top": ("top", "Show the strongest training examples of targets."),
    "self-influence": ("top", "Show the training examples of highest self-influence."),
    "index": ("index", "Store an index of training examples, for approximate questions."),
    "ask": ("ask", "Show the training documents behind a language model's answer."),
    "export": ("export", "Write scores, top examples or summaries as CSV, Parquet or a numpy matrix."),
    "report": ("report", "Write an HTML page with the results."),
    "serve": ("serve", "Serve a page with questions to a store, and the same answers as JSON."),
    "compare": ("compare", "Compare the rankings of two runs, or of two estimators."),
    "retrain": ("retrain", "Train models on subsets of the training examples, for `tracer lds`."),
    "lds": ("retrain", "Show how well scores predict training on subsets."),
    "completion": ("app", "Print the completion script of a shell."),
}
"""Each command's module and first line of help; written here, so that the list of commands imports none of them."""

FIRST_STEPS = """\
A first look, on built-in data:
  tracer demo
Your own model:
  tracer init                    writes tracer.toml; name your model and data in it
  tracer run tracer.toml --dry-run
  tracer run tracer.toml
  tracer top tracer.toml -k 5    the strongest training examples of each target
  tracer report tracer.toml --output-dir report
"""


class UserCodeError(Exception):
    """The user's own code, named by a setting, failed; the message says where and how."""


class ExampleCommand(click.Command):
    """A command whose help ends with the examples of its docstring, line by line as they are."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.help, _, examples = inspect.cleandoc(self.help or "").partition("\n\nExamples:\n")
        self._examples = textwrap.dedent(examples)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        _write_lines(formatter, "Examples", self._examples)


class Program(click.Group):
    """Commands that are modules of this package; exceptions become messages and exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names in the order of a first session."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"tracer.cli.{COMMANDS[cmd_name][0]}")
        return getattr(module, cmd_name.replace("-", "_"))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the first steps."""
        _write_lines(formatter, "First steps", FIRST_STEPS)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember the typed command line for messages that tell how to continue."""
        ctx.meta["tracer.typed"] = f"{ctx.info_name} {shlex.join(args)}"
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; errors become one message and an exit code."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            code = INTERRUPTED
        except (TracerError, OSError) as error:
            if getattr(error, "errno", None) == errno.EPIPE:  # the reader, such as head, is done: click ends quietly
                raise
            code = _report_error(ctx, f"Error: {error}", BAD_INPUT)
        except UserCodeError as error:
            code = _report_error(ctx, f"Error: {error}", UNEXPECTED)
        except (Exception, SystemExit) as error:  # SystemExit: other code must not choose this program's exit code
            message = f"Unexpected {type(error).__name__}: {error}"
            if not ctx.params.get("debug"):
                name = str(ctx.find_root().info_name)
                message += f"\nFor the traceback: {name} --debug{typed_command(ctx).removeprefix(name)}"
            code = _report_error(ctx, message, UNEXPECTED)
        ctx.exit(code)


def _write_lines(formatter: click.HelpFormatter, heading: str, text: str) -> None:
    """Write lines under a heading without wrapping them."""
    with formatter.section(heading):
        for line in text.splitlines():
            formatter.write(f"{'':>{formatter.current_indent}}{line}\n")


def _report_error(ctx: click.Context, message: str, code: int) -> int:
    """Print an error, with its traceback after ``--debug``, and return the exit code."""
    if ctx.params.get("debug"):
        click.echo(printable(traceback.format_exc()), err=True)
    click.echo(printable(message), err=True)
    return code


def typed_command(ctx: click.Context) -> str:
    """Return the typed command line, quoted for a shell."""
    return str(ctx.meta.get("tracer.typed", ctx.command_path))


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.option("-v", "--verbose", is_flag=True, help="Show the library's log messages.")
@click.version_option(__version__, message="tracer %(version)s", help="Show the version.")
def main(debug: bool, verbose: bool) -> None:
    """Trace a PyTorch model's predictions to the training examples that caused them.

    Every command's --help has examples. Exit codes: 0 success, 1 damage found, 2 wrong call or input, 3 an error in
    other code, 130 interrupted by Ctrl-C.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(name)s: %(message)s" if verbose else "%(message)s"))
    logging.basicConfig(handlers=[handler])
    if verbose:
        logging.getLogger("tracer").setLevel(logging.INFO)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


@click.command("completion", cls=ExampleCommand)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    Save it once in the shell's directory of completions. The script asks the installed program, so it stays correct
    when the program changes. bash needs version 4.4 or newer.

    Examples:
        bash:  mkdir -p ~/.local/share/bash-completion/completions
               tracer completion bash > ~/.local/share/bash-completion/completions/tracer
        zsh:   tracer completion zsh > "${fpath[1]}/_tracer"       then start a new shell
        fish:  tracer completion fish > ~/.config/fish/completions/tracer.fish
    """
    found = get_completion_class(shell)
    assert found is not None  # click has these three
    click.echo(found(ctx.find_root().command, {}, "tracer", "_TRACER_COMPLETE").source())
