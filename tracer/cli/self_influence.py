"""``tracer self-influence``: the rows whose labels are worth a look."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from tracer.cli.help import TaughtCommand
from tracer.cli.output import json_option, show, table
from tracer.cli.stores import choose, label_of, ranking_options

EXAMPLES = r"""
tracer self-influence runs/first -k 20
tracer self-influence runs/first -k 100 --json | jq '.rows'
"""


@click.command("self-influence", cls=TaughtCommand, examples=EXAMPLES)
@click.argument("store")
@click.option("-k", "k", type=click.IntRange(min=1), default=20, show_default=True, help="How many rows.")
@click.option("--lowest", is_flag=True, help="Those of lowest self-influence instead.")
@ranking_options
@json_option
def command(store: str, k: int, lowest: bool, as_json: bool, **options: Any) -> None:
    """Show the training rows of highest self-influence.

    A row's influence on itself is large where its gradient stays large: wrong labels, and rare or hard rows. STORE is
    a store's directory or URL, or the TOML file of its run; targets are not needed. With cosine it is that of tracin.
    """
    choice = choose(store, needs_targets=False, **options)
    values = choice.self_influence()
    order = np.argsort(values if lowest else -values, kind="stable")[:k]
    labels = choice.train_labels()
    headers = ["rank", "row", "self-influence", *([] if labels is None else ["class"])]
    rows = [
        [rank, row, values[row], *([] if labels is None else [label_of(labels, row)])]
        for rank, row in enumerate(order, 1)
    ]
    summary = {"rows": order, "self_influence": values[order], "train_rows": len(values), "mean": values.mean()}
    show(as_json, summary, table(headers, rows))
