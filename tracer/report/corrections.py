"""What a reader of the page decided about labels, applied to the labels."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tracer._core.text import csv_cell
from tracer.errors import InputError, MismatchError
from tracer.report.samples import check_class_names

_COLUMNS = {"id", "label", "suggested_label", "verdict"}
_VERDICTS = ("confirmed", "ignored")


def apply_corrections(
    path: str | os.PathLike[str],
    labels: Any,
    *,
    ids: Sequence[str | int] | None = None,
    class_names: Sequence[str] | Mapping[int, str] | None = None,
) -> np.ndarray:
    r"""Return labels with the corrections that a reader confirmed on the page of a report.

    The file is downloaded from the page's list of training examples. Confirmed examples get their suggested label;
    ignored ones stay. Edit the column ``suggested_label`` to choose another label.

    Args:
        path: The CSV or JSON file.
        labels: ``[N]``, the labels of the training examples, as in `Attribution.report`.
        ids: ``[N]``, the ids of the report, if it had any. Default: examples are known by their index.
        class_names: The names of classes of the report, if it had any; labels are then class indices.

    Returns:
        ``[N]``, a new array of the dtype of ``labels``.

    Raises:
        InputError: If there is no such file, it is not one of verdicts, it names an unknown example or label, or a
            confirmed example has no suggested label.
        MismatchError: If a label in the file is not that of the example: the labels are not those of the report.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "verdicts.csv"
    ...     _ = path.write_text("id,label,suggested_label,verdict\n2,0,1,confirmed\n0,1,0,ignored\n")
    ...     apply_corrections(path, [1, 1, 0])
    array([1, 1, 1])
    """
    corrected = np.array(labels)
    if corrected.ndim != 1:
        raise InputError(f"labels must be [N], got shape {list(corrected.shape)}.")
    known = range(len(corrected)) if ids is None else ids
    if len(known) != len(corrected):
        raise InputError(f"ids and labels must agree in N, got {len(known)} and {len(corrected)}.")
    place = {str(name): index for index, name in enumerate(known)}
    if len(place) < len(known):
        raise InputError("ids names some examples alike; expected another id for each.")
    values: dict[str, Any] = {str(value): value for value in corrected.tolist()}
    class_names = check_class_names(class_names)
    if class_names is not None:
        values = {name: number for number, name in enumerate(class_names)}
    names = {value: name for name, value in values.items()}
    for row in _read(Path(path)):
        index = place.get(row["id"])
        if index is None:
            raise InputError(f"{path} names the example {row['id']!r}, which is not among the {len(known)} given.")
        own = names.get(corrected[index].item(), str(corrected[index]))
        if row["label"] and row["label"] != own:
            raise MismatchError(
                f"{path}: example {row['id']!r} has the label {row['label']!r} in the report and {own!r} in labels; "
                f"pass the labels (and class_names, if any) that the report was made from."
            )
        if row["verdict"] == "confirmed":
            corrected[index] = _suggested(row, values, path)
    return corrected


def _suggested(row: Mapping[str, str], values: Mapping[str, Any], path: str | os.PathLike[str]) -> Any:
    """Return the value of a suggested label, or raise InputError."""
    if row["suggested_label"] not in values:
        what = "no suggested label" if not row["suggested_label"] else f"the unknown label {row['suggested_label']!r}"
        raise InputError(
            f"{path}: the confirmed example {row['id']!r} has {what}; write one of {sorted(values)[:20]} into its "
            f"suggested_label, or remove the row."
        )
    return values[row["suggested_label"]]


def _read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file of verdicts as texts, or raise InputError."""
    if not path.is_file():
        raise InputError(f"there is no file {path}; download the verdicts from the report's list of training examples.")
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text) if path.suffix.lower() == ".json" else list(csv.DictReader(io.StringIO(text)))
        found = [{name: str(row[name]) for name in _COLUMNS} for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(
            f"{path} is no file of verdicts ({type(error).__name__}: {error}); expected the columns "
            f"{', '.join(sorted(_COLUMNS))}."
        ) from error
    if path.suffix.lower() != ".json":
        found = [{name: _unquoted(value) for name, value in row.items()} for row in found]
    for row in found:
        if row["verdict"] not in _VERDICTS:
            raise InputError(f"{path}: example {row['id']!r} has the verdict {row['verdict']!r}; expected {_VERDICTS}.")
    return found


def _unquoted(value: str) -> str:
    """Return a cell's text without the apostrophe of `csv_cell`."""
    return value[1:] if value.startswith("'") and csv_cell(value[1:]) == value else value
