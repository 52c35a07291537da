"""How a row of the data is shown: as an image, a text, the numbers of a vector, or by its index alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from tracer.errors import InputError

Kind = Literal["images", "texts", "vectors", "absent"]

MAX_CLASSES = 1000
"""With more different labels they are taken for numbers or names of rows, not for classes."""


MAX_FLOAT_CLASSES = 20
"""Likewise for labels that are floats, as those of two classes often are."""

MISSING_COLOR = (1.0, 0.0, 1.0)
"""Pixels that are NaN are drawn magenta, which neither gray images nor many photographs have."""


class Samples:
    """Inputs, labels and predictions of ``size`` rows, ready to be shown one by one.

    Args:
        role: What the rows are, ``"train"`` or ``"target"``; used in messages and captions.
        size: The number of rows.
        inputs: Images ``[size, H, W]``, ``[size, C, H, W]`` or ``[size, H, W, C]`` with C of 1, 3 or 4 (channels first
            where both readings are possible), vectors ``[size, D]`` or ``[size]``, texts, records (a mapping a row, or
            a two-dimensional array of objects), or None.
        labels: ``[size]``, class indices, names or numbers, or None.
        predictions: ``[size]``, likewise.
        class_names: The name of each class index.
        feature_names: The name of each number of a vector, ``D`` of them.

    Raises:
        InputError: If a length differs from ``size``, or a label is no index of ``class_names``.

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
                raise InputError(f"{role}_{name} has {len(values)} rows; expected {size}, one for each {role} row.")
        self.kind: Kind = _kind(self.inputs, f"{role}_inputs")
        self._low, self._high = (
            _limits(self.inputs) if self.inputs is not None and self.kind == "images" else (0.0, 1.0)
        )
        self._has_missing = self.inputs is not None and self.kind == "images" and _has_nan(self.inputs)
        self.feature_names = self._check_names(feature_names)

    def _check_names(self, names: Sequence[str] | None) -> list[str] | None:
        """Return one name a number where the rows are vectors."""
        if names is None or self.kind != "vectors" or self.inputs is None:
            return None
        width = 1 if self.inputs.ndim == 1 else self.inputs.shape[1]
        if len(names) != width:
            raise InputError(f"feature_names has {len(names)} names; {self.role}_inputs has {width} numbers a row.")
        return [str(name) for name in names]

    def label(self, row: int) -> str:
        """Return the name of the row's label; empty where labels are absent."""
        return "" if self.labels is None else self.labels[row]

    def prediction(self, row: int) -> str:
        """Return the name of what the model predicts; empty where predictions are absent."""
        return "" if self.predictions is None else self.predictions[row]

    def image(self, row: int) -> np.ndarray:
        """Return the row as an image between 0 and 1: ``[H, W]`` or ``[H, W, C]`` with C of 3 or 4.

        Values are scaled by the least and greatest of all images, unless these lie in [0, 1] (floats) or are bytes.
        Where pixels of any image are NaN, all images have colours, and these pixels are `MISSING_COLOR`.

        Args:
            row: The row's index.

        Returns:
            The image, float64.
        """
        assert self.inputs is not None
        pixels = np.asarray(self.inputs[row], dtype=np.float64)
        if pixels.ndim == 3 and pixels.shape[0] in (1, 3, 4):
            pixels = np.moveaxis(pixels, 0, -1)  # [C, H, W] -> [H, W, C]
        if pixels.ndim == 3 and pixels.shape[-1] == 1:
            pixels = pixels[..., 0]
        scaled = np.clip((pixels - self._low) / (self._high - self._low), 0.0, 1.0)
        return _mark_missing(scaled) if self._has_missing else scaled

    def text(self, row: int) -> str:
        """Return the row's text, as it came; empty where rows are no texts."""
        return str(self.inputs[row]) if self.inputs is not None and self.kind == "texts" else ""

    def vector(self, row: int) -> np.ndarray:
        """Return the row's numbers ``[D]``; empty where rows are no vectors."""
        if self.inputs is None or self.kind != "vectors":
            return np.zeros(0)
        return np.atleast_1d(self.inputs[row])


def as_array(values: Any, name: str) -> np.ndarray:
    """Return a tensor, a sequence of tensors, numbers or texts as an array without copying where possible.

    Args:
        values: What came.
        name: The argument's name, for the message.

    Returns:
        The array; its first dimension counts rows.

    Raises:
        InputError: If the rows do not form one array.
    """
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
        raise InputError(f"{name} must be an array, a tensor or a list of rows of one shape, or of texts.")
    if array.dtype == object and array.size == 0 and len(values):
        raise InputError(f"{name} has rows of different shapes; give images or vectors of one shape, or texts.")
    return array


def as_text(value: Any) -> str:
    r"""Return a name as text that can be drawn and written: what UTF-8 cannot hold is replaced by its number.

    >>> as_text("ant \ud800")
    'ant \\ud800'
    """
    return str(value).encode("utf-8", "backslashreplace").decode("utf-8")


def class_codes(*groups: Samples, class_names: Sequence[str] | None = None) -> tuple[list[np.ndarray], list[str]]:
    """Return the labels of groups of rows as indices into one list of names.

    Args:
        *groups: Rows that have classes as labels.
        class_names: In which order names that occur come first.

    Returns:
        An index for each row of each group, int64, and the names: those of ``class_names``, then others, sorted, whole
        numbers by their value.

    >>> samples = Samples("train", 3, labels=[10, 9, 10])
    >>> class_codes(samples)
    ([array([1, 0, 1])], ['9', '10'])
    """
    found = {name for group in groups for name in (group.labels or ())}
    names = list(dict.fromkeys(as_text(name) for name in class_names or ()))
    names += sorted(found.difference(names), key=_by_value)
    places = {name: place for place, name in enumerate(names)}
    return [np.array([places[name] for name in group.labels or ()], dtype=np.int64) for group in groups], names


def _by_value(name: str) -> tuple[bool, int, str]:
    """Return a sort key that puts whole numbers first and in order."""
    whole = name.lstrip("-").isdecimal()
    return not whole, int(name) if whole else 0, name


def _are_classes(labels: np.ndarray) -> bool:
    """Tell classes from numbers: few different values, and of floats very few, without fractions."""
    if labels.dtype.kind == "f" and not (labels == np.round(labels)).all():
        return False
    return 0 < len(np.unique(labels)) <= (MAX_FLOAT_CLASSES if labels.dtype.kind == "f" else MAX_CLASSES)


def _are_indices(values: np.ndarray, num_classes: int) -> bool:
    """Tell whether floats or bools, as labels of two classes often are, are class indices."""
    if values.dtype.kind not in "fb":
        return False
    return bool(((values == np.round(values)) & (values >= 0) & (values < num_classes)).all())


def _without_records(inputs: Any, feature_names: Sequence[str] | None) -> Any:
    """Return records as texts of one line a field, and anything else as it is."""
    if isinstance(inputs, np.ndarray) and inputs.dtype == object and inputs.ndim == 2:
        names = feature_names or [f"field {place}" for place in range(inputs.shape[1])]
        inputs = [dict(zip(names, values, strict=False)) for values in inputs]
    if isinstance(inputs, Sequence) and len(inputs) and isinstance(inputs[0], Mapping):
        return ["\n".join(f"{name}: {value}" for name, value in record.items()) for record in inputs]
    return inputs


def _kind(inputs: np.ndarray | None, name: str) -> Kind:
    """Return how the inputs are shown, from their dtype and number of dimensions."""
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
        "3 or 4, vectors [N, D] or texts. Pass what should be shown, for example one channel: inputs[:, 0]."
    )


def _limits(images: np.ndarray) -> tuple[float, float]:
    """Return which values are drawn as black and as white: the least and greatest that are finite, or a usual range."""
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
    """Tell whether any value is NaN."""
    return values.dtype.kind == "f" and bool(np.isnan(values).any())


def _mark_missing(image: np.ndarray) -> np.ndarray:
    """Return an image with colours in which pixels that are NaN stand out."""
    if image.ndim == 2:
        image = np.repeat(image[..., None], 3, axis=-1)
    image[np.isnan(image).any(axis=-1)] = (*MISSING_COLOR, 1.0)[: image.shape[-1]]
    return image


def _names(values: Any, name: str, class_names: Sequence[str] | None) -> list[str]:
    """Return each label as text: the class's name, the index, or a number to four digits."""
    array = as_array(values, name)
    if array.ndim != 1:
        raise InputError(f"{name} has shape {list(array.shape)}; expected one value a row.")
    if class_names is not None and _are_indices(array, len(class_names)):
        array = array.astype(np.int64)
    if class_names is None or array.dtype.kind not in "iu":
        return [f"{value:.4g}" if array.dtype.kind == "f" else as_text(value) for value in array]
    outside = np.flatnonzero((array < 0) | (array >= len(class_names)))
    if outside.size:
        raise InputError(
            f"{name} holds {array[outside[0]]} at row {outside[0]}, but class_names has {len(class_names)} names "
            f"(0 to {len(class_names) - 1})."
        )
    texts = [as_text(name) for name in class_names]
    return [texts[int(value)] for value in array]
