"""The storage of features: their dtype, or none (``storage="none"``)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer._core.validation import check_choice
from tracer.errors import CallOrderError, InputError

STORAGES = ("float32", "float16", "int8", "none")


@dataclass(frozen=True)
class FeatureStorage:
    """The setting ``storage`` and everything that follows from it.

    Attributes:
        name: ``"float32"``, ``"float16"``, ``"int8"``, or ``"none"``: features are not stored.

    >>> FeatureStorage("int8").row_bytes(4096), FeatureStorage("none").row_bytes(4096)
    (4096, 0)
    """

    name: str

    def __post_init__(self) -> None:
        """Check the name."""
        check_choice("storage", self.name, STORAGES)

    @classmethod
    def default(cls, projector: str, needs_features: bool) -> str:
        """Return the storage to use if none was asked for: exact gradients are stored only if scores need them."""
        if projector != "none":
            return "float16"
        return "float32" if needs_features else "none"

    @property
    def stores_features(self) -> bool:
        """Whether tables have features."""
        return self.name != "none"

    def row_bytes(self, dim: int) -> int:
        """Return the bytes of one stored row of ``dim`` values."""
        return dim * np.dtype(self.name).itemsize if self.stores_features else 0

    def check_projector(self, projector: str) -> None:
        """Raise `InputError` unless scores can be computed from the stored values of gradients projected like this."""
        if not self.stores_features and projector != "none":
            raise InputError(
                f"expected projector='none' with storage='none', got projector={projector!r}: without stored features, "
                "scores are computed from exact gradients; pass projector='none', or storage='float16'."
            )

    def require_features(self, what: str, instead: str = "") -> None:
        """Refuse a call or argument, for example ``"groups="``, if features are not stored; ``instead`` adds advice."""
        if not self.stores_features:
            raise CallOrderError(
                f"{what} needs stored features and this store has storage='none'; {instead}featurize into another "
                "save_dir with storage='float32' or 'float16' (projector='none' keeps gradients exact)."
            )
