"""Objects with TRAK's ``AbstractModelOutput`` interface as tasks."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tracer.data.tasks import Task
from tracer.errors import BatchError, InputTypeError
from tracer.types import Batch, SampleOutputs


def is_model_output(task: Any) -> bool:
    """Return whether an object or class has the methods of TRAK's ``AbstractModelOutput``."""
    return all(callable(getattr(task, name, None)) for name in ("get_output", "get_out_to_loss_grad"))


class ModelOutputTask(Task):
    """A task that asks an object of TRAK's ``AbstractModelOutput`` for f and the reweighting term.

    f is ``get_output`` of each example, and ``Q = -get_out_to_loss_grad``: TRAK's sign is that of the fall of the loss.
    The interface has no loss and no second derivative, so w is 0, and the loss is that of f as a margin,
    ``log(1 + exp(-f))``, which orders checkpoints and is shown in reports, and which no score depends on.

    Args:
        model_output: The object, or its class, which is called without arguments.
    """

    name = "model_output"

    def __init__(self, model_output: Any) -> None:
        if inspect.isclass(model_output):
            try:
                model_output = model_output()
            except TypeError as error:
                raise InputTypeError(
                    f"task is the class {model_output.__qualname__}, which cannot be made without arguments ({error}); "
                    f"pass an instance."
                ) from error
        self._wrapped = model_output

    def outputs(self, model: nn.Module, batch: Batch) -> SampleOutputs:
        """Return the object's outputs and reweighting terms; see `Task.outputs`."""
        if not isinstance(batch, (tuple, list)) or not all(isinstance(part, Tensor) for part in batch):
            raise BatchError(
                f"{type(self._wrapped).__name__}.get_output takes the parts of an example by position; expected a "
                f"batch that is a tuple of tensors, got {type(batch).__name__}."
            )
        weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        samples = zip(*(part.unbind() for part in batch), strict=True)
        found = [self._wrapped.get_output(model, weights, buffers, *sample) for sample in samples]
        output = torch.stack([each.reshape(()) for each in found])
        with torch.no_grad():
            fall = self._wrapped.get_out_to_loss_grad(model, weights, buffers, batch)
        fall, detached = fall.detach().reshape(len(output)).to(output.dtype), output.detach()
        return SampleOutputs(output, F.softplus(-detached), -fall, torch.zeros_like(detached))

    def settings(self) -> dict[str, Any]:
        """Return the qualified name of the object's class and its plain attributes."""
        kind = type(self._wrapped)
        plain = {key: value for key, value in vars(self._wrapped).items() if isinstance(value, (bool, int, float, str))}
        return {"name": self.name, "class": f"{kind.__module__}.{kind.__qualname__}", **dict(sorted(plain.items()))}
