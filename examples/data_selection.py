"""Choose training rows by their influence on a validation set, train on them, and measure the gain against random.

A pool of handwritten digits has some labels flipped (``--flip-rate``). A network is trained on the whole pool once and
leaves checkpoints. Each row's score is its influence on the loss of the whole validation set, a column of one group:
positive rows lowered it. Networks are then trained from scratch, with several seeds, on the top fraction by influence,
of the whole pool and of each class, on as many random rows, on those of lowest loss, and on the whole pool, and are
tested on other images.

With ``--flip-rate 0`` there is nothing to leave out, and the table says what selection does then.

Run it: python examples/data_selection.py
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from run_directory import claim_directory
from torch import Tensor, nn
from torch.func import functional_call
from vision_data import load_vision

from tracer import attribute
from tracer.retraining import EpochCheckpoint, Recipe, train_models

TASK = "image_classification"
ESTIMATORS = ("influence", "tracin")
Rows = tuple[Tensor, Tensor]


class Pool(NamedTuple):
    """The data.

    Attributes:
        train: Images ``[N, 1, 8, 8]`` and labels ``[N]``, some of them flipped.
        flipped: ``[N]``, bool.
        validation: Rows whose loss decides, all labels right.
        test: Rows for the measurement only.
    """

    train: Rows
    flipped: np.ndarray
    validation: Rows
    test: Rows


def load_pool(num_train: int, num_validation: int, flip_rate: float, seed: int) -> Pool:
    """Return the digits in three parts, with flipped labels in the first."""
    data = load_vision("digits", None)
    parts = data.tensors()
    images = torch.cat(parts)
    labels = torch.as_tensor(np.concatenate([data.train_labels, data.test_labels]))
    rng = np.random.default_rng(seed)
    order = torch.as_tensor(rng.permutation(len(labels)))
    train, validation, test = order.tensor_split([num_train, num_train + num_validation])
    flipped = np.zeros(num_train, dtype=bool)
    flipped[rng.choice(num_train, size=round(flip_rate * num_train), replace=False)] = True
    shift = torch.as_tensor(rng.integers(1, 10, size=num_train) * flipped)
    given = (labels[train] + shift) % 10
    return Pool((images[train], given), flipped, (images[validation], labels[validation]), (images[test], labels[test]))


def make_model() -> nn.Module:
    """Return a perceptron of 4,810 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def score_rows(pool: Pool, checkpoints: Sequence[EpochCheckpoint], save_dir: Path, seed: int) -> dict[str, np.ndarray]:
    """Return how good each row is for the validation set, ``[N]`` for each way to say so.

    Args:
        pool: The data.
        checkpoints: Of one training run on the whole pool.
        save_dir: The directory of the store.
        seed: Of the projection.

    Returns:
        Scores by name: influence of each estimator on the validation loss, and minus the row's own loss, the mean over
        checkpoints, which needs no gradients and no validation set.
    """
    pairs = [(checkpoint.state, checkpoint.learning_rate) for checkpoint in checkpoints]
    found = attribute(
        make_model(), TASK, pool.train, pool.validation, pairs,
        save_dir=save_dir, exp_name="validation", proj_dim=1024, seed=seed,
    )  # fmt: skip
    one_group = np.zeros(len(pool.validation[1]), dtype=int)
    scores = {}
    for estimator in ESTIMATORS:
        column = found.tracer.finalize_scores("validation", estimator, target="loss", groups=one_group)  # [N, 1]
        scores[f"top by {estimator}"] = np.array(column[:, 0])
    losses = [
        nn.functional.cross_entropy(logits_of(checkpoint.state, pool.train[0]), pool.train[1], reduction="none")
        for checkpoint in checkpoints
    ]
    scores["lowest loss"] = -torch.stack(losses).mean(0).numpy()
    return scores


def logits_of(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """Return logits ``[N, 10]`` of the model with these weights."""
    with torch.no_grad():
        logits: Tensor = functional_call(make_model(), state, (images,))
    return logits


def choose(
    scores: dict[str, np.ndarray], labels: np.ndarray, fraction: float, num_random: int, seed: int
) -> tuple[list[str], np.ndarray]:
    """Return the rows that each way chooses, several draws of random ones, and all.

    Args:
        scores: ``[N]`` for each way, higher is chosen first.
        labels: ``[N]``, as trained on. Each way chooses twice: from all rows, and the same share of each class.
        fraction: Which share of the rows.
        num_random: How many random draws.
        seed: Of these.

    Returns:
        A name for each choice and the masks ``[S, N]``.
    """
    rng, count = np.random.default_rng(seed), round(fraction * len(labels))
    choices: list[tuple[str, np.ndarray]] = []
    for name, values in scores.items():
        order = np.argsort(-values, kind="stable")
        place = np.empty(len(labels))
        for label in np.unique(labels):  # each row's place in its class, from 0 for the best to 1
            rows = order[labels[order] == label]
            place[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
        best = np.argsort(place, kind="stable")[:count]
        choices += [(name, order[:count]), (f"{name}, each class", best)]
    choices += [("random", rng.permutation(len(labels))[:count]) for _ in range(num_random)]
    choices.append(("the whole pool", np.arange(len(labels))))
    names, masks = [name for name, _ in choices], np.zeros((len(choices), len(labels)), dtype=bool)
    for mask, (_, rows) in zip(masks, choices, strict=True):
        mask[rows] = True
    return names, masks


def measure(pool: Pool, names: Sequence[str], masks: np.ndarray, recipe: Recipe, seeds: int) -> dict[str, np.ndarray]:
    """Return test accuracies of networks trained on each choice with each seed, by its name."""
    accuracies: dict[str, list[float]] = {name: [] for name in names}
    for model in train_models(make_model, TASK, pool.train, recipe, masks, seeds=range(100, 100 + seeds)):
        right = logits_of(model.state, pool.test[0]).argmax(1) == pool.test[1]
        accuracies[names[model.subset]].append(float(right.float().mean()))
    return {name: np.array(values) for name, values in accuracies.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/data_selection"))
    parser.add_argument("--fraction", type=float, default=0.5, help="share of the pool that is chosen (0.5)")
    parser.add_argument("--flip-rate", type=float, default=0.3, help="share of the pool's labels that is flipped (0.3)")
    parser.add_argument("--seeds", type=int, default=10, help="networks trained on each choice (10)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the flips and the first network")
    parser.add_argument("--quick", action="store_true", help="fewer rows and networks: a few seconds")
    options = parser.parse_args(arguments)
    for name, low, high in (("fraction", 0.05, 0.95), ("flip_rate", 0.0, 0.5)):
        if not low <= getattr(options, name) <= high:
            parser.error(f"--{name.replace('_', '-')} must be in {low} to {high}; got {getattr(options, name)}")
    if options.quick:
        options.seeds = 3
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train on the pool, score its rows, train on the choices and print what they bring."""
    options = parse(arguments)
    num_train, num_validation, epochs = (400, 100, 12) if options.quick else (1000, 200, 20)
    settings = {"num_train": num_train, "num_validation": num_validation, "epochs": epochs, "seed": options.seed}
    claim_directory(options.output_dir, {**settings, "flip_rate": options.flip_rate})
    pool = load_pool(num_train, num_validation, options.flip_rate, options.seed)
    recipe = Recipe(learning_rate=0.1, momentum=0.9, batch_size=32, epochs=epochs, schedule="linear")
    count = round(options.fraction * num_train)
    print(f"{num_train:,} rows, {pool.flipped.sum()} with flipped labels; {count} of them are chosen.")

    saved_epochs = sorted({max(1, round(share * epochs)) for share in (0.1, 0.25, 0.5, 0.75, 1.0)})
    (first,) = train_models(
        make_model, TASK, pool.train, recipe, seeds=[options.seed], checkpoint_epochs=saved_epochs
    )  # the same seed gives the same weights, so a second call finds its rows in the store
    scores = score_rows(pool, first.checkpoints, options.output_dir / "store", options.seed)
    num_random = 2 if options.quick else 5
    names, masks = choose(scores, pool.train[1].numpy(), options.fraction, num_random, options.seed)
    print(f"Training {len(masks) * options.seeds} networks on {len(masks)} choices of rows ...")
    accuracies = measure(pool, names, masks, recipe, options.seeds)

    print(f"\nTest accuracy ({len(pool.test[1])} images, mean and standard deviation over networks)")
    print(f"{'trained on':<30}{'rows':>6}{'flipped':>9}{'accuracy':>17}{'gain':>9}")
    for name, values in accuracies.items():
        chosen = masks[names.index(name)]
        flipped = f"{pool.flipped[chosen].mean():.1%}"
        spread, gain = f"{values.mean():.1%} ± {values.std():.1%}", values.mean() - accuracies["random"].mean()
        print(f"{name:<30}{chosen.sum():>6}{flipped:>9}{spread:>17}{gain:>+9.1%}")
    table = {name: values.tolist() for name, values in accuracies.items()}
    (options.output_dir / "accuracies.json").write_text(json.dumps(table, indent=2))

    if options.flip_rate >= 0.1:
        selected, drawn = accuracies["top by influence, each class"], accuracies["random"]
        assert selected.mean() > drawn.mean() + 0.01, "each class's rows of highest influence should beat random ones"
        assert pool.flipped[masks[0]].mean() < pool.flipped.mean() / 2, "few of them should have flipped labels"


if __name__ == "__main__":
    main()
