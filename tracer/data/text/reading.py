"""Data sets of Hugging Face's `datasets` by the name of a hub's data set, a folder or files."""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tracer.errors import InputError, InputTypeError, MissingDependencyError

_FORMATS = {
    ".jsonl": "json", ".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".arrow": "arrow",
    ".txt": "text", ".md": "text",
}  # fmt: skip
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def import_datasets() -> Any:
    """Return the package `datasets`, or raise MissingDependencyError."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError("reading data needs datasets: pip install 'tracin[hf]'") from error
    return datasets


def read_dataset(data: Any, split: str = "train", streaming: bool = False, name: str = "data") -> Any:
    """Return a `datasets.Dataset`, or an `IterableDataset` if it is a stream.

    Args:
        data: The name of a data set on the hub, with a configuration after a comma; a folder of ``save_to_disk`` or
            with files; a file, or a glob of files, of JSON lines, CSV, Parquet, Arrow or text, of which each line is a
            document; a list of texts or records; or a data set, which is returned as it is.
        split: The split of it.
        streaming: Iterate it instead of reading it whole.
        name: The argument's name, for messages.

    Raises:
        InputError: If there is no such data set, file or split.
        InputTypeError: If the data are of another type.
    """
    datasets = import_datasets()
    if isinstance(data, (datasets.Dataset, datasets.IterableDataset)):
        return data
    if isinstance(data, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return _split_of(data, split, name)
    if isinstance(data, (list, tuple)) and data and all(isinstance(item, (str, Mapping)) for item in data):
        return datasets.Dataset.from_list([{"text": item} if isinstance(item, str) else dict(item) for item in data])
    if not isinstance(data, (str, os.PathLike)):
        raise InputTypeError(
            f"{name} is a {type(data).__name__}; expected the name of a data set, a folder or file, a list of texts or "
            f"records, or a data set of the package datasets."
        )
    path = Path(data)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        found = datasets.load_from_disk(str(path))
        found = (
            _split_of(found, split, name) if isinstance(found, datasets.DatasetDict) else _sliced(found, split, name)
        )
        return found.to_iterable_dataset() if streaming else found
    arguments, options = _arguments(str(data))
    try:
        return datasets.load_dataset(*arguments, split=split, streaming=streaming, **options)
    except Exception as error:  # of the hub, the network, the parser or the split: the package raises many kinds
        raise InputError(
            f"{name}={str(data)!r} with split={split!r} cannot be read ({type(error).__name__}: {error}); expected a "
            f"data set of the hub, a folder of save_to_disk, or files that end in {', '.join(_FORMATS)}."
        ) from error


def _arguments(data: str) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return the arguments of ``load_dataset`` for a name, a folder or files."""
    found = sorted(name for name in glob.glob(data, recursive=True) if Path(name).is_file())
    if not found:
        if Path(data).is_dir():
            return (data,), {}
        if Path(data).suffix in _FORMATS or any(part in data for part in "*?"):
            raise InputError(f"there is no file {data!r} in {Path.cwd()}; check the path.")
        name, _, configuration = data.partition(",")
        return (name, configuration) if configuration else (name,), {}
    endings = {Path(name.removesuffix(next((e for e in _COMPRESSED if name.endswith(e)), ""))).suffix for name in found}
    if len(endings) > 1 or not endings <= _FORMATS.keys():
        raise InputError(f"{data!r} has files that end in {sorted(endings)}; expected one of {', '.join(_FORMATS)}.")
    ending = endings.pop()
    options: dict[str, Any] = {"data_files": {"train": found}}
    return (_FORMATS[ending],), {**options, "sep": "\t"} if ending == ".tsv" else options


def _split_of(found: Any, split: str, name: str) -> Any:
    wanted, bracket, rest = split.partition("[")
    if wanted not in found:
        raise InputError(f"{name} has no split {wanted!r}; choose one of {sorted(found)} by split=.")
    return _sliced(found[wanted], bracket + rest, name) if bracket else found[wanted]


def _sliced(found: Any, split: str, name: str) -> Any:
    """Return the slice of a data set in memory that a split such as ``train[:100]`` names."""
    _, bracket, rest = split.partition("[")
    if not bracket:
        return found
    start, colon, stop = rest.removesuffix("]").partition(":")
    try:
        first, last = (int(text) if text else None for text in (start, stop))
        if not colon or not rest.endswith("]"):
            raise ValueError
    except ValueError as error:
        raise InputError(f"{name} has split={split!r}; expected a slice of numbers, such as train[:1000].") from error
    return found.select(range(len(found))[first:last])
