"""``tracer report``: a page that shows what was found, from a store and the rows it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from tracer.cli.help import TaughtCommand
from tracer.cli.job import load_rows
from tracer.cli.output import json_option, show
from tracer.cli.references import build
from tracer.cli.stores import choose, ranking_options
from tracer.data.batches import tensor_from_numpy
from tracer.data.datasets import DataSource
from tracer.errors import InputError

EXAMPLES = """
tracer report tracer.toml --output-dir report             rows as in the file of the run
tracer report runs/first --output-dir report --train training:train_set --targets training:test_set
tracer report runs/first --output-dir report --inputs training:train_texts --class-names negative,positive
"""
_LABEL_KEYS = ("labels", "label", "targets", "target", "y")
_MAY_CHANGE = {"train": "training rows", "targets": "targets"}


@click.command("report", cls=TaughtCommand, examples=EXAMPLES)
@click.argument("store")
@click.option("--output-dir", required=True, type=click.Path(file_okay=False, path_type=Path), help="Where files go.")
@click.option("--train", help="Training rows (inputs, labels), as module:callable; else as in the file.")
@click.option("--targets", help="The rows that were explained, likewise.")
@click.option("--inputs", help="What to show of training rows: images, vectors or texts, as module:callable.")
@click.option("--target-inputs", help="What to show of targets, likewise.")
@click.option("--class-names", help="With commas, or as module:callable.")
@click.option("--figures/--no-figures", default=True, help="PNG files beside the page, which need matplotlib.")
@click.option(
    "--all-scores/--no-all-scores", default=True, help="Take in all scores, 4 bytes a row and target in the store."
)
@click.option("--title", help="The page's title.")
@click.option("-k", "k", type=click.IntRange(min=1), default=8, show_default=True, help="Rows shown of each target.")
@ranking_options
@json_option
def command(
    store: str,
    output_dir: Path,
    train: str | None,
    targets: str | None,
    inputs: str | None,
    target_inputs: str | None,
    class_names: str | None,
    figures: bool,
    all_scores: bool,
    title: str | None,
    k: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Write a page that shows what was found.

    STORE is a store's directory or URL, or the TOML file of its run, which also says where the rows are. Without rows
    the page has numbers and no pictures. Rows are what a data set yields: inputs first, labels last; tokens are not
    shown: give texts by --inputs. Figures need matplotlib and images Pillow: pip install 'tracin[report]'.
    """
    choice = choose(store, **options)
    settings = {**choice.settings, **{name: ref for name, ref in (("train", train), ("targets", targets)) if ref}}
    sizes = {"train": choice.reader.train_set_size, "targets": choice.num_targets}
    shown = {name: _rows(settings, name, size) for name, size in sizes.items()}
    labels = {"train": choice.train_labels(), "targets": choice.target_labels()}
    replaced = {"train": inputs, "targets": target_inputs}
    seen = {name: build(ref, name) if (ref := replaced[name]) else shown[name][0] for name in sizes}
    known = {name: shown[name][1] if labels[name] is None else labels[name] for name in sizes}
    more: dict[str, Any] = {"title": title} if title else {}
    page = choice.found.report(
        output_dir,
        inputs=seen["train"],
        labels=known["train"],
        class_names=_names(class_names),
        target_inputs=seen["targets"],
        target_labels=known["targets"],
        k=k,
        figures=figures,
        all_scores=all_scores,
        **more,
    )
    show(as_json, {"page": page}, f"Report: {page}")


def _names(class_names: str | None) -> list[str] | None:
    if class_names is None:
        return None
    if ":" in class_names:
        return list(build(class_names, "class_names"))
    return [name.strip() for name in class_names.split(",")]


def _rows(settings: Mapping[str, Any], name: str, size: int) -> tuple[Any, Any]:
    """Return inputs and labels of the rows that a setting names; None for what is not there."""
    if name not in settings:
        return None, None
    source = load_rows(settings, name)
    if len(source) != size:
        raise InputError(f"{name}: {settings[name]} has {len(source)} rows; the store has {size} {_MAY_CHANGE[name]}.")
    return displayed(source)


def displayed(source: DataSource) -> tuple[Any, Any]:
    """Return what can be shown of rows.

    Args:
        source: The rows.

    Returns:
        Inputs, an array with rows first or a list of texts, and labels, an array; None for what cannot be shown, such
        as tokens, or labels of more than one number.
    """
    inputs: list[Any] = []
    labels: list[Any] = []
    for batch, _ in source.batches(np.arange(len(source))):
        one, other = _split(batch)
        inputs.append(one)
        labels.append(other)
    return _joined(inputs, _is_shown), _joined(labels, lambda values: values.ndim == 1)


def _split(batch: Any) -> tuple[Any, Any]:
    """Return a batch's inputs and labels: the first and the last part, or those with the usual names."""
    if isinstance(batch, Mapping):
        key = next((name for name in _LABEL_KEYS if name in batch), None)
        first = next((value for name, value in batch.items() if name != key), None)
        return first, None if key is None else batch[key]
    if isinstance(batch, (list, tuple)) and len(batch) > 1:
        return batch[0], batch[-1]
    return batch, None


def _is_shown(values: np.ndarray) -> bool:
    """Tell whether inputs are images or vectors; whole numbers in rows are tokens."""
    return values.ndim > 2 or (values.ndim == 2 and values.dtype.kind == "f")


def _joined(parts: list[Any], is_usable: Any) -> Any:
    """Return the parts of all batches as one array or list, or None where they are of another kind."""
    if all(isinstance(part, (list, tuple)) and all(isinstance(text, str) for text in part) for part in parts):
        return [text for part in parts for text in part]
    arrays = [tensor_from_numpy(part) if isinstance(part, np.ndarray) else part for part in parts]
    if not all(isinstance(part, torch.Tensor) for part in arrays):
        return None
    values = [part.detach().float().numpy() if part.is_floating_point() else part.numpy() for part in arrays]
    if len({value.shape[1:] for value in values}) != 1 or not is_usable(values[0]):
        return None
    return np.concatenate(values)
