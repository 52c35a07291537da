"""A store of a language model's training, from the names of the model, its checkpoints and its data."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import nn

from tracer.api.attribution import Attribution, attribute
from tracer.api.checkpoint_sources import is_below
from tracer.api.language_inputs import compare_rows, described_task, is_name, language_inputs, target_source
from tracer.api.settings import stored_settings
from tracer.api.tracer import Tracer
from tracer.data.text.encoding import with_template
from tracer.data.text.settings import TextOptions, text_settings
from tracer.data.text.source import TextSource, text_source
from tracer.errors import InputError, MismatchError, StoreError
from tracer.store import Store
from tracer.training.checkpoint_paths import find_checkpoints
from tracer.training.language_models import is_in_sides, load_tokenizer, own_weights
from tracer.types import Checkpoint


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
    """Build the store of a language model from names: of the model, its checkpoints and its training data.

    Args:
        model: A name on the hub, a directory of ``save_pretrained`` or of peft's adapters, or a module: a causal
            language model, or an encoder-decoder, whose examples have a prompt and a completion.
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
    if is_name(checkpoints) or (isinstance(checkpoints, (list, tuple)) and all(map(is_name, checkpoints))):
        named = [checkpoints] if is_name(checkpoints) else checkpoints
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
    for name, ids in zip(("ids", "target_ids"), inputs.ids, strict=True):
        options.setdefault(name, ids)
    inputs.check(save_dir, str(options.get("exp_name", "targets")))
    result = attribute(
        inputs.model, inputs.task, inputs.train, inputs.targets, checkpoints, save_dir=save_dir, **options
    )
    inputs.record(result.tracer.store, cast(Tracer, result.tracer)._factory.target_settings)
    return replace(result, language=inputs)


def load_store(
    save_dir: str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | nn.Module | None = None,
    data: Any = None,
    tokenizer: Any = None,
    checkpoints: Sequence[Checkpoint] | None = None,
    exp_name: str = "targets",
    estimator: str | None = None,
    folders: Sequence[str | os.PathLike[str]] | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Attribution:
    """Open a store of `build_store` with its model, tokenizer and data, for `Attribution.explain`.

    The store has their names and all settings; pass what it does not know, since it was an object or has moved. Code
    that comes with a model or data set is never executed.

    Args:
        save_dir: The store's directory or URL.
        model: The model. Default: by the name in the store.
        data: The training data. Default: by the name in the store.
        tokenizer: The tokenizer. Default: by the name in the store, else the model's.
        checkpoints: State dicts or paths in the order of their numbers. Default: the paths in the store.
        exp_name: The name of targets in the store, for `Attribution.scores`.
        estimator: The estimator, as for `attribute`.
        folders: The folders below which paths that the store has are followed, since a store may come from others.
            Default: the folder that holds the store.
        device: The device to compute on. Default: CUDA if a model is loaded by name and there is one.
        **options: ``memory_bytes``, ``process`` or ``progress``, as for `Tracer`, and ``target_task`` if the store was
            built with one.

    Returns:
        The attribution.

    Raises:
        InputError: If something is neither in the store nor passed, or a path is outside ``folders``.
        MismatchError: If the data, weights or ``target_task`` differ from those of the store.
        MissingDependencyError: If transformers, datasets or peft is needed and not installed.
    """
    store = Store.open_existing(save_dir)
    record = LanguageRecord.of(store, folders)
    model = record.name("model") if model is None else model
    data = record.name("data") if data is None else data
    if tokenizer is None:
        named = "tokenizer" in record.values or isinstance(model, nn.Module)
        tokenizer = record.name("tokenizer") if named else None
    if not isinstance(model, nn.Module):
        record = replace(record, folders=(*record.folders, str(own_weights(os.fspath(model)))))
    ids = store.catalog.checkpoint_ids()
    if checkpoints is not None and len(checkpoints) != len(ids):
        raise InputError(f"checkpoints has {len(checkpoints)}; expected {len(ids)}, as many as the store has.")
    paths = record.checkpoints(store) if checkpoints is None else list(checkpoints)
    of_task = (store.manifest.settings.get("task") or {}).get("reduction", "sum")  # collected, without a record
    dtype, loss = (str(record.values.get(name, default)) for name, default in (("dtype", "auto"), ("loss", of_task)))
    inputs = language_inputs(
        model, data, None, paths, tokenizer=tokenizer, dtype=dtype, loss=loss, options=record.options()
    )
    if len(inputs.train) != store.manifest.train_set_size:
        raise MismatchError(
            f"the data have {len(inputs.train)} examples now, and the store {store.manifest.train_set_size}; pass by "
            f"data= those that it was built from."
        )
    inputs = replace(inputs, folders=record.folders)
    if device is None and is_name(model) and torch.cuda.is_available():
        device = "cuda"
    settings = {**stored_settings(store.manifest), "device": device, **options}
    tracer = Tracer(inputs.model, inputs.task, len(inputs.train), save_dir, **settings)
    record.check_target_task(tracer._factory.target_settings)
    for model_id, checkpoint in zip(ids, checkpoints or (), strict=False):
        tracer.load_checkpoint(checkpoint, model_id)
    tracer.close()
    return Attribution(tracer, exp_name, estimator, sources=(inputs.train, None), language=inputs)


def stored_sources(
    store: Store, exp_name: str, folders: Sequence[str | os.PathLike[str]], rows: np.ndarray | None = None
) -> tuple[TextSource, TextSource | None]:
    """Return the training examples and the targets of a store of `build_store`, to be shown.

    The targets are None if the store does not know them: of several sets it has the name of the last.

    Args:
        store: The store.
        exp_name: The name of the targets.
        folders: The folders below which paths in the store are followed.
        rows: The training examples that are compared with the store, ascending. Default: all.

    Raises:
        InputError: If the store does not know a name, or it is outside ``folders``.
        MismatchError: If the training data are not those of the store.
    """
    record = LanguageRecord.of(store, folders)
    model, settings = record.name("model"), with_template(text_settings(record.options()))
    named = record.name("tokenizer") if "tokenizer" in record.values else None
    tokenizer, in_sides = load_tokenizer(model, named), is_in_sides(model)
    known = store.catalog.checkpoint_ids()[0]
    train = text_source(record.name("data"), tokenizer, settings, "data", in_sides=in_sides)
    compare_rows(train, store.checkpoint(known), rows)
    if "targets" not in record.values or not store.catalog.has_targets(exp_name, known):
        return train, None
    split = record.values.get("target_split")
    name, own_split = record.name("targets"), None if split is None else str(split)
    targets = target_source(name, tokenizer, settings, own_split, in_sides)
    try:
        compare_rows(targets, store.targets(exp_name, known))
    except MismatchError:  # the store has the name of the set that was built last
        return train, None
    return train, targets


@dataclass(frozen=True)
class LanguageRecord:
    """The names and settings that a store has of its language model."""

    values: Mapping[str, Any]
    folders: tuple[str, ...]
    store: str

    @classmethod
    def of(cls, store: Store, folders: Sequence[str | os.PathLike[str]] | None) -> LanguageRecord:
        """Read a store's record; without ``folders``, paths are followed below the folder that holds the store."""
        values = store.manifest.info.get("language") or {}
        # a JSON file that others may have written
        if not isinstance(values, Mapping) or not all(isinstance(each, _PLAIN) for each in values.values()):
            raise StoreError(f"the record of the language model in {store.path} is damaged: build the store again.")
        chosen = [store.path.parent] if folders is None else folders
        return cls(values, tuple(str(each) for each in chosen), str(store.path))

    def name(self, what: str) -> str:
        """Return the name of the model, data or tokenizer; raise InputError if there is none, or it is elsewhere."""
        name = self.values.get(what)
        if name is None:
            raise InputError(
                f"the store {self.store} does not say which {what} it was built with (an object was passed, or "
                f"build_store has not made it); pass {what}=."
            )
        self._check(what, str(name), what)
        return str(name)

    def checkpoints(self, store: Store) -> list[str]:
        """Return the paths of all checkpoints; raise InputError if one is not known, or elsewhere."""
        found = []
        for model_id in store.catalog.checkpoint_ids():
            path = store.table_attributes(model_id).get("source")
            if path is None:
                raise InputError(
                    f"the store {self.store} does not say where the weights of checkpoint {model_id} are (a state dict "
                    f"was passed); pass checkpoints=, in the order of their numbers."
                )
            self._check(f"checkpoint {model_id}", str(path), "checkpoints")
            found.append(str(path))
        return found

    def _check(self, what: str, path: str, option: str) -> None:
        if os.path.isabs(path) and not any(is_below(path, folder) for folder in self.folders):
            raise InputError(
                f"the store says that its {what} is {path}, which is in none of {list(self.folders)}. If you trust it, "
                f"pass folders= with its folder (--trust in the shell), or pass {option}=."
            )

    def check_target_task(self, settings: Mapping[str, Any] | None) -> None:
        """Raise MismatchError if targets had a task of their own that the given one, None without, differs from."""
        stored = self.values.get("target_task")
        given = None if settings is None else described_task(settings)
        if stored not in (None, given):
            raise MismatchError(
                f"the store {self.store} was built with target_task={stored}, got {given}; pass the same target_task=, "
                f"which a store cannot hold."
            )

    def options(self) -> TextOptions:
        """Return the settings of the texts."""
        found: Any = {name: self.values[name] for name in TextOptions.__annotations__ if name in self.values}
        if "{" not in (found.get("chat_template") or "{"):
            raise StoreError(f"the chat template in {self.store} is damaged: build the store again.")
        return found


_PLAIN = (str, bool, int, type(None))
