"""The results of the demo: flipped labels by self-influence, and proponents and opponents of predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from torch.utils.data import TensorDataset

from tracer.api.attribution import Attribution, attribute
from tracer.cli.demo_digits import digits
from tracer.cli.demo_digits.digits import Digits, Settings
from tracer.errors import MissingDependencyError
from tracer.report.health import CHECKED_SHARES, checked_counts, recovered, recovery_table


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: the network is too small for more, which would take longer and change last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
@torch.random.fork_rng(devices=[])  # building a network draws initial weights from the global generator
def run(
    settings: Settings, output_dir: Path, proj_dim: int = 256, log: Callable[[str], object] = print
) -> dict[str, Any]:
    """Train on digits with flipped labels, attribute, print the results and write the report; resumes if run again.

    Returns:
        ``accuracy`` on test images; ``flipped``, the number of flipped labels; ``checked``, the numbers of images that
        are checked; ``found``, the number of flipped labels that each ranking finds among them; the paths ``report``
        and ``store``.
    """
    data = digits.load_data(settings)
    total = int(data.flipped.sum())
    log(
        f"Handwritten digits: {settings.num_train:,} for training, {settings.num_test} for testing; "
        f"{total} training labels are flipped."
    )
    checkpoints = digits.train_or_reuse(data, settings, output_dir / "checkpoints", log)
    found = attribute(
        digits.build_model(),
        "image_classification",
        TensorDataset(data.train_images, data.train_labels),
        TensorDataset(data.test_images, data.test_labels),
        checkpoints=checkpoints,
        save_dir=output_dir / "store",
        proj_dim=proj_dim,
        seed=settings.seed,
    )
    evaluated = [digits.evaluate(path, data.train_images, data.train_labels) for path, _ in checkpoints]
    predictions, _ = digits.evaluate(checkpoints[-1][0], data.test_images, data.test_labels)
    losses = np.stack([loss for _, loss in evaluated])
    rankings = {"mean loss": losses.mean(axis=0), "final loss": losses[-1]}
    every = {"self-influence": found.self_influence(), **rankings}
    accuracy = float((predictions == data.test_labels).float().mean())
    log(f"Test accuracy at the last checkpoint: {accuracy:.1%}")
    log(_table(every, data.flipped))
    health = found.label_health()
    estimate = health if isinstance(health, str) else f"{health.share:.1%}, {health.low:.1%} to {health.high:.1%}"
    log(f"Estimated share of wrong labels (95 % interval): {estimate}")
    shown = choose_targets(predictions, data.test_labels)
    log(_examples(found, data, predictions, shown))
    page, note = _report(
        found,
        data,
        output_dir / "report",
        train_predictions=evaluated[-1][0],
        target_predictions=predictions,
        rankings=rankings,
        health=health,
        shown_targets=shown,
        settings={**asdict(settings), "proj_dim": proj_dim, "checkpoints": len(checkpoints)},
    )
    log(f"\nReport: {page}{note}")
    return {
        "accuracy": accuracy,
        "flipped": total,
        "checked": checked_counts(len(data.flipped)),
        "found": {name: recovered(scores, data.flipped) for name, scores in every.items()},
        "report": page,
        "store": output_dir / "store",
    }


def choose_targets(predictions: Int64[Tensor, " M"], labels: Int64[Tensor, " M"], count: int = 3) -> list[int]:
    """Return the indices of some correct predictions and of up to ``count`` wrong ones, twice as many in all."""
    wrong = np.flatnonzero((predictions != labels).numpy())[:count]
    right = np.flatnonzero((predictions == labels).numpy())[: 2 * count - len(wrong)]
    return [*right.tolist(), *wrong.tolist()]


def _table(rankings: dict[str, np.ndarray], flipped: Bool[np.ndarray, " N"]) -> str:
    total = f"{flipped.sum()} of {len(flipped)} labels are flipped"
    lines = [
        f"\nFlipped labels found among the images ranked highest ({total})",
        f"{'':<30}" + "".join(f"{f'top {share:.0%}':>14}" for share in CHECKED_SHARES),
    ]
    lines += [
        f"{name:<30}" + "".join(f"{cell:>14}" for cell in row) for name, *row in recovery_table(rankings, flipped)
    ]
    return "\n".join(lines)


def _examples(found: Attribution, data: Digits, predictions: Tensor, shown: list[int]) -> str:
    """Return the labels of the strongest training images for some test images."""
    tops = [found.top(5, kind=kind) for kind in ("proponents", "opponents")]
    lines = ["\nLabels of the strongest training images (* flipped) for some test images"]
    for target in shown:
        proponents, opponents = (
            " ".join(
                f"{data.train_labels[index]}{'*' if data.flipped[index] else ' '}" for index in top.indices[target]
            )
            for top in tops
        )
        verdict = f"{data.test_labels[target]}, predicted {predictions[target]}"
        lines.append(f"  test {target:>3} ({verdict}): proponents {proponents}  opponents {opponents}")
    return "\n".join(lines)


def _report(found: Attribution, data: Digits, directory: Path, **options: Any) -> tuple[Path, str]:
    """Write the report, without pictures if a package for them is missing; return its path and a note on that."""
    options |= {
        "labels": data.train_labels,
        "target_labels": data.test_labels,
        "class_names": digits.CLASS_NAMES,
        "known_mislabelled": data.flipped,
        "title": "Mislabelled digits",
    }
    try:
        return found.report(directory, inputs=data.train_images, target_inputs=data.test_images, **options), ""
    except MissingDependencyError as error:
        return found.report(directory, figures=False, **options), f" (without pictures. {error})"
