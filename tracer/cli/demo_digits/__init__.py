"""The demo: flipped labels among handwritten digits, with data in the package; also examples/mislabeled_digits.py."""

from tracer.cli.demo_digits.digits import Settings
from tracer.cli.demo_digits.findings import run

__all__ = ["Settings", "run"]
