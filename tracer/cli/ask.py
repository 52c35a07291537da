"""``tracer ask``: the training documents behind an answer of a language model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from tracer.api.language import load_store
from tracer.cli.output import ResultCommand, print_result
from tracer.cli.settings import read_settings, setting_option
from tracer.cli.stores import TRUST, Integers, find_store, hide_loading, trusted_folders
from tracer.errors import InputError
from tracer.scoring.scorer import KINDS


class AskCommand(ResultCommand):
    """A command with the options of the estimator, and those for what a store does not know."""

    shared = (
        *(setting_option(name) for name in ("estimator", "target", "regularization")),
        click.Option(["--model-ids"], type=Integers(), help="Only these checkpoints, such as 0,2 or 0-3."),
        click.Option(["--model"], help="The model, if the store does not know it or it has moved."),
        click.Option(["--data"], help="The training data, if the store does not know them."),
        click.Option(["--tokenizer"], help="The tokenizer, if the store does not know it."),
        click.Option(["--checkpoints"], multiple=True, help="The path of each checkpoint, if they have moved."),
        click.Option(["--trust"], **TRUST),
        click.Option(["--device"], help="Device to compute on. Default: cuda if there is one."),
    )


@click.command("ask", cls=AskCommand)
@click.argument("store")
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--completion", multiple=True, help="The completion of each prompt. Default: generated ones.")
@click.option("--rather-than", multiple=True, help="Another completion of each prompt, whose score is subtracted.")
@click.option("-k", "--top", "k", type=click.IntRange(min=1), default=5, show_default=True, help="Documents to show.")
@click.option(
    "--kind", type=click.Choice(KINDS), default="proponents", show_default=True,
    help="Documents that made the completion likelier, or less likely.",
)  # fmt: skip
@click.option(
    "--exact", type=click.IntRange(min=0), default=0, show_default=True,
    help="Rank this many documents again by exact gradients.",
)  # fmt: skip
@click.option(
    "--candidates", type=click.IntRange(min=0), default=0, show_default=True,
    help="Rank this many examples, found by the index of `tracer index`; 0: all.",
)  # fmt: skip
@click.option("--tokens/--no-tokens", default=True, help="Split scores over tokens. Default: yes.")
@click.option(
    "--max-new-tokens", type=click.IntRange(min=1), help="Most generated tokens. Default: 64, or what fits the model."
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Of sampling; 0 takes the likeliest tokens.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of sampling.")
def ask(store: str, prompts: tuple[str, ...], k: int, **options: Any) -> None:
    r"""Show the training documents behind a language model's answer.

    STORE is the directory or URL of a store of `tracer build`, or its TOML file. With several prompts, the mean of
    their scores is shown. Brackets mark the tokens that carry the score. Completions follow prompts as they are: write
    the space in between.

    Examples:
        tracer ask store "Who wrote Faust?"
        tracer ask store "The capital of France is" --completion " Paris" --rather-than " Rome" --estimator cosine
        tracer ask store "Who wrote Faust?" --exact 1000 -k 10 --json
        tracer ask store "Who wrote Faust?" --candidates 1000      after tracer index store
    """
    save_dir, in_file = find_store(store)
    given = {name: options.pop(name) for name in ("estimator", "target", "regularization")}
    chosen = {**in_file, **read_settings(None, given)}
    folders = trusted_folders(save_dir, options.pop("trust"))
    names = ("model", "data", "tokenizer", "device")
    loaded = {name: value for name in names if (value := options.pop(name)) is not None}
    checkpoints = options.pop("checkpoints") or None
    hide_loading()
    found = load_store(save_dir, folders=folders, checkpoints=checkpoints, progress=False, **loaded)
    ranking = {name: chosen[name] for name in ("estimator", "target", "regularization") if name in chosen}
    found = replace(found, model_ids=options.pop("model_ids"), **ranking)
    completion, other = (_texts(options.pop(name), len(prompts), name) for name in ("completion", "rather_than"))
    answer = found.explain(list(prompts), completion, rather_than=other, k=k, **options)
    print_result(answer.to_dict(), str(answer))


def _texts(given: tuple[str, ...], count: int, name: str) -> list[str] | None:
    if given and len(given) != count:
        flag = "--" + name.replace("_", "-")
        raise InputError(f"{flag} came {len(given)} times for {count} prompts; give one for each.")
    return list(given) or None
