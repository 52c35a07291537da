"""Collect training examples' gradients while a model is trained, in place of a pass over them afterwards.

`collector` watches the loop, `shares` are what the examples of a batch contribute to a step, `checks` compare them with
the optimizer's gradient and with examples run apart from training, and `segments` are the sums in the store.
"""

from tracer.api.collecting.collector import GradientCollector
from tracer.api.collecting.indexed import IndexedDataset
from tracer.api.collecting.segments import collected_checkpoints

__all__ = ["GradientCollector", "IndexedDataset", "collected_checkpoints"]
