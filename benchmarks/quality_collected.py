"""Gradients collected in a training run, as contenders: no pass over the training rows after it.

Each trains a network of its own by the task's recipe, with a `GradientCollector`, and without one for its seconds: they
are what collecting adds to the training, and scoring.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from quality_methods import Case, Found, Method, clock, row_losses
from quality_tracer import needs_adam, stored_bytes
from torch import nn

from tracer import GradientCollector, attribute

SEED = 1000


@dataclass(frozen=True)
class Collected:
    """A training run and what is collected in it.

    Attributes:
        label: What is added to the estimators' names.
        options: As `tracer.GradientCollector` takes them.
        share: The strength of the run.
        featurized: Whether the training rows are featurized afterwards at the same checkpoints, with the same sums of
            rates, instead of what was collected: what a `CheckpointRecorder` gives.
        estimators: Which estimators read the store.
        unfit: Says of a case why the method does not apply, or nothing.
    """

    label: str
    options: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    featurized: bool = False
    estimators: tuple[str, ...] = ("tracin", "cosine")
    unfit: Callable[[Case], str] = lambda case: ""

    def run(self, case: Case, folder: Path) -> list[Found]:
        """Train twice, and score from what was collected."""
        plain = self._timed(lambda: self._train(case, None))
        steps = case.recipe.epochs * -(-case.sizes[0] // case.recipe.batch_size)
        every = max(1, steps // (2 * len(case.checkpoints)))
        collectors: list[GradientCollector] = []

        def make(model: nn.Module, optimizer: torch.optim.Optimizer) -> GradientCollector:
            options = {"every": every, **self.options}
            collectors.append(GradientCollector(model, optimizer, folder, case.task, case.sizes[0], **options))
            return collectors[0]

        collecting = self._timed(lambda: self._train(case, make)) - plain
        (collector,) = collectors
        store = folder / "featurized" if self.featurized else collector.store
        start = clock()
        found = attribute(
            case.model, case.task, case.train, case.targets, collector.checkpoints,
            save_dir=store, batch_size=case.batch_size, progress=False, **self.options,
        )  # fmt: skip
        scoring = clock() - start + (0.0 if self.featurized else collecting)
        row_bytes = stored_bytes(store / "checkpoints") / case.sizes[0]
        results = []
        for estimator in self.estimators:
            start = clock()
            scores = found.tracer.finalize_scores(found.exp_name, estimator)
            seconds = scoring + clock() - start
            own = found.self_influence if estimator == "tracin" else None
            facts = {"checkpoints": len(collector.checkpoints), "training": collecting / plain}
            results.append(Found(f"tracer {estimator}, {self.label}", scores, seconds, row_bytes, own, {}, facts))
        return results

    def _timed(self, work: Callable[[], None]) -> float:
        start = clock()
        work()
        return clock() - start

    def _train(self, case: Case, make: Callable[..., GradientCollector] | None) -> None:
        """Train by the recipe, collected or not."""
        recipe = case.recipe.at_strength(self.share)
        torch.manual_seed(SEED)
        model = case.make_model().train()
        optimizer = recipe.make_optimizer(model.named_parameters())
        inputs, labels = case.train
        epoch_steps = -(-len(labels) // recipe.batch_size)
        with make(model, optimizer) if make else contextlib.nullcontext() as collector:
            for step in range(recipe.epochs * epoch_steps):
                if step % epoch_steps == 0:
                    batches = torch.randperm(len(labels)).split(recipe.batch_size)
                rows = batches[step % epoch_steps]
                x, y = inputs[rows], labels[rows]
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate_at(step, recipe.epochs * epoch_steps)
                optimizer.zero_grad()
                with collector.batch((x, y), rows) if collector else contextlib.nullcontext():
                    row_losses(model(x), y).mean().backward()
                optimizer.step()
                if collector:
                    collector.step()


COLLECTED = [
    Collected("collected, k=1024", {"proj_dim": 1024}),
    Collected("collected, k=4096", {"proj_dim": 4096}),
    Collected("collected, factored, k=4096", {"proj_dim": 4096, "projector": "factored"}),
    Collected("collected's checkpoints, k=4096", {"proj_dim": 4096}, featurized=True),
    Collected("collected, half strength, k=4096", {"proj_dim": 4096}, share=0.5),
    Collected("collected's checkpoints, half strength, k=4096", {"proj_dim": 4096}, share=0.5, featurized=True),
    Collected("collected, Adam, k=1024", {"proj_dim": 1024, "preconditioner": "adam"}, unfit=needs_adam),
    Collected(
        "collected's checkpoints, Adam, k=1024",
        {"proj_dim": 1024, "preconditioner": "adam"},
        featurized=True,
        unfit=needs_adam,
    ),
]


def collected_methods() -> list[Method]:
    """Return the contenders."""
    return [Method(f"tracer, {each.label}", each.run, unfit=each.unfit) for each in COLLECTED]
