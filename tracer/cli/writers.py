"""Tables of any length, written row block by row block: CSV and Parquet, whole or not at all."""

from __future__ import annotations

import csv
import importlib
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tracer._core.files import write_whole
from tracer.errors import MissingDependencyError

Block = Mapping[str, np.ndarray]
"""Columns of equal length, by name; integers, floats, or texts."""


def write_csv(path: Path, blocks: Iterable[Block]) -> int:
    """Write blocks as CSV with a header; floats in the shortest form that gives the same number again.

    Args:
        path: The file.
        blocks: At least one, all with the same columns.

    Returns:
        The number of rows.
    """
    counted = 0

    def write(file: BinaryIO) -> None:
        nonlocal counted
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        lines = csv.writer(text, lineterminator="\n")
        for number, block in enumerate(blocks):
            if not number:
                lines.writerow(block)
            columns = [_texts(column) for column in block.values()]
            lines.writerows(zip(*columns, strict=True))
            counted += len(columns[0])
        text.detach()

    write_whole(path, write)
    return counted


def write_parquet(path: Path, blocks: Iterable[Block]) -> int:
    """Write blocks as Parquet, a row group each.

    Args:
        path: The file.
        blocks: At least one, all with the same columns.

    Returns:
        The number of rows.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        pyarrow: Any = importlib.import_module("pyarrow")
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingDependencyError(
            f"{path} is to be Parquet, and pyarrow is not installed ({error}); install it with: "
            f"pip install 'tracin[parquet]', or write .csv."
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
    """Write a matrix as a numpy file, block by block.

    Args:
        path: The file.
        scores: ``[N, M]``, float32, anything that gives rows as an array when it is sliced.
        block_rows: Rows of a block.

    Returns:
        The number of rows.
    """
    num_rows, num_targets = scores.shape

    def write(file: BinaryIO) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (num_rows, num_targets)}
        np.lib.format.write_array_header_2_0(file, header)
        for start in range(0, num_rows, block_rows):
            file.write(np.ascontiguousarray(scores[start : start + block_rows], "<f4").tobytes())

    write_whole(path, write)
    return int(num_rows)


def _texts(column: np.ndarray) -> list:
    """Return a column's values as CSV has them."""
    if column.dtype == np.float32:
        return [format(value, ".9g") for value in column.tolist()]  # nine digits tell any two float32 apart
    return column.tolist()
