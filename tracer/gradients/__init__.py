"""Per-sample gradients of any PyTorch model."""

from tracer.gradients.engine import METHODS, GradientEngine, Sink
from tracer.gradients.isolation import isolated
from tracer.gradients.layers import LayerCall, register_layer_rule
from tracer.gradients.selection import ParamSelection, select_parameters

__all__ = [
    "METHODS",
    "GradientEngine",
    "LayerCall",
    "ParamSelection",
    "Sink",
    "isolated",
    "register_layer_rule",
    "select_parameters",
]
