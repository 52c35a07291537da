"""How near the report's estimate of wrong labels comes: digits with known shares of flipped labels.

Each run flips a share of the training labels of scikit-learn's digits to another digit, trains a model, attributes the
test images and estimates the share from influence alone. Two models and several seeds; the seeds of the calibration
(the rates `CALIBRATION` of tracer/report/health.py) are others than those of the check.

Run it: python benchmarks/health.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from tracer import attribute
from tracer.report.health import estimate_wrong_labels
from tracer.report.summaries import summarize_scores

FLIP_RATES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3)
NUM_TRAIN, EPOCHS, SAVED = 1297, 15, (1, 3, 5, 10, 15)
LEARNING_RATE = 0.1
ESTIMATORS = ("tracin", "cosine", "influence")
RESULTS = Path(__file__).parent / "results" / "health.json"


def build_model(kind: str) -> nn.Module:
    """Return a conv net or a multilayer perceptron for images ``[B, 1, 8, 8]``."""
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def flipped_digits(rate: float, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """Return all images, labels with flips among the first `NUM_TRAIN`, the right labels, and which are flipped."""
    images, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(digits))
    images, digits = images[order] / 16.0, digits[order].astype(np.int64)
    flipped = np.zeros(len(digits), dtype=bool)
    flipped[rng.choice(NUM_TRAIN, size=round(rate * NUM_TRAIN), replace=False)] = True
    labels = (digits + rng.integers(1, 10, size=len(digits)) * flipped) % 10
    x = torch.as_tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return x, torch.as_tensor(labels), torch.as_tensor(digits), flipped[:NUM_TRAIN]


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, seed: int) -> list[tuple[dict[str, Any], float]]:
    """Train with plain SGD and return the saved weights with their learning rate."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    saved = []
    for epoch in range(1, EPOCHS + 1):
        for rows in torch.randperm(len(x), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        if epoch in SAVED:
            saved.append(({name: value.clone() for name, value in model.state_dict().items()}, LEARNING_RATE))
    return saved


def run(kind: str, rate: float, seed: int) -> list[dict[str, Any]]:
    """Train once and estimate with each estimator."""
    x, labels, digits, flipped = flipped_digits(rate, seed)
    torch.manual_seed(seed)
    model = build_model(kind)
    checkpoints = train(model, x[:NUM_TRAIN], labels[:NUM_TRAIN], seed)
    targets = digits[NUM_TRAIN:]
    found = []
    for estimator in ESTIMATORS:
        with tempfile.TemporaryDirectory() as folder:
            attribution = attribute(
                model, "image_classification", (x[:NUM_TRAIN], labels[:NUM_TRAIN]), (x[NUM_TRAIN:], targets),
                checkpoints, save_dir=folder, proj_dim=1024, estimator=estimator, progress=False,
            )  # fmt: skip
            summary = summarize_scores(attribution.scores, labels[:NUM_TRAIN].numpy(), targets.numpy())
        classes = summary.classes
        assert classes is not None
        wrong = classes.contradicted
        estimate = estimate_wrong_labels(classes)
        found.append({
            "model": kind, "estimator": estimator, "rate": float(flipped.mean()), "seed": seed,
            "contradicted": float(wrong.mean()),
            "false_positive": float(wrong[~flipped].mean()),
            "detected": float(wrong[flipped].mean()) if flipped.any() else None,
            "restored": float((classes.harmed == digits[:NUM_TRAIN].numpy())[wrong & flipped].mean())
            if (wrong & flipped).any() else None,
            "share": estimate.share, "low": estimate.low, "high": estimate.high,
        })  # fmt: skip
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table: one line for each model, estimator and flip rate, means over seeds."""
    lines = [
        "| model | estimator | flipped, % | contradicted, % | of the right ones, % | of the flipped, % | "
        "estimate, % (runs) | interval holds it |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in dict.fromkeys((each["model"], each["estimator"], each["rate"]) for each in found):
        group = [each for each in found if (each["model"], each["estimator"], each["rate"]) == key]
        shares = ", ".join(f"{100 * each['share']:.1f}" for each in group)
        held = sum(each["low"] <= each["rate"] <= each["high"] for each in group)
        detected = "-" if key[2] == 0 else f"{100 * np.mean([each['detected'] for each in group]):.0f}"
        lines.append(
            f"| {key[0]} | {key[1]} | {100 * key[2]:.1f} | {100 * np.mean([e['contradicted'] for e in group]):.1f} | "
            f"{100 * np.mean([e['false_positive'] for e in group]):.1f} | {detected} | {shares} | "
            f"{held} of {len(group)} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--rates", type=float, nargs="+", default=list(FLIP_RATES))
    parser.add_argument("--models", nargs="+", choices=["conv", "mlp"], default=["conv", "mlp"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    found: list[dict[str, Any]] = []
    for kind in options.models:
        for rate in options.rates:
            for seed in options.seeds:
                found += run(kind, rate, seed)
                print(f"{kind}, {rate:.0%} flipped, seed {seed}: {found[-len(ESTIMATORS)]['share']:.3f}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n" + table(found))


if __name__ == "__main__":
    main()
