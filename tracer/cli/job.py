"""A run, with its model, data and checkpoints loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tracer._core.validation import check_count
from tracer.api.attribution import Attribution, attribute
from tracer.cli.checkpoints import Found, find_checkpoints, replaced_rates
from tracer.cli.references import build, resolve
from tracer.data.datasets import DataSource, as_data_source
from tracer.errors import InputTypeError

_LOADED = ("model", "task", "train", "targets", "checkpoints", "learning_rate", "collate_fn", "save_dir", "batch_size")
_RANKING = ("exp_name", "estimator", "target", "regularization")


@dataclass(frozen=True)
class Job:
    """What a run works on.

    Attributes:
        model: The model.
        task: As `attribute` takes it.
        train: The training rows.
        targets: The rows to explain.
        checkpoints: Paths with learning rates.
        save_dir: Where the store lies or is to be made.
        ranking: ``exp_name``, ``estimator``... as far as they are given.
        options: Options of `Tracer`, as far as they are given.
        notes: What one should know of the settings, sentences.
    """

    model: nn.Module
    task: Any
    train: DataSource
    targets: DataSource
    checkpoints: Found
    save_dir: str
    ranking: Mapping[str, Any]
    options: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @classmethod
    def load(cls, settings: Mapping[str, Any]) -> Job:
        """Import and build what the settings name.

        Args:
            settings: As `tracer.cli.settings.read_settings` returns them, with all that is required.

        Returns:
            The job.

        Raises:
            InputTypeError: What was built is no model, or no rows.
        """
        checkpoints = find_checkpoints(settings["checkpoints"], settings.get("learning_rate"))
        model = build(settings["model"], "model")
        if not isinstance(model, nn.Module):
            raise InputTypeError(
                f"model: {settings['model']} gave a {type(model).__name__}; expected a torch.nn.Module."
            )
        train, targets = (load_rows(settings, name) for name in ("train", "targets"))
        return cls(
            model,
            load_task(settings["task"]),
            train,
            targets,
            checkpoints,
            settings["save_dir"],
            {name: settings[name] for name in _RANKING if name in settings},
            {name: value for name, value in settings.items() if name not in (*_LOADED, *_RANKING)},
            replaced_rates(settings["checkpoints"], checkpoints),
        )

    def run(self, train: DataSource, targets: DataSource) -> Attribution:
        """Run `attribute` on these rows, which are the job's, perhaps wrapped."""
        return attribute(
            self.model,
            self.task,
            train,
            targets,
            [path if rate is None else (path, rate) for path, rate in self.checkpoints],
            save_dir=self.save_dir,
            **self.ranking,
            **self.options,
        )


def load_rows(settings: Mapping[str, Any], name: str) -> DataSource:
    """Return the rows that a setting names.

    Args:
        settings: The settings.
        name: ``train`` or ``targets``.

    Returns:
        The rows, batched as ``batch_size`` and ``collate_fn`` say.
    """
    collate = resolve(settings["collate_fn"], "collate_fn") if "collate_fn" in settings else None
    batch_size = check_count(settings.get("batch_size", 64), "batch_size")
    return as_data_source(build(settings[name], name), name, batch_size, collate)


def load_task(task: str) -> Any:
    """Return a task: a name as it is; of a reference a class is called, a function or an instance taken as it is.

    >>> load_task("regression"), load_task("tracer:LanguageModeling").name
    ('regression', 'language_modeling')
    """
    if ":" not in task:
        return task
    found = resolve(task, "task")
    return build(task, "task") if isinstance(found, type) else found
