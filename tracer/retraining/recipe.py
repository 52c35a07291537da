"""The settings of a training run: the optimizer, its learning rates, batches and epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tracer._core.validation import check_choice, check_count
from tracer.errors import InputError, InputTypeError

_OPTIMIZERS = ("sgd", "adamw")
_SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Recipe:
    """The settings of an ordinary training run; the loss of a step is the mean of the task's loss over the batch.

    Attributes:
        optimizer: ``sgd`` (`torch.optim.SGD`, no dampening) or ``adamw`` (`torch.optim.AdamW`, betas 0.9 and 0.999).
        learning_rate: The learning rate of the first step. Default: 0.1.
        momentum: The momentum of SGD. Default: 0.
        weight_decay: As in the optimizer: added to SGD's gradient, subtracted from AdamW's weights; for all parameters.
        batch_size: Examples per step; an epoch's last step takes the remaining ones. Default: 64.
        epochs: The number of passes over the examples. Default: 20.
        schedule: ``constant``; or falling at every step to reach zero right after the last one: ``linear``, or
            ``cosine`` as in `torch.optim.lr_scheduler.CosineAnnealingLR`.

    Raises:
        InputError: If a name is unknown, a number is out of range, or ``adamw`` has momentum.
        InputTypeError: If a value is not a number.

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
            check_choice(field, getattr(self, field), choices)
        for field, bound in (("learning_rate", math.inf), ("momentum", 1.0), ("weight_decay", math.inf)):
            try:
                number = float(getattr(self, field))
            except (TypeError, ValueError):
                raise InputTypeError(f"{field} is {getattr(self, field)!r}; expected a number.") from None
            if not 0.0 <= number < bound:
                below = "" if bound == math.inf else f", below {bound:g}"
                raise InputError(f"{field} is {number}; expected 0 or more{below}.")
            object.__setattr__(self, field, number)
        for field in ("batch_size", "epochs"):
            object.__setattr__(self, field, check_count(getattr(self, field), field))
        if self.optimizer == "adamw" and self.momentum:
            raise InputError(f"momentum={self.momentum} came with optimizer='adamw'; expected 0, it is for 'sgd'.")

    def make_optimizer(self, parameters: Iterable[tuple[str, Tensor]]) -> torch.optim.Optimizer:
        """Return a new optimizer of named leaf tensors, whose state dict has the names as ``param_names``."""
        # Steps are elementwise, so stacked tensors of many models move as each model's own would.
        if self.optimizer == "adamw":
            return torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        return torch.optim.SGD(
            parameters, lr=self.learning_rate, momentum=self.momentum, weight_decay=self.weight_decay
        )

    def at_strength(self, share: float) -> Recipe:
        """Return the recipe of a run in which every example has a share of its weight, with as many steps.

        Models that are trained on random halves of the examples are best predicted from a run at half strength, in the
        middle between examples that are in and out. It has the rates times the share: for SGD that is the loss times
        the share, and it holds for AdamW too, whose steps do not depend on the scale of the loss.

        Args:
            share: The share, above 0 and up to 1; 0.5 for random halves.

        Returns:
            The recipe.

        Raises:
            InputError: If the share is out of range.

        >>> Recipe(learning_rate=0.5).at_strength(0.5).learning_rate
        0.25
        """
        if not 0 < share <= 1:
            raise InputError(f"share is {share}; expected a number above 0, at most 1.")
        return replace(self, learning_rate=self.learning_rate * share)

    def rate_at(self, step: int, num_steps: int) -> float:
        """Return the learning rate of a step, counted from 0.

        Args:
            step: The step.
            num_steps: The number of steps of the run.

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
