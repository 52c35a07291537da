"""How a model is trained: the optimizer, its learning rates, batches and epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from tracer._core.validation import check_count
from tracer.errors import InputError, InputTypeError, nearest_name

_OPTIMIZERS = ("sgd", "adamw")
_SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Recipe:
    """The settings of an ordinary training run; the loss of a step is the mean of the task's over the batch's rows.

    Attributes:
        optimizer: ``sgd`` (`torch.optim.SGD`, no dampening) or ``adamw`` (`torch.optim.AdamW`, betas 0.9 and 0.999).
        learning_rate: Of the first step.
        momentum: Of SGD.
        weight_decay: As the optimizer has it: added to SGD's gradient, taken from AdamW's weights; for all parameters.
        batch_size: Rows a step; an epoch's last step takes those that are left.
        epochs: How often each row comes.
        schedule: ``constant``; or step by step to zero, which comes right after the last step: ``linear``, or
            ``cosine`` as in `torch.optim.lr_scheduler.CosineAnnealingLR`.

    Raises:
        InputError: A name is not known, a number is out of range, or ``adamw`` came with momentum.
        InputTypeError: A number is none.

    >>> Recipe(optimizer="adamw", learning_rate=1e-3, epochs=5).batch_size
    64
    """

    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 64
    epochs: int = 20
    schedule: str = "constant"

    def __post_init__(self) -> None:
        for field, choices in (("optimizer", _OPTIMIZERS), ("schedule", _SCHEDULES)):
            name = getattr(self, field)
            if name not in choices:
                raise InputError(f"{field}={name!r} is not known; {nearest_name(name, choices)}.")
        for field, bound in (("learning_rate", math.inf), ("momentum", 1.0), ("weight_decay", math.inf)):
            object.__setattr__(self, field, _number_below(getattr(self, field), field, bound))
        for field in ("batch_size", "epochs"):
            object.__setattr__(self, field, check_count(getattr(self, field), field))
        if self.optimizer == "adamw" and self.momentum:
            raise InputError(f"momentum={self.momentum} came with optimizer='adamw'; expected 0, it is for 'sgd'.")

    def make_optimizer(self, parameters: Iterable[tuple[str, Tensor]]) -> torch.optim.Optimizer:
        """Return the optimizer of named parameters.

        Args:
            parameters: Names and leaf tensors. Its steps are elementwise, so tensors of many models stacked are moved
                as each model's own would be.

        Returns:
            A new optimizer; its state dict has the names as ``param_names``.
        """
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def rate_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step.

        Args:
            step: 0 for the first.
            num_steps: How many the run has.

        Returns:
            The rate.

        >>> [Recipe(learning_rate=1.0, schedule="linear").rate_at(step, 4) for step in range(4)]
        [1.0, 0.75, 0.5, 0.25]
        """
        if self.schedule == "linear":
            return self.learning_rate * (num_steps - step) / num_steps
        if self.schedule == "cosine":
            return self.learning_rate * (1.0 + math.cos(math.pi * step / num_steps)) / 2.0
        return self.learning_rate


def _number_below(value: object, field: str, bound: float) -> float:
    """Return a number from 0 to below a bound.

    Args:
        value: What the user passed.
        field: Its name.
        bound: The bound.

    Returns:
        The number as float.

    Raises:
        InputTypeError: It is none.
        InputError: It is out of range.
    """
    try:
        number = float(value)  # type: ignore[arg-type]  # what cannot be converted is told below
    except (TypeError, ValueError):
        raise InputTypeError(f"{field} is {value!r}; expected a number.") from None
    if not 0.0 <= number < bound:
        raise InputError(f"{field} is {number}; expected 0 or more{'' if bound == math.inf else f', below {bound:g}'}.")
    return number
