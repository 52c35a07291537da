"""A run with its model, data and checkpoints loaded, from references ``package.module:name`` to the user's code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tracer._core.validation import check_count, check_model
from tracer.api.attribution import Attribution, attribute
from tracer.api.settings import FeatureSettings
from tracer.cli.app import UserCodeError
from tracer.data.datasets import DataSource, as_data_source
from tracer.data.example_ids import ExampleId, find_ids
from tracer.data.named_tasks import make_task
from tracer.data.tables import AS_THEY_ARE, InputForm
from tracer.errors import InputError, InputTypeError, nearest_name
from tracer.training.checkpoint_paths import WeightedPaths, find_checkpoints

RANKING: tuple[str, ...] = ("exp_name", "estimator", "target", "regularization")
"""The settings that decide the scores of a finished store."""


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
    ids: tuple[list[ExampleId] | None, list[ExampleId] | None] = (None, None)  # of training examples and targets
    notes: tuple[str, ...] = ()  # sentences about the settings that the user should know

    @classmethod
    def load(cls, settings: Mapping[str, Any]) -> Job:
        """Import and build everything that complete settings name."""
        checkpoints, notes = find_checkpoints(settings["checkpoints"], settings.get("learning_rate"))
        model = build(settings["model"], "model")
        if not isinstance(model, nn.Module):
            raise InputTypeError(
                f"model: {settings['model']} returned a {type(model).__name__}; expected a torch.nn.Module."
            )
        task = load_task(settings["task"])
        options = {name: value for name, value in settings.items() if name in FeatureSettings.__annotations__}
        if "target_task" in options:
            options["target_task"] = load_task(options["target_task"])
        forms = [InputForm.of(check_model(model), make_task(each)) for each in (task, options.get("target_task", task))]
        train, ids = load_examples(settings, "train", forms[0])
        targets, target_ids = load_examples(settings, "targets", forms[1])
        return cls(
            model,
            task,
            train,
            targets,
            checkpoints,
            settings["save_dir"],
            {name: settings[name] for name in RANKING if name in settings},
            options,
            (ids, target_ids),
            notes,
        )

    def run(self, train: DataSource, targets: DataSource, count: int | None = None, **changes: Any) -> Attribution:
        """Run `attribute` on these examples at the first ``count`` checkpoints, with changed options."""
        checkpoints = [path if rate is None else (path, rate) for path, rate in self.checkpoints[:count]]
        options = {"save_dir": self.save_dir, **self.ranking, **self.options, **changes}
        if count is None:
            options |= {"ids": self.ids[0], "target_ids": self.ids[1]}
        return attribute(self.model, self.task, train, targets, checkpoints, **options)


_IDS = {"train": "ids", "targets": "target_ids"}


def load_examples(
    settings: Mapping[str, Any], name: str, form: InputForm = AS_THEY_ARE
) -> tuple[DataSource, list[ExampleId] | None]:
    """Return the examples of the setting ``train`` or ``targets``, for a model that takes them in a form, and ids."""
    collate = resolve(settings["collate_fn"], "collate_fn") if "collate_fn" in settings else None
    batch_size = check_count(settings.get("batch_size", 64), "batch_size")
    in_order = bool(settings.get("check_rows", True))
    data, ids = build(settings[name], name), settings.get(_IDS[name])
    source = as_data_source(data, name, batch_size, collate, in_order, form)
    found = build(ids, _IDS[name]) if isinstance(ids, str) and ":" in ids else ids
    return source, find_ids(found, data, len(source), _IDS[name])


def load_task(task: str) -> Any:
    """Return a task's name unchanged, or the object of a reference; a class is called.

    >>> load_task("regression"), load_task("tracer:LanguageModeling").name
    ('regression', 'language_modeling')
    """
    if ":" not in task:
        return task
    found = resolve(task, "task")
    return build(task, "task") if isinstance(found, type) else found


def resolve(reference: str, setting: str) -> Any:
    """Import the object of a reference, from the current directory first; its name may have dots too."""
    module_name, colon, name = reference.partition(":")
    if not (colon and module_name and name):
        raise InputError(f"{setting} is {reference!r}; expected package.module:callable, such as training:build_model.")
    directory = os.getcwd()
    if directory not in sys.path:
        sys.path.insert(0, directory)
    found = _import(module_name, reference, setting)
    for part in name.split("."):
        if not hasattr(found, part):
            public = [each for each in vars(found) if not each.startswith("_")] if hasattr(found, "__dict__") else []
            raise InputError(
                f"{setting} is {reference!r}, and {module_name} has no {part!r}; {nearest_name(part, public)}."
            )
        found = getattr(found, part)
    return found


def build(reference: str, setting: str) -> Any:
    """Import the object of a reference and call it, unless it is already data or a module."""
    found = resolve(reference, setting)
    # A data set or a model may be callable too; it is the object itself that is meant.
    ready = not isinstance(found, type) and (hasattr(found, "__getitem__") or hasattr(found, "parameters"))
    if ready or not callable(found):
        return found
    return _guard(found, reference, setting)


def _import(module_name: str, reference: str, setting: str) -> Any:
    try:
        return _guard(lambda: importlib.import_module(module_name), reference, setting)
    except UserCodeError as error:
        cause = error.__cause__
        # A missing module is bad input; a module that fails to import, or misses another one, is the user's code.
        if isinstance(cause, ModuleNotFoundError) and f"{module_name}.".startswith(f"{cause.name}."):
            raise InputError(f"{setting} is {reference!r}: {cause} in {os.getcwd()}.") from cause
        raise


def _guard(call: Callable[[], Any], reference: str, setting: str) -> Any:
    """Call the user's code; raise `UserCodeError` for whatever it raises."""
    try:
        return call()
    except SystemExit as error:  # argparse, or a script without a guard
        raise UserCodeError(
            f"{setting}: {reference} ended the program (SystemExit: {error}). Move code that must not run on import, "
            f"such as the parsing of arguments, under `if __name__ == '__main__':`."
        ) from error
    except Exception as error:
        raise UserCodeError(
            f"{setting}: {reference} failed with {type(error).__name__}: {error} (tracer --debug shows the traceback)"
        ) from error
