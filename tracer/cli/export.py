"""``tracer export``: scores, top examples and summaries as files."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np

from tracer._core.files import write_whole
from tracer._core.text import csv_cell
from tracer.cli.output import print_result
from tracer.cli.stores import Integers, RankingCommand, StoreView, check_targets, count_option, known_labels, open_view
from tracer.errors import InputError, MissingDependencyError
from tracer.report.summaries import matrix_blocks
from tracer.scoring.scorer import KINDS
from tracer.store.table_schema import NO_LABEL

_BLOCK_SCORES = 1 << 20  # scores of a block: the most in memory at a time, apart from summaries
Columns = Mapping[str, np.ndarray]  # columns of equal length, by name: integers, floats, or texts


@click.command("export", cls=RankingCommand)
@click.argument("store")
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--what", type=click.Choice(["scores", "top", "rows", "targets"]), default="scores", show_default=True,
    help="All pairs, the strongest training examples, or a summary of training examples or targets.",
)  # fmt: skip
@click.option("--targets", type=Integers(), help="Only these targets, such as 0,5,10-12 (scores and top).")
@count_option(10, "Training examples for each target (top).")
def export(store: str, out: Path, what: str, targets: list[int] | None, k: int, **options: Any) -> None:
    """Write scores, top examples or summaries as CSV, Parquet or a numpy matrix.

    OUT's ending decides the format: .csv, .parquet (needs pyarrow) or .npy (scores only). An existing file is replaced
    when the new one is complete. Pairs are never all in memory at once; scores that are not yet in the store are
    computed and stored first. With --estimator cosine or trackstar, self-influence is that of tracin, in the column
    self_influence_tracin, since each example's cosine with itself is 1.

    Examples:
        tracer export runs/first scores.parquet                   one line a pair: train_row, target, score
        tracer export runs/first scores.npy                       the matrix [training examples, targets]
        tracer export runs/first top.csv --what top -k 20         proponents and opponents of each target
        tracer export runs/first rows.csv --what rows             each training example: self-influence, mean score
        tracer export runs/first targets.csv --what targets       each target: mean score
    """
    suffix = _check_suffix(out, what, targets)
    view = open_view(store, **options)
    chosen = check_targets(targets, view.target_table.num_rows)
    content: Any
    if what == "scores":
        ids = _id_column(view.ids()), _id_column(view.target_ids())
        content = view.found.scores if suffix == ".npy" else score_blocks(view.found.scores, chosen, *ids)
    else:
        content = _top_blocks(view, chosen, k) if what == "top" else [_summary(view, what)]
    counts: list[int] = []
    write_whole(out, lambda file: counts.extend(_WRITERS[suffix](file, content)))
    result = {"path": out, "what": what, "rows": sum(counts), "bytes": out.stat().st_size}
    print_result(result, f"{out}: {sum(counts):,} rows")


def _check_suffix(out: Path, what: str, targets: list[int] | None) -> str:
    """Return the ending, which decides the format; refuse what does not fit together."""
    suffix = out.suffix.lower()
    if suffix not in _WRITERS:
        raise InputError(f"{out} ends with {out.suffix!r}; expected one of {', '.join(_WRITERS)}.")
    if not out.parent.is_dir():
        raise InputError(f"{out} cannot be written: there is no directory {out.parent}; create it first.")
    if suffix == ".npy" and (what != "scores" or targets is not None):
        raise InputError("A .npy file is the matrix of all scores; for anything else write .csv or .parquet.")
    if targets is not None and what in ("rows", "targets"):
        raise InputError(f"got --targets with --what {what}, which covers all targets; leave --targets out.")
    if suffix == ".parquet":
        try:
            for name in ("pyarrow", "pyarrow.parquet"):
                importlib.import_module(name)
        except ImportError as error:
            raise MissingDependencyError(
                f"{out} needs pyarrow, which is not installed ({error}); install it with: pip install "
                f"'tracin[parquet]', or write .csv."
            ) from error
    return suffix


def _id_column(ids: list[str | int] | None) -> np.ndarray | None:
    """Return ids as an array of integers, or of texts if one is a text: a column of Parquet has one type."""
    if ids is None:
        return None
    return np.array(ids) if all(isinstance(each, int) for each in ids) else np.array(list(map(str, ids)), object)


def _named(name: str, ids: np.ndarray | None, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return a column with the ids of rows; none if they are not known."""
    return {} if ids is None else {name: ids[rows]}


def score_blocks(
    scores: Any, targets: list[int], ids: np.ndarray | None = None, target_ids: np.ndarray | None = None
) -> Iterator[Columns]:
    """Yield pairs of scores ``[N, M]`` in long form, all targets of one training example after another."""
    columns = np.asarray(targets, dtype=np.int64)
    everything = len(targets) == scores.shape[1]
    for start, block in matrix_blocks(scores, _BLOCK_SCORES):
        rows = np.arange(start, start + len(block))
        yield {
            "train_row": np.repeat(rows, len(columns)),
            **_named("train_id", ids, np.repeat(rows, len(columns))),
            "target": np.tile(columns, len(rows)),
            **_named("target_id", target_ids, np.tile(columns, len(rows))),
            "score": (block if everything else block[:, columns]).ravel(),
        }


def _top_blocks(view: StoreView, targets: list[int], k: int) -> Iterator[Columns]:
    """Yield the proponents of all targets, then the opponents."""
    k = min(k, view.reader.train_set_size)
    columns = np.asarray(targets, dtype=np.int64)
    ids, target_ids = _id_column(view.ids()), _id_column(view.target_ids())
    for kind in KINDS:
        top = view.found.top(k, kind)
        yield {
            "kind": np.full(len(columns) * k, kind),
            "target": np.repeat(columns, k),
            **_named("target_id", target_ids, np.repeat(columns, k)),
            "rank": np.tile(np.arange(1, k + 1), len(columns)),
            "train_row": top.indices[columns].ravel(),
            **_named("train_id", ids, top.indices[columns].ravel()),
            "score": top.scores[columns].ravel(),
        }


def _summary(view: StoreView, what: str) -> Columns:
    """Return the mean scores of each training example (``what`` is rows) or of each target."""
    found, by_row = view.found, what == "rows"
    scores = found.scores
    size = scores.shape[0 if by_row else 1]
    mean, absolute = np.zeros(size), np.zeros(size)
    for start, block in matrix_blocks(scores, _BLOCK_SCORES):
        rows = slice(start, start + len(block)) if by_row else slice(None)
        for sums, values in ((mean, block.astype(np.float64)), (absolute, np.abs(block, dtype=np.float64))):
            sums[rows] += values.mean(axis=1) if by_row else values.sum(axis=0)
    labels = known_labels(view.train_table if by_row else view.target_table)
    if labels is not None and (labels == NO_LABEL).any():
        labels = None  # integers have no missing value
    ids = view.ids() if by_row else view.target_ids()
    chosen = found.estimators
    own = "self_influence" + ("" if chosen.scores == chosen.self_influence else f"_{chosen.self_influence}")
    return {
        "train_row" if by_row else "target": np.arange(size),
        **_named("train_id" if by_row else "target_id", _id_column(ids), np.arange(size)),
        **({} if labels is None else {"class": labels}),
        **({own: view.self_influence()} if by_row else {}),
        "mean_score": mean if by_row else mean / scores.shape[0],
        "mean_absolute_score": absolute if by_row else absolute / scores.shape[0],
    }


def _write_csv(file: BinaryIO, blocks: Iterable[Columns]) -> Iterator[int]:
    """Write blocks with the same columns as CSV with a header; yield the number of lines of each."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
    lines = csv.writer(text, lineterminator="\n")
    for number, block in enumerate(blocks):
        if not number:
            lines.writerow(block)
        columns = [
            # nine digits distinguish any two float32
            [format(value, ".9g") if column.dtype == np.float32 else csv_cell(value) for value in column.tolist()]
            for column in block.values()
        ]
        lines.writerows(zip(*columns, strict=True))
        yield len(columns[0])
    text.detach()  # else closing the wrapper would close the file before it is synced


def _write_parquet(file: BinaryIO, blocks: Iterable[Columns]) -> Iterator[int]:
    """Write blocks with the same columns as Parquet, a row group each; yield the number of lines of each."""
    pyarrow: Any = importlib.import_module("pyarrow")
    writer: Any = None
    for block in blocks:
        table = pyarrow.table(dict(block))
        writer = writer or pyarrow.parquet.ParquetWriter(file, table.schema)
        writer.write_table(table)
        yield table.num_rows
    if writer is not None:
        writer.close()


def _write_matrix(file: BinaryIO, scores: Any) -> Iterator[int]:
    """Write scores ``[N, M]`` as a numpy file, float32; yield the number of lines of each block."""
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(scores.shape)}
    np.lib.format.write_array_header_2_0(file, header)
    for _, block in matrix_blocks(scores, _BLOCK_SCORES):
        file.write(np.ascontiguousarray(block, "<f4").tobytes())
        yield len(block)


_WRITERS: Mapping[str, Callable[[BinaryIO, Any], Iterator[int]]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".npy": _write_matrix,
}
"""The writer of each ending; the first two take blocks of columns, the last one the matrix."""
