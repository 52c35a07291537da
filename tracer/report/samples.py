"""Examples as the report shows them: images, texts, vectors, or indices alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from tracer.data.tables import frame_numbers, is_frame
from tracer.errors import InputError, InputTypeError
from tracer.report.text import as_text

Kind = Literal["images", "texts", "vectors", "absent"]

MAX_CLASSES = 1000  # labels with more distinct values are numbers or names of single examples, not classes
MAX_FLOAT_CLASSES = 20  # the same for labels that are floats, as those of two classes often are
MISSING_COLOR = (1.0, 0.0, 1.0)
"""The color of NaN pixels: magenta, which gray images and most photographs do not contain."""


class Samples:
    """Inputs, labels and predictions of ``size`` examples, to be shown one by one; ``role`` is named in errors.

    Inputs, labels and predictions are as in `tracer.report.write_report`; channels come first if both readings of an
    image's shape are possible. Records (mappings, or a two-dimensional array of objects) are texts with ``fields``, the
    values of each field as texts, empty if a record lacks it.

    Raises:
        InputError: If a length differs from ``size``, or a label is not an index of ``class_names``.

    >>> samples = Samples("train", 2, inputs=["one", "two"], labels=[0, 1], class_names=["odd", "even"])
    >>> samples.kind, samples.label(1), samples.text(1)
    ('texts', 'even', 'two')
    """

    def __init__(
        self,
        role: str,
        size: int,
        inputs: Any = None,
        labels: Any = None,
        predictions: Any = None,
        class_names: Sequence[str] | None = None,
        feature_names: Sequence[str] | None = None,
    ) -> None:
        self.size = size
        if is_frame(inputs):
            feature_names = [str(name) for name in inputs.columns] if feature_names is None else feature_names
            numbers = frame_numbers(inputs)
            inputs = _records(inputs) if numbers is None else numbers
        self.fields = _fields(inputs, feature_names)
        if self.fields is not None:
            inputs = _as_texts(self.fields)
        self.inputs = np.zeros(size) if inputs is None else as_array(inputs, f"{role}_inputs")
        self.labels = None if labels is None else _names(labels, f"{role}_labels", class_names)
        self.predictions = None if predictions is None else _names(predictions, f"{role}_predictions", class_names)
        self.has_classes = labels is not None and _are_classes(as_array(labels, f"{role}_labels"))
        for name, values in (("inputs", self.inputs), ("labels", self.labels), ("predictions", self.predictions)):
            if values is not None and len(values) != size:
                raise InputError(
                    f"{role}_{name} has {len(values)} examples; expected {size}, one for each {role} example."
                )
        self.kind: Kind = "absent" if inputs is None else _kind(self.inputs, f"{role}_inputs")
        self.feature_names: list[str] | None = None
        if self.kind == "vectors" and feature_names is not None:
            width = int(np.prod(self.inputs.shape[1:]))
            if len(feature_names) != width:
                raise InputError(
                    f"feature_names has {len(feature_names)} names; expected {width}, one for each number of "
                    f"{role}_inputs."
                )
            self.feature_names = [str(name) for name in feature_names]
        images = self.inputs if self.kind == "images" else np.zeros(0)
        self._low, self._high = _limits(images)
        # if any image has missing pixels all get colors, so that thumbnails can share a sheet
        self._has_missing = images.dtype.kind == "f" and bool(np.isnan(images).any())

    def label(self, index: int) -> str:
        """Return the name of an example's label; empty without labels."""
        return "" if self.labels is None else self.labels[index]

    def prediction(self, index: int) -> str:
        """Return the name of the model's prediction; empty without predictions."""
        return "" if self.predictions is None else self.predictions[index]

    def image(self, index: int) -> np.ndarray:
        """Return an image between 0 and 1, float64: ``[H, W]`` or ``[H, W, C]`` with C of 3 or 4."""
        pixels = np.asarray(self.inputs[index], dtype=np.float64)
        if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4):
            pixels = np.moveaxis(pixels, 0, -1)  # [C, H, W] -> [H, W, C]
        if pixels.ndim == 3 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        scaled = np.clip((pixels - self._low) / (self._high - self._low), 0.0, 1.0)
        if not self._has_missing:
            return scaled
        if scaled.ndim == 2:
            scaled = np.repeat(scaled[..., None], 3, axis=-1)
        scaled[np.isnan(scaled).any(axis=-1)] = (*MISSING_COLOR, 1.0)[: scaled.shape[-1]]
        return scaled

    def text(self, index: int) -> str:
        """Return an example's text, unchanged."""
        return str(self.inputs[index])

    def vector(self, index: int) -> np.ndarray:
        """Return an example's numbers ``[D]``."""
        return np.atleast_1d(self.inputs[index])


def as_array(values: Any, name: str) -> np.ndarray:
    """Return a tensor or a sequence of tensors, numbers or texts as an array, without a copy if possible."""
    if hasattr(values, "to_numpy"):  # a Series counts by its index, not by position
        values = values.to_numpy()
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray(values.numpy() if values.dtype.is_floating_point is False else values.float().numpy())
    if (
        not isinstance(values, np.ndarray)
        and hasattr(values, "__len__")
        and len(values)
        and isinstance(values[0], Tensor)
    ):
        values = [as_array(value, name) for value in values]
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, dtype=object)
    if array.ndim == 0 or (array.dtype == object and not all(isinstance(value, str) for value in array.flat)):
        raise InputError(f"{name} must be an array, a tensor, or a list of arrays of one shape or of texts.")
    if array.dtype == object and array.size == 0 and len(values):
        raise InputError(f"{name} has values of different shapes; pass images or vectors of one shape, or texts.")
    return array


def check_class_names(names: Sequence[str] | Mapping[int, str] | None) -> list[str] | None:
    """Return the name of each class index, of a list or of a mapping from indices such as ``id2label``.

    Raises:
        InputError: A mapping has other keys than 0, 1, 2, ….
        InputTypeError: It is a single text.

    >>> check_class_names({1: "owl", 0: "cat"})
    ['cat', 'owl']
    """
    if isinstance(names, str):
        raise InputTypeError(f"class_names is {names!r}; expected a list with a name for each class index.")
    if isinstance(names, Mapping):
        by_index = {int(key): name for key, name in names.items() if str(key).isdecimal()}
        if sorted(by_index) != list(range(len(names))):
            raise InputError(f"class_names has the keys {list(names)[:5]}; expected the class indices 0, 1, 2, …")
        names = [by_index[index] for index in range(len(names))]
    return None if names is None else [as_text(name) for name in names]


def class_codes(*sets: Samples, class_names: Sequence[str] | None = None) -> tuple[list[np.ndarray], list[str]]:
    """Return the labels of sets of examples as indices (int64) into one list of names, and these names.

    The names are ``class_names``, then other labels, sorted, with whole numbers by their value.

    >>> samples = Samples("train", 3, labels=[10, 9, 10])
    >>> class_codes(samples)
    ([array([1, 0, 1])], ['9', '10'])
    """
    found = {name for each in sets for name in (each.labels or ())}
    names = list(dict.fromkeys(as_text(name) for name in class_names or ()))
    names += sorted(found.difference(names), key=_by_value)
    places = {name: place for place, name in enumerate(names)}
    return [np.array([places[name] for name in each.labels or ()], dtype=np.int64) for each in sets], names


def _by_value(name: str) -> tuple[bool, int, str]:
    """Return a sort key that puts whole numbers first and in order."""
    whole = name.lstrip("-").isdecimal()
    return not whole, int(name) if whole else 0, name


def _are_classes(labels: np.ndarray) -> bool:
    """Return whether labels are classes: few distinct values, and of floats very few without fractions."""
    is_float = labels.dtype.kind == "f"
    if is_float and not (labels == np.round(labels)).all():
        return False
    return 0 < len(np.unique(labels)) <= (MAX_FLOAT_CLASSES if is_float else MAX_CLASSES)


def _records(frame: Any) -> list[dict[str, Any]]:
    """Return the lines of a table as mappings."""
    columns = [frame[name].to_list() for name in frame.columns]
    return [dict(zip(map(str, frame.columns), line, strict=True)) for line in zip(*columns, strict=True)]


def _fields(inputs: Any, feature_names: Sequence[str] | None) -> dict[str, list[str]] | None:
    """Return the values of each field of records, as texts; None for anything else."""
    if isinstance(inputs, np.ndarray) and inputs.dtype == object and inputs.ndim == 2:
        keys = feature_names or [f"field {place}" for place in range(inputs.shape[1])]
        inputs = [dict(zip(keys, values, strict=False)) for values in inputs]
    if not (isinstance(inputs, Sequence) and len(inputs) and isinstance(inputs[0], Mapping)):
        return None
    names = dict.fromkeys(name for record in inputs for name in record)
    return {str(name): [str(record[name]) if name in record else "" for record in inputs] for name in names}


def _as_texts(fields: Mapping[str, Sequence[str]]) -> list[str]:
    """Return records as texts with a line for each field."""
    lines = zip(*fields.values(), strict=True)
    return ["\n".join(f"{name}: {value}" for name, value in zip(fields, line, strict=True) if value) for line in lines]


def _kind(inputs: np.ndarray, name: str) -> Kind:
    """Return the kind of inputs from their dtype and number of dimensions."""
    if inputs.dtype.kind in "UO":
        return "texts"
    if inputs.ndim <= 2:
        return "vectors"
    if inputs.ndim == 3 or (inputs.ndim == 4 and {inputs.shape[1], inputs.shape[3]} & {1, 3, 4}):
        return "images"
    raise InputError(
        f"{name} has shape {list(inputs.shape)}; expected images [N, H, W], [N, C, H, W] or [N, H, W, C] with C of 1, "
        "3 or 4, vectors [N, D] or texts. Select what to show, for example one channel: inputs[:, 0]."
    )


def _limits(images: np.ndarray) -> tuple[float, float]:
    """Return the values of black and of white: the finite minimum and maximum, or the usual range if they fit in it."""
    if images.dtype == np.uint8:
        return 0.0, 255.0
    low, high = 0.0, 1.0
    if images.dtype.kind == "f":
        finite = np.isfinite(images)
        if finite.any():
            low = float(np.min(images, where=finite, initial=np.inf))
            high = float(np.max(images, where=finite, initial=-np.inf))
    elif images.size:
        low, high = float(images.min()), float(images.max())
    if low >= 0.0 and high <= 1.0 and high > 0.0:
        return 0.0, 1.0
    return (low, high) if high > low else (low, low + 1.0)


def _names(values: Any, name: str, class_names: Sequence[str] | None) -> list[str]:
    """Return each label as text: the class's name, the index, or a number to four digits."""
    array = as_array(values, name)
    if array.ndim != 1:
        raise InputError(f"{name} has shape {list(array.shape)}; expected one value for each example.")
    if class_names is not None and array.dtype.kind in "fb":
        # labels of two classes are often floats or bools
        if ((array == np.round(array)) & (array >= 0) & (array < len(class_names))).all():
            array = array.astype(np.int64)
    if class_names is None or array.dtype.kind not in "iu":
        return [f"{value:.4g}" if array.dtype.kind == "f" else as_text(value) for value in array]
    outside = np.flatnonzero((array < 0) | (array >= len(class_names)))
    if outside.size:
        raise InputError(
            f"{name} contains {array[outside[0]]} at index {outside[0]}; expected an index into the "
            f"{len(class_names)} class_names, 0 to {len(class_names) - 1}."
        )
    texts = [as_text(name) for name in class_names]
    return [texts[int(value)] for value in array]
