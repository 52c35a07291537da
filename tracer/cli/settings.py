"""The settings of a run, defined once: as keys of a TOML file, as flags, in the template and in the help.

A setting that is not given is not passed on, so that the library's own default holds.
"""

from __future__ import annotations

import dataclasses
import json
import textwrap
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from tracer.api.questions import CHOICES
from tracer.api.settings import FeatureSettings
from tracer.cli.app import ExampleCommand
from tracer.cli.output import ResultCommand
from tracer.data.text.settings import TextSettings
from tracer.errors import InputError, InputTypeError, nearest_name
from tracer.scoring.estimators import Estimate

LARGEST_COUNT = (1 << 63) - 1  # the largest int64: larger counts do not fit into tensors and files


def _parse_rates(text: str) -> float | list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--learning-rate is {text!r}; expected a number, or several with commas.") from error
    return rates[0] if len(rates) == 1 else rates


def _parse_number(text: str) -> float | str:
    if text == "auto":
        return text
    try:
        return float(text)
    except ValueError as error:
        raise InputError(f"{text!r} is no number; expected one, for regularization also 'auto'.") from error


def _parse_process(text: str) -> str | tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash:
        return text
    if not (number.isdecimal() and count.isdecimal()):
        raise InputError(f"process is {text!r}; expected 'slurm', or a number and a count, such as 0/4.")
    return int(number), int(count)


@dataclass(frozen=True)
class _Kind:
    """The types of a setting's values in a file, their description, and the parser of text."""

    types: tuple[type, ...]
    expected: str
    parse: Callable[[str], Any] = str
    items: tuple[type, ...] = (int, float)


_KINDS = {
    "str": _Kind((str,), "a text"),
    "int": _Kind((int,), "a whole number"),
    "bool": _Kind((bool,), "true or false"),
    "texts": _Kind((str, list), "a text or a list of texts", lambda text: [text], (str,)),
    "rates": _Kind((int, float, list), "a number or a list of numbers", _parse_rates),
    "float": _Kind((int, float, str), 'a number or "auto"', _parse_number),
    "process": _Kind((str,), "a text", _parse_process),
}
_KINDS_OF_NAMED_TYPES = {"ParamSelection": "texts", "ProcessChoice": "process"}


@dataclass(frozen=True)
class Setting:
    """One setting; its name is the key in a file, and with dashes the flag."""

    name: str
    kind: str  # a key of _KINDS
    section: str  # heading in the help and the template
    help: str
    example: str  # value in the template, as TOML
    required: bool = False
    choices: tuple[str, ...] = ()  # all values, if they can be listed

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return "--" + self.name.replace("_", "-")

    def check(self, value: Any, path: str) -> None:
        """Raise `InputTypeError` or `InputError` for a file's value of the wrong type or outside the choices."""
        kind = _KINDS[self.kind]
        fits = isinstance(value, kind.types) and (bool in kind.types or not isinstance(value, bool))
        if not fits or (isinstance(value, list) and not all(isinstance(item, kind.items) for item in value)):
            raise InputTypeError(f"{path}: {self.name} is {value!r}; expected {kind.expected}.")
        if self.choices and value not in self.choices:
            raise InputError(f"{path}: {self.name} is {value!r}; {nearest_name(value, self.choices)}.")

    def parse(self, value: Any) -> Any:
        """Return the value that the library accepts, of a value from a file or a flag."""
        if self.kind == "int" and abs(value) > LARGEST_COUNT:
            raise InputError(f"{self.name} is {value}; expected at most {LARGEST_COUNT}.")
        if isinstance(value, tuple):  # a flag that was repeated
            return list(value)
        return _KINDS[self.kind].parse(value) if isinstance(value, str) else value


def _from_fields(settings: type, names: Sequence[str], section: str) -> tuple[Setting, ...]:
    """Return settings of some fields of a dataclass, with help and choices from their metadata."""
    found = []
    for field in (field for field in dataclasses.fields(settings) if field.name in names):
        choices = tuple(field.metadata.get("choices", ()))
        example = _EXAMPLES.get(field.name) or json.dumps(field.default or next(iter(choices), field.default))
        text = field.metadata["help"].replace("`", "").replace(". None:", ". By default")
        text = _HELP.get(field.name, text.replace("; None:", "; by default"))
        if "efault" not in text and field.default is not None:
            text += " Default: " + example.strip('"') + "."
        kind = str(field.type).split(" | ")[0]
        kind = _KINDS_OF_NAMED_TYPES.get(kind, kind)
        found.append(Setting(field.name, kind, section, text, example, choices=choices))
    return tuple(found)


_INPUT, _FEATURES, _SCORES, _EXECUTION = "Inputs", "Gradients and storage", "Scores", "Execution"
_INPUT_NAMES = ("target_task",)
_EXECUTION_NAMES = ("device", "memory_bytes", "process", "resume", "progress")
# Values that a shell writes differently from Python
_HELP = {
    "params": "Name patterns of the parameters to use; may be repeated. By default all trainable ones.",
    "process": "This process's number and the number of processes, for example 0/4, or slurm in a job array.",
    "resume": "Continue an existing store; with --no-resume it is an error. Default: true.",
}
_EXAMPLES = {
    "checkpoint_key": '"ema"', "params": '["*"]', "device": '"cpu"', "process": '"slurm"', "progress": "true",
    "damping": "0.1", "curvature_examples": "4096", "group_column": '"source"', "id_column": '"id"',
    "chat_template": '"template.jinja"',
}  # fmt: skip

# of an attribution, which answers several questions
_ESTIMATOR: dict[str, Any] = {
    "choices": CHOICES,
    "help": "Method by which influence is estimated; auto: what predicts training without examples best. Default: "
    "tracin for scores and self-influence, cosine for proponents and opponents.",
}

_FEATURE_SETTINGS = (
    *_from_fields(
        FeatureSettings,
        [name for name in FeatureSettings.__annotations__ if name not in (*_INPUT_NAMES, *_EXECUTION_NAMES)],
        _FEATURES,
    ),
    *(
        dataclasses.replace(each, **_ESTIMATOR) if each.name == "estimator" else each
        for each in _from_fields(Estimate, ("estimator", "target", "regularization"), _SCORES)
    ),
)
_CHECKPOINTS = Setting(
    "checkpoints", "texts", _INPUT,
    "Directories, files or globs, which are sorted by their numbers; may be repeated.",
    '"checkpoints/epoch_*.pt"', True,
)  # fmt: skip

SETTINGS = (
    Setting("model", "str", _INPUT, "Model, as module:callable, which builds it.", '"training:build_model"', True),
    Setting(
        "task", "str", _INPUT, "A task's name, or module:callable of a loss or Task.",
        '"image_classification"', True,
    ),
    Setting("target_task", "str", _INPUT, "The task of targets, if it is another one. Default: task.", '"regression"'),
    Setting("train", "str", _INPUT, "Training examples, as module:callable.", '"training:train_set"', True),
    Setting("targets", "str", _INPUT, "Examples to explain, as module:callable.", '"training:test_set"', True),
    Setting(
        "ids", "str", _INPUT,
        "Names of training examples: a column or attribute of train, or module:callable. Default: a table's index.",
        '"paths"',
    ),
    Setting("target_ids", "str", _INPUT, "Names of targets, like ids.", '"paths"'),
    _CHECKPOINTS,
    Setting(
        "learning_rate", "rates", _INPUT,
        "One for all checkpoints, or one for each, separated by commas; it replaces rates that a recorder wrote. "
        "Default: the rates of a recorder's directory, each the sum over a checkpoint's steps.",
        "0.1",
    ),
    Setting("save_dir", "str", _INPUT, "Directory or URL of the store; created if missing.", '"runs/first"', True),
    Setting("exp_name", "str", _INPUT, "The name of the targets in the store.", '"targets"'),
    *_FEATURE_SETTINGS,
    Setting("batch_size", "int", _EXECUTION, "Batch size of data sets and tensors. Default: 64.", "64"),
    Setting("collate_fn", "str", _EXECUTION, "Makes batches of examples, as module:callable.", '"training:collate"'),
    *_from_fields(FeatureSettings, _EXECUTION_NAMES, _EXECUTION),
)  # fmt: skip
"""All settings: those of `attribute` and `Tracer`, from the fields that define them, and the inputs of a run."""

BY_NAME = {setting.name: setting for setting in SETTINGS}

BUILD_BY_NAME = {
    setting.name: setting
    for setting in (
        Setting("model", "str", _INPUT, "Name on the hub or directory of a language model.", '"model"', True),
        Setting(
            "data", "str", _INPUT,
            "Training data: a name on the hub, a folder of save_to_disk, or files (jsonl, csv, parquet, txt).",
            '"train.jsonl"', True,
        ),
        Setting("targets", "str", _INPUT, "Examples to explain, as data. Default: none yet.", '"targets.jsonl"'),
        dataclasses.replace(
            _CHECKPOINTS, required=False, example='"run"',
            help=_CHECKPOINTS.help + " Those of a trainer have rates. Default: the model's own weights.",
        ),
        dataclasses.replace(
            BY_NAME["learning_rate"], help="One for all checkpoints or one for each, with commas. Default: logged ones."
        ),
        Setting("out", "str", _INPUT, "Directory or URL of the store; created if missing.", '"runs/store"', True),
        BY_NAME["exp_name"],
        Setting("tokenizer", "str", _INPUT, "The tokenizer. Default: the model's.", '"model"'),
        Setting("target_split", "str", _INPUT, "The split of the targets. Default: that of the data.", '"test"'),
        Setting("dtype", "str", _INPUT, "Dtype of the model. Default: that in which it was saved.", '"float32"'),
        Setting(
            "loss", "str", _INPUT, "An example's loss: the sum or mean over its predicted tokens. Default: sum.",
            '"sum"', choices=("sum", "mean"),
        ),
        *_from_fields(TextSettings, list(TextSettings.__annotations__), "Texts"),
        *_FEATURE_SETTINGS,
        *_from_fields(FeatureSettings, _EXECUTION_NAMES, _EXECUTION),
    )
}  # fmt: skip
"""All settings of `tracer build`."""


def setting_option(name: str, known: Mapping[str, Setting] = BY_NAME, **options: Any) -> click.Option:
    """Return the option of a setting; without the flag its value is None or an empty tuple."""
    setting = known[name]
    flag, kind = setting.flag, setting.kind
    options = {"help": setting.help, "default": None, **options}
    if kind == "bool":
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    elif kind == "texts":
        del options["default"]
        options["multiple"] = True
    else:
        options["type"] = click.Choice(setting.choices) if setting.choices else int if kind == "int" else str
    return click.Option([flag, name], **options)


class SettingsCommand(ResultCommand):
    """A command with a flag for every setting; its help lists them under their headings."""

    known: Mapping[str, Setting] = BY_NAME
    shared = tuple(setting_option(name) for name in BY_NAME)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, settings by section."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                setting = self.known.get(parameter.name or "")
                sections.setdefault(setting.section if setting else "Options", []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class BuildSettingsCommand(SettingsCommand):
    """A command with a flag for every setting of `tracer build`."""

    known = BUILD_BY_NAME
    shared = tuple(setting_option(name, BUILD_BY_NAME) for name in BUILD_BY_NAME)


def read_settings(path: str | None, flags: Mapping[str, Any], known: Mapping[str, Setting] = BY_NAME) -> dict[str, Any]:
    """Return the given settings of a TOML file with flags over them; flags that are None or empty are not given."""
    found = {} if path is None else _read_file(path, known)
    found.update({name: value for name, value in flags.items() if value not in (None, ())})
    return {name: known[name].parse(value) if name in known else value for name, value in found.items()}


def check_required(settings: Mapping[str, Any], path: str | None, known: Mapping[str, Setting] = BY_NAME) -> None:
    """Raise `InputError` if a setting that a run needs is missing."""
    missing = [setting for setting in known.values() if setting.required and setting.name not in settings]
    if missing:
        names = ", ".join(setting.name for setting in missing)
        advice = "" if path else " `tracer init` writes a file to fill in."
        raise InputError(f"{path or 'This run'} lacks {names}: give it in the file, or as {missing[0].flag}.{advice}")


def _read_file(path: str, known: Mapping[str, Setting]) -> dict[str, Any]:
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from error
    except (FileNotFoundError, IsADirectoryError) as error:
        store, command = ("--out", "init --build") if "out" in known else ("--save-dir", "init")
        what = f"There is no file {path}" if isinstance(error, FileNotFoundError) else f"{path} is a directory"
        name = path if path.endswith(".toml") else "settings.toml"
        raise InputError(
            f"{what}; `tracer {command} {name}` writes a file of settings to fill in. The store is named by {store}."
        ) from error
    for name, value in found.items():
        if name not in known:
            raise InputError(f"{path} has the unknown key {name!r}; {nearest_name(name, known)}.")
        known[name].check(value, path)
    return found


_HEAD = """\
# Settings of `tracer {command}`. Each is also a flag, which overrides the file: proj_dim = 1024 is --proj-dim 1024.
# Paths, and the modules in module:callable, are relative to the directory in which tracer is called.
# Lines behind # show all other settings; without them the library's defaults hold.
"""


@click.command("init", cls=ExampleCommand)
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default="tracer.toml")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--build", is_flag=True, help="Write the settings of `tracer build`.")
def init(path: Path, force: bool, build: bool) -> None:
    """Write a commented configuration for `tracer run`.

    PATH is tracer.toml by default. Settings that a run needs come first, with made-up values to replace; all others are
    comments.

    Examples:
        tracer init
        $EDITOR tracer.toml
        tracer run tracer.toml --dry-run
    """
    command = "build" if build else "run"
    _write_template(path, force, command, BUILD_BY_NAME if build else BY_NAME)
    click.echo(f"Wrote {path}. Fill in model and data, then: tracer {command} {path} --dry-run")


def _write_template(path: Path, force: bool, command: str, known: Mapping[str, Setting]) -> None:
    """Write required settings as keys, all others as comments."""
    if path.exists() and not force:
        raise InputError(f"{path} exists already; choose another name, or pass --force to replace it.")
    parts, section = [_HEAD.replace("{command}", command)], ""
    for setting in known.values():
        if setting.section != section:
            section = setting.section
            parts.append(f"# --- {section} ---\n")
        about = setting.help + (f" One of: {', '.join(setting.choices)}." if setting.choices else "")
        comment = textwrap.fill(about, 110, initial_indent="# ", subsequent_indent="# ")
        parts.append(f"{comment}\n{'' if setting.required else '# '}{setting.name} = {setting.example}\n")
    path.write_text("\n".join(parts), encoding="utf-8")
