"""``tracer export``: scores, top rows and summaries as files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

from tracer.cli.help import TaughtCommand
from tracer.cli.output import json_option, show
from tracer.cli.stores import Choice, Integers, check_targets, choose, ranking_options
from tracer.cli.writers import Block, write_csv, write_matrix, write_parquet
from tracer.errors import InputError
from tracer.scoring.scorer import KINDS
from tracer.store.table_schema import NO_LABEL

EXAMPLES = """
tracer export runs/first scores.parquet                   one line a pair: train_row, target, score
tracer export runs/first scores.npy                       the matrix [training rows, targets]
tracer export runs/first top.csv --what top -k 20         proponents and opponents of each target
tracer export runs/first rows.csv --what rows             each training row: self-influence, mean score
tracer export runs/first targets.csv --what targets       each target: mean score
"""
_BLOCK_SCORES = 1 << 20
"""Scores of a block: what is in memory at a time, apart from summaries."""
_SUFFIXES = (".csv", ".parquet", ".npy")


@click.command("export", cls=TaughtCommand, examples=EXAMPLES)
@click.argument("store")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--what",
    type=click.Choice(["scores", "top", "rows", "targets"]),
    default="scores",
    show_default=True,
    help="All pairs, the strongest rows, or a summary of rows or targets.",
)
@click.option("--targets", type=Integers(), help="Only these targets, such as 0,5,10-12 (scores and top).")
@click.option("-k", "k", type=click.IntRange(min=1), default=10, show_default=True, help="Rows for each target (top).")
@ranking_options
@json_option
def command(store: str, out: Path, what: str, targets: list[int] | None, k: int, as_json: bool, **options: Any) -> None:
    """Write scores, top rows or summaries as CSV, Parquet or a numpy matrix.

    OUT's ending says how: .csv, .parquet (needs pyarrow) or .npy (scores only). A file that is there is replaced when
    the new one is complete. All pairs never lie in memory at once; scores that are not in the store yet are computed
    and stored first. With --estimator cosine, self-influence is of tracin and its column self_influence_tracin: each
    row's cosine with itself is 1.
    """
    suffix = _checked_suffix(out, what, targets)
    choice = choose(store, **options)
    if suffix == ".npy":
        scores = choice.found.scores
        num_rows = write_matrix(out, scores, _block_rows(scores))
    else:
        chosen = check_targets(targets, choice.num_targets)
        if what == "scores":
            blocks = score_blocks(choice.found.scores, chosen)
        elif what == "top":
            blocks = _top_blocks(choice, chosen, k)
        else:
            blocks = iter([_row_summary(choice) if what == "rows" else _target_summary(choice)])
        num_rows = (write_csv if suffix == ".csv" else write_parquet)(out, blocks)
    summary = {"path": out, "what": what, "rows": num_rows, "bytes": out.stat().st_size}
    show(as_json, summary, f"{out}: {num_rows:,} rows")


def _checked_suffix(out: Path, what: str, targets: list[int] | None) -> str:
    """Return how the file is to be written; refuse what does not go together."""
    suffix = out.suffix.lower()
    if suffix not in _SUFFIXES:
        raise InputError(f"{out} ends with {out.suffix!r}; expected one of {', '.join(_SUFFIXES)}.")
    if not out.parent.is_dir():
        raise InputError(f"{out} cannot be written: there is no directory {out.parent}; make it first.")
    if suffix == ".npy" and (what != "scores" or targets is not None):
        raise InputError("A .npy file is the matrix of all scores; for anything else write .csv or .parquet.")
    if targets is not None and what in ("rows", "targets"):
        raise InputError(f"--targets came with --what {what}, which is of all targets; leave it out.")
    return suffix


def score_blocks(scores: Any, targets: list[int]) -> Iterator[Block]:
    """Yield pairs in long form, all targets of a training row one after another.

    Args:
        scores: ``[N, M]``.
        targets: Which targets.

    Yields:
        Columns ``train_row`` and ``target``, int64, and ``score``, float32.
    """
    step, columns = _block_rows(scores), np.asarray(targets, dtype=np.int64)
    everything = len(targets) == scores.shape[1]
    for start in range(0, scores.shape[0], step):
        block = np.asarray(scores[start : start + step])
        rows = np.arange(start, start + len(block))
        yield {
            "train_row": np.repeat(rows, len(columns)),
            "target": np.tile(columns, len(rows)),
            "score": (block if everything else block[:, columns]).ravel(),
        }


def _top_blocks(choice: Choice, targets: list[int], k: int) -> Iterator[Block]:
    """Yield proponents, then opponents, of each target in turn."""
    k = min(k, choice.reader.train_set_size)
    columns = np.asarray(targets, dtype=np.int64)
    for kind in KINDS:
        top = choice.found.top(k, kind)
        yield {
            "kind": np.full(len(columns) * k, kind),
            "target": np.repeat(columns, k),
            "rank": np.tile(np.arange(1, k + 1), len(columns)),
            "train_row": top.indices[columns].ravel(),
            "score": top.scores[columns].ravel(),
        }


def _row_summary(choice: Choice) -> Block:
    """Return what is to be known of each training row."""
    scores, labels = choice.found.scores, choice.train_labels()
    mean, absolute = np.zeros(scores.shape[0]), np.zeros(scores.shape[0])
    for start in range(0, scores.shape[0], _block_rows(scores)):
        block = np.asarray(scores[start : start + _block_rows(scores)], dtype=np.float64)
        mean[start : start + len(block)] = block.mean(axis=1)
        absolute[start : start + len(block)] = np.abs(block).mean(axis=1)
    return {
        "train_row": np.arange(scores.shape[0]),
        **_label_column(labels),
        # cosine has none of its own, each row's would be 1
        "self_influence" + ("_tracin" if choice.found.estimator == "cosine" else ""): choice.self_influence(),
        "mean_score": mean,
        "mean_absolute_score": absolute,
    }


def _target_summary(choice: Choice) -> Block:
    """Return what is to be known of each target."""
    scores, labels = choice.found.scores, choice.target_labels()
    total, absolute = np.zeros(scores.shape[1]), np.zeros(scores.shape[1])
    for start in range(0, scores.shape[0], _block_rows(scores)):
        block = np.asarray(scores[start : start + _block_rows(scores)], dtype=np.float64)
        total += block.sum(axis=0)
        absolute += np.abs(block).sum(axis=0)
    return {
        "target": np.arange(scores.shape[1]),
        **_label_column(labels),
        "mean_score": total / scores.shape[0],
        "mean_absolute_score": absolute / scores.shape[0],
    }


def _label_column(labels: np.ndarray | None) -> dict[str, np.ndarray]:
    """Return the classes as a column; none where a row has none, since integers know no gap."""
    return {} if labels is None or (labels == NO_LABEL).any() else {"class": labels}


def _block_rows(scores: Any) -> int:
    return max(1, _BLOCK_SCORES // int(scores.shape[1]))
