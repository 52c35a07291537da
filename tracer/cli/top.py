"""``tracer top`` and ``tracer self-influence``: the training examples at the top of a ranking."""

from __future__ import annotations

from typing import Any

import click
import numpy as np

from tracer.cli.output import format_table, print_result
from tracer.cli.stores import (
    Integers,
    RankingCommand,
    StoreView,
    check_targets,
    class_of,
    count_option,
    known_labels,
    open_view,
    texts_options,
)
from tracer.scoring.scorer import KINDS
from tracer.store.example_groups import KINDS as KINDS_OF_GROUPS
from tracer.store.example_groups import read_example_groups
from tracer.types import TopK

SHOWN_TARGETS = 10  # the number of targets printed for people if none are named


@click.command("top", cls=RankingCommand)
@click.argument("store")
@click.option("--targets", type=Integers(), help="Only these targets, such as 0,5,10-12.")
@count_option(10, "Training examples for each target.")
@click.option(
    "--kind", type=click.Choice([*KINDS, "both"]), default="proponents", show_default=True,
    help="Examples that lowered the target's loss, raised it, or both.",
)  # fmt: skip
@click.option("--train-groups", type=click.Choice(KINDS_OF_GROUPS), help="Rank documents or groups by summed scores.")
@texts_options
def top(store: str, targets: list[int] | None, k: int, kind: str, train_groups: str | None, **options: Any) -> None:
    """Show the strongest training examples of targets.

    Positive scores mark proponents: training on the example lowered the target's loss. STORE is a store's directory or
    URL, or the TOML file of its run.

    Examples:
        tracer top runs/first --targets 0,5 -k 10
        tracer top runs/first --kind opponents --estimator influence --json
    """
    texts, trust = options.pop("texts"), options.pop("trust")
    view = open_view(store, **options)
    chosen = check_targets(targets, view.target_table.num_rows)
    names = None
    if train_groups is None:
        k = min(k, view.reader.train_set_size)
    else:
        numbers, names = read_example_groups(view.reader.store, train_groups)
        k = min(k, len(np.unique(numbers)))
    found = {each: view.found.top(k, each, train_groups) for each in (KINDS if kind == "both" else (kind,))}
    shown = chosen if targets is not None else chosen[:SHOWN_TARGETS]
    target_ids = view.target_ids()
    if texts and train_groups is None:
        view = view.with_texts(trust, np.unique(np.concatenate([top.indices[shown] for top in found.values()])))
    text = _text(view, shown, found, train_groups, names)
    if len(shown) < len(chosen):
        text += f"\n\n{len(chosen) - len(shown)} more targets: choose by --targets, or use --json or export for all."
    listed = [
        {"target": target, **({} if target_ids is None else {"id": target_ids[target]})}
        | {
            each: {
                "rows": top.indices[target],
                **({} if top.ids is None else {"ids": top.ids[target]}),
                "scores": top.scores[target],
            }
            for each, top in found.items()
        }
        for target in chosen
    ]
    result = {"exp_name": view.found.exp_name, "estimator": _estimator(view, train_groups), "targets": listed}
    print_result(result, text)


@click.command("self-influence", cls=RankingCommand)
@click.argument("store")
@count_option(20, "Training examples to show.")
@click.option("--lowest", is_flag=True, help="Those of lowest self-influence instead.")
@texts_options
def self_influence(store: str, k: int, lowest: bool, **options: Any) -> None:
    """Show the training examples of highest self-influence.

    An example's influence on itself is large if its gradient stays large, for example because its label is wrong or
    because it is rare or hard. STORE is a store's directory or URL, or the TOML file of its run; targets are not
    needed. With --estimator cosine, self-influence is that of tracin.

    Examples:
        tracer self-influence runs/first -k 20
        tracer self-influence runs/first -k 100 --json | jq '.rows'
    """
    texts, trust = options.pop("texts"), options.pop("trust")
    view = open_view(store, needs_targets=False, **options)
    values = view.self_influence()
    order = np.argsort(values if lowest else -values, kind="stable")[:k]
    if texts:
        view = view.with_texts(trust, np.sort(order))
    ids = view.ids()
    named = {} if ids is None else {"ids": [ids[index] for index in order.tolist()]}
    result = {"rows": order, **named, "self_influence": values[order], "train_rows": len(values), "mean": values.mean()}
    print_result(result, view.ranking_table("self-influence", order.tolist(), values[order].tolist()))


def _text(
    view: StoreView, targets: list[int], found: dict[str, TopK], train_groups: str | None, names: list[str] | None
) -> str:
    labels, ids, parts = known_labels(view.target_table), view.target_ids(), []
    texts = view.texts(targets, 1)
    for target in targets:
        label = class_of(labels, target)
        of_class = "" if label is None else f" (class {label})"
        for kind, top in found.items():
            ranked = top.indices[target], top.scores[target]
            table = (
                view.ranking_table("score", *ranked)
                if train_groups is None
                else _of_groups(train_groups, names, *ranked)
            )
            name = "" if ids is None else f" {ids[target]}"
            estimator = _estimator(view, train_groups)
            title = f"target {target}{name}{of_class}: {kind} by {estimator}"
            parts.append("\n".join([title, *([texts[target]] if target in texts else []), table]))
    return "\n\n".join(parts)


def _estimator(view: StoreView, train_groups: str | None) -> str:
    return view.found.estimators.top if train_groups is None else view.found.estimators.scores


def _of_groups(kind: str, names: list[str] | None, numbers: np.ndarray, scores: np.ndarray) -> str:
    rows = [
        (rank, number if names is None else names[number], score)
        for rank, (number, score) in enumerate(zip(numbers.tolist(), scores.tolist(), strict=True), 1)
    ]
    return format_table(("rank", "score", kind), [(rank, score, name) for rank, name, score in rows])
