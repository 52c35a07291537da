"""The demo: flipped labels among handwritten digits, with data that comes with the package.

`tracer demo` runs it from wherever the package is installed; ``examples/mislabeled_digits.py`` is the same.
"""

from tracer.cli.demo_digits.digits import Settings
from tracer.cli.demo_digits.findings import run

__all__ = ["Settings", "run"]
