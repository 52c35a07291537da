"""``tracer export``: scores, top examples and summaries as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from tracer.cli.help import ExampleCommand
from tracer.cli.output import json_option, print_result
from tracer.cli.stores import Integers, StoreView, check_targets, count_option, open_view, ranking_options
from tracer.cli.writers import Columns, matrix_blocks, write_csv, write_matrix, write_parquet
from tracer.errors import InputError
from tracer.scoring.scorer import KINDS
from tracer.store.table_schema import NO_LABEL

EXAMPLES = """
tracer export runs/first scores.parquet                   one line a pair: train_row, target, score
tracer export runs/first scores.npy                       the matrix [training examples, targets]
tracer export runs/first top.csv --what top -k 20         proponents and opponents of each target
tracer export runs/first rows.csv --what rows             each training example: self-influence, mean score
tracer export runs/first targets.csv --what targets       each target: mean score
"""
_BLOCK_SCORES = 1 << 20
"""Scores of a block: the most in memory at a time, apart from summaries."""
_SUFFIXES = (".csv", ".parquet", ".npy")


@click.command("export", cls=ExampleCommand, examples=EXAMPLES)
@click.argument("store")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--what", type=click.Choice(["scores", "top", "rows", "targets"]), default="scores", show_default=True,
    help="All pairs, the strongest training examples, or a summary of training examples or targets.",
)  # fmt: skip
@click.option("--targets", type=Integers(), help="Only these targets, such as 0,5,10-12 (scores and top).")
@count_option(10, "Training examples for each target (top).")
@ranking_options
@json_option
def command(store: str, out: Path, what: str, targets: list[int] | None, k: int, as_json: bool, **options: Any) -> None:
    """Write scores, top examples or summaries as CSV, Parquet or a numpy matrix.

    OUT's ending decides the format: .csv, .parquet (needs pyarrow) or .npy (scores only). An existing file is replaced
    when the new one is complete. Pairs are never all in memory at once; scores that are not yet in the store are
    computed and stored first. With --estimator cosine, self-influence is that of tracin, in the column
    self_influence_tracin, since each example's cosine with itself is 1.
    """
    suffix = _check_suffix(out, what, targets)
    view = open_view(store, **options)
    if suffix == ".npy":
        scores = view.found.scores
        num_lines = write_matrix(out, scores, _block_rows(scores))
    else:
        chosen = check_targets(targets, view.num_targets)
        if what == "scores":
            blocks = score_blocks(view.found.scores, chosen)
        elif what == "top":
            blocks = _top_blocks(view, chosen, k)
        else:
            blocks = iter([_train_summary(view) if what == "rows" else _target_summary(view)])
        num_lines = (write_csv if suffix == ".csv" else write_parquet)(out, blocks)
    result = {"path": out, "what": what, "rows": num_lines, "bytes": out.stat().st_size}
    print_result(as_json, result, f"{out}: {num_lines:,} rows")


def _check_suffix(out: Path, what: str, targets: list[int] | None) -> str:
    """Return the ending, which decides the format; refuse what does not fit together."""
    suffix = out.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"{out} ends with {out.suffix!r}; expected one of {', '.join(_SUFFIXES)}.")
    if not out.parent.is_dir():
        raise InputError(f"{out} cannot be written: there is no directory {out.parent}; create it first.")
    if suffix == ".npy" and (what != "scores" or targets is not None):
        raise InputError("A .npy file is the matrix of all scores; for anything else write .csv or .parquet.")
    if targets is not None and what in ("rows", "targets"):
        raise InputError(f"got --targets with --what {what}, which covers all targets; leave --targets out.")
    return suffix


def score_blocks(scores: Any, targets: list[int]) -> Iterator[Columns]:
    """Yield pairs of scores ``[N, M]`` in long form, all targets of one training example after another."""
    columns = np.asarray(targets, dtype=np.int64)
    everything = len(targets) == scores.shape[1]
    for start, block in matrix_blocks(scores, _block_rows(scores)):
        rows = np.arange(start, start + len(block))
        yield {
            "train_row": np.repeat(rows, len(columns)),
            "target": np.tile(columns, len(rows)),
            "score": (block if everything else block[:, columns]).ravel(),
        }


def _top_blocks(view: StoreView, targets: list[int], k: int) -> Iterator[Columns]:
    """Yield the proponents of all targets, then the opponents."""
    k = min(k, view.reader.train_set_size)
    columns = np.asarray(targets, dtype=np.int64)
    for kind in KINDS:
        top = view.found.top(k, kind)
        yield {
            "kind": np.full(len(columns) * k, kind),
            "target": np.repeat(columns, k),
            "rank": np.tile(np.arange(1, k + 1), len(columns)),
            "train_row": top.indices[columns].ravel(),
            "score": top.scores[columns].ravel(),
        }


def _train_summary(view: StoreView) -> Columns:
    scores = view.found.scores
    mean, absolute = np.zeros(scores.shape[0]), np.zeros(scores.shape[0])
    for start, block in matrix_blocks(scores, _block_rows(scores)):
        values = block.astype(np.float64)
        mean[start : start + len(block)] = values.mean(axis=1)
        absolute[start : start + len(block)] = np.abs(values).mean(axis=1)
    return {
        "train_row": np.arange(scores.shape[0]),
        **_label_column(view.train_labels),
        "self_influence" + ("_tracin" if view.found.estimator == "cosine" else ""): view.self_influence(),
        "mean_score": mean,
        "mean_absolute_score": absolute,
    }


def _target_summary(view: StoreView) -> Columns:
    scores = view.found.scores
    total, absolute = np.zeros(scores.shape[1]), np.zeros(scores.shape[1])
    for _, block in matrix_blocks(scores, _block_rows(scores)):
        values = block.astype(np.float64)
        total += values.sum(axis=0)
        absolute += np.abs(values).sum(axis=0)
    return {
        "target": np.arange(scores.shape[1]),
        **_label_column(view.target_labels),
        "mean_score": total / scores.shape[0],
        "mean_absolute_score": absolute / scores.shape[0],
    }


def _label_column(labels: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the classes as a column; none if an example has no class, since integers have no missing value."""
    return {} if labels is None or (labels == NO_LABEL).any() else {"class": labels}


def _block_rows(scores: Any) -> int:
    return max(1, _BLOCK_SCORES // int(scores.shape[1]))
