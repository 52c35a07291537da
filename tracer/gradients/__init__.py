"""Per-sample gradients of any PyTorch model."""

from tracer.gradients.audit import Sink
from tracer.gradients.engine import METHODS, GradientEngine, GradientsChanged
from tracer.gradients.isolation import isolated
from tracer.gradients.layers import LayerCall, register_layer_rule
from tracer.gradients.selection import ParamSelection, select_parameters

__all__ = [
    "METHODS",
    "GradientEngine",
    "GradientsChanged",
    "LayerCall",
    "ParamSelection",
    "Sink",
    "isolated",
    "register_layer_rule",
    "select_parameters",
]
