"""Tracer: which training examples made a PyTorch model do what it did."""

__version__ = "0.1.0"
