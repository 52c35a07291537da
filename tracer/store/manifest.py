"""The settings that decide every number of a store: written once, compared whenever the store is opened again.

It is stored in the attributes of the store's root group.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tracer._core.text import listing
from tracer.errors import InputError, InputTypeError, MismatchError, StoreError
from tracer.store.feature_storage import FeatureStorage

FORMAT = "tracer"
FORMAT_VERSION = 10
_REQUIRED = ("train_set_size", "feature_dim", "storage")

logger = logging.getLogger("tracer")


def current_versions() -> dict[str, str]:
    """Return the versions of the packages that numbers come from; ``"unknown"`` if one is not installed."""
    versions = {}
    for name, distribution in (("tracer", "tracin"), ("torch", "torch"), ("numpy", "numpy"), ("zarr", "zarr")):
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "unknown"
    return versions


def json_value(value: Any, where: str) -> Any:
    """Return a copy of a value as plain JSON; ``where`` names it in errors.

    Args:
        value: Tuples become lists, numpy scalars become Python numbers.
        where: The name of the value, for errors.

    Returns:
        The copy, equal to reading it back from JSON.

    Raises:
        InputTypeError: If a part of it is of another type.
        InputError: If a number is NaN or infinite.

    >>> json_value({"shape": (2, 3)}, "settings")
    {'shape': [2, 3]}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} is {value}: expected a finite number")
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, (list, tuple)):
        return [json_value(item, f"{where}[{position}]") for position, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: json_value(item, f"{where}.{key}") for key, item in value.items()}
    raise InputTypeError(
        f"{where} is of type {type(value).__name__}: expected JSON values "
        "(dicts with str keys, lists, str, bool, int, float, None); convert it first"
    )


@dataclass(frozen=True)
class Manifest:
    """The settings that a store was made with.

    Attributes:
        settings: Every setting that changes numbers, as JSON values, compared when a store is opened again. The store
            itself reads three of them: ``train_set_size`` (int), ``feature_dim`` (int) and ``storage``
            (``"float32"``, ``"float16"``, ``"int8"``, or ``"none"``: features are not stored). ``params`` maps names to
            shapes and its order counts.
        info: Recorded and never compared, for example the model's class.
        versions: The packages that made the store; another version is only logged.
        layout: The division into files, decided when a store is made: ``chunk_rows``, the training examples of one
            file, and ``processes``, the number of processes to share them.
        format_version: Of the files; a store with another one is refused.

    >>> manifest = Manifest({"train_set_size": 5, "feature_dim": 2, "storage": "float16"})
    >>> manifest.train_set_size, manifest.storage
    (5, 'float16')
    """

    settings: Mapping[str, Any]
    info: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=current_versions)
    format_version: int = FORMAT_VERSION
    layout: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Normalise to plain JSON and check the settings that the store reads."""
        for name in ("settings", "info", "versions", "layout"):
            object.__setattr__(self, name, json_value(getattr(self, name), name))
        missing = [name for name in _REQUIRED if name not in self.settings]
        if missing:
            raise InputError(f"settings lack {missing}: expected at least {list(_REQUIRED)}")
        for name in ("train_set_size", "feature_dim"):
            value = self.settings[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise InputError(f"{name} is {value!r}: expected an integer of at least 1")
        FeatureStorage(self.settings["storage"])

    @property
    def train_set_size(self) -> int:
        """The number of training examples N."""
        return int(self.settings["train_set_size"])

    @property
    def feature_dim(self) -> int:
        """The number of values of an example's features."""
        return int(self.settings["feature_dim"])

    @property
    def storage(self) -> str:
        """The setting's name: ``"float32"``, ``"float16"``, ``"int8"`` or ``"none"``."""
        return self.feature_storage.name

    @property
    def feature_storage(self) -> FeatureStorage:
        """The dtype of stored features, and whether they are stored at all."""
        return FeatureStorage(str(self.settings["storage"]))

    @property
    def is_collected(self) -> bool:
        """Whether rows of training examples are sums over the steps of a training, by `GradientCollector`."""
        return "collected" in self.info

    @property
    def shares_projection(self) -> bool:
        """Whether features of different checkpoints can be multiplied: they have one projection, or are exact."""
        projector = self.settings.get("projector") or {}
        return bool(self.settings.get("shared_projection")) or projector.get("kind") == "none"

    def attributes(self) -> dict[str, Any]:
        """Return the manifest as attributes of the store's root group."""
        return {
            "format": FORMAT,
            "format_version": self.format_version,
            "settings": dict(self.settings),
            "info": dict(self.info),
            "versions": dict(self.versions),
            "layout": dict(self.layout),
        }

    @classmethod
    def from_attributes(cls, attributes: Mapping[str, Any], where: object) -> Manifest:
        """Read a manifest back from a store's root group; ``where`` is the store's directory, for errors."""
        if attributes.get("format") != FORMAT:
            raise StoreError(
                f"{where} holds a zarr group that this library did not write: expected the attribute "
                f"format={FORMAT!r}, got {attributes.get('format')!r}; choose another save_dir"
            )
        version = attributes.get("format_version")
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise StoreError(
                f"{where} has format version {version}, this package knows up to {FORMAT_VERSION}: upgrade the package"
            )
        if isinstance(version, int) and version < FORMAT_VERSION:
            raise StoreError(
                f"{where} has format version {version} of an earlier release; expected {FORMAT_VERSION}, whose tables "
                "have other arrays: featurize again into a new save_dir, or use the release that "
                "wrote it"
            )
        try:
            layout = {str(name): int(value) for name, value in attributes["layout"].items()}
            if layout and min(layout["chunk_rows"], layout["processes"]) < 1:
                raise ValueError(f"the layout is {layout}")
            if not all(
                type(size) is int for shape in attributes["settings"].get("params", {}).values() for size in shape
            ):
                raise TypeError("expected the shapes of parameters")
            return cls(
                attributes["settings"],
                attributes["info"],
                attributes["versions"],
                int(attributes["format_version"]),
                layout,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"the manifest in {where}/zarr.json is damaged ({error!r}): restore it or choose another save_dir"
            ) from error


def differences(stored: Manifest, asked: Manifest) -> list[str]:
    """Return the differences between two manifests' settings, such as ``projector.seed: stored 0, asked 1``."""
    return list(_differences("", stored.settings, asked.settings))


def check_same(stored: Manifest, asked: Manifest, where: object) -> None:
    """Check that a store at ``where`` may be continued with these settings; other package versions are only logged."""
    lines = differences(stored, asked)
    if len(lines) == 1 and stored.train_set_size < asked.train_set_size:
        raise MismatchError(
            f"{where} has {stored.train_set_size} training rows, got train_set_size={asked.train_set_size}. To add "
            f"rows after the existing ones, call Tracer.open({str(where)!r}).grow({asked.train_set_size}) first; else "
            "pass another save_dir."
        )
    if lines:
        raise MismatchError(
            f"{where} was written with other settings:\n  - "
            + "\n  - ".join(lines)
            + "\nPass another save_dir to start again, or the stored values to continue; if you do not need what is "
            "stored, remove the directory."
        )
    for line in _differences("", stored.versions, asked.versions):
        logger.info("%s was written with another version of %s", where, line)


def _differences(path: str, stored: Any, asked: Any) -> Iterator[str]:
    """Yield the lines of `differences` for one pair of values, at a dotted path."""
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        if path == "params":
            yield from _param_differences(stored, asked)
            return
        for key in [*stored, *(key for key in asked if key not in stored)]:
            inner = f"{path}.{key}" if path else key
            if key not in asked:
                yield f"{inner}: stored {_short(stored[key])}, asked nothing"
            elif key not in stored:
                yield f"{inner}: stored nothing, asked {_short(asked[key])}"
            else:
                yield from _differences(inner, stored[key], asked[key])
    elif stored != asked or isinstance(stored, bool) != isinstance(asked, bool):
        yield f"{path}: stored {_short(stored)}, asked {_short(asked)}"


def _param_differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[str]:
    """Yield which parameters were added, removed, reshaped or put in another order."""
    removed = [repr(name) for name in stored if name not in asked]
    added = [repr(name) for name in asked if name not in stored]
    reshaped = [
        f"{name!r} stored {stored[name]}, asked {asked[name]}"
        for name in stored
        if name in asked and stored[name] != asked[name]
    ]
    for names, what in ((removed, "only stored"), (added, "only asked"), (reshaped, "of another shape")):
        if names:
            yield f"params: {len(names)} {what}: {listing(names)}"
    if not removed and not added:
        for position, (before, now) in enumerate(zip(stored, asked, strict=True)):
            if before != now:
                yield f"params: in another order, first at position {position}: stored {before!r}, asked {now!r}"
                return


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
