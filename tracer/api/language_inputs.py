"""A model, its tokenizer and its data, from names or as objects."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import nn

from tracer._core.validation import check_choice
from tracer.data.datasets import DataSource, NoExamples
from tracer.data.example_ids import ExampleId
from tracer.data.fingerprints import fingerprint_samples
from tracer.data.text.encoding import with_template
from tracer.data.text.isolation import check_isolation
from tracer.data.text.settings import TextOptions, TextSettings, text_settings
from tracer.data.text.source import TextSource, text_source
from tracer.data.token_tasks import LanguageModeling, is_encoder_decoder
from tracer.errors import InputError, MismatchError
from tracer.store import RowTable, Store
from tracer.store.arrays.metadata import NODE
from tracer.store.arrays.store_path import store_path
from tracer.store.example_groups import write_example_groups
from tracer.training.language_models import load_language_model
from tracer.types import Checkpoint


@dataclass(frozen=True)
class LanguageInputs:
    """A model, a task and tokenized examples, as `attribute` takes them."""

    model: nn.Module
    tokenizer: Any
    task: LanguageModeling
    train: TextSource
    targets: TextSource | NoExamples
    settings: TextSettings
    recipe: Mapping[str, Any]  # the names and settings they come from
    folders: tuple[str, ...] | None = None  # below which paths of checkpoints in the store are followed

    @property
    def most_tokens(self) -> int | None:
        """The most tokens that the model takes; None if it does not say."""
        return getattr(getattr(self.model, "config", None), "max_position_embeddings", None)

    @property
    def ids(self) -> tuple[list[ExampleId] | None, list[ExampleId] | None]:
        """The ids of training examples and targets, if the data have them."""
        return self.train.ids, self.targets.ids if isinstance(self.targets, TextSource) else None

    def check(self, save_dir: str | os.PathLike[str], exp_name: str) -> None:
        """Raise `MismatchError` if a store has other tokens of examples than these; stored ones are not run again."""
        if not (store_path(save_dir) / NODE).exists():
            return
        store = Store.open_existing(save_dir)
        catalog = store.catalog
        ids = catalog.target_ids(exp_name) if exp_name in catalog.exp_names() else []
        tables: list[tuple[DataSource, RowTable]] = [
            (self.train, store.checkpoint(each)) for each in catalog.checkpoint_ids()[:1]
        ]
        tables += [(self.targets, store.targets(exp_name, each)) for each in ids[:1]]
        for source, table in tables if store.manifest.settings.get("check_rows", True) else ():
            if len(source) == table.num_rows:
                compare_rows(source, table)

    def record(self, store: Store, target_task: Mapping[str, Any] | None = None) -> None:
        """Write into a store the documents and groups of its training examples, and where they come from.

        Args:
            store: The store.
            target_task: The settings of the targets' task, if they have one of their own.
        """
        write_example_groups(store, self.train.rows.documents, self.train.groups)
        of_targets = {} if target_task is None else {"target_task": described_task(target_task)}
        store.set_info(language={**self.recipe, **of_targets})


def compare_rows(source: DataSource, table: RowTable, rows: np.ndarray | None = None) -> None:
    """Compare the examples of a source with those of a table of the store.

    Args:
        source: The source.
        table: The table.
        rows: The examples whose tokens are compared, ascending. Default: all.

    Raises:
        MismatchError: If their number or their tokens differ.
    """
    if len(source) != table.num_rows:
        raise MismatchError(
            f"expected {table.num_rows} examples, as {table.path} has, got {len(source)}; pass those it was made of"
        )
    done = np.setdiff1d(np.arange(table.num_rows) if rows is None else rows, table.remaining())
    if len(done) and table.has_fingerprints:
        for batch, inds in source.batches(done):
            table.check_rows(inds, fingerprint_samples(batch, len(inds)))


def target_source(
    targets: Any, tokenizer: Any, settings: TextSettings, split: str | None, in_sides: bool
) -> TextSource:
    """Return targets, each a document in its place, with the settings of the training examples."""
    alone = {"packing": "none", "unit": "document", "group_column": None, "split": split or settings.split}
    return text_source(targets, tokenizer, text_settings({**asdict(settings), **alone}), "targets", True, in_sides)


def language_inputs(
    model: str | os.PathLike[str] | nn.Module,
    data: Any,
    targets: Any = None,
    checkpoints: Sequence[Checkpoint] = (),
    *,
    tokenizer: Any = None,
    dtype: str = "auto",
    loss: str = "sum",
    target_split: str | None = None,
    options: TextOptions | None = None,
) -> LanguageInputs:
    """Load and tokenize what names say; see `build_store`."""
    check_choice("loss", loss, ("sum", "mean"))
    settings = with_template(text_settings(options or {}))
    given_tokenizer = tokenizer
    if isinstance(model, nn.Module):
        if tokenizer is None or is_name(tokenizer):
            raise InputError("model is a module; pass its tokenizer, an object, by tokenizer=.")
        module = model
    else:
        name = os.fspath(tokenizer) if is_name(tokenizer) else None
        module, own = load_language_model(os.fspath(model), checkpoints, name, dtype)
        tokenizer = own if tokenizer is None or is_name(tokenizer) else tokenizer
    in_sides = is_encoder_decoder(module)
    train = text_source(data, tokenizer, settings, "data", in_sides=in_sides)
    explained: TextSource | NoExamples = NoExamples()
    if targets is not None:
        explained = target_source(targets, tokenizer, settings, target_split, in_sides)
    longest = max(source.rows.longest for source in (train, explained) if isinstance(source, TextSource))
    task, recipe = LanguageModeling(loss), {"dtype": dtype, "loss": loss, **asdict(settings), "chat": train.is_chat}
    named = {"model": model, "data": data, "targets": targets, "tokenizer": given_tokenizer}
    recipe |= {name: _place(value) for name, value in named.items() if is_name(value)}
    recipe |= {"target_split": target_split}
    found = LanguageInputs(module, tokenizer, task, train, explained, settings, recipe)
    most = found.most_tokens
    if most is not None and longest > most:
        raise InputError(
            f"an example has {longest} tokens, and the model has {most} positions; pass max_length={most}."
        )
    if settings.unit == "block":
        check_isolation(module, train)
    return found


def described_task(settings: Mapping[str, Any]) -> str:
    """Return the settings of a task as one text, the same for the same settings."""
    return json.dumps(settings, sort_keys=True)


def is_name(value: Any) -> bool:
    """Return whether a value is a name or path rather than an object."""
    return isinstance(value, (str, os.PathLike))


def _place(name: str | os.PathLike[str]) -> str:
    """Return a name on the hub as it is, and a path from the root on, so that it is found from other directories."""
    text = os.fspath(name)
    return os.path.abspath(text) if os.path.exists(text) or glob.glob(text, recursive=True) else text
