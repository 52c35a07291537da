"""What a method of attribution gets and gives, and what the field's methods share.

``N`` training rows, ``M`` targets. Scores are ``[N, M]``, positive for a proponent.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import compute_clock
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tracer.retraining import Recipe

clock = compute_clock()
"""Gives the seconds of methods: processor time, which other processes do not change."""

Rows = tuple[Tensor, Tensor]
"""Inputs and labels of rows, ``[B, ...]`` each."""

States = list[tuple[dict[str, Tensor], float]]
"""State dicts with their learning rates, in training order."""


@dataclass(frozen=True)
class Case:
    """What every method gets.

    Attributes:
        task: The task's kind, as tracer names it.
        model: The network in eval mode, with the weights of the last checkpoint. Methods get a copy.
        train: The N training rows.
        targets: The M targets.
        checkpoints: The checkpoints of one run.
        optimizers: The optimizer's state dict at each checkpoint of the run.
        ensemble: The checkpoints of independent runs, one after another.
        rate_sums: The sums of learning rates up to each of these since the one before, over 1 - momentum.
        half: The checkpoints of as many runs at half strength, with such sums.
        last_layer: The module that gives the logits.
        make_model: Builds an untrained network.
        recipe: How it was trained.
        batch_size: For methods that go through the rows in batches.
    """

    task: str
    model: nn.Module
    train: Rows
    targets: Rows
    checkpoints: States
    optimizers: list[dict[str, Any]]
    ensemble: States
    rate_sums: list[float]
    half: States
    last_layer: str
    make_model: Callable[[], nn.Module]
    recipe: Recipe
    batch_size: int = 100

    @property
    def sizes(self) -> tuple[int, int]:
        """N and M."""
        return len(self.train[0]), len(self.targets[0])

    @property
    def num_parameters(self) -> int:
        """The number of parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def layers(self) -> list[nn.Module]:
        """The modules that have parameters of their own."""
        return [module for module in self.model.modules() if list(module.parameters(recurse=False))]

    def copied(self, **changes: Any) -> Case:
        """Return the case with a model of its own, and with other changes."""
        return replace(self, model=copy.deepcopy(self.model), **changes)

    def states(self) -> list[nn.Module]:
        """Return a network in eval mode for each checkpoint."""
        models = [copy.deepcopy(self.model) for _ in self.checkpoints]
        for model, (state, _) in zip(models, self.checkpoints, strict=True):
            model.load_state_dict(state)
        return models


@dataclass(frozen=True)
class Found:
    """What a method gives.

    Attributes:
        name: The method's, as in tables. Several of one name differ in a setting; the first has the default.
        scores: ``[N, M]``, positive for proponents; None for methods that only rank rows.
        seconds: Processor time for all of it but ``suspicion``.
        row_bytes: What lies on disk for a training row.
        suspicion: Computes ``[N]``, higher for rows that are more likely mislabelled: self-influence, or a baseline's
            own ranking; None where there is none.
        setting: What differs from the default.
        facts: What else its row in the results has.
        error: Why there is nothing.
    """

    name: str
    scores: np.ndarray | None = None
    seconds: float = float("nan")
    row_bytes: float = 0.0
    suspicion: Callable[[], np.ndarray] | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""


@dataclass(frozen=True)
class Method:
    """A way to get scores.

    Attributes:
        name: What it is called in tables.
        run: Takes a case and an empty folder that it may use.
        package: The module that must be installed.
        unfit: Says of a case why the method does not apply, or nothing.
    """

    name: str
    run: Callable[[Case, Path], list[Found]]
    package: str = "torch"
    unfit: Callable[[Case], str] = lambda case: ""


def row_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Return each row's cross-entropy, of sequences the mean over positions.

    Args:
        outputs: Logits, ``[B, classes]`` or ``[B, T, vocabulary]``.
        labels: ``[B]`` or ``[B, T]``.

    Returns:
        ``[B]``.
    """
    losses = F.cross_entropy(outputs.movedim(-1, 1), labels, reduction="none")
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).splitlines() or [""])[0]


def log_odds(losses: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(-loss), elementwise."""
    return -losses - torch.log(-torch.expm1(-losses))


Runner = Callable[[Case, Path], list[Found]]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings, logs and bars, and let attention be differentiated twice."""
    silent = contextlib.redirect_stderr(io.StringIO())
    with warnings.catch_warnings(), silent, sdpa_kernel(SDPBackend.MATH):
        warnings.simplefilter("ignore")
        previous = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(previous)


def timed(name: str, run: Callable[..., Found], settings: Sequence[dict[str, Any]]) -> Runner:
    """Return a runner that calls ``run`` once for each setting, times it, and keeps an error as the result.

    Args:
        name: The method's.
        run: Takes a case, a folder and the setting's values.
        settings: What to try, the default first.

    Returns:
        The runner.
    """

    def runner(case: Case, folder: Path) -> list[Found]:
        results = []
        for number, setting in enumerate(settings):
            with quiet():
                start = clock()
                try:
                    found = run(case.copied(), folder / str(number), **setting)
                except Exception as error:  # a library that fails here has a row that says so
                    found = Found(name, error=f"{type(error).__name__}: {first_line(error)}")
            seconds = clock() - start
            results.append(replace(found, name=name, seconds=seconds, setting=setting))
        return results

    return runner


def method(
    name: str,
    run: Callable[..., Found],
    settings: Sequence[dict[str, Any]] = ({},),
    unfit: Callable[[Case], str] = lambda case: "",
) -> Method:
    """Return a method of the package that its name begins with."""
    return Method(name, timed(name, run, settings), name.split()[0], unfit)


def at_most(parameters: int) -> Callable[[Case], str]:
    """Return a function that says why a case is too large for a method, or nothing."""

    def unfit(case: Case) -> str:
        count = case.num_parameters
        return f"{count:,} parameters, more than the {parameters:,} that it can do here" if count > parameters else ""

    return unfit


def needs_last_layer(case: Case) -> str:
    """Return why a method of the last linear layer does not apply, or nothing."""
    return "" if case.last_layer and case.task != "language_modeling" else "no linear layer of its own gives the logits"
