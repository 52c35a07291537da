"""Tracer: which training examples made a PyTorch model do what it did.

`attribute` is the one call for the usual case; `Tracer` is the scorer it is built on.

Names are imported on first use, since a second of imports for torch is too long for `tracer --help`, or for the
completion of a word.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tracer.api.attribution import Attribution, attribute
    from tracer.api.collecting import GradientCollector, IndexedDataset, collected_checkpoints
    from tracer.api.explained import ExplainedDocument, Explanation
    from tracer.api.language import build_store, load_store
    from tracer.api.token_influence import token_influence
    from tracer.api.tracer import Tracer
    from tracer.api.traker import TRAKer
    from tracer.data.named_tasks import BinaryClassification, Classification
    from tracer.data.tasks import Task, loss_outputs
    from tracer.data.token_tasks import LanguageModeling
    from tracer.errors import (
        BatchError,
        CallOrderError,
        CheckpointError,
        GradientError,
        IncompleteError,
        InputError,
        InputTypeError,
        MismatchError,
        MissingDependencyError,
        NonFiniteError,
        RankError,
        StoreError,
        TracerError,
    )
    from tracer.gradients import LayerCall, register_layer_rule
    from tracer.projection import Projector, register_projector
    from tracer.report.corrections import apply_corrections
    from tracer.scoring.regularization import Regularization
    from tracer.store import Verification, verify
    from tracer.training.recording import (
        CheckpointRecord,
        CheckpointRecorder,
        Recording,
        load_checkpoints,
        open_recording,
    )
    from tracer.training.tracin_ideal import IdealRecorder
    from tracer.training.tracin_ideal_record import IdealRecord, read_ideal
    from tracer.types import SampleOutputs, TopK

__version__ = "0.1.0"

_HOMES = {
    "tracer.api.attribution": ("Attribution", "attribute"),
    "tracer.api.explained": ("ExplainedDocument", "Explanation"),
    "tracer.api.language": ("build_store", "load_store"),
    "tracer.api.collecting": ("GradientCollector", "IndexedDataset", "collected_checkpoints"),
    "tracer.scoring.regularization": ("Regularization",),
    "tracer.errors": (
        "BatchError",
        "CallOrderError",
        "CheckpointError",
        "GradientError",
        "IncompleteError",
        "InputError",
        "InputTypeError",
        "MismatchError",
        "MissingDependencyError",
        "NonFiniteError",
        "RankError",
        "StoreError",
        "TracerError",
    ),
    "tracer.gradients": ("LayerCall", "register_layer_rule"),
    "tracer.training.tracin_ideal": ("IdealRecorder",),
    "tracer.training.tracin_ideal_record": ("IdealRecord", "read_ideal"),
    "tracer.projection": ("Projector", "register_projector"),
    "tracer.report.corrections": ("apply_corrections",),
    "tracer.training.recording": (
        "CheckpointRecord",
        "CheckpointRecorder",
        "Recording",
        "load_checkpoints",
        "open_recording",
    ),
    "tracer.store": ("Verification", "verify"),
    "tracer.data.named_tasks": ("BinaryClassification", "Classification"),
    "tracer.data.tasks": ("Task", "loss_outputs"),
    "tracer.data.token_tasks": ("LanguageModeling",),
    "tracer.api.token_influence": ("token_influence",),
    "tracer.api.tracer": ("Tracer",),
    "tracer.api.traker": ("TRAKer",),
    "tracer.types": ("SampleOutputs", "TopK"),
}
"""Where each public name is defined."""

__all__ = [
    "Attribution",
    "BatchError",
    "BinaryClassification",
    "CallOrderError",
    "CheckpointError",
    "CheckpointRecord",
    "CheckpointRecorder",
    "Classification",
    "ExplainedDocument",
    "Explanation",
    "GradientCollector",
    "GradientError",
    "IdealRecord",
    "IdealRecorder",
    "IncompleteError",
    "IndexedDataset",
    "InputError",
    "InputTypeError",
    "LanguageModeling",
    "LayerCall",
    "MismatchError",
    "MissingDependencyError",
    "NonFiniteError",
    "Projector",
    "RankError",
    "Recording",
    "Regularization",
    "SampleOutputs",
    "StoreError",
    "TRAKer",
    "Task",
    "TopK",
    "Tracer",
    "TracerError",
    "Verification",
    "apply_corrections",
    "attribute",
    "build_store",
    "collected_checkpoints",
    "load_checkpoints",
    "load_store",
    "loss_outputs",
    "open_recording",
    "read_ideal",
    "register_layer_rule",
    "register_projector",
    "token_influence",
    "verify",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            found = globals()[name] = getattr(importlib.import_module(module), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
