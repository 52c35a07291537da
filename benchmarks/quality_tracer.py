"""tracer's own contenders: its estimators from stores of several sizes, and what a user may vary.

Each store is made anew: one featurizing of the training rows and one of the targets at every checkpoint, and then
each estimator reads it. An estimator's seconds are those of the store and of its own scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from quality_methods import Case, Found, Method, clock

from tracer import attribute
from tracer.api.attribution import Attribution

FACTORS = tuple(10.0 ** (power / 2) for power in range(-6, 7))
"""What the λ that tracer chooses is multiplied by in a sweep, from 0.001 to 1,000."""

WITH_RIDGE = ("trak", "influence")
"""The estimators that take ``regularization``."""

LARGEST_EXACT = 6_000
"""Parameters up to which whole gradients are stored, for estimators that need a kernel of them."""


@dataclass(frozen=True)
class Variant:
    """A store, and the estimators that read it.

    Attributes:
        label: What is added to the estimators' names.
        estimators: Which.
        options: As `tracer.attribute` takes them.
        checkpoints: ``run``: those of one run; ``last``: the last of them; ``ensemble``: those of all runs; ``half``
            and ``half ensemble``: of runs at half strength.
        rates: Whether checkpoints come with their learning rates.
        summed: Whether these are sums over steps, and several runs are scored one by one.
        last_layer: Whether only the last layer's gradients are taken.
        sweep: Whether several values of λ are tried.
        scoring: As `Tracer.finalize_scores` takes it.
        unfit: Says of a case why the variant does not apply, or nothing.
    """

    label: str
    estimators: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    checkpoints: str = "run"
    rates: bool = True
    summed: bool = False
    last_layer: bool = False
    sweep: bool = False
    scoring: dict[str, Any] = field(default_factory=dict)
    unfit: Callable[[Case], str] = lambda case: ""

    @property
    def title(self) -> str:
        """What its method is called."""
        return self.name_of(self.estimators[0]) if len(self.estimators) == 1 else f"tracer, {self.label}"

    def name_of(self, estimator: str) -> str:
        """Return what a row of the table is called."""
        return f"tracer {estimator}" + (f", {self.label}" if self.label else "")

    def run(self, case: Case, folder: Path) -> list[Found]:
        """Make the store and score with each estimator."""
        start = clock()
        found = self.store(case, folder / "store", case.targets)
        featurizing = clock() - start
        row_bytes = stored_bytes(folder / "store" / "checkpoints") / case.sizes[0]
        results = []
        for estimator in self.estimators:
            facts = {}
            for setting in self.settings(found, estimator):
                start = clock()
                name, options = self.name_of(estimator), {**self.scoring, **setting}
                try:
                    scores = self.scores(found, case, estimator, options)
                except Exception as error:  # one estimator's failure has a row that says so
                    results.append(Found(name, setting=setting, error=f"{type(error).__name__}: {error}"))
                    continue
                seconds = featurizing + clock() - start
                suspicion = self.suspicion(case, folder, found, estimator, options)
                if estimator in WITH_RIDGE and not setting:
                    chosen = found.tracer.regularization(estimator)
                    facts = {"regularization": chosen.value, "rule": chosen.rule}
                results.append(Found(name, scores, seconds, row_bytes, suspicion, setting, facts))
        return results

    def scores(self, found: Attribution, case: Case, estimator: str, options: dict[str, Any]) -> np.ndarray:
        """Return the scores, ``[N, M]``: of all checkpoints, or the mean over runs."""
        every = np.array(found.model_ids)
        runs = np.split(every, len(every) // len(case.checkpoints)) if self.summed else [every]
        ask = found.tracer.finalize_scores
        return np.mean([ask(found.exp_name, estimator, run.tolist(), **options) for run in runs], axis=0)

    def settings(self, found: Attribution, estimator: str) -> Iterator[dict[str, Any]]:
        """Yield the values of λ that are tried, the chosen one first."""
        yield {}
        if self.sweep and estimator in WITH_RIDGE:
            chosen = found.tracer.regularization(estimator).value
            yield from ({"regularization": factor * chosen} for factor in FACTORS)

    def store(self, case: Case, folder: Path, targets: Any, exp_name: str = "targets") -> Attribution:
        """Featurize training rows and targets; what the folder holds is not computed again."""
        every: list[Any] = {
            "run": case.checkpoints,
            "last": case.checkpoints[-1:],
            "ensemble": case.ensemble,
            "half": case.half[: len(case.checkpoints)],
            "half ensemble": case.half,
        }[self.checkpoints]
        if self.summed and "half" not in self.checkpoints:
            every = [(state, total) for (state, _), total in zip(every, case.rate_sums, strict=False)]
        options = dict(self.options)
        if options.get("preconditioner") == "adam":
            paired = zip(every, case.optimizers, strict=True)
            every = [({"model": state, "optimizer": optimizer}, rate) for (state, rate), optimizer in paired]
        if self.last_layer:
            names = [name for name, _ in case.model.named_parameters()]
            options["params"] = [name for name in names if name.startswith(f"{case.last_layer}.")]
        return attribute(
            case.model,
            case.task,
            case.train,
            targets,
            every if self.rates else [state for state, _ in every],
            save_dir=folder,
            batch_size=case.batch_size,
            exp_name=exp_name,
            progress=False,
            **options,
        )

    def suspicion(
        self, case: Case, folder: Path, found: Attribution, estimator: str, options: dict[str, Any]
    ) -> Callable[[], np.ndarray] | None:
        """Return a function that gives each row's influence on itself, ``[N]``; a row's cosine with itself is 1."""

        def compute() -> np.ndarray:
            if estimator == "tracin":
                return found.self_influence()
            own = self.store(case, folder / "store", case.train, "train")
            return np.diagonal(self.scores(own, case, estimator, options)).copy()

        return None if estimator in ("cosine", "trackstar") else compute


def stored_bytes(folder: Path) -> int:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def needs_varied_rates(case: Case) -> str:
    """Return why equal rates are no variant, or nothing."""
    return "" if len({rate for _, rate in case.checkpoints}) > 1 else "all checkpoints have one learning rate"


def needs_own_layer(case: Case) -> str:
    """Return why the last layer cannot be chosen alone, or nothing."""
    names = [name for name, _ in case.model.named_parameters()]
    return "" if any(name.startswith(f"{case.last_layer}.") for name in names) else "the last layer is tied to another"


def needs_classes(case: Case) -> str:
    """Return why the output is no other target than the loss, or nothing."""
    return "the output of a language model is its loss" if case.task == "language_modeling" else ""


def needs_adam(case: Case) -> str:
    """Return why Adam's second moments are not there, or nothing."""
    return "" if case.recipe.optimizer == "adamw" else "not trained with Adam"


def needs_few_parameters(case: Case) -> str:
    """Return why whole gradients are not stored, or nothing."""
    return f"{case.num_parameters:,} parameters" if case.num_parameters > LARGEST_EXACT else ""


ALL = ("tracin", "cosine", "trak", "influence")
SHARED = {"shared_projection": True}
OUTPUTS = {"estimator": "influence"}  # so that the curvature of all outputs is computed, not that of f alone

VARIANTS = [
    Variant("k=256", ALL, {"proj_dim": 256}),
    Variant("k=1024", ALL, {"proj_dim": 1024}, sweep=True),
    Variant("k=4096", ALL, {"proj_dim": 4096}),
    Variant("exact", ("tracin", "cosine"), {"projector": "none"}),
    Variant("exact stored", WITH_RIDGE, {"projector": "none", "storage": "float32"}, unfit=needs_few_parameters),
    Variant("k=1024, shared", ("source",), {"proj_dim": 1024, **SHARED}, summed=True),
    Variant("k=4096, shared", ("source",), {"proj_dim": 4096, **SHARED}, summed=True),
    Variant(
        "exact stored, shared",
        ("source",),
        {"projector": "none", "storage": "float32"},
        summed=True,
        unfit=needs_few_parameters,
    ),
    Variant("k=1024, shared, 3 runs", ("source",), {"proj_dim": 1024, **SHARED}, checkpoints="ensemble", summed=True),
    Variant(
        "k=4096, half strength",
        ("influence", "source"),
        {"proj_dim": 4096, **SHARED},
        checkpoints="half",
        summed=True,
    ),
    Variant(
        "k=4096, half strength, 3 runs",
        ("source",),
        {"proj_dim": 4096, **SHARED},
        checkpoints="half ensemble",
        summed=True,
    ),
    Variant("k=1024, all outputs", ("influence", "relatif"), {"proj_dim": 1024, **OUTPUTS}),
    Variant("k=4096, all outputs", ("influence",), OUTPUTS),
    Variant("k=1024, all outputs, last checkpoint", ("influence",), {"proj_dim": 1024, **OUTPUTS}, "last"),
    Variant("k=1024, all outputs, 3 runs", ("influence",), {"proj_dim": 1024, **OUTPUTS}, "ensemble"),
    Variant("k=1024, target output", ("tracin",), {"proj_dim": 1024}, scoring={"target": "output"}),
    Variant("k=1024, target loss", WITH_RIDGE, {"proj_dim": 1024}, scoring={"target": "loss"}),
    Variant("k=1024, equal rates", ("tracin",), {"proj_dim": 1024}, rates=False, unfit=needs_varied_rates),
    Variant("k=1024, Adam", ALL, {"proj_dim": 1024, "preconditioner": "adam"}, unfit=needs_adam),
    Variant("exact, K-FAC", ("tracin",), {"projector": "none", "preconditioner": "kfac"}),
    Variant("exact, EK-FAC", ("tracin",), {"projector": "none", "preconditioner": "ekfac"}),
    *(
        Variant(
            f"exact, {name}, target output",
            ("tracin",),
            {"projector": "none", "preconditioner": preconditioner},
            scoring={"target": "output"},
            unfit=needs_classes,
        )
        for name, preconditioner in (("K-FAC", "kfac"), ("EK-FAC", "ekfac"))
    ),
    Variant("k=4096", ("trackstar",)),
    Variant("factored, k=4096, K-FAC", ("tracin",), {"projector": "factored", "preconditioner": "kfac"}),
    Variant("16 kB of signs, K-FAC", ("tracin",), {"preconditioner": "kfac", "storage": "binary", "proj_dim": 1 << 17}),
    Variant("k=4096, K-FAC", ("tracin", "influence"), {"preconditioner": "kfac", "storage": "int8"}),
    Variant("4 kB of signs", ("tracin", "cosine"), {"storage": "binary", "proj_dim": 1 << 15}),
    Variant("4 kB of signs, K-FAC", ("tracin",), {"preconditioner": "kfac", "storage": "binary", "proj_dim": 1 << 15}),
    Variant(
        "4 kB of signs, EK-FAC", ("tracin",), {"preconditioner": "ekfac", "storage": "binary", "proj_dim": 1 << 15}
    ),
    Variant("exact, EK-FAC, last checkpoint", ("tracin",), {"projector": "none", "preconditioner": "ekfac"}, "last"),
    Variant("last layer", ("tracin",), {"projector": "none"}, last_layer=True, unfit=needs_own_layer),
    Variant("k=1024, last checkpoint", ALL, {"proj_dim": 1024}, checkpoints="last"),
    Variant("k=1024, 3 runs", ALL, {"proj_dim": 1024}, checkpoints="ensemble", sweep=True),
]
"""What is compared; k is ``proj_dim``."""


def tracer_methods() -> list[Method]:
    """Return tracer's contenders."""
    return [Method(variant.title, variant.run, unfit=variant.unfit) for variant in VARIANTS]
