"""The settings of a run, once for all: as keys of a TOML file, as flags, in the template and in the help.

A setting that is not given is not passed on, so that the library's own default holds.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tracer.cli.help import TaughtCommand
from tracer.errors import InputError, InputTypeError, nearest_name

LARGEST_COUNT = (1 << 63) - 1
"""Whole numbers beyond this are in no tensor's and no file's range."""

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "text": ((str,), "a text"),
    "count": ((int,), "a whole number"),
    "switch": ((bool,), "true or false"),
    "texts": ((str, list), "a text or a list of texts"),
    "rates": ((int, float, list), "a number or a list of numbers"),
    "number": ((int, float, str), 'a number or "auto"'),
}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: The key in a file; the flag is the same with dashes.
        kind: What values it takes, a key of ``_KINDS``.
        section: The heading under which it stands in the help and the template.
        help: What it does, a sentence.
        example: Its value in the template, as TOML.
        required: Whether a run needs it.
        choices: The values that are known, where these are all.
    """

    name: str
    kind: str
    section: str
    help: str
    example: str
    required: bool = False
    choices: tuple[str, ...] = ()

    @property
    def in_template(self) -> bool:
        """Whether the template sets it, rather than show it in a comment."""
        return self.required

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return "--" + self.name.replace("_", "-")


_WHAT, _HOW, _ANSWER, _WORK = "What to trace", "Gradients and storage", "Scores", "How to work"

SETTINGS = (
    Setting("model", "text", _WHAT, "Model, as module:callable, which builds it.", '"training:build_model"', True),
    Setting(
        "task", "text", _WHAT, "A task's name, or module:callable of a loss function or Task.",
        '"image_classification"', True,
    ),
    Setting("train", "text", _WHAT, "Training rows, as module:callable.", '"training:train_set"', True),
    Setting("targets", "text", _WHAT, "Rows to explain, as module:callable.", '"training:test_set"', True),
    Setting(
        "checkpoints", "texts", _WHAT,
        "A recorder's directory, files or globs, which are sorted by their numbers; may be repeated.",
        '"checkpoints/epoch_*.pt"', True,
    ),
    Setting(
        "learning_rate", "rates", _WHAT,
        "One for all checkpoints or one for each, with commas; it replaces rates that a recorder wrote. Leave it out "
        "for a recorder's directory, which has each checkpoint's sum over its steps.",
        "0.1",
    ),
    Setting("save_dir", "text", _WHAT, "Where the store lies or is to be made.", '"runs/first"', True),
    Setting("exp_name", "text", _WHAT, "The name of the targets in the store.", '"targets"'),
    Setting("proj_dim", "count", _HOW, "Numbers k kept of a gradient; inner products err by about 1/sqrt(k).", "4096"),
    Setting(
        "projector", "text", _HOW, "How gradients are projected.", '"sketch"',
        choices=("sketch", "none", "rademacher", "gaussian", "factored", "fast_jl"),
    ),
    Setting(
        "storage", "text", _HOW, "How features are stored.", '"float16"',
        choices=("float16", "int8", "float32", "none"),
    ),
    Setting("params", "texts", _HOW, "Name patterns of the parameters that count; may be repeated.", '["*"]'),
    Setting(
        "gradients", "text", _HOW, "How gradients are computed.", '"auto"', choices=("auto", "capture", "functional")
    ),
    Setting(
        "preconditioner", "text", _HOW, "Inner products of Adam's steps, from second moments in the checkpoints.",
        '"adam"', choices=("adam",),
    ),
    Setting(
        "autocast", "text", _HOW, "Compute under autocast in this dtype, as mixed-precision training does.",
        '"bfloat16"', choices=("bfloat16", "float16"),
    ),
    Setting("seed", "count", _HOW, "The projection's seed.", "0"),
    Setting("check_rows", "switch", _HOW, "Recognise rows by a hash of their inputs.", "true"),
    Setting(
        "estimator", "text", _ANSWER, "What scores estimate.", '"tracin"',
        choices=("tracin", "cosine", "influence", "trak"),
    ),
    Setting(
        "target", "text", _ANSWER, "Influence on the targets' loss, or on their output.", '"loss"',
        choices=("loss", "output"),
    ),
    Setting("regularization", "number", _ANSWER, "Lambda of influence and trak: a number or auto.", '"auto"'),
    Setting("batch_size", "count", _WORK, "Rows of a batch, where the data do not say it.", "64"),
    Setting("collate_fn", "text", _WORK, "How rows become a batch, as module:callable.", '"training:collate"'),
    Setting("device", "text", _WORK, "Where to compute, such as cuda:0; else where the model is.", '"cpu"'),
    Setting("memory_bytes", "count", _WORK, "How much ranking holds, about.", "1073741824"),
    Setting(
        "process", "text", _WORK, "Which of several processes this is: slurm, or such as 0/4.", '"slurm"'
    ),
    Setting("resume", "switch", _WORK, "Continue a store that is there.", "true"),
    Setting("progress", "switch", _WORK, "Show progress bars; else on a terminal only.", "true"),
)  # fmt: skip
"""All settings: those of `tracer.attribute` and `tracer.Tracer`, and where model, data and checkpoints are."""

BY_NAME = {setting.name: setting for setting in SETTINGS}


def setting_flags(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add every setting to a command as a flag; what is not given comes as None, or as an empty tuple."""
    for setting in reversed(SETTINGS):
        flag = setting.flag
        options: dict[str, Any] = {"help": setting.help, "default": None}
        if setting.kind == "switch":
            flag = f"{flag}/--no-{setting.flag.removeprefix('--')}"
        elif setting.kind == "texts":
            options = {"help": setting.help, "multiple": True}
        else:
            options["type"] = int if setting.kind == "count" else str
            if setting.choices:
                options["type"] = click.Choice(setting.choices)
        command = click.option(flag, setting.name, **options)(command)
    return command


class SettingsCommand(TaughtCommand):
    """A command whose help lists settings under their headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those that are settings section by section."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                known = BY_NAME.get(parameter.name or "")
                groups.setdefault(known.section if known else "Options", []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def read_settings(path: str | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file, with flags over them.

    Args:
        path: A TOML file, or None.
        flags: Values by setting; None and empty tuples are not given.

    Returns:
        Those settings that are given, checked for their type, by name.

    Raises:
        InputError: The file cannot be read or has a key that is not known, or a number is out of range.
        InputTypeError: A value is of a type that cannot be used.
    """
    found = {} if path is None else _read_file(path)
    found.update({name: value for name, value in flags.items() if value not in (None, ())})
    for name in ("checkpoints", "params"):
        if name in found:
            found[name] = [found[name]] if isinstance(found[name], str) else list(found[name])
    for name, value in found.items():
        if name in BY_NAME and BY_NAME[name].kind == "count" and abs(value) > LARGEST_COUNT:
            raise InputError(f"{name} is {value}; expected at most {LARGEST_COUNT}.")
    for name, parse in (("learning_rate", _rates), ("regularization", _number), ("process", _process)):
        if isinstance(found.get(name), str):
            found[name] = parse(found[name])
    return found


def check_required(settings: Mapping[str, Any], path: str | None) -> None:
    """Check that a run has what it needs.

    Args:
        settings: What is given.
        path: The file that was read, for the message.

    Raises:
        InputError: Something is missing.
    """
    missing = [setting for setting in SETTINGS if setting.required and setting.name not in settings]
    if missing:
        names = ", ".join(setting.name for setting in missing)
        where = f"{path} lacks" if path else "This run lacks"
        advice = "" if path else " `tracer init` writes a file to fill in."
        raise InputError(f"{where} {names}: give it in the file, or as {missing[0].flag}.{advice}")


def _read_file(path: str) -> dict[str, Any]:
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from error
    except FileNotFoundError as error:
        raise InputError(f"There is no file {path}; `tracer init {path}` writes one to fill in.") from error
    for name, value in found.items():
        if name not in BY_NAME:
            raise InputError(f"{path} has the unknown key {name!r}; {nearest_name(name, BY_NAME)}.")
        setting = BY_NAME[name]
        types, expected = _KINDS[setting.kind]
        fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        item_type: Any = str if setting.kind == "texts" else (int, float)
        if not fits or (isinstance(value, list) and not all(isinstance(item, item_type) for item in value)):
            raise InputTypeError(f"{path}: {name} is {value!r}; expected {expected}.")
        if setting.choices and value not in setting.choices:
            raise InputError(f"{path}: {name} is {value!r}; {nearest_name(value, setting.choices)}.")
    return found


def _rates(text: str) -> float | list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--learning-rate is {text!r}; expected a number, or several with commas.") from error
    return rates[0] if len(rates) == 1 else rates


def _number(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"regularization is {text!r}; expected a number or 'auto'.") from error


def _process(text: str) -> str | tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash:
        return text
    if not (number.isdecimal() and count.isdecimal()):
        raise InputError(f"process is {text!r}; expected 'slurm', or a number and how many, such as 0/4.")
    return int(number), int(count)
