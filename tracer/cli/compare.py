"""``tracer compare``: the similarity of the rankings of two runs or two estimators."""

from __future__ import annotations

from typing import Any

import click
import numpy as np
from jaxtyping import Float

from tracer.cli.output import print_result
from tracer.cli.settings import BY_NAME
from tracer.cli.stores import Integers, RankingCommand, StoreView, count_option, open_view
from tracer.errors import MismatchError
from tracer.metrics.ranks import rank_correlation
from tracer.report.summaries import matrix_blocks
from tracer.scoring.scorer import KINDS

_BLOCK_SCORES = 1 << 22  # scores of a block of targets, of each side


@click.command("compare", cls=RankingCommand)
@click.argument("a")
@click.argument("b")
@count_option(10, "Size of the compared tops.")
@click.option("--estimator-b", type=click.Choice(BY_NAME["estimator"].choices), help="Estimator of B. Default: A's.")
@click.option("--exp-name-b", help="The targets' name in B. Default: A's.")
@click.option("--model-ids-b", type=Integers(), help="Only these checkpoints of B. Default: A's.")
def compare(a: str, b: str, k: int, **options: Any) -> None:
    """Compare the rankings of two runs, or of two estimators.

    A and B are stores with the same training examples and the same targets, or one store twice. For each target:
    Spearman's rank correlation of all scores, and the share of the k strongest examples that both have; over the
    training examples: the rank correlation of self-influence. Scores that are not yet in the stores are computed first.

    Examples:
        tracer compare runs/seed0 runs/seed1                      two training runs on the same examples
        tracer compare runs/k1024 runs/k4096 -k 20                two projections
        tracer compare runs/first runs/first --estimator tracin --estimator-b influence
    """
    of_b = {name: options.pop(f"{name}_b") for name in ("estimator", "exp_name", "model_ids")}
    first = open_view(a, **options)
    second = open_view(b, **{**options, **{name: value for name, value in of_b.items() if value is not None}})
    _check_alike(first, second)
    found = _similarity(first, second, k)
    sides = {
        name: {"path": view.reader.store.path, "exp_name": view.found.exp_name, "estimator": str(view.found.estimators)}
        for name, view in (("a", first), ("b", second))
    }
    print_result({**sides, **found}, _text(sides, found))


def _check_alike(first: StoreView, second: StoreView) -> None:
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


def _similarity(first: StoreView, second: StoreView, k: int) -> dict[str, Any]:
    """Return ``spearman`` and the overlap of both kinds of tops, ``[M]`` each, and that of self-influence."""
    k = min(k, first.reader.train_set_size)
    scores, own = first.found.scores, [view.self_influence()[:, None] for view in (first, second)]
    step = max(1, _BLOCK_SCORES // scores.shape[0])
    correlations = [
        rank_correlation(*(_columns(view.found.scores, start, step) for view in (first, second)))
        for start in range(0, scores.shape[1], step)
    ]
    found: dict[str, Any] = {"k": k, "spearman": np.concatenate(correlations)}
    for kind in KINDS:
        tops = [view.found.top(k, kind).indices for view in (first, second)]
        shared = [len(np.intersect1d(one, other)) for one, other in zip(*tops, strict=True)]
        found[f"overlap_{kind}"] = np.asarray(shared) / k
    return {**found, "self_influence_spearman": float(rank_correlation(*own)[0])}


def _columns(scores: Any, start: int, count: int) -> Float[np.ndarray, "N m"]:
    # A matrix of several files is read as whole rows, so columns are cut from blocks of rows.
    blocks = matrix_blocks(scores, _BLOCK_SCORES)
    return np.concatenate([block[:, start : start + count].astype(np.float64) for _, block in blocks])


def _text(sides: dict[str, dict[str, Any]], found: dict[str, Any]) -> str:
    spearman = found["spearman"][np.isfinite(found["spearman"])]
    k, constant = found["k"], len(found["spearman"]) - len(spearman)
    lines = [
        f"{name.upper()}  {each['path']}, targets {each['exp_name']!r}, {each['estimator']}"
        for name, each in sides.items()
    ]
    lines += ["", f"{'over targets':<34}{'mean':>8}{'median':>8}{'lowest':>8}"]
    columns = {
        "rank correlation of scores": spearman,
        f"share of the top {k} proponents": found["overlap_proponents"],
        f"share of the top {k} opponents": found["overlap_opponents"],
    }
    for name, values in columns.items():
        shown = (values.mean(), np.median(values), values.min()) if len(values) else ()
        lines.append(f"{name:<34}" + ("".join(f"{value:>8.3f}" for value in shown) or 3 * f"{'-':>8}"))
    lines.append(f"{'rank correlation of self-influence':<34}{found['self_influence_spearman']:>8.3f}")
    if constant:
        lines.append(f"{constant} targets have no rank correlation: on one side all their scores are equal.")
    return "\n".join(lines)
