"""What commands on a store share: which store, which targets, which estimator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from tracer.api.attribution import Attribution
from tracer.api.store_reader import StoreReader
from tracer.api.tracer import Tracer
from tracer.cli.settings import BY_NAME, read_settings
from tracer.errors import InputError, nearest_name
from tracer.store.table_schema import NO_LABEL

_RANKING: tuple[str, ...] = ("exp_name", "estimator", "target", "regularization")


@dataclass(frozen=True)
class Choice:
    """A store and what is asked of it, as the options say.

    Attributes:
        found: Answers questions.
        settings: Of the file that was named in the store's place; empty for a store's directory.
    """

    found: Attribution
    settings: Mapping[str, Any]

    @property
    def reader(self) -> Tracer | StoreReader:
        """The store."""
        return self.found.tracer

    @property
    def first_id(self) -> int:
        """The first checkpoint that counts."""
        ids = self.found.model_ids or self.reader.store.checkpoint_ids()
        return ids[0]

    def train_labels(self) -> np.ndarray | None:
        """Return the classes of train rows ``[N]``, as the store knows them, or None."""
        return known_labels(self.reader.store.checkpoint(self.first_id).column("label"))

    def target_labels(self) -> np.ndarray | None:
        """Return the classes of targets ``[M]``, likewise."""
        return known_labels(self.reader.store.targets(self.found.exp_name, self.first_id).column("label"))

    def self_influence(self) -> np.ndarray:
        """Return each train row's influence on itself ``[N]``, of the estimator; of ``tracin`` for ``cosine``."""
        found = self.found
        estimator = "tracin" if found.estimator == "cosine" else found.estimator
        return self.reader.self_influence(found.model_ids, estimator, regularization=found.regularization)

    @property
    def num_targets(self) -> int:
        """M."""
        return self.reader.store.targets(self.found.exp_name, self.first_id).num_rows


def known_labels(labels: np.ndarray) -> np.ndarray | None:
    """Return labels ``[N]``, or None where there is none at all."""
    return None if (labels == NO_LABEL).all() else np.asarray(labels)


def label_of(labels: np.ndarray | None, row: int) -> int | None:
    """Return a row's class, or None."""
    return None if labels is None or labels[row] == NO_LABEL else int(labels[row])


def ranking_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say what scores are, as keywords of `choose`."""
    for option in reversed(
        [
            click.option("--exp-name", help="The targets' name; needed where the store has several."),
            click.option("--estimator", type=click.Choice(BY_NAME["estimator"].choices), help="Default: tracin."),
            click.option("--target", type=click.Choice(BY_NAME["target"].choices), help="Of what of the targets."),
            click.option("--regularization", help="Lambda of influence and trak: a number or auto."),
            click.option("--model-ids", type=Integers(), help="Only these checkpoints, such as 0,2 or 0-3."),
            click.option("--device", help="Where to multiply, such as cuda:0.", default="cpu", show_default=True),
        ]
    ):
        command = option(command)
    return command


class Integers(click.ParamType):
    """Numbers and ranges with commas: ``0,5,10-12`` is 0, 5, 10, 11, 12."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """Return the numbers."""
        if isinstance(value, list):
            return value
        numbers: list[int] = []
        for part in str(value).split(","):
            first, dash, last = part.strip().partition("-")
            if not first.isdecimal() or (dash and not last.isdecimal()):
                self.fail(f"{value!r}; expected numbers and ranges such as 0,5,10-12.", param, ctx)
            if int(last or first) < int(first):
                self.fail(f"{value!r} has the range {part.strip()}; expected the lower number first.", param, ctx)
            numbers.extend(range(int(first), int(last or first) + 1))
        if len(set(numbers)) < len(numbers):
            again = sorted(number for number, times in Counter(numbers).items() if times > 1)
            self.fail(f"{value!r} names {again} more than once; name each once.", param, ctx)
        return numbers


def open_store(store: str, device: str = "cpu") -> tuple[StoreReader, dict[str, Any]]:
    """Open a store by its directory, its URL, or the file of settings that it was made with.

    Args:
        store: As `find_store` takes it.
        device: Where to multiply.

    Returns:
        The store, and the settings of the file.
    """
    save_dir, settings = find_store(store)
    return StoreReader.open(save_dir, device), settings


def find_store(store: str) -> tuple[str, dict[str, Any]]:
    """Return where a store lies, without looking into it.

    Args:
        store: The directory or URL, or a file of settings that has ``save_dir``: whatever is a file here, or ends as
            one and is no directory.

    Returns:
        The directory or URL, and the settings of the file.

    Raises:
        InputError: The file names no store.
    """
    path = Path(store)
    if not (path.is_file() or (store.endswith(".toml") and not path.is_dir())):
        return store, {}
    settings = read_settings(store, {})
    if "save_dir" not in settings:
        raise InputError(f"{store} has no save_dir; name the store itself.")
    return settings["save_dir"], settings


def choose(store: str, *, device: str = "cpu", needs_targets: bool = True, **options: Any) -> Choice:
    """Open a store and choose targets and estimator.

    Args:
        store: As `open_store` takes it.
        device: Where to multiply.
        needs_targets: Whether targets must be known.
        **options: What `ranking_options` adds; None is not given.

    Returns:
        The choice.

    """
    reader, settings = open_store(store, device)
    chosen: dict[str, Any] = {}
    for given in (settings, read_settings(None, options)):  # what was typed is above the file
        chosen.update((name, given[name]) for name in _RANKING if name in given)
    if needs_targets:
        chosen["exp_name"] = _checked_name(reader, chosen.get("exp_name"))
    chosen.setdefault("exp_name", "targets")
    return Choice(Attribution(reader, model_ids=options.get("model_ids"), **chosen), settings)


def _checked_name(reader: Tracer | StoreReader, exp_name: str | None) -> str:
    """Return the name of the targets: what was given if it is known, else the only one there is."""
    known, path = reader.store.exp_names(), reader.store.path
    if not known:
        raise InputError(f"{path} has no targets; score some first, as `tracer run` does.")
    if exp_name is None and len(known) > 1:
        raise InputError(f"{path} has several sets of targets: choose one of {known} by --exp-name.")
    if exp_name is not None and exp_name not in known:
        raise InputError(f"exp_name={exp_name!r} was never scored; {nearest_name(exp_name, known)}.")
    return exp_name or known[0]


def check_targets(targets: list[int] | None, num_targets: int) -> list[int]:
    """Return the targets to show: those that were named, else all.

    Args:
        targets: Indices, or None.
        num_targets: M.

    Returns:
        The indices.

    Raises:
        InputError: One is out of range.
    """
    if targets is None:
        return list(range(num_targets))
    outside = [target for target in targets if target >= num_targets]
    if outside:
        raise InputError(f"--targets names {outside}; the store has targets 0 to {num_targets - 1}.")
    return targets
