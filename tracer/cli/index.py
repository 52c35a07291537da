"""``tracer index``: an index of training examples for approximate search."""

from __future__ import annotations

import click

from tracer.api.questions import Estimators
from tracer.api.tracer import Tracer
from tracer.cli.output import ResultCommand, print_result
from tracer.cli.settings import read_settings, setting_option
from tracer.cli.stores import Integers, find_store
from tracer.scoring.search_index import DIMS


class IndexCommand(ResultCommand):
    """A command with the option of the estimator."""

    shared = (setting_option("estimator"),)


@click.command("index", cls=IndexCommand)
@click.argument("store")
@click.option("--model-ids", type=Integers(), help="Only these checkpoints, such as 0,2 or 0-3. Default: all.")
@click.option("--dims", type=click.IntRange(min=1), default=DIMS, show_default=True, help="Bytes of each example.")
def index(store: str, estimator: str | None, model_ids: list[int] | None, dims: int) -> None:
    """Store an index of training examples, for approximate questions.

    STORE is a store's directory or URL, or its TOML file. The index is of the examples as they are now: build it again
    after some were replaced or added.

    Examples:
        tracer index store
        tracer ask store "Who wrote Faust?" --candidates 1000
    """
    save_dir, in_file = find_store(store)
    given = {**in_file, **read_settings(None, {"estimator": estimator})}.get("estimator")
    with Tracer.open(save_dir) as reader:
        chosen = Estimators.of(given, reader.store.manifest).top
        reader.build_index(chosen, model_ids, dims=dims)
        result = {"path": str(save_dir), "estimator": chosen, "examples": reader.train_set_size, "dims": dims}
    print_result(result, f"Stored the index of {result['examples']:,} training examples for estimator {chosen}.")
