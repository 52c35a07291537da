"""Files of any length, written block by block: CSV, Parquet and numpy, complete or not at all."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tracer._core.files import write_whole
from tracer.errors import MissingDependencyError

Columns = Mapping[str, np.ndarray]
"""Columns of equal length, by name: integers, floats, or texts."""


def write_csv(path: Path, blocks: Iterable[Columns]) -> int:
    """Write blocks with the same columns as CSV with a header; return the number of lines."""
    counted = 0

    def write(file: BinaryIO) -> None:
        nonlocal counted
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        lines = csv.writer(text, lineterminator="\n")
        for number, block in enumerate(blocks):
            if not number:
                lines.writerow(block)
            columns = [_csv_values(column) for column in block.values()]
            lines.writerows(zip(*columns, strict=True))
            counted += len(columns[0])
        text.detach()  # else closing the wrapper would close the file before it is synced

    write_whole(path, write)
    return counted


def write_parquet(path: Path, blocks: Iterable[Columns]) -> int:
    """Write blocks with the same columns as Parquet, a row group each; return the number of lines."""
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} needs pyarrow, which is not installed ({error}); install it with: pip install 'tracin[parquet]', "
            f"or write .csv."
        ) from error
    counted = 0

    def write(file: BinaryIO) -> None:
        nonlocal counted
        writer: Any = None
        for block in blocks:
            table = pyarrow.table(dict(block))
            writer = writer or parquet.ParquetWriter(file, table.schema)
            writer.write_table(table)
            counted += table.num_rows
        if writer is not None:
            writer.close()

    write_whole(path, write)
    return counted


def write_matrix(path: Path, scores: Any, block_rows: int) -> int:
    """Write a score matrix ``[N, M]``, float32, as a numpy file; return N."""
    header = {"descr": "<f4", "fortran_order": False, "shape": tuple(scores.shape)}

    def write(file: BinaryIO) -> None:
        np.lib.format.write_array_header_2_0(file, header)
        for _, block in matrix_blocks(scores, block_rows):
            file.write(np.ascontiguousarray(block, "<f4").tobytes())

    write_whole(path, write)
    return int(scores.shape[0])


def matrix_blocks(matrix: Any, block_rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the blocks of anything that returns rows when it is sliced, each with its first row."""
    for start in range(0, matrix.shape[0], block_rows):
        yield start, np.asarray(matrix[start : start + block_rows])


def _csv_values(column: np.ndarray) -> list:
    if column.dtype == np.float32:
        return [format(value, ".9g") for value in column.tolist()]  # nine digits distinguish any two float32
    return column.tolist()
