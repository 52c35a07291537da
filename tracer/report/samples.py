"""Examples as the report shows them: images, texts, vectors, or indices alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from tracer.errors import InputError
from tracer.report.text import as_text

Kind = Literal["images", "texts", "vectors", "absent"]

MAX_CLASSES = 1000
"""Labels with more distinct values are numbers or names of single examples, not classes."""

MAX_FLOAT_CLASSES = 20
"""The same for labels that are floats, as those of two classes often are."""

MISSING_COLOR = (1.0, 0.0, 1.0)
"""The color of NaN pixels: magenta, which gray images and most photographs do not contain."""


class Samples:
    """Inputs, labels and predictions of ``size`` examples, to be shown one by one.

    Args:
        role: ``"train"`` or ``"target"``, for error messages.
        size: The number of examples.
        inputs: Images ``[size, H, W]``, ``[size, C, H, W]`` or ``[size, H, W, C]`` with C of 1, 3 or 4 (channels first
            where both readings are possible), vectors ``[size, D]`` or ``[size]``, texts, records (mappings, or a
            two-dimensional array of objects), or None.
        labels: ``[size]``, class indices, names or numbers, or None.
        predictions: ``[size]``, of the same form, or None.
        class_names: The name of each class index.
        feature_names: The name of each number of a vector, ``D`` of them.

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
        *,
        inputs: Any = None,
        labels: Any = None,
        predictions: Any = None,
        class_names: Sequence[str] | None = None,
        feature_names: Sequence[str] | None = None,
    ) -> None:
        self.role = role
        self.size = size
        inputs = _without_records(inputs, feature_names)
        self.inputs = None if inputs is None else as_array(inputs, f"{role}_inputs")
        self.labels = None if labels is None else _names(labels, f"{role}_labels", class_names)
        self.predictions = None if predictions is None else _names(predictions, f"{role}_predictions", class_names)
        self.has_classes = labels is not None and _are_classes(as_array(labels, f"{role}_labels"))
        for name, values in (("inputs", self.inputs), ("labels", self.labels), ("predictions", self.predictions)):
            if values is not None and len(values) != size:
                raise InputError(
                    f"{role}_{name} has {len(values)} examples; expected {size}, one for each {role} example."
                )
        self.kind: Kind = _kind(self.inputs, f"{role}_inputs")
        self._low, self._high = (
            _limits(self.inputs) if self.inputs is not None and self.kind == "images" else (0.0, 1.0)
        )
        # if any image has missing pixels all get colors, so that thumbnails can share a sheet
        self._has_missing = self.inputs is not None and self.kind == "images" and _has_nan(self.inputs)
        self.feature_names = self._check_names(feature_names)

    def _check_names(self, names: Sequence[str] | None) -> list[str] | None:
        """Return a name for each number of a vector; None for other inputs."""
        if names is None or self.kind != "vectors" or self.inputs is None:
            return None
        width = 1 if self.inputs.ndim == 1 else self.inputs.shape[1]
        if len(names) != width:
            raise InputError(
                f"feature_names has {len(names)} names; expected {width}, one for each number of {self.role}_inputs."
            )
        return [str(name) for name in names]

    def label(self, index: int) -> str:
        """Return the name of an example's label; empty without labels."""
        return "" if self.labels is None else self.labels[index]

    def prediction(self, index: int) -> str:
        """Return the name of the model's prediction; empty without predictions."""
        return "" if self.predictions is None else self.predictions[index]

    def image(self, index: int) -> np.ndarray:
        """Return an image between 0 and 1, float64: ``[H, W]`` or ``[H, W, C]`` with C of 3 or 4."""
        assert self.inputs is not None
        pixels = np.asarray(self.inputs[index], dtype=np.float64)
        if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4):
            pixels = np.moveaxis(pixels, 0, -1)  # [C, H, W] -> [H, W, C]
        if pixels.ndim == 3 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        scaled = np.clip((pixels - self._low) / (self._high - self._low), 0.0, 1.0)
        return _mark_missing(scaled) if self._has_missing else scaled

    def text(self, index: int) -> str:
        """Return an example's text, unchanged; empty for other inputs."""
        return str(self.inputs[index]) if self.inputs is not None and self.kind == "texts" else ""

    def vector(self, index: int) -> np.ndarray:
        """Return an example's numbers ``[D]``; empty for other inputs."""
        if self.inputs is None or self.kind != "vectors":
            return np.zeros(0)
        return np.atleast_1d(self.inputs[index])


def as_array(values: Any, name: str) -> np.ndarray:
    """Return a tensor or a sequence of tensors, numbers or texts as an array, without a copy if possible."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return np.asarray(values.numpy() if values.dtype.is_floating_point is False else values.float().numpy())
    if not isinstance(values, np.ndarray) and len(values) and isinstance(values[0], Tensor):
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
    if labels.dtype.kind == "f" and not (labels == np.round(labels)).all():
        return False
    return 0 < len(np.unique(labels)) <= (MAX_FLOAT_CLASSES if labels.dtype.kind == "f" else MAX_CLASSES)


def _are_indices(values: np.ndarray, num_classes: int) -> bool:
    """Return whether floats or bools, as labels of two classes often are, are class indices."""
    if values.dtype.kind not in "fb":
        return False
    return bool(((values == np.round(values)) & (values >= 0) & (values < num_classes)).all())


def _without_records(inputs: Any, feature_names: Sequence[str] | None) -> Any:
    """Return records as texts with a line for each field, and anything else unchanged."""
    if isinstance(inputs, np.ndarray) and inputs.dtype == object and inputs.ndim == 2:
        names = feature_names or [f"field {place}" for place in range(inputs.shape[1])]
        inputs = [dict(zip(names, values, strict=False)) for values in inputs]
    if isinstance(inputs, Sequence) and len(inputs) and isinstance(inputs[0], Mapping):
        return ["\n".join(f"{name}: {value}" for name, value in record.items()) for record in inputs]
    return inputs


def _kind(inputs: np.ndarray | None, name: str) -> Kind:
    """Return the kind of inputs from their dtype and number of dimensions."""
    if inputs is None:
        return "absent"
    if inputs.dtype.kind in "UO":
        return "texts"
    if inputs.ndim <= 2:
        return "vectors"
    if inputs.ndim == 3 or (inputs.ndim == 4 and (inputs.shape[1] in (1, 3, 4) or inputs.shape[3] in (1, 3, 4))):
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


def _has_nan(values: np.ndarray) -> bool:
    """Return whether any value is NaN."""
    return values.dtype.kind == "f" and bool(np.isnan(values).any())


def _mark_missing(image: np.ndarray) -> np.ndarray:
    """Return an image in color with NaN pixels in `MISSING_COLOR`."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    image[np.isnan(image).any(axis=-1)] = (*MISSING_COLOR, 1.0)[: image.shape[-1]]
    return image


def _names(values: Any, name: str, class_names: Sequence[str] | None) -> list[str]:
    """Return each label as text: the class's name, the index, or a number to four digits."""
    array = as_array(values, name)
    if array.ndim != 1:
        raise InputError(f"{name} has shape {list(array.shape)}; expected one value for each example.")
    if class_names is not None and _are_indices(array, len(class_names)):
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
