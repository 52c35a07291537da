"""``tracer compare``: how alike the rankings of two runs, or of two estimators, are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click
import numpy as np

from tracer.cli.help import TaughtCommand
from tracer.cli.output import json_option, show
from tracer.cli.settings import BY_NAME
from tracer.cli.stores import Choice, Integers, choose, ranking_options
from tracer.errors import MismatchError
from tracer.metrics.ranks import rank_correlation
from tracer.scoring.scorer import KINDS

EXAMPLES = """
tracer compare runs/seed0 runs/seed1                      two training runs on the same rows
tracer compare runs/k1024 runs/k4096 -k 20                two projections
tracer compare runs/first runs/first --estimator tracin --estimator-b influence
"""
_BLOCK_SCORES = 1 << 22
"""Scores of a block of targets, of each side."""


@click.command("compare", cls=TaughtCommand, examples=EXAMPLES)
@click.argument("a")
@click.argument("b")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="Rows of the tops compared.")
@click.option("--estimator-b", type=click.Choice(BY_NAME["estimator"].choices), help="Of B; else the same.")
@click.option("--exp-name-b", help="The targets' name in B; else the same.")
@click.option("--model-ids-b", type=Integers(), help="Only these checkpoints of B; else as of A.")
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

    A and B are stores with the same training rows and the same targets, or one store twice. For each target: Spearman's
    rank correlation of all scores, and the share of the k strongest rows that both have; over the training rows: the
    rank correlation of self-influence. Scores that are not in the stores yet are computed first.
    """
    first = choose(a, **options)
    others = {"estimator": estimator_b, "exp_name": exp_name_b, "model_ids": model_ids_b}
    second = choose(b, **{**options, **{name: value for name, value in others.items() if value is not None}})
    check_alike(first, second)
    found = compare(first, second, k)
    show(as_json, {"a": _side(first), "b": _side(second), **found}, _text(first, second, found))


def check_alike(first: Choice, second: Choice) -> None:
    """Check that two choices are of the same training rows and targets.

    Args:
        first: One side.
        second: The other.

    Raises:
        MismatchError: Their numbers differ, or rows have other inputs.
    """
    sizes = [(each.reader.train_set_size, each.num_targets) for each in (first, second)]
    for what, one, other in zip(("training rows", "targets"), *sizes, strict=True):
        if one != other:
            raise MismatchError(
                f"A has {one} {what} and B has {other}; rankings can be compared over the same rows only."
            )
    if not all(each.reader.store.manifest.settings.get("check_rows") for each in (first, second)):
        return
    for what in ("training rows", "targets"):
        prints = [_fingerprints(each, what) for each in (first, second)]
        other_rows = np.flatnonzero(prints[0] != prints[1])
        if len(other_rows):
            raise MismatchError(
                f"{len(other_rows)} of {len(prints[0])} {what} have other inputs in B than in A, first "
                f"{other_rows[:5].tolist()}; rankings can be compared over the same rows only."
            )


def compare(first: Choice, second: Choice, k: int) -> dict[str, Any]:
    """Return how alike two rankings are.

    Args:
        first: One side.
        second: The other.
        k: Rows of the tops compared.

    Returns:
        ``spearman``, ``overlap_proponents``, ``overlap_opponents``, ``[M]`` each; ``self_influence_spearman``; ``k``.
    """
    k = min(k, first.reader.train_set_size)
    spearman = np.concatenate([rank_correlation(one, other) for one, other in _target_blocks(first, second)])
    overlaps = {}
    for kind in KINDS:
        tops = [each.found.top(k, kind).indices for each in (first, second)]
        shared = [len(np.intersect1d(one, other)) for one, other in zip(*tops, strict=True)]
        overlaps[f"overlap_{kind}"] = np.asarray(shared) / k
    own = [each.self_influence()[:, None] for each in (first, second)]
    return {
        "k": k,
        "spearman": spearman,
        **overlaps,
        "self_influence_spearman": float(rank_correlation(own[0], own[1])[0]),
    }


def _target_blocks(first: Choice, second: Choice) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the scores of some targets after others, ``[N, m]`` of both sides."""
    scores = [each.found.scores for each in (first, second)]
    num_rows, num_targets = scores[0].shape
    step = max(1, _BLOCK_SCORES // num_rows)
    for start in range(0, num_targets, step):
        one, other = (_columns(each, start, min(start + step, num_targets)) for each in scores)
        yield one, other


def _columns(scores: Any, start: int, stop: int) -> np.ndarray:
    """Return the scores of some targets, read by rows, since a matrix in several files is read as whole rows."""
    num_rows = scores.shape[0]
    found, step = np.empty((num_rows, stop - start)), max(1, _BLOCK_SCORES // scores.shape[1])
    for first in range(0, num_rows, step):
        found[first : first + step] = np.asarray(scores[first : first + step])[:, start:stop]
    return found


def _fingerprints(choice: Choice, what: str) -> np.ndarray:
    store = choice.reader.store
    rows = (
        store.checkpoint(choice.first_id)
        if what == "training rows"
        else store.targets(choice.found.exp_name, choice.first_id)
    )
    return rows.column("fingerprint")


def _side(choice: Choice) -> dict[str, Any]:
    found = choice.found
    return {"path": choice.reader.store.path, "exp_name": found.exp_name, "estimator": found.estimator}


def _text(first: Choice, second: Choice, found: dict[str, Any]) -> str:
    sides = [
        f"{name}  {each['path']}, targets {each['exp_name']!r}, {each['estimator']}"
        for name, each in (("A", _side(first)), ("B", _side(second)))
    ]
    spearman = found["spearman"][np.isfinite(found["spearman"])]
    k, constant = found["k"], len(found["spearman"]) - len(spearman)
    lines = [
        *sides,
        "",
        f"{'over targets':<34}{'mean':>8}{'median':>8}{'lowest':>8}",
        _line("rank correlation of scores", spearman),
        _line(f"share of the top {k} proponents", found["overlap_proponents"]),
        _line(f"share of the top {k} opponents", found["overlap_opponents"]),
        f"{'rank correlation of self-influence':<34}{found['self_influence_spearman']:>8.3f}",
    ]
    if constant:
        lines.append(f"{constant} targets have equal scores of all rows on one side and no rank correlation.")
    return "\n".join(lines)


def _line(name: str, values: np.ndarray) -> str:
    if not len(values):
        return f"{name:<34}{'-':>8}{'-':>8}{'-':>8}"
    return f"{name:<34}{values.mean():>8.3f}{np.median(values):>8.3f}{values.min():>8.3f}"
