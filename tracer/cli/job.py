"""A run with its model, data and checkpoints loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tracer._core.validation import check_count
from tracer.api.attribution import Attribution, attribute
from tracer.cli.checkpoints import WeightedPaths, find_checkpoints, replaced_rates
from tracer.cli.references import build, resolve
from tracer.data.datasets import DataSource, as_data_source
from tracer.errors import InputTypeError

RANKING: tuple[str, ...] = ("exp_name", "estimator", "target", "regularization")
"""The settings that decide the scores of a finished store."""

_LOADED = ("model", "task", "train", "targets", "checkpoints", "learning_rate", "collate_fn", "save_dir", "batch_size")


@dataclass(frozen=True)
class Job:
    """The inputs of a run."""

    model: nn.Module
    task: Any
    train: DataSource
    targets: DataSource
    checkpoints: WeightedPaths
    save_dir: str
    ranking: Mapping[str, Any]  # given values of RANKING
    options: Mapping[str, Any]  # given options of Tracer
    notes: tuple[str, ...] = ()  # sentences about the settings that the user should know

    @classmethod
    def load(cls, settings: Mapping[str, Any]) -> Job:
        """Import and build everything that complete settings name."""
        checkpoints = find_checkpoints(settings["checkpoints"], settings.get("learning_rate"))
        model = build(settings["model"], "model")
        if not isinstance(model, nn.Module):
            raise InputTypeError(
                f"model: {settings['model']} returned a {type(model).__name__}; expected a torch.nn.Module."
            )
        train, targets = (load_data(settings, name) for name in ("train", "targets"))
        return cls(
            model,
            load_task(settings["task"]),
            train,
            targets,
            checkpoints,
            settings["save_dir"],
            {name: settings[name] for name in RANKING if name in settings},
            {name: value for name, value in settings.items() if name not in (*_LOADED, *RANKING)},
            replaced_rates(settings["checkpoints"], checkpoints),
        )

    def run(self, train: DataSource, targets: DataSource, count: int | None = None, **changes: Any) -> Attribution:
        """Run `attribute` on these examples at the first ``count`` checkpoints, with changed options."""
        checkpoints = [path if rate is None else (path, rate) for path, rate in self.checkpoints[:count]]
        options = {"save_dir": self.save_dir, **self.ranking, **self.options, **changes}
        return attribute(self.model, self.task, train, targets, checkpoints, **options)


def load_data(settings: Mapping[str, Any], name: str) -> DataSource:
    """Return the examples of the setting ``train`` or ``targets``."""
    collate = resolve(settings["collate_fn"], "collate_fn") if "collate_fn" in settings else None
    batch_size = check_count(settings.get("batch_size", 64), "batch_size")
    return as_data_source(build(settings[name], name), name, batch_size, collate)


def load_task(task: str) -> Any:
    """Return a task's name unchanged, or the object of a reference; a class is called.

    >>> load_task("regression"), load_task("tracer:LanguageModeling").name
    ('regression', 'language_modeling')
    """
    if ":" not in task:
        return task
    found = resolve(task, "task")
    return build(task, "task") if isinstance(found, type) else found
