"""Pitfalls of how a network was trained: late checkpoints, learning-rate schedules, momentum and Adam."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from pitfalls_runs import (
    RecordedRun,
    Settings,
    mean_loss,
    network,
    pearson,
    rank_correlation,
    recorded_run,
    row_gradients,
    scores_of,
    study,
)
from quality_tasks import digits

from tracer.retraining import Recipe

Row = dict[str, Any]
"""A line of a table, values by column."""

FITTED = {
    "rate 0.5": Recipe(learning_rate=0.5, batch_size=20, epochs=100),
    "rate 0.2, momentum 0.9": Recipe(learning_rate=0.2, momentum=0.9, batch_size=20, epochs=100),
}
"""Two ways to fit the rows to the end: one that leaves some slopes, and one that leaves next to none."""


def late_checkpoints(
    settings: Settings, recipes: Mapping[str, Recipe] = FITTED, epochs: Sequence[int] = (1, 2, 5, 10, 20, 50, 100)
) -> list[Row]:
    """Score with single checkpoints of a run that fits its rows, and with several.

    Args:
        settings: How much is run.
        recipes: How the network is trained, by name.
        epochs: The checkpoints.

    Returns:
        A row for each checkpoint, for all of them and for those but the first two.
    """
    data, model, rows = digits(settings.num_train, settings.num_targets), network(), []
    for name, recipe in recipes.items():
        found = study(settings, network, data.train, data.targets, recipe, epochs)
        checkpoints = [(checkpoint.state, 1.0) for checkpoint in found.checkpoints]
        chosen = {f"epoch {epoch}": [number] for number, epoch in enumerate(epochs)}
        several = {f"all {len(epochs)}": list(range(len(epochs)))}
        several[f"the last {len(epochs) - 2}"] = list(range(2, len(epochs)))
        with scores_of(model, data.train, data.targets, checkpoints) as stored:
            for label, ids in {**chosen, **several}.items():
                row: Row = {"run": name, "checkpoints": label, "agreement": found.agreement}
                for estimator in ("tracin", "cosine", "influence"):
                    grade = found.grade(stored.scores(estimator, ids))
                    row[estimator], row[f"{estimator}_interval"] = grade.mean, grade.interval
                row["half"] = rows_of_half(stored.scores("tracin", ids))
                row["ridge"] = stored.ridge(ids)
                row |= fitted_state(model, checkpoints[ids[0]][0], data.train) if len(ids) == 1 else {}
                rows.append(row)
    return rows


def rows_of_half(scores: np.ndarray) -> int:
    """Return how many rows hold half of the sum of all absolute scores ``[N, M]``."""
    shares = np.sort(np.abs(scores).sum(axis=1))[::-1]
    return int(np.searchsorted(np.cumsum(shares), shares.sum() / 2)) + 1


def fitted_state(model: torch.nn.Module, state: Mapping[str, torch.Tensor], train: Any) -> Row:
    """Return how far the rows are fitted, and what of their slopes and gradients number formats keep.

    Args:
        model: The network.
        state: Its weights.
        train: The rows.

    Returns:
        The mean loss, the median of ``1 - p``, and the share of rows whose ``1 - p`` is 0 when it is subtracted in
        float32, and whose loss gradient is 0 in float16.
    """
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(train[0])
    probability = logits.softmax(1).gather(1, train[1].unsqueeze(1)).squeeze(1)
    exact = logits.double().softmax(1).scatter(1, train[1].unsqueeze(1), 0.0).sum(1)
    lost = (row_gradients(model, train).half() == 0).all(1)
    return {
        "loss": mean_loss(model, train),
        "slope": exact.median().item(),
        "lost_slopes": (1 - probability == 0).double().mean().item(),
        "lost_gradients": lost.double().mean().item(),
    }


def step_rate(step: int, num_steps: int, rate: float = 0.01) -> float:
    """Return a rate that is divided by 10 after three and after six tenths of the steps."""
    return rate * (1.0 if step < 0.3 * num_steps else 0.1 if step < 0.6 * num_steps else 0.01)


SCHEDULES = {"steps": step_rate, "cosine": Recipe(learning_rate=0.01, schedule="cosine").rate_at}


def schedules(
    settings: Settings, num_epochs: int = 20, kept: Sequence[Sequence[int]] = ((1, 2, 4, 8, 12, 16, 20), (10, 15, 20))
) -> list[Row]:
    """Weigh the checkpoints of falling learning rates in several ways, and compare with TracInIdeal.

    A tenth of the labels is flipped, so that gradients do not vanish when the rate falls.

    Args:
        settings: How much is run; of its rows two thirds.
        num_epochs: How often each row comes.
        kept: The checkpoints that are used.

    Returns:
        A row for each schedule, choice of checkpoints and rule.
    """
    data, rows = digits(settings.num_train * 2 // 3, settings.num_targets // 2, flip_rate=0.1), []
    used = sorted({epoch for epochs in kept for epoch in epochs})
    for name, rate_at in SCHEDULES.items():
        run = recorded_run(data.train, data.targets, plain_sgd, rate_at, num_epochs, used)
        with scores_of(network(), data.train, data.targets, [(run.states[epoch], 1.0) for epoch in used]) as stored:
            single = {epoch: stored.scores("tracin", [number]) for number, epoch in enumerate(used)}
        for epochs in kept:
            for rule, weights in checkpoint_weights(run, epochs).items():
                weighed = sum(weight * single[epoch] for weight, epoch in zip(weights, epochs, strict=True))
                label = ", ".join(map(str, epochs))
                rows.append({"schedule": name, "checkpoints": label, "rule": rule, **against_ideal(weighed, run.ideal)})
    return rows


def plain_sgd(model: torch.nn.Module, momentum: float = 0.0) -> torch.optim.Optimizer:
    """Return SGD whose rate is set at each step."""
    return torch.optim.SGD(model.parameters(), lr=1.0, momentum=momentum)


def checkpoint_weights(run: RecordedRun, epochs: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the weight of each checkpoint ``[C]`` by rule.

    Sums of rates are those that one row meets: the mean rate of an epoch for each time that the row comes.

    Args:
        run: Tells the rates.
        epochs: Of the checkpoints.

    Returns:
        The weights.
    """
    summed = np.concatenate([[0.0], np.cumsum(run.rates.mean(axis=1))])  # [E + 1]
    ends = summed[np.array(epochs)]
    since = np.diff(ends, prepend=0.0)
    until = np.diff(ends, append=summed[-1])
    around = (since + until) / 2
    around[0] += since[0] / 2  # nothing else stands for the time before the first,
    around[-1] += until[-1] / 2  # nor for that behind the last
    return {
        "equal": np.ones(len(epochs)),
        "rate in force": np.array([run.rate_after[epoch] for epoch in epochs]),
        "sum since the last": since,
        "half of the sums before and after": around,
    }


def against_ideal(scores: np.ndarray, ideal: np.ndarray) -> Row:
    """Return rank and linear correlation with TracInIdeal, and the sum of scores over the true change of the losses."""
    total = float(np.median(scores.sum(axis=0) / ideal.sum(axis=0)))
    return {"spearman": rank_correlation(scores, ideal), "pearson": pearson(scores, ideal), "total": total}


def momentum(
    settings: Settings, values: Sequence[float] = (0.0, 0.5, 0.9), epochs: Sequence[int] = (1, 2, 4, 8, 12, 16, 20)
) -> list[Row]:
    """Train with momentum m and the rate times 1 - m, and compare scores with those without momentum.

    Args:
        settings: How much is run. Recorded runs take two thirds of its rows.
        values: m, 0 first.
        epochs: The checkpoints, the last one the end of training.

    Returns:
        A row for each value.
    """
    small = digits(settings.num_train * 2 // 3, settings.num_targets // 2)
    full = digits(settings.num_train, settings.num_targets)
    rows: list[Row] = []
    first: np.ndarray | None = None
    for value in values:
        make, rate = partial(plain_sgd, momentum=value), 0.003 * (1 - value)
        run = recorded_run(small.train, small.targets, make, lambda *_, rate=rate: rate, epochs[-1], epochs)
        weights = checkpoint_weights(run, epochs)["half of the sums before and after"]
        weighed = [(run.states[epoch], weight) for epoch, weight in zip(epochs, weights, strict=True)]
        with scores_of(network(), small.train, small.targets, weighed, storage="none") as stored:
            found = stored.scores()
        first = found if first is None else first
        recipe = Recipe(learning_rate=0.2 * (1 - value), momentum=value, batch_size=20, epochs=epochs[-1])
        truth = study(settings, network, full.train, full.targets, recipe, epochs)
        states = [(checkpoint.state, 1.0) for checkpoint in truth.checkpoints]
        with scores_of(network(), full.train, full.targets, states, storage="none") as stored:
            grade = truth.grade(stored.scores())
        row: Row = {"momentum": value, "ratio": float((found * first).sum() / (first * first).sum())}
        row |= {"same": rank_correlation(found, first), "lds": grade.mean, "lds_interval": grade.interval}
        rows.append(row | against_ideal(found, run.ideal))
    return rows


ADAM_EPOCHS = (1, 2, 3, 5, 7, 10, 15, 20)
IDEAL_EPOCHS = (1, 2, 4, 6, 8, 10)
LARGER_EPS = 1e-4
"""In place of Adam's 1e-8: small beside the median of √v̂ in these runs, which is 0.03."""


def adam(
    settings: Settings, epochs: Sequence[int] = ADAM_EPOCHS, ideal_epochs: Sequence[int] = IDEAL_EPOCHS
) -> list[Row]:
    """Score runs of Adam as if SGD had made them, and with the second moments.

    Args:
        settings: How much is run. Recorded runs take two thirds of its rows.
        epochs: Checkpoints of the run that the LDS grades, the last one its end.
        ideal_epochs: Checkpoints of the recorded runs, the last one their end.

    Returns:
        A row for each way to score.
    """
    data = digits(settings.num_train, settings.num_targets)
    recipe = Recipe(optimizer="adamw", learning_rate=0.003, batch_size=20, epochs=epochs[-1])
    found = study(settings, network, data.train, data.targets, recipe, epochs)
    kept = [(checkpoint.state, checkpoint.optimizer_state, 1.0) for checkpoint in found.checkpoints]
    small = digits(settings.num_train * 2 // 3, settings.num_targets // 2)
    recorded = {}
    for beta in (0.0, 0.9):
        make = partial(_adam, beta=beta)
        recorded[beta] = recorded_run(
            small.train, small.targets, make, lambda *_: 0.001, ideal_epochs[-1], ideal_epochs
        )
    rows, first = [], None
    for label, estimator, eps in (
        ("tracin", "tracin", None),
        ('tracin, preconditioner="adam"', "tracin", 1e-8),
        ("the same with eps 1e-4", "tracin", LARGER_EPS),
        ("cosine", "cosine", None),
        ('cosine, preconditioner="adam"', "cosine", 1e-8),
    ):
        grade = found.grade(_adam_scores(data, kept, estimator, eps))
        first = first or grade
        row: Row = {"method": label, "lds": grade.mean, "lds_interval": grade.interval}
        row["gain"] = "-" if grade is first else "{:+.3f} to {:+.3f}".format(*grade.difference(first))
        for beta, run in recorded.items():
            weights = checkpoint_weights(run, ideal_epochs)["half of the sums before and after"]
            saved = [
                (run.states[epoch], run.optimizer_states[epoch], weight)
                for epoch, weight in zip(ideal_epochs, weights, strict=True)
            ]
            compared = against_ideal(_adam_scores(small, saved, estimator, eps), run.ideal)
            if estimator == "cosine":
                del compared["total"]  # cosines are in no unit of the loss
            row |= {f"{key}_{beta}": value for key, value in compared.items()}
        rows.append(row)
    return rows


def _adam(model: torch.nn.Module, beta: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.named_parameters(), lr=1.0, betas=(beta, 0.999))


def _adam_scores(data: Any, kept: Sequence[tuple[Any, Any, float]], estimator: str, eps: float | None) -> np.ndarray:
    """Return scores of checkpoints ``(state, optimizer state, weight)``, plain where ``eps`` is None."""
    if eps is None:
        checkpoints: list[Any] = [(state, weight) for state, _, weight in kept]
    else:
        checkpoints = [({"model": state, "optimizer": with_eps(saved, eps)}, weight) for state, saved, weight in kept]
    options = {"storage": "none", "preconditioner": None if eps is None else "adam"}
    with scores_of(network(), data.train, data.targets, checkpoints, **options) as stored:
        return stored.scores(estimator)


def with_eps(optimizer_state: dict[str, Any], eps: float) -> dict[str, Any]:
    """Return a copy of an optimizer's state dict with another ``eps``."""
    changed = copy.deepcopy(optimizer_state)
    for group in changed["param_groups"]:
        group["eps"] = eps
    return changed
