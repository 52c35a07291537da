"""``tracer compare``: the similarity of the rankings of two runs or two estimators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import numpy as np
from jaxtyping import Float

from tracer.cli.help import ExampleCommand
from tracer.cli.output import json_option, print_result
from tracer.cli.settings import BY_NAME
from tracer.cli.stores import Integers, StoreView, count_option, open_view, ranking_options
from tracer.cli.writers import matrix_blocks
from tracer.errors import MismatchError
from tracer.metrics.ranks import rank_correlation
from tracer.scoring.scorer import KINDS

EXAMPLES = """
tracer compare runs/seed0 runs/seed1                      two training runs on the same examples
tracer compare runs/k1024 runs/k4096 -k 20                two projections
tracer compare runs/first runs/first --estimator tracin --estimator-b influence
"""
_BLOCK_SCORES = 1 << 22
"""Scores of a block of targets, of each side."""


@click.command("compare", cls=ExampleCommand, examples=EXAMPLES)
@click.argument("a")
@click.argument("b")
@count_option(10, "Size of the compared tops.")
@click.option("--estimator-b", type=click.Choice(BY_NAME["estimator"].choices), help="Estimator of B. Default: A's.")
@click.option("--exp-name-b", help="The targets' name in B. Default: A's.")
@click.option("--model-ids-b", type=Integers(), help="Only these checkpoints of B. Default: A's.")
@ranking_options
@json_option
def command(
    a: str,
    b: str,
    k: int,
    estimator_b: str | None,
    exp_name_b: str | None,
    model_ids_b: list[int] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Compare the rankings of two runs, or of two estimators.

    A and B are stores with the same training examples and the same targets, or one store twice. For each target:
    Spearman's rank correlation of all scores, and the share of the k strongest examples that both have; over the
    training examples: the rank correlation of self-influence. Scores that are not yet in the stores are computed first.
    """
    first = open_view(a, **options)
    of_b = {"estimator": estimator_b, "exp_name": exp_name_b, "model_ids": model_ids_b}
    second = open_view(b, **{**options, **{name: value for name, value in of_b.items() if value is not None}})
    check_alike(first, second)
    found = compare(first, second, k)
    sides = {name: _side(view) for name, view in (("a", first), ("b", second))}
    print_result(as_json, {**sides, **found}, _text(sides, found))


def check_alike(first: StoreView, second: StoreView) -> None:
    """Raise `MismatchError` unless both sides have the same training examples and targets."""
    advice = "; rankings can be compared over the same examples only."
    tables = {
        "training examples": (first.train_table, second.train_table),
        "targets": (first.target_table, second.target_table),
    }
    for what, (one, other) in tables.items():
        if one.num_rows != other.num_rows:
            raise MismatchError(f"A has {one.num_rows} {what} and B has {other.num_rows}{advice}")
    if not all(view.reader.store.manifest.settings.get("check_rows") for view in (first, second)):
        return  # a store without fingerprints has zeros there
    for what, (one, other) in tables.items():
        differing = np.flatnonzero(one.column("fingerprint") != other.column("fingerprint"))
        if len(differing):
            raise MismatchError(
                f"{len(differing)} of {one.num_rows} {what} have other inputs in B than in A, first "
                f"{differing[:5].tolist()}{advice}"
            )


def compare(first: StoreView, second: StoreView, k: int) -> dict[str, Any]:
    """Return ``spearman`` and the overlap of both kinds of tops, ``[M]`` each, and that of self-influence."""
    k = min(k, first.reader.train_set_size)
    spearman = np.concatenate([rank_correlation(one, other) for one, other in _target_blocks(first, second)])
    overlaps = {}
    for kind in KINDS:
        tops = [view.found.top(k, kind).indices for view in (first, second)]
        shared = [len(np.intersect1d(one, other)) for one, other in zip(*tops, strict=True)]
        overlaps[f"overlap_{kind}"] = np.asarray(shared) / k
    own = [view.self_influence()[:, None] for view in (first, second)]
    correlation = float(rank_correlation(own[0], own[1])[0])
    return {"k": k, "spearman": spearman, **overlaps, "self_influence_spearman": correlation}


def _target_blocks(
    first: StoreView, second: StoreView
) -> Iterator[tuple[Float[np.ndarray, "N m"], Float[np.ndarray, "N m"]]]:
    """Yield both sides' scores of one block of targets after another."""
    scores = [view.found.scores for view in (first, second)]
    num_train, num_targets = scores[0].shape
    step = max(1, _BLOCK_SCORES // num_train)
    for start in range(0, num_targets, step):
        one, other = (_columns(each, start, min(start + step, num_targets)) for each in scores)
        yield one, other


def _columns(scores: Any, start: int, stop: int) -> Float[np.ndarray, "N m"]:
    found = np.empty((scores.shape[0], stop - start))
    # A matrix of several files is read as whole rows, so columns are cut from blocks of rows.
    for first, block in matrix_blocks(scores, max(1, _BLOCK_SCORES // scores.shape[1])):
        found[first : first + len(block)] = block[:, start:stop]
    return found


def _side(view: StoreView) -> dict[str, Any]:
    found = view.found
    return {"path": view.reader.store.path, "exp_name": found.exp_name, "estimator": found.estimator}


def _text(sides: dict[str, dict[str, Any]], found: dict[str, Any]) -> str:
    spearman = found["spearman"][np.isfinite(found["spearman"])]
    k, constant = found["k"], len(found["spearman"]) - len(spearman)
    lines = [
        *(
            f"{name.upper()}  {each['path']}, targets {each['exp_name']!r}, {each['estimator']}"
            for name, each in sides.items()
        ),
        "",
        f"{'over targets':<34}{'mean':>8}{'median':>8}{'lowest':>8}",
        _line("rank correlation of scores", spearman),
        _line(f"share of the top {k} proponents", found["overlap_proponents"]),
        _line(f"share of the top {k} opponents", found["overlap_opponents"]),
        f"{'rank correlation of self-influence':<34}{found['self_influence_spearman']:>8.3f}",
    ]
    if constant:
        lines.append(f"{constant} targets have no rank correlation: on one side all their scores are equal.")
    return "\n".join(lines)


def _line(name: str, values: np.ndarray) -> str:
    if not len(values):
        return f"{name:<34}{'-':>8}{'-':>8}{'-':>8}"
    return f"{name:<34}{values.mean():>8.3f}{np.median(values):>8.3f}{values.min():>8.3f}"
