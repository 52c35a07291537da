"""Options that commands on a store share: the store, its targets, the estimator."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from jaxtyping import Float64, Integer

from tracer.api.attribution import Attribution
from tracer.api.language import stored_sources
from tracer.api.store_reader import StoreReader
from tracer.api.tracer import Tracer
from tracer.cli.job import RANKING
from tracer.cli.output import ResultCommand, format_table
from tracer.cli.settings import BUILD_BY_NAME, BY_NAME, read_settings, setting_option
from tracer.errors import InputError, TracerError, nearest_name
from tracer.report.text import shortened
from tracer.store import RowTable
from tracer.store.table_schema import NO_LABEL

logger = logging.getLogger("tracer")

_SHOWN = 80
"""The most characters of a text in a table."""


@dataclass(frozen=True)
class StoreView:
    """A store with the chosen targets, estimator and checkpoints."""

    found: Attribution
    settings: Mapping[str, Any]  # of the run's file; empty if the store itself was named

    @property
    def reader(self) -> Tracer | StoreReader:
        """The store."""
        return self.found.tracer

    @property
    def train_table(self) -> RowTable:
        """The training examples at the first chosen checkpoint."""
        return self.reader.store.checkpoint(self._first_id)

    @property
    def target_table(self) -> RowTable:
        """The targets at the first chosen checkpoint."""
        return self.reader.store.targets(self.found.exp_name, self._first_id)

    @property
    def _first_id(self) -> int:
        return (self.found.model_ids or self.reader.store.catalog.checkpoint_ids())[0]

    def with_texts(self, trust: Sequence[str], rows: np.ndarray | None = None) -> StoreView:
        """Return a view with the texts of a store of `tracer build`, if there are such and they are found.

        Args:
            trust: Further folders below which paths in the store are followed.
            rows: The training examples that are shown, ascending, and so compared with the store. Default: all.
        """
        store = self.reader.store
        if "language" not in store.manifest.info:
            return self
        hide_loading()
        try:
            folders = trusted_folders(str(store.path), trust)
            sources = stored_sources(store, self.found.exp_name, folders, rows)
        except TracerError as error:
            logger.warning("texts are not shown: %s", error)
            return self
        return replace(self, found=replace(self.found, sources=sources))

    def texts(self, indices: Iterable[int], side: int = 0) -> dict[int, str]:
        """Return the beginnings of the texts of some training examples (``side`` 0) or targets (1), in one line."""
        source, chosen = self.found.sources[side], np.unique(list(indices))
        texts = None if source is None else source.texts(chosen)
        lines = (shortened(" ".join(text.split()), _SHOWN) for text in texts or ())
        return dict(zip(chosen.tolist(), lines, strict=False))

    def self_influence(self) -> Float64[np.ndarray, " N"]:
        """Return each training example's influence on itself; for ``cosine``, which has none, that of ``tracin``."""
        return self.found.by("self_influence").self_influence()

    def ranking_table(self, name: str, indices: Iterable[int], values: Iterable[float]) -> str:
        """Return a table of ranked training examples with their values and, if known, classes."""
        labels, ids, indices = known_labels(self.train_table), self.ids(), list(indices)
        texts = self.texts(indices)
        ranked = enumerate(zip(indices, values, strict=True), 1)
        rows = [
            (
                *(rank, index, *([] if ids is None else [ids[index]]), value),
                *([] if labels is None else [class_of(labels, index)]),
                *([texts[index]] if texts else []),
            )
            for rank, (index, value) in ranked
        ]
        known = {"id": ids is not None, name: True, "class": labels is not None, "text": bool(texts)}
        return format_table(["rank", "example", *(header for header, there in known.items() if there)], rows)

    def ids(self) -> list[str | int] | None:
        """Return the ids of training examples, if the store has them."""
        return self.reader.store.ids().listed(self.reader.train_set_size)

    def target_ids(self) -> list[str | int] | None:
        """Return the ids of targets, if the store has them."""
        return self.reader.store.ids(self.found.exp_name).listed(self.target_table.num_rows)


def known_labels(table: RowTable) -> Integer[np.ndarray, " n"] | None:
    """Return the classes of examples; None if the store knows none."""
    labels = np.asarray(table.column("label"))
    return None if (labels == NO_LABEL).all() else labels


def class_of(labels: np.ndarray | None, index: int) -> int | None:
    """Return the class of an example, or None."""
    return None if labels is None or labels[index] == NO_LABEL else int(labels[index])


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
            repeated = sorted(number for number, times in Counter(numbers).items() if times > 1)
            self.fail(f"{value!r} names {repeated} more than once; name each once.", param, ctx)
        return numbers


class RankingCommand(ResultCommand):
    """A command with the options that decide the scores, as keywords of `open_view`."""

    shared = (
        setting_option("exp_name", help="The name of the targets; needed if the store has several."),
        *(setting_option(name) for name in ("estimator", "target", "regularization")),
        click.Option(["--model-ids"], type=Integers(), help="Only these checkpoints, such as 0,2 or 0-3."),
        click.Option(["--device"], help="Device to compute on, such as cuda:0.", default="cpu", show_default=True),
    )


TRUST: Mapping[str, Any] = {
    "multiple": True,
    "metavar": "DIR",
    "help": "Follow paths in the store below this folder too; repeat it. By default only those below the store's own "
    "folder and the current one.",
}
"""The option ``--trust``, for commands that follow paths in a store."""


def texts_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add ``--texts`` and ``--trust`` to a command that shows training examples."""
    told = "Show the beginnings of texts, of a store of `tracer build`."
    return click.option("--texts", is_flag=True, help=told)(click.option("--trust", **TRUST)(command))


def trusted_folders(save_dir: str, trust: Sequence[str]) -> list[str]:
    """Return the folders below which paths in a store are followed."""
    own = save_dir.rpartition("/")[0] if "://" in save_dir else str(Path(save_dir).absolute().parent)
    return list(dict.fromkeys([own, os.getcwd(), *trust]))


def hide_loading() -> None:
    """Turn off the progress bars of loading models and data, where it takes a moment."""
    with contextlib.suppress(ImportError):  # which is reported when they are loaded
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()


def count_option(default: int, text: str) -> Callable[..., Any]:
    """Return the option ``-k``."""
    return click.option("-k", "k", type=click.IntRange(min=1), default=default, show_default=True, help=text)


def find_store(store: str) -> tuple[str, dict[str, Any]]:
    """Return the directory or URL of a store, and the settings of the run's file if that was named."""
    path = Path(store)
    if not (path.is_file() or (store.endswith(".toml") and not path.is_dir())):
        return store, {}
    settings = read_settings(store, {}, {**BUILD_BY_NAME, **BY_NAME})
    if "out" in settings:  # of `tracer build`, whose model and data are no references to code
        return settings["out"], {name: settings[name] for name in RANKING if name in settings}
    if "save_dir" not in settings:
        raise InputError(f"{store} has no save_dir; name the store itself.")
    return settings["save_dir"], settings


def open_store(store: str, device: str = "cpu") -> tuple[StoreReader, dict[str, Any]]:
    """Open the store of `find_store`; return it and the settings of the run's file."""
    save_dir, settings = find_store(store)
    return StoreReader.open(save_dir, device), settings


def open_view(store: str, *, device: str = "cpu", needs_targets: bool = True, **options: Any) -> StoreView:
    """Open a store and choose targets, estimator and checkpoints by the options of `ranking_options`."""
    reader, settings = open_store(store, device)
    given = settings | read_settings(None, options)  # flags override the file
    chosen = {name: given[name] for name in RANKING if name in given}
    if needs_targets:
        chosen["exp_name"] = _check_name(reader, chosen.get("exp_name"))
    chosen.setdefault("exp_name", "targets")
    return StoreView(Attribution(reader, model_ids=options.get("model_ids"), **chosen), settings)


def _check_name(reader: StoreReader, exp_name: str | None) -> str:
    """Return the name of the targets; without one, that of the only targets in the store."""
    known, path = reader.store.catalog.exp_names(), reader.store.path
    if not known:
        raise InputError(f"{path} has no targets; score some first, for example with `tracer run`.")
    if exp_name is None and len(known) > 1:
        raise InputError(f"{path} has several sets of targets: choose one of {known} by --exp-name.")
    if exp_name is not None and exp_name not in known:
        raise InputError(f"exp_name={exp_name!r} was never scored; {nearest_name(exp_name, known)}.")
    return exp_name or known[0]


def check_targets(targets: list[int] | None, num_targets: int) -> list[int]:
    """Return the indices of ``--targets``; without the option, of all targets."""
    if targets is None:
        return list(range(num_targets))
    outside = [target for target in targets if target >= num_targets]
    if outside:
        raise InputError(f"--targets names {outside}; the store has targets 0 to {num_targets - 1}.")
    return targets
