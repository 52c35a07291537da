"""What capture raises inside the gradients room when a layer has to take the general way."""

from __future__ import annotations


class CaptureFailed(Exception):
    """A layer cannot be captured; never reaches a user.

    Args:
        layer: The layer's name.
        reason: Why.
        expanded: Whether the layer is only the first of those whose expanded outputs may be to blame.
    """

    def __init__(self, layer: str, reason: str, expanded: bool = False) -> None:
        super().__init__(f"{layer}: {reason}")
        self.layer, self.reason, self.expanded = layer, reason, expanded
