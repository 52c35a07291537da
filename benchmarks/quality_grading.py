"""What retraining says of the targets, and how well scores predict it or find flipped labels.

``N`` training rows, ``M`` targets, ``S`` subsets, ``R`` removals of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from quality_methods import Found, quiet
from quality_tasks import Data, Task

from tracer.metrics import lds, mislabel_detection, removal_correlation, spearman
from tracer.retraining import random_subsets, retrain

NUM_RESAMPLES, NUM_POINTS = 1000, 101
"""Of the bootstrap, and of a recovery curve in the results."""


@dataclass(frozen=True)
class Truth:
    """What retraining says.

    Attributes:
        masks: ``[S, N]``, bool.
        outputs: ``[S, M]``, higher is better for the target.
        removed: ``[R, k]``, rows that were left out; None where none were.
        changes: ``[R, M]``, the output with all rows minus that without the removed ones.
        ceiling: About the largest LDS that a perfect predictor of the mean over seeds can have, from how well seeds
            agree; None with one seed.
    """

    masks: np.ndarray
    outputs: np.ndarray
    removed: np.ndarray | None = None
    changes: np.ndarray | None = None
    ceiling: float | None = None


def ground_truth(task: Task, data: Data, cache: Path) -> Truth:
    """Train on random halves and without some rows; what the cache holds is not trained again.

    Args:
        task: What is trained.
        data: Its rows.
        cache: The folder.

    Returns:
        What became of the targets.
    """
    num_train = len(data.train[0])
    options = {"recipe": task.recipe, "seeds": range(task.num_seeds), "save_dir": cache / task.name}
    masks = random_subsets(task.num_subsets, num_train)
    found = retrain(task.make_model, task.kind, data.train, data.targets, masks, **options)
    by_seed = higher_is_better(task, found)  # [S, seeds, M]
    ceiling = None
    if task.num_seeds > 1:  # of the mean of s seeds, after Spearman and Brown
        one = float(np.nanmean(spearman(by_seed[:, 0], by_seed[:, 1])))
        ceiling = (task.num_seeds * one / (1 + (task.num_seeds - 1) * one)) ** 0.5 if one > 0 else 0.0
    truth = Truth(masks, by_seed.mean(1), ceiling=ceiling)
    if not task.num_removals:
        return truth
    rng = np.random.default_rng(0)
    removed = np.stack([rng.permutation(num_train)[: task.num_removed] for _ in range(task.num_removals)])
    kept = np.ones((1 + task.num_removals, num_train), dtype=bool)  # the first is whole
    np.put_along_axis(kept[1:], removed, False, axis=1)
    found = retrain(task.make_model, task.kind, data.train, data.targets, kept, paired=True, **options)
    outputs = higher_is_better(task, found).mean(1)
    return replace(truth, removed=removed, changes=outputs[0] - outputs[1:])


def higher_is_better(task: Task, found: Any) -> np.ndarray:
    """Return the targets' outputs, ``[S, seeds, M]``: margins, of language models minus the loss."""
    return -found.losses_by_seed if task.kind == "language_modeling" else found.outputs_by_seed


def grade(found: Found, truth: Truth, data: Data, plain: float, brief: bool = False) -> dict[str, Any]:
    """Return a method's row of the table.

    Args:
        found: What the method gave.
        truth: What retraining says.
        data: The rows, with what labels are flipped.
        plain: The seconds of the plain passes.
        brief: Whether the LDS is enough, without its interval.

    Returns:
        The row; what cannot be graded is not in it.
    """
    row: dict[str, Any] = {"method": found.name, "setting": found.setting}
    row |= {"seconds": found.seconds, "ratio": found.seconds / plain, "row_bytes": found.row_bytes, **found.facts}
    error = found.error
    if found.scores is not None and not np.isfinite(found.scores).all():
        error = f"{1 - np.isfinite(found.scores).mean():.0%} of the scores are not finite"
    if error:
        return row | {"error": error}
    if found.scores is not None:
        graded = lds(found.scores, truth.masks, truth.outputs, num_resamples=0 if brief else NUM_RESAMPLES)
        row["lds"] = graded.mean
        if not brief:
            row["lds_interval"] = list(graded.interval)
            if truth.removed is not None:
                row["removal"] = removal_correlation(found.scores, truth.removed, truth.changes).spearman
    return row if brief or data.flipped is None else row | detection(found, data.flipped)


def detection(found: Found, flipped: np.ndarray) -> dict[str, Any]:
    """Return how well a method's rankings find flipped labels, as parts of its row."""
    row: dict[str, Any] = {}
    rankings = {"harm": None if found.scores is None else -found.scores.mean(axis=1), "own": own_ranking(found, row)}
    shares = np.linspace(0, len(flipped), NUM_POINTS).round().astype(int)
    for name, ranking in rankings.items():
        if ranking is not None and np.isfinite(ranking).all():
            detected = mislabel_detection(ranking, flipped)
            row |= {f"auc_{name}": detected.auc, f"curve_{name}": detected.curve[shares].round(4).tolist()}
    return row


def grade_all(results: Sequence[Found], truth: Truth, data: Data, plain: float) -> Iterator[dict[str, Any]]:
    """Grade what a method gave: the default and the best of the other settings in full, the others briefly.

    Args:
        results: Of one method, which may have several names.
        truth: What retraining says.
        data: The rows.
        plain: The seconds of the plain passes.

    Yields:
        A row for each.
    """
    for name in dict.fromkeys(found.name for found in results):
        same = [found for found in results if found.name == name]
        rows = [grade(found, truth, data, plain, brief=True) for found in same]
        best = int(np.argmax([row.get("lds", -np.inf) for row in rows]))
        for number, (found, row) in enumerate(zip(same, rows, strict=True)):
            yield grade(found, truth, data, plain) if number in (0, best) else row


def own_ranking(found: Found, row: dict[str, Any]) -> np.ndarray | None:
    """Return the method's ranking of rows, ``[N]``, or None; what went wrong goes into the row's note."""
    if found.suspicion is None:
        return None
    try:
        with quiet():
            return np.asarray(found.suspicion(), dtype=np.float64).reshape(-1)
    except Exception as error:  # self-influence fails in some libraries where scores do not
        row["own_error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return None
