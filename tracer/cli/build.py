"""``tracer build``: the store of a language model from names, as `build_store` makes it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

import click
import torch

from tracer.api.attribution import Attribution
from tracer.api.language_inputs import LanguageInputs, language_inputs
from tracer.api.settings import FeatureSettings
from tracer.cli.job import RANKING, Job
from tracer.cli.run import execute, next_steps
from tracer.cli.settings import BUILD_BY_NAME, BuildSettingsCommand, check_required, read_settings
from tracer.data.datasets import DataSource
from tracer.data.text.settings import TextOptions
from tracer.training.checkpoint_paths import find_checkpoints
from tracer.training.language_models import own_weights


@dataclass(frozen=True)
class LanguageJob(Job):
    """A run whose store knows the documents of its examples."""

    inputs: LanguageInputs | None = None

    def run(self, train: DataSource, targets: DataSource, count: int | None = None, **changes: Any) -> Attribution:
        """Run `attribute`, and record the documents if it is the whole run."""
        if count is None and self.inputs is not None:
            self.inputs.check(self.save_dir, str(self.ranking.get("exp_name", "targets")))
        found = super().run(train, targets, count, **changes)
        if count is None and self.inputs is not None:
            self.inputs.record(found.tracer.store)
        return found


@click.command("build", cls=BuildSettingsCommand)
@click.argument("config", required=False, type=click.Path())
@click.option("--dry-run", is_flag=True, help="Show the plan and its cost from a few timed batches; store nothing.")
def build(config: str | None, dry_run: bool, **flags: Any) -> None:
    r"""Build the store of a language model from the names of model, data and checkpoints.

    CONFIG is a TOML file of settings, which `tracer init --build` writes; each is also a flag, which overrides the
    file. Run it again with the same store and it resumes; Ctrl-C stops it without losing a finished batch.

    Examples:
        tracer build --model gpt2 --data train.jsonl --targets questions.jsonl --out runs/gpt2
        tracer build --model base --data chats.jsonl --checkpoints run --loss-on assistant --out runs/chats
        tracer build build.toml --proj-dim 1024 --dry-run
    """
    settings = read_settings(config, flags, BUILD_BY_NAME)
    check_required(settings, config, BUILD_BY_NAME)
    settings["save_dir"], flags["save_dir"] = settings["out"], flags["out"]
    execute(_job(settings), settings, dry_run, lambda: _next_steps(config, flags, settings))


def _next_steps(config: str | None, flags: dict[str, Any], settings: dict[str, Any]) -> str:
    store = config if config is not None and not flags["out"] else settings["out"]
    return f"{next_steps(config, flags, settings, (), ' --texts')}\n  tracer ask {shlex.quote(store)} 'a prompt'"


def _job(settings: dict[str, Any]) -> LanguageJob:
    named = settings.get("checkpoints") or [str(own_weights(settings["model"]))]
    checkpoints, notes = find_checkpoints(named, settings.get("learning_rate"))
    text: Any = {name: settings[name] for name in TextOptions.__annotations__ if name in settings}
    names = ("tokenizer", "dtype", "loss", "target_split")
    inputs = language_inputs(
        settings["model"],
        settings["data"],
        settings.get("targets"),
        [path for path, _ in checkpoints],
        options=text,
        **{name: settings[name] for name in names if name in settings},
    )
    options = {name: value for name, value in settings.items() if name in FeatureSettings.__annotations__}
    if torch.cuda.is_available():
        options.setdefault("device", "cuda")
    return LanguageJob(
        inputs.model,
        inputs.task,
        inputs.train,
        inputs.targets,
        checkpoints,
        settings["save_dir"],
        {name: settings[name] for name in RANKING if name in settings},
        options,
        inputs.ids,
        notes=notes,
        inputs=inputs,
    )
