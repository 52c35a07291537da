"""``tracer top``: the strongest training rows of targets."""

from __future__ import annotations

from typing import Any

import click

from tracer.cli.help import TaughtCommand
from tracer.cli.output import json_option, show, table
from tracer.cli.stores import Choice, Integers, check_targets, choose, label_of, ranking_options
from tracer.scoring.scorer import KINDS
from tracer.types import TopK

SHOWN_TARGETS = 10
"""How many targets are printed for people where none are named."""


EXAMPLES = r"""
tracer top runs/first --targets 0,5 -k 10
tracer top runs/first --kind opponents --estimator influence --json
"""


@click.command("top", cls=TaughtCommand, examples=EXAMPLES)
@click.argument("store")
@click.option("--targets", type=Integers(), help="These targets, such as 0,5,10-12; else all.")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="Rows for each target.")
@click.option("--kind", type=click.Choice([*KINDS, "both"]), default="proponents", show_default=True)
@ranking_options
@json_option
def command(store: str, targets: list[int] | None, k: int, kind: str, as_json: bool, **options: Any) -> None:
    """Show the strongest training rows of targets.

    Positive scores are proponents: training on the row lowered the target's loss. STORE is a store's directory or
    URL, or the TOML file of its run.
    """
    choice = choose(store, **options)
    chosen = check_targets(targets, choice.num_targets)
    k = min(k, choice.reader.train_set_size)
    found = {each: choice.found.top(k, each) for each in (KINDS if kind == "both" else (kind,))}
    shown = chosen if targets is not None or as_json else chosen[:SHOWN_TARGETS]
    text = _text(choice, shown, found)
    if len(shown) < len(chosen):
        text += f"\n\n{len(chosen) - len(shown)} more targets: choose by --targets, or see all by --json or export."
    show(as_json, _as_dict(choice, chosen, found), text)


def _as_dict(choice: Choice, targets: list[int], found: dict[str, TopK]) -> dict[str, Any]:
    listed = [
        {
            "target": target,
            **{
                kind: {"rows": top.indices[target], "scores": [float(score) for score in top.scores[target]]}
                for kind, top in found.items()
            },
        }
        for target in targets
    ]
    return {"exp_name": choice.found.exp_name, "estimator": choice.found.estimator, "targets": listed}


def _text(choice: Choice, targets: list[int], found: dict[str, TopK]) -> str:
    train_labels, target_labels = choice.train_labels(), choice.target_labels()
    parts = []
    for target in targets:
        for kind, top in found.items():
            label = label_of(target_labels, target)
            heading = f"target {target}" + ("" if label is None else f" (class {label})") + f": {kind}"
            headers = ["rank", "row", "score", *([] if train_labels is None else ["class"])]
            rows = [
                [rank, row, score, *([] if train_labels is None else [label_of(train_labels, row)])]
                for rank, (row, score) in enumerate(zip(top.indices[target], top.scores[target], strict=True), 1)
            ]
            parts.append(f"{heading}\n{table(headers, rows)}")
    return "\n\n".join(parts)
