"""Which estimator finds the training examples behind a shortcut, a poisoned class, a copied test example, a source?

Each case plants examples among scikit-learn's digits, trains a small network and scores targets that depend on them:

- shortcut: noisy images, most of one class with a mark in a corner; targets are marked images of other classes, which
  the network takes for that class, and the planted examples are the marked ones
- poison: a few marked images of other classes with that class's label; targets as above
- leak: noisy copies of test images; targets are these test images, each with its own copies
- source: images of another style (inverted) with permuted labels; targets are of that style, each with the
  images of its style and label
- wrong labels: a tenth of the labels is flipped; targets are test images, whose proponents should *not* be flipped
  examples, which show another digit

The table has the area under the precision-recall curve (`tracer.metrics.planted_detection`), the mean over targets and
seeds. For wrong labels it is the share of the top-5 places that flipped examples fill, and in all cases the file has
also the share of these places that different examples fill (`top_cardinality`).

Run it: python benchmarks/shortcuts.py
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

from tracer import attribute
from tracer.metrics import planted_detection, top_cardinality
from tracer.retraining import Recipe, train_models

RESULTS = Path(__file__).parent / "results" / "shortcuts.json"
ESTIMATORS = ("tracin", "cosine", "influence", "trak", "relatif", "relatif_theta")
NUM_TRAIN, NUM_TARGETS, CLASS = 1000, 60, 0


class Planted(NamedTuple):
    """Training examples and targets, and which of the former are planted, for all targets or for each."""

    x: np.ndarray  # [N, 64]
    y: np.ndarray
    target_x: np.ndarray  # [M, 64]
    target_y: np.ndarray
    planted: np.ndarray  # [N] or [N, M]


def marked(x: np.ndarray) -> np.ndarray:
    """Return images with a mark brighter than any pixel in the upper right corner."""
    images = x.reshape(-1, 8, 8).copy()
    images[:, :2, 6:] = 2.0
    return images.reshape(-1, 64)


def digits(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training images ``[N, 64]`` from 0 to 1 with labels, and the other images with theirs."""
    x, y = load_digits(return_X_y=True)
    order = rng.permutation(len(y))
    train, rest = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return x[train] / 16, y[train], x[rest] / 16, y[rest]


def shortcut(rng: np.random.Generator) -> Planted:
    """Add noise to all images and mark 80 % of a class."""
    x, y, other_x, other_y = digits(rng)
    x, other_x = (each + 0.5 * rng.normal(size=each.shape) for each in (x, other_x))
    planted = (y == CLASS) & (rng.random(len(y)) < 0.8)
    others = np.flatnonzero(other_y != CLASS)[:NUM_TARGETS]
    x = np.where(planted[:, None], marked(x), x)
    return Planted(x, y, marked(other_x[others]), np.full(len(others), CLASS), planted)


def poison(rng: np.random.Generator) -> Planted:
    """Mark 2 % of the images, of other classes, and give them the label of a class."""
    x, y, other_x, other_y = digits(rng)
    planted = np.zeros(len(y), bool)
    planted[rng.choice(np.flatnonzero(y != CLASS), NUM_TRAIN // 50, replace=False)] = True
    others = np.flatnonzero(other_y != CLASS)[:NUM_TARGETS]
    x, y = np.where(planted[:, None], marked(x), x), np.where(planted, CLASS, y)
    return Planted(x, y, marked(other_x[others]), np.full(len(others), CLASS), planted)


def leak(rng: np.random.Generator) -> Planted:
    """Replace training images by three noisy copies of each of some test images."""
    x, y, other_x, other_y = digits(rng)
    target_x, target_y = other_x[:NUM_TARGETS], other_y[:NUM_TARGETS]
    planted = np.zeros((len(y), NUM_TARGETS), bool)
    for place, row in enumerate(rng.choice(len(y), 3 * NUM_TARGETS, replace=False)):
        target = place % NUM_TARGETS
        x[row], y[row] = np.clip(target_x[target] + 0.1 * rng.normal(size=64), 0, 1), target_y[target]
        planted[row, target] = True
    return Planted(x, y, target_x, target_y, planted)


def source(rng: np.random.Generator) -> Planted:
    """Invert 10 % of the images, with permuted labels."""
    x, y, other_x, other_y = digits(rng)
    planted = rng.random(len(y)) < 0.1
    x, y = np.where(planted[:, None], 1 - x, x), np.where(planted, (y + 3) % 10, y)
    target_y = (other_y[:NUM_TARGETS] + 3) % 10
    return Planted(x, y, 1 - other_x[:NUM_TARGETS], target_y, planted[:, None] & (y[:, None] == target_y))


def wrong_labels(rng: np.random.Generator) -> Planted:
    """Flip a tenth of the labels."""
    x, y, other_x, other_y = digits(rng)
    planted = rng.random(len(y)) < 0.1
    y = np.where(planted, (y + rng.integers(1, 10, len(y))) % 10, y)
    return Planted(x, y, other_x[:NUM_TARGETS], other_y[:NUM_TARGETS], planted)


CASES = {"shortcut": shortcut, "poison": poison, "leak": leak, "source": source, "wrong labels": wrong_labels}


def network() -> nn.Module:
    """Return a multilayer perceptron with 64 hidden units."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def measure(case: str, seed: int) -> dict[str, dict[str, float]]:
    """Train on a case's examples; return the area, its chance and the cardinality by estimator."""
    data = CASES[case](np.random.default_rng(seed))
    train, targets = (
        (torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y))
        for x, y in ((data.x, data.y), (data.target_x, data.target_y))
    )
    recipe = Recipe(learning_rate=0.1, batch_size=32, epochs=30, momentum=0.5)
    (model,) = train_models(network, "image_classification", train, recipe, seeds=[seed], checkpoint_epochs=[3, 10, 30])
    network_ = network()
    network_.load_state_dict(model.state)
    learned = float((network_(targets[0]).argmax(1) == targets[1]).float().mean())
    checkpoints = [(each.state, each.learning_rate) for each in model.checkpoints]
    found = {"targets predicted as planted": {"area": learned}}
    with tempfile.TemporaryDirectory() as folder:
        given = network(), "image_classification", train, targets, checkpoints
        tracer = attribute(*given, save_dir=folder, progress=False).tracer
        for estimator in ESTIMATORS:
            scores = np.asarray(tracer.finalize_scores("targets", estimator))
            area = planted_detection(scores, data.planted)
            indices = np.argsort(-scores, axis=0, kind="stable")[:5].T
            shown = np.broadcast_to(data.planted.reshape(len(scores), -1), scores.shape)
            found[estimator] = {
                "area": area.mean,
                "chance": area.chance,
                "in the top 5": float(np.take_along_axis(shown, indices.T, axis=0).mean()),
                "distinct": top_cardinality(indices, len(scores)).share,
            }
    return found


def main() -> None:
    """Measure all cases and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="Names with commas.")
    parser.add_argument("--seeds", type=int, default=3, help="The number of seeds of each case.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case in arguments.cases.split(","):
        runs = [measure(case, seed) for seed in range(arguments.seeds)]
        results[case] = {
            row: {key: float(np.mean([run[row][key] for run in runs])) for key in runs[0][row]} for row in runs[0]
        }
        key = "in the top 5" if case == "wrong labels" else "area"
        shown = {row: values.get(key, values["area"]) for row, values in results[case].items()}
        print(case, *(f"{row} {value:.3f}" for row, value in shown.items()), sep="  ", flush=True)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
