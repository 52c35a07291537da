"""``tracer report``: an HTML page from a store and the examples behind it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from tracer.cli.job import build, load_examples
from tracer.cli.output import print_result
from tracer.cli.stores import RankingCommand, count_option, known_labels, open_view
from tracer.data.batches import tensor_from_numpy
from tracer.data.datasets import DataSource
from tracer.data.model_inputs import label_key
from tracer.errors import InputError
from tracer.store import RowTable

_NAMES = {"train": "training examples", "targets": "targets"}


@click.command("report", cls=RankingCommand)
@click.argument("store")
@click.option("--output-dir", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--train", help="Training examples (inputs, labels), as module:callable. Default: from the file.")
@click.option("--targets", help="The explained examples, as module:callable. Default: from the file.")
@click.option("--inputs", help="Images, vectors or texts to show for training examples, as module:callable.")
@click.option("--target-inputs", help="Images, vectors or texts to show for targets, as module:callable.")
@click.option("--class-names", help="With commas, or as module:callable.")
@click.option("--figures/--no-figures", default=True, help="Also write PNG files, which need matplotlib.")
@click.option("--all-scores/--no-all-scores", default=True, help="Use all scores, 4 bytes for each pair in the store.")
@click.option("--title", help="The page's title.")
@count_option(8, "Training examples shown for each target.")
def report(store: str, output_dir: Path, class_names: str | None, **options: Any) -> None:
    """Write an HTML page with the results.

    STORE is a store's directory or URL, or the TOML file of its run, which also names the examples. Without examples
    the page has numbers and no pictures. Of each example the first item is the input and the last one the label; tokens
    are not shown: pass texts by --inputs. Figures need matplotlib and images Pillow: pip install 'tracin[report]'.

    Examples:
        tracer report tracer.toml --output-dir report             examples as in the file of the run
        tracer report runs/first --output-dir report --train training:train_set --targets training:test_set
        tracer report runs/first --output-dir report --inputs training:train_texts --class-names negative,positive
    """
    given = {name: options.pop(name) for name in ("train", "targets", "inputs", "target_inputs")}
    shown = {name: options.pop(name) for name in ("k", "figures", "all_scores", "title")}
    view = open_view(store, **options)
    settings = {**view.settings, **{name: given[name] for name in _NAMES if given[name]}}
    train = _displayable_data(settings, "train", view.train_table, given["inputs"])
    targets = _displayable_data(settings, "targets", view.target_table, given["target_inputs"])
    page = view.found.report(
        output_dir,
        inputs=train[0],
        labels=train[1],
        class_names=_class_names(class_names),
        target_inputs=targets[0],
        target_labels=targets[1],
        **{name: value for name, value in shown.items() if value is not None},
    )
    print_result({"page": page}, f"Report: {page}")


def _class_names(class_names: str | None) -> list[str] | None:
    if class_names is None:
        return None
    if ":" in class_names:
        return list(build(class_names, "class_names"))
    return [name.strip() for name in class_names.split(",")]


def _displayable_data(settings: Mapping[str, Any], name: str, table: RowTable, inputs: str | None) -> tuple[Any, Any]:
    """Return inputs and labels of one side: of its setting, if there is one, unless inputs and labels are given."""
    shown: tuple[Any, Any] = (None, None)
    if name in settings:
        source, _ = load_examples(settings, name)
        if len(source) != table.num_rows:
            raise InputError(
                f"{name}: {settings[name]} has {len(source)} examples; the store has {table.num_rows} {_NAMES[name]}."
            )
        shown = displayable(source)
    labels = known_labels(table)
    return build(inputs, name) if inputs else shown[0], shown[1] if labels is None else labels


def displayable(source: DataSource) -> tuple[Any, Any]:
    """Return the inputs and labels of all examples as arrays or a list of texts; None for tokens and other kinds."""
    pairs = [_split(batch) for batch, _ in source.batches(np.arange(len(source)))]
    inputs, labels = ([pair[side] for pair in pairs] for side in (0, 1))
    # a matrix of integers holds tokens
    shown = _concatenate(inputs, lambda values: values.ndim > 2 or (values.ndim == 2 and values.dtype.kind == "f"))
    return shown, _concatenate(labels, lambda values: values.ndim == 1)


def _split(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        key = label_key(batch)
        first = next((value for name, value in batch.items() if name != key), None)
        return first, batch.get(key)
    if isinstance(batch, (list, tuple)) and len(batch) > 1:
        return batch[0], batch[-1]
    return batch, None


def _concatenate(parts: list[Any], is_usable: Callable[[np.ndarray], bool]) -> Any:
    if all(isinstance(part, (list, tuple)) and all(isinstance(text, str) for text in part) for part in parts):
        return [text for part in parts for text in part]
    tensors = [tensor_from_numpy(part) if isinstance(part, np.ndarray) else part for part in parts]
    if not all(isinstance(part, torch.Tensor) for part in tensors):
        return None
    # numpy has no bfloat16
    values = [part.detach().float().numpy() if part.is_floating_point() else part.numpy() for part in tensors]
    if len({value.shape[1:] for value in values}) != 1 or not is_usable(values[0]):
        return None
    return np.concatenate(values)
