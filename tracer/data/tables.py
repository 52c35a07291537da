"""Tables and arrays as data: DataFrames and Series, numpy arrays of any dtype, and data sets of `datasets`.

Tables are recognized by what they can do, so that pandas and its like need not be installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from tracer._core.text import listing
from tracer.data.batches import tensor_from_numpy
from tracer.data.criteria import CriterionTask
from tracer.data.model_inputs import LABEL_KEYS, forward_names, label_key
from tracer.data.tasks import LossTask, LowerPrecision, Task
from tracer.errors import BatchError, InputError, InputTypeError
from tracer.types import Batch

_TRAINER_LABELS = ("labels", "label", "label_ids")


def is_frame(values: Any) -> bool:
    """Return whether this is a table with named columns, such as a DataFrame."""
    return hasattr(values, "to_numpy") and hasattr(values, "columns")


def is_column(values: Any) -> bool:
    """Return whether this is one column of values, such as a Series."""
    return hasattr(values, "to_numpy") and not hasattr(values, "columns") and hasattr(values, "__len__")


def is_array(values: Any) -> bool:
    """Return whether this is a table, a column, or an array of numbers."""
    return is_frame(values) or is_column(values) or (isinstance(values, np.ndarray) and values.dtype.kind in "biuf")


@dataclass(frozen=True)
class InputForm:
    """The form in which a model and its task take arrays and tables.

    Attributes:
        dtype: The dtype of floating-point inputs. Default: None, that of the array.
        takes_integers: Whether integers stay integers, as a model with an embedding takes them. Default: True.
        columns: The columns of a data set that the model's forward takes; None: all.
    """

    dtype: torch.dtype | None = None
    takes_integers: bool = True
    columns: frozenset[str] | None = None

    @classmethod
    def of(cls, model: nn.Module, task: Task) -> InputForm:
        """Return the form for a model; a task of the user's own gets all columns of a data set."""
        floating = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
        embeds = any(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for module in model.modules())
        inner = task.task if isinstance(task, LowerPrecision) else task
        own = isinstance(inner, LossTask) or not type(inner).__module__.startswith(f"{__package__}.")
        named = isinstance(inner, CriterionTask) or not own
        return cls(next(floating, None), embeds, forward_names(model) if named else None)

    def tensor(self, values: Any, name: str, is_label: bool = False) -> Tensor:
        """Return a table, a column or an array as a tensor: floats in the model's dtype, labels as they are.

        Raises:
            InputTypeError: A column holds no numbers.
        """
        array = _frame_array(values, name) if is_frame(values) else _column_array(values, name, is_label)
        if array.dtype.kind in "biu" and (is_label or self.takes_integers):
            return tensor_from_numpy(array.astype(np.int64, copy=False))
        found = tensor_from_numpy(array)
        return found.to(self.dtype or (found.dtype if found.is_floating_point() else torch.get_default_dtype()))

    def batch(self, batch: Batch) -> Batch:
        """Return a batch with its arrays and tables as tensors; anything else stays as it is."""
        if is_array(batch):
            return self.tensor(batch, "the batch")
        if isinstance(batch, Mapping) and any(map(is_array, batch.values())):
            key = label_key(batch)
            return {
                name: self.tensor(value, repr(name), name == key) if is_array(value) else value
                for name, value in batch.items()
            }
        if isinstance(batch, (tuple, list)) and any(map(is_array, batch)):
            last = len(batch) - 1 if len(batch) > 1 else None
            values = [
                self.tensor(value, f"batch[{place}]", place == last) if is_array(value) else value
                for place, value in enumerate(batch)
            ]
            return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
        return batch

    def collate(self, samples: list[Any]) -> Batch:
        """Return a batch of examples as `DataLoader` makes it, with floats of numpy in the model's dtype."""
        try:
            batch, first = default_collate(samples), samples[0]
        except (RuntimeError, TypeError, ValueError) as error:
            raise BatchError(
                f"The examples do not fit into one batch: {error}. Expected examples of the same shapes, or a tuple of "
                f"tensors, arrays or tables, (inputs, labels); pass collate_fn=, for texts their tokenizer or collator."
            ) from error
        if _is_float(first):
            return batch.to(self.dtype)
        if isinstance(first, Mapping) and any(map(_is_float, first.values())):
            return {key: value.to(self.dtype) if _is_float(first[key]) else value for key, value in batch.items()}
        if isinstance(first, (tuple, list)) and any(map(_is_float, first)):
            pairs = zip(batch, first, strict=True)
            values = [value.to(self.dtype) if _is_float(own) else value for value, own in pairs]
            return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
        return batch

    def tensors(self, data: Sequence[Any], name: str) -> list[Tensor]:
        """Return a tuple of tensors, arrays and tables as tensors; the last one of several holds labels."""
        last = len(data) - 1 if len(data) > 1 else None
        return [
            value if isinstance(value, Tensor) else self.tensor(value, f"{name}[{place}]", place == last)
            for place, value in enumerate(data)
        ]


AS_THEY_ARE = InputForm()


def _is_float(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.floating)) and value.dtype.kind == "f"


def with_labels(frame: Any, name: str) -> tuple[Any, Any]:
    """Split a table at its only column of labels; raise `InputError` if there is none or several."""
    keys = [key for key in LABEL_KEYS if key in list(frame.columns)]
    if len(keys) != 1:
        raise InputError(
            f"{name} is a table with the columns {list(frame.columns)}; expected exactly one of {list(LABEL_KEYS)} for "
            f"the labels, got {keys or 'none'}. Pass the inputs and the labels: (X, y)."
        )
    return frame[[column for column in frame.columns if column != keys[0]]], frame[keys[0]]


def frame_numbers(frame: Any) -> np.ndarray | None:
    """Return a table of numbers ``[N, columns]``; None if a column holds anything else."""
    columns = [_numbers(frame[column]) for column in frame.columns]
    known = [values for values in columns if values is not None]
    return np.stack(known, axis=1) if known and len(known) == len(columns) else None


def _frame_array(frame: Any, name: str) -> np.ndarray:
    found = frame_numbers(frame)
    if found is None:
        bad = [str(column) for column in frame.columns if _numbers(frame[column]) is None]
        raise InputTypeError(
            f"{name} is a table whose columns {bad} hold no numbers; expected numbers in all columns. Encode texts and "
            f"categories as numbers, as in training, or leave these columns out."
        )
    return found


def _column_array(values: Any, name: str, is_label: bool) -> np.ndarray:
    found = values if isinstance(values, np.ndarray) else _numbers(values)
    if found is None:
        advice = (
            "Pass class indices in the order of the model's outputs, for example y.astype('category').cat.codes."
            if is_label
            else "Encode texts and categories as numbers, as in training."
        )
        raise InputTypeError(f"{name} holds {values.dtype} values, which are no numbers; expected numbers. {advice}")
    return found


def _numbers(column: Any) -> np.ndarray | None:
    """Return a column of numbers as an array; None if it holds anything else."""
    array = np.asarray(column.to_numpy())
    if array.dtype == object and all(isinstance(value, (bool, int, float, np.number, np.bool)) for value in array):
        array = np.array(array.tolist())  # of several types, or of types with a missing value of their own
    return array if array.dtype.kind in "biuf" else None


def is_hugging_face(data: Any) -> bool:
    """Return whether this is a data set of `datasets`, or a mapping of its splits."""
    return all(hasattr(data, name) for name in ("column_names", "with_format", "remove_columns"))


def prepared(data: Any, name: str, form: InputForm, collate_fn: Callable[[list], Batch] | None) -> Any:
    """Return a data set of `datasets` with the columns that the model takes, as tensors unless they are collated."""
    if isinstance(data, Mapping):
        raise InputTypeError(f"{name} has the splits {sorted(map(str, data))}; pass one of them: data['train'].")
    kept = _kept(data.column_names, form.columns)
    if len(kept) < len(data.column_names):
        data = data.select_columns(kept)
    return data.with_format("torch") if collate_fn is None and data.format["type"] is None else data


def _kept(columns: Sequence[str], taken: frozenset[str] | None) -> list[str]:
    """Return the columns that are inputs or labels, as transformers' Trainer chooses them."""
    if taken is None or not taken & set(columns):  # a single input need not have the forward's name
        return list(columns)
    labels = [name for name in columns if name in _TRAINER_LABELS] or [name for name in columns if name in LABEL_KEYS]
    return [name for name in columns if name in taken or name in labels]


def as_collate_fn(collate_fn: Any) -> Any:
    """Return a tokenizer as the function that pads a batch with it; any other function unchanged."""
    return Padding(collate_fn) if hasattr(collate_fn, "pad") and hasattr(collate_fn, "padding_side") else collate_fn


class Padding:
    """Pads tokenized examples to the longest of a batch, and labels of tokens with -100.

    Args:
        tokenizer: A tokenizer of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, samples: list[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch of tensors; columns of texts stay lists."""
        texts = [name for name, value in samples[0].items() if isinstance(value, str)]
        labels = [name for name, value in samples[0].items() if name in LABEL_KEYS and np.ndim(value) == 1]
        inputs = [{k: v for k, v in sample.items() if k not in (*texts, *labels)} for sample in samples]
        if texts and "input_ids" not in inputs[0]:
            raise BatchError(
                f"The examples have no tokens, only {listing(list(samples[0]))}; expected a column 'input_ids': "
                f"tokenize them first, for example data.map(lambda row: tokenizer(row[{texts[0]!r}]))."
            )
        try:
            batch = dict(self._tokenizer.pad(inputs, return_tensors="pt"))
        except (ValueError, TypeError) as error:
            raise BatchError(
                f"The tokenizer cannot pad the columns {sorted(inputs[0])}: {str(error).splitlines()[0]} Leave out "
                f"those that are no inputs, or pass a collate_fn of your own."
            ) from error
        for name in labels:
            batch[name] = self._padded([sample[name] for sample in samples], batch["input_ids"].shape[1])
        return batch | {name: [sample[name] for sample in samples] for name in texts}

    def _padded(self, labels: Iterable[Any], length: int) -> Tensor:
        rows = [torch.as_tensor(each) for each in labels]
        length = max(length, *map(len, rows))
        found = torch.full((len(rows), length), -100)
        for place, row in enumerate(rows):
            start = length - len(row) if self._tokenizer.padding_side == "left" else 0
            found[place, start : start + len(row)] = row
        return found
