"""A store of a language model's training, from the names of the model, its checkpoints and its data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from tracer._core.validation import check_choice
from tracer.api.attribution import Attribution, attribute
from tracer.data.datasets import DataSource, NoExamples
from tracer.data.fingerprints import fingerprint_samples
from tracer.data.text.isolation import check_isolation
from tracer.data.text.settings import TextOptions, text_settings
from tracer.data.text.source import TextSource, text_source
from tracer.data.token_tasks import LanguageModeling
from tracer.errors import InputError
from tracer.store import RowTable, Store
from tracer.store.arrays.metadata import NODE
from tracer.store.arrays.store_path import store_path
from tracer.store.example_groups import write_example_groups
from tracer.training.checkpoint_paths import find_checkpoints
from tracer.training.language_models import load_language_model, own_weights
from tracer.types import Checkpoint


@dataclass(frozen=True)
class LanguageInputs:
    """A model, a task and tokenized examples, as `attribute` takes them."""

    model: nn.Module
    tokenizer: Any
    task: LanguageModeling
    train: TextSource
    targets: TextSource | NoExamples
    recipe: Mapping[str, Any]  # the names and settings they come from

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
            done = np.setdiff1d(np.arange(table.num_rows), table.remaining())
            if table.num_rows == len(source) and len(done):
                for batch, inds in source.batches(done):
                    table.check_rows(inds, fingerprint_samples(batch, len(inds)))

    def record(self, store: Store) -> None:
        """Write into a store the documents and groups of its training examples, and where they come from."""
        write_example_groups(store, self.train.rows.documents, self.train.groups)
        store.set_info(language=dict(self.recipe))


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
    settings = text_settings(options or {})
    if isinstance(model, nn.Module):
        if tokenizer is None or isinstance(tokenizer, str):
            raise InputError("model is a module; pass its tokenizer, an object, by tokenizer=.")
        module = model
    else:
        module, found = load_language_model(
            os.fspath(model), checkpoints, tokenizer if isinstance(tokenizer, str) else None, dtype
        )
        tokenizer = found if tokenizer is None or isinstance(tokenizer, str) else tokenizer
    train = text_source(data, tokenizer, settings, "data")
    explained: TextSource | NoExamples = NoExamples()
    if targets is not None:
        alone = {"packing": "none", "unit": "document", "group_column": None, "split": target_split or settings.split}
        explained = text_source(
            targets, tokenizer, text_settings({**asdict(settings), **alone}), "targets", in_order=True
        )
    most = getattr(getattr(module, "config", None), "max_position_embeddings", None)
    longest = max(int(source.rows.lengths.max()) for source in (train, explained) if isinstance(source, TextSource))
    if most is not None and longest > most:
        raise InputError(
            f"an example has {longest} tokens, and the model has {most} positions; pass max_length={most}."
        )
    if settings.unit == "block":
        check_isolation(module, train)
    names = {
        name: str(value) for name, value in (("model", model), ("data", data), ("targets", targets)) if _is_name(value)
    }
    recipe = {**names, **asdict(settings)}
    return LanguageInputs(module, tokenizer, LanguageModeling(loss), train, explained, recipe)


def _is_name(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike))


def build_store(
    model: str | os.PathLike[str] | nn.Module,
    data: Any,
    checkpoints: Any = None,
    *,
    save_dir: str | os.PathLike[str],
    targets: Any = None,
    learning_rate: float | Sequence[float] | None = None,
    tokenizer: Any = None,
    dtype: str = "auto",
    loss: str = "sum",
    target_split: str | None = None,
    **options: Any,
) -> Attribution:
    """Build the store of a causal language model from names: of the model, its checkpoints and its training data.

    Args:
        model: A name on the hub, a directory of ``save_pretrained`` or of peft's adapters, or a module.
        data: The training data: a name on the hub, a folder of ``save_to_disk``, files of JSON lines, CSV, Parquet or
            text, a list of texts or records, or a data set of `datasets`.
        checkpoints: A folder of a trainer or recorder, a file, a glob, or a list of these, or state dicts as for
            `attribute`. Default: the model's own weights.
        save_dir: The directory or URL of the store, which is created if it does not exist.
        targets: The examples to explain, in one of the forms of ``data``. Default: none yet; self-influence and
            `Tracer.query` need none.
        learning_rate: One for all checkpoints, or one for each. Default: those that the trainer or recorder logged.
        tokenizer: The tokenizer, or its name. Default: the model's.
        dtype: The dtype of a model loaded by name, for example ``float32``. Default: that in which it was saved.
        loss: ``sum`` over the predicted tokens of an example, as trainers weigh them in a batch, or their ``mean``.
        target_split: The split of the targets. Default: that of the data.
        **options: The fields of `tracer.data.text.settings.TextSettings`, and the options of `attribute`.

    Returns:
        The attribution; its ``scores`` and ``top`` need targets.

    Raises:
        InputError: If a model, file, split or column does not exist, or settings do not fit each other.
        InputTypeError: If a setting is unknown.
        MissingDependencyError: If transformers, datasets or peft is needed and not installed.
    """
    text: Any = {name: options.pop(name) for name in tuple(options) if name in TextOptions.__annotations__}
    if _is_name(checkpoints) or (isinstance(checkpoints, (list, tuple)) and all(map(_is_name, checkpoints))):
        named = [checkpoints] if _is_name(checkpoints) else checkpoints
        found, _ = find_checkpoints(named, learning_rate)
        checkpoints = [path if rate is None else (path, rate) for path, rate in found]
        paths = [path for path, _ in found]
    else:
        if learning_rate is not None and checkpoints is not None:
            raise InputError("learning_rate goes with checkpoints by name; pass (checkpoint, learning rate) instead.")
        paths = []
    inputs = language_inputs(
        model, data, targets, paths, tokenizer=tokenizer, dtype=dtype, loss=loss, target_split=target_split,
        options=text,
    )  # fmt: skip
    if checkpoints is None and not isinstance(model, nn.Module):
        checkpoints = [(own_weights(os.fspath(model)), 1.0 if learning_rate is None else learning_rate)]
    elif checkpoints is None:
        checkpoints = [(inputs.model.state_dict(), 1.0 if learning_rate is None else learning_rate)]
    if not isinstance(model, nn.Module) and torch.cuda.is_available():
        options.setdefault("device", "cuda")
    inputs.check(save_dir, str(options.get("exp_name", "targets")))
    result = attribute(
        inputs.model, inputs.task, inputs.train, inputs.targets, checkpoints, save_dir=save_dir, **options
    )
    inputs.record(result.tracer.store)
    return result
