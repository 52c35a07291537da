"""What the demo finds: flipped labels by self-influence, and who speaks for and against a prediction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from tracer.api.attribution import Attribution, attribute
from tracer.cli.demo_digits.digits import (
    CLASS_NAMES,
    Digits,
    Settings,
    build_model,
    evaluate,
    load_data,
    train_or_reuse,
)
from tracer.errors import MissingDependencyError

CHECKED_SHARES = (0.1, 0.2, 0.3)
"""Shares of the rows that are looked at, those ranked highest."""


@torch.random.fork_rng(devices=[])  # each net that is made draws its first weights
def run(
    settings: Settings, output_dir: Path, proj_dim: int = 4096, say: Callable[[str], object] = print
) -> dict[str, Any]:
    """Train on digits of which some labels are flipped, attribute, say what is found and write the report.

    Called again with the same settings, it takes up what is there: checkpoints and every row already featurized.

    Args:
        settings: How to train.
        output_dir: Where checkpoints, store and report go.
        proj_dim: Numbers kept of each gradient.
        say: Takes lines to print.

    Returns:
        ``accuracy`` on test images; ``flipped``, how many labels are; ``checked``, the numbers of rows that are looked
        at; ``found``, how many flipped labels each ranking has among them; ``report`` and ``store``,
        paths.
    """
    data = load_data(settings)
    total = int(data.flipped.sum())
    say(
        f"Handwritten digits: {settings.num_train:,} for training, {settings.num_test} for testing; "
        f"{total} training labels are flipped."
    )
    checkpoints = train_or_reuse(data, settings, output_dir / "checkpoints", say)
    found = attribute(
        build_model(),
        "image_classification",
        TensorDataset(data.train_images, data.train_labels),
        TensorDataset(data.test_images, data.test_labels),
        checkpoints=checkpoints,
        save_dir=output_dir / "store",
        proj_dim=proj_dim,
        seed=settings.seed,
    )
    evaluated = [evaluate(path, data.train_images, data.train_labels) for path, _ in checkpoints]
    predictions, _ = evaluate(checkpoints[-1][0], data.test_images, data.test_labels)
    losses = np.stack([loss for _, loss in evaluated])
    rankings = {"loss, mean over checkpoints": losses.mean(axis=0), "loss at the last checkpoint": losses[-1]}
    counts = {
        name: found_at(scores, data.flipped)
        for name, scores in {"self-influence": found.self_influence(), **rankings}.items()
    }
    accuracy = float((predictions == data.test_labels).float().mean())
    say(f"Test accuracy at the last checkpoint: {accuracy:.1%}")
    say(_table(counts, total, len(data.flipped)))
    shown = choose_targets(predictions, data.test_labels)
    say(_examples(found, data, predictions, shown))
    facts = {**asdict(settings), "proj_dim": proj_dim, "checkpoints": len(checkpoints)}
    page, note = _report(
        found,
        data,
        output_dir / "report",
        train_predictions=evaluated[-1][0],
        target_predictions=predictions,
        rankings=rankings,
        shown_targets=shown,
        settings=facts,
    )
    say(f"\nReport: {page}{note}")
    return {
        "accuracy": accuracy,
        "flipped": total,
        "checked": [round(share * len(data.flipped)) for share in CHECKED_SHARES],
        "found": counts,
        "report": page,
        "store": output_dir / "store",
    }


def found_at(scores: np.ndarray, flipped: np.ndarray) -> list[int]:
    """Return how many flipped labels are among the rows that rank highest, for each share of rows checked.

    Args:
        scores: ``[N]``, higher is checked earlier.
        flipped: ``[N]``, bool.

    Returns:
        A number for each of `CHECKED_SHARES`.

    >>> found_at(np.array([0.1, 0.9, 0.5, 0.3, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0]), np.arange(10) < 3)
    [1, 2, 2]
    """
    hits = np.cumsum(flipped[np.argsort(-scores, kind="stable")])
    return [int(hits[round(share * len(hits)) - 1]) for share in CHECKED_SHARES]


def choose_targets(predictions: Tensor, labels: Tensor, count: int = 3) -> list[int]:
    """Return some test images that the model gets right, and some or all that it gets wrong.

    Args:
        predictions: ``[M]``.
        labels: ``[M]``.
        count: How many it gets wrong, at most; twice as many in all.

    Returns:
        Indices.
    """
    wrong = np.flatnonzero((predictions != labels).numpy())[:count]
    right = np.flatnonzero((predictions == labels).numpy())[: 2 * count - len(wrong)]
    return [*right.tolist(), *wrong.tolist()]


def _table(counts: dict[str, list[int]], total: int, num_rows: int) -> str:
    """Return how many flipped labels each ranking finds, beside chance."""
    lines = [
        f"\nFlipped labels found among the rows ranked highest ({total} of {num_rows} labels are flipped)",
        f"{'':<30}" + "".join(f"{f'top {share:.0%}':>14}" for share in CHECKED_SHARES),
    ]
    for name, numbers in counts.items():
        lines.append(f"{name:<30}" + "".join(f"{f'{found} ({found / total:.0%})':>14}" for found in numbers))
    expected = [total * round(share * num_rows) / num_rows for share in CHECKED_SHARES]
    chance = "".join(f"{f'{count:.0f} ({count / total:.0%})':>14}" for count in expected)
    return "\n".join([*lines, f"{'chance (expected)':<30}{chance}"])


def _examples(found: Attribution, data: Digits, predictions: Tensor, shown: list[int]) -> str:
    """Return the labels of the strongest training images for some test images."""
    proponents, opponents = found.top(5, kind="proponents"), found.top(5, kind="opponents")
    lines = ["\nLabels of the strongest training images (* flipped) for some test images"]
    for target in shown:
        words = [
            " ".join(f"{data.train_labels[row]}{'*' if data.flipped[row] else ' '}" for row in top.indices[target])
            for top in (proponents, opponents)
        ]
        verdict = f"{data.test_labels[target]}, predicted {predictions[target]}"
        lines.append(f"  test {target:>3} ({verdict}): proponents {words[0]}  opponents {words[1]}")
    return "\n".join(lines)


def _report(found: Attribution, data: Digits, directory: Path, **options: Any) -> tuple[Path, str]:
    """Write the report, without pictures where the packages for them are missing; return its path and what to say."""
    options |= {
        "labels": data.train_labels,
        "target_labels": data.test_labels,
        "class_names": CLASS_NAMES,
        "known_mislabelled": data.flipped,
        "title": "Mislabelled digits",
    }
    try:
        return found.report(directory, inputs=data.train_images, target_inputs=data.test_images, **options), ""
    except MissingDependencyError as error:
        page = found.report(directory, figures=False, **options)
        return page, f" (without pictures. {error})"
