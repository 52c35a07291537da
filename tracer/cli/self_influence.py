"""``tracer self-influence``: training examples whose labels are worth checking."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from tracer.cli.help import ExampleCommand
from tracer.cli.output import json_option, print_result
from tracer.cli.stores import count_option, open_view, ranking_options

EXAMPLES = r"""
tracer self-influence runs/first -k 20
tracer self-influence runs/first -k 100 --json | jq '.rows'
"""


@click.command("self-influence", cls=ExampleCommand, examples=EXAMPLES)
@click.argument("store")
@count_option(20, "Training examples to show.")
@click.option("--lowest", is_flag=True, help="Those of lowest self-influence instead.")
@ranking_options
@json_option
def command(store: str, k: int, lowest: bool, as_json: bool, **options: Any) -> None:
    """Show the training examples of highest self-influence.

    An example's influence on itself is large if its gradient stays large, for example because its label is wrong or
    because it is rare or hard. STORE is a store's directory or URL, or the TOML file of its run; targets are not
    needed. With --estimator cosine, self-influence is that of tracin.
    """
    view = open_view(store, needs_targets=False, **options)
    values = view.self_influence()
    order = np.argsort(values if lowest else -values, kind="stable")[:k]
    result = {"rows": order, "self_influence": values[order], "train_rows": len(values), "mean": values.mean()}
    print_result(as_json, result, view.ranking_table("self-influence", order.tolist(), values[order].tolist()))
