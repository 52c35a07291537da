"""``tracer report``: an HTML page from a store and the examples behind it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from tracer.cli.job import build, load_examples
from tracer.cli.output import print_result
from tracer.cli.stores import (
    TRUST,
    RankingCommand,
    count_option,
    known_labels,
    open_view,
)
from tracer.data.displayable import displayable
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
@click.option("--class-names", help="Separated by commas, or as module:callable.")
@click.option("--figures/--no-figures", default=True, help="Also write PNG files, which need matplotlib.")
@click.option("--all-scores/--no-all-scores", default=True, help="Use all scores, which take 4 bytes for each pair.")
@click.option("--title", help="The page's title.")
@click.option("--trust", **TRUST)
@count_option(8, "Training examples shown for each target.")
def report(store: str, output_dir: Path, class_names: str | None, **options: Any) -> None:
    """Write an HTML page with the results.

    STORE is a store's directory or URL, or the TOML file of its run, which also names the examples. Without examples
    the page has numbers and no pictures; a store of `tracer build` knows its texts. The first item of an example is
    shown as its input, the last one as its label. If inputs are tokens, pass the texts by --inputs. Figures need
    matplotlib and images Pillow: pip install 'tracin[report]'.

    Examples:
        tracer report tracer.toml --output-dir report             examples as in the file of the run
        tracer report runs/first --output-dir report --train training:train_set --targets training:test_set
        tracer report runs/first --output-dir report --inputs training:train_texts --class-names negative,positive
    """
    given = {name: options.pop(name) for name in ("train", "targets", "inputs", "target_inputs")}
    shown = {name: options.pop(name) for name in ("k", "figures", "all_scores", "title")}
    trust = options.pop("trust")
    view = open_view(store, **options)
    if not any(given.values()):
        view = view.with_texts(trust)
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
    setting = {"train": "inputs", "targets": "target_inputs"}[name]
    return build(inputs, setting) if inputs else shown[0], shown[1] if labels is None else labels
