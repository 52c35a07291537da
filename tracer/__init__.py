"""Tracer: which training examples made a PyTorch model do what it did.

`attribute` is the one call for the usual case; `Tracer` is the scorer it is built on.
"""

from tracer.attribute import Attribution, attribute
from tracer.curvature import Regularization
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
from tracer.ideal import IdealRecorder
from tracer.ideal_record import IdealRecord, read_ideal
from tracer.projection import Projector, register_projector
from tracer.recording import CheckpointRecord, CheckpointRecorder, Recording, load_checkpoints, open_recording
from tracer.store import Verification, verify
from tracer.tasks import LanguageModeling, Task, loss_outputs
from tracer.tokens import token_influence
from tracer.tracer import Tracer
from tracer.types import SampleOutputs, TopK

__version__ = "0.1.0"

__all__ = [
    "Attribution",
    "BatchError",
    "CallOrderError",
    "CheckpointError",
    "CheckpointRecord",
    "CheckpointRecorder",
    "GradientError",
    "IdealRecord",
    "IdealRecorder",
    "IncompleteError",
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
    "Task",
    "TopK",
    "Tracer",
    "TracerError",
    "Verification",
    "attribute",
    "load_checkpoints",
    "loss_outputs",
    "open_recording",
    "read_ideal",
    "register_layer_rule",
    "register_projector",
    "token_influence",
    "verify",
]
