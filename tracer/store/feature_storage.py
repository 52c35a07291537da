"""The storage of features: their dtype, or none (``storage="none"``)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracer._core.validation import check_choice
from tracer.errors import CallOrderError, InputError

STORAGES = ("float32", "float16", "int8", "binary", "none")


@dataclass(frozen=True)
class FeatureStorage:
    """The setting ``storage`` and everything that follows from it.

    Attributes:
        name: ``"float32"``, ``"float16"``, ``"int8"``, ``"binary"``: the signs of training examples' features; or
            ``"none"``: features are not stored.

    >>> [FeatureStorage(name).row_bytes(4096) for name in ("int8", "binary", "none")]
    [4096, 512, 0]
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

    @property
    def is_binary(self) -> bool:
        """Whether eight features are stored in a byte."""
        return self.name == "binary"

    @property
    def of_targets(self) -> str:
        """The storage of targets: of few rows, more than signs are stored."""
        return "float16" if self.is_binary else self.name

    @property
    def dtype(self) -> str:
        """The dtype of the stored array."""
        return "uint8" if self.is_binary else self.name

    def columns(self, dim: int) -> int:
        """Return the columns of the stored array of rows of ``dim`` values."""
        return dim // 8 if self.is_binary else dim

    def dim(self, columns: int) -> int:
        """Return the values of a row of a stored array with so many columns."""
        return columns * 8 if self.is_binary else columns

    def row_bytes(self, dim: int) -> int:
        """Return the bytes of one stored row of ``dim`` values."""
        return self.columns(dim) * np.dtype(self.dtype).itemsize if self.stores_features else 0

    def check_projector(self, projector: str, dim: int) -> None:
        """Raise `InputError` unless scores can be computed from the stored values of gradients projected like this."""
        if self.is_binary and (projector == "none" or dim < 64 or dim & (dim - 1)):
            raise InputError(
                f"storage='binary' got projector={projector!r} and proj_dim={dim}; expected a projection to a power of "
                "two, 64 or more, since features are rotated before their signs are taken. proj_dim=32768 takes 4 KB."
            )
        if not self.stores_features and projector != "none":
            raise InputError(
                f"expected projector='none' with storage='none', got projector={projector!r}: without stored features, "
                "scores are computed from exact gradients; pass projector='none', or storage='float16'."
            )

    def require_values(self, what: str) -> None:
        """Refuse what needs more of training examples' features than their signs."""
        if self.is_binary:
            raise CallOrderError(
                f"{what} needs a kernel of training examples, and this store has storage='binary', whose rows are "
                "signs: use 'tracin' or 'cosine', or featurize into another save_dir with storage='int8'."
            )

    def require_features(self, what: str, instead: str = "") -> None:
        """Refuse a call or argument, for example ``"groups="``, if features are not stored; ``instead`` adds advice."""
        if not self.stores_features:
            raise CallOrderError(
                f"{what} needs stored features and this store has storage='none'; {instead}featurize into another "
                "save_dir with storage='float32' or 'float16' (projector='none' keeps gradients exact)."
            )
