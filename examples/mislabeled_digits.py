"""Find flipped labels among handwritten digits, and see which training images speak for and against a prediction.

A tenth of the training labels of scikit-learn's digits (8 by 8 pixels, 1,797 of them) is flipped to another digit. A
small conv net is trained on them and saved a few times on the way. From these checkpoints `tracer.attribute` computes
each training image's self-influence (TracInCP; Pruthi et al. 2020), by which flipped labels stand out, and the
proponents and opponents of each test image.

Run it: python examples/mislabeled_digits.py
Running it again with the same settings takes up what is there: the checkpoints and every row already featurized.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tracer import attribute

CLASS_NAMES = [str(digit) for digit in range(10)]
CHECKED_SHARES = (0.1, 0.2, 0.3)
CHECKPOINT_SHARES = (1 / 15, 1 / 6, 1 / 3, 2 / 3, 1.0)  # of the epochs: early ones too, while the gradients are large


@dataclass(frozen=True)
class Settings:
    """What the checkpoints depend on.

    Attributes:
        seed: Of the split, the flips, the first weights and the order of batches.
        flip_rate: The share of training labels that is flipped.
        num_train: How many images are trained on.
        num_test: How many of the other images are targets.
        epochs: Passes over the training images.
        batch_size: Images a step.
        learning_rate: Of plain SGD, constant.
    """

    seed: int
    flip_rate: float
    num_train: int
    num_test: int
    epochs: int
    batch_size: int
    learning_rate: float = 0.1


@dataclass(frozen=True)
class Digits:
    """The data.

    Attributes:
        train_images: ``[num_train, 1, 8, 8]``, between 0 and 1.
        train_labels: ``[num_train]``, as trained on.
        flipped: ``[num_train]``, bool, whose label is wrong.
        test_images: ``[num_test, 1, 8, 8]``.
        test_labels: ``[num_test]``, all right.
    """

    train_images: Tensor
    train_labels: Tensor
    flipped: np.ndarray
    test_images: Tensor
    test_labels: Tensor


def load_data(settings: Settings) -> Digits:
    """Split the digits at random and flip labels of the training part."""
    digits = load_digits()
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(len(digits.target))
    train, test = order[: settings.num_train], order[-settings.num_test :]
    images = torch.as_tensor(digits.images / 16.0, dtype=torch.float32).unsqueeze(1)  # [1797, 1, 8, 8]
    labels = digits.target.astype(np.int64)
    flipped = np.zeros(len(train), dtype=bool)
    flipped[rng.choice(len(train), size=round(settings.flip_rate * len(train)), replace=False)] = True
    shift = rng.integers(1, 10, size=len(train)) * flipped
    train_labels = torch.as_tensor((labels[train] + shift) % 10)
    return Digits(images[train], train_labels, flipped, images[test], torch.as_tensor(labels[test]))


def build_model() -> nn.Module:
    """Return a conv net of about 38,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(data: Digits, settings: Settings, directory: Path) -> list[tuple[Path, float]]:
    """Train with plain SGD, as TracIn assumes, and save the weights after some of the epochs.

    Args:
        data: The digits.
        settings: How to train.
        directory: Where the weights go.

    Returns:
        The path and the learning rate of each checkpoint.
    """
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate)
    saved_epochs = {max(1, round(share * settings.epochs)) for share in CHECKPOINT_SHARES}
    checkpoints = []
    for epoch in range(1, settings.epochs + 1):
        for rows in torch.randperm(settings.num_train).split(settings.batch_size):
            loss = nn.functional.cross_entropy(model(data.train_images[rows]), data.train_labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch in saved_epochs:
            path = directory / f"epoch_{epoch:03d}.pt"
            torch.save(model.state_dict(), path)
            checkpoints.append((path, settings.learning_rate))
    return checkpoints


def train_or_reuse(data: Digits, settings: Settings, directory: Path) -> list[tuple[Path, float]]:
    """Return the checkpoints of an earlier run with the same settings, or train.

    Args:
        data: The digits.
        settings: How to train.
        directory: Where checkpoints are kept.

    Returns:
        The path and the learning rate of each checkpoint.

    Raises:
        SystemExit: If the directory holds a run with other settings.
    """
    record = directory / "training.json"  # written last: it is there only if training came to its end
    if not record.exists():
        print(f"Training {settings.epochs} epochs ...")
        checkpoints = train(data, settings, directory)
        names = [[path.name, learning_rate] for path, learning_rate in checkpoints]
        record.write_text(json.dumps({"settings": asdict(settings), "checkpoints": names}, indent=2))
        return checkpoints
    found = json.loads(record.read_text())
    if found["settings"] != asdict(settings):
        raise SystemExit(
            f"{directory} holds checkpoints of other settings: {found['settings']}.\n"
            f"These are: {asdict(settings)}.\nChoose another --output-dir, or remove that folder's parent."
        )
    print(f"Reusing the {len(found['checkpoints'])} checkpoints in {directory}.")
    return [(directory / name, learning_rate) for name, learning_rate in found["checkpoints"]]


@torch.no_grad()
def evaluate(model: nn.Module, path: Path, images: Tensor, labels: Tensor) -> tuple[Tensor, np.ndarray]:
    """Return the predictions ``[N]`` and losses ``[N]`` at a checkpoint."""
    model.load_state_dict(torch.load(path, weights_only=True))
    logits = model(images)
    return logits.argmax(dim=1), nn.functional.cross_entropy(logits, labels, reduction="none").numpy()


def found_at(scores: np.ndarray, flipped: np.ndarray) -> list[int]:
    """Return how many flipped labels are among the rows that rank highest, for each share of rows checked."""
    hits = np.cumsum(flipped[np.argsort(-scores, kind="stable")])
    return [int(hits[round(share * len(hits)) - 1]) for share in CHECKED_SHARES]


def print_found(rankings: dict[str, np.ndarray], flipped: np.ndarray) -> None:
    """Print a table of how many flipped labels each ranking finds, beside chance."""
    total = int(flipped.sum())
    print(f"\nFlipped labels found among the rows ranked highest ({total} of {len(flipped)} labels are flipped)")
    print(f"{'':<30}" + "".join(f"{f'top {share:.0%}':>14}" for share in CHECKED_SHARES))
    for name, scores in rankings.items():
        print(f"{name:<30}" + "".join(f"{f'{found} ({found / total:.0%})':>14}" for found in found_at(scores, flipped)))
    expected = [total * round(share * len(flipped)) / len(flipped) for share in CHECKED_SHARES]
    print(f"{'chance (expected)':<30}" + "".join(f"{f'{count:.0f} ({count / total:.0%})':>14}" for count in expected))


def choose_targets(predictions: Tensor, labels: Tensor, count: int = 3) -> list[int]:
    """Return some test images that the model gets right and all or some that it gets wrong."""
    wrong = torch.nonzero(predictions != labels).flatten()[:count]
    right = torch.nonzero(predictions == labels).flatten()[: 2 * count - len(wrong)]
    return [*right.tolist(), *wrong.tolist()]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/mislabeled_digits"))
    parser.add_argument("--flip-rate", type=float, default=0.1, help="share of flipped training labels (0.1)")
    parser.add_argument("--epochs", type=int, help="passes over the training images (30)")
    parser.add_argument("--proj-dim", type=int, help="numbers kept of each gradient (4096)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer images, epochs and numbers: a few seconds")
    options = parser.parse_args(arguments)
    if not 0.01 <= options.flip_rate <= 0.5:
        parser.error(f"--flip-rate must lie in 0.01 to 0.5; got {options.flip_rate}")
    options.epochs = options.epochs or (12 if options.quick else 30)
    options.proj_dim = options.proj_dim or (512 if options.quick else 4096)
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, attribute, print what is found and write the report."""
    options = parse(arguments)
    num_train, num_test, batch_size = (500, 60, 16) if options.quick else (1297, 500, 32)
    settings = Settings(options.seed, options.flip_rate, num_train, num_test, options.epochs, batch_size)
    data = load_data(settings)
    print(
        f"Handwritten digits: {num_train:,} for training, {num_test} for testing; "
        f"{data.flipped.sum()} training labels are flipped."
    )
    checkpoints = train_or_reuse(data, settings, options.output_dir / "checkpoints")

    model = build_model()
    attribution = attribute(
        model,
        "image_classification",
        TensorDataset(data.train_images, data.train_labels),
        TensorDataset(data.test_images, data.test_labels),
        checkpoints=checkpoints,
        save_dir=options.output_dir / "store",
        proj_dim=options.proj_dim,
        seed=options.seed,
    )
    self_influence = attribution.self_influence()

    losses = np.stack([evaluate(model, path, data.train_images, data.train_labels)[1] for path, _ in checkpoints])
    rankings = {"loss, mean over checkpoints": losses.mean(axis=0), "loss at the last checkpoint": losses[-1]}
    train_predictions, _ = evaluate(model, checkpoints[-1][0], data.train_images, data.train_labels)
    test_predictions, _ = evaluate(model, checkpoints[-1][0], data.test_images, data.test_labels)
    accuracy = float((test_predictions == data.test_labels).float().mean())
    print(f"Test accuracy at the last checkpoint: {accuracy:.1%}")
    print_found({"self-influence": self_influence, **rankings}, data.flipped)

    shown = choose_targets(test_predictions, data.test_labels)
    proponents, opponents = attribution.top(5, kind="proponents"), attribution.top(5, kind="opponents")
    print("\nLabels of the strongest training images (* flipped) for some test images")
    for target in shown:
        words = [
            " ".join(f"{data.train_labels[row]}{'*' if data.flipped[row] else ' '}" for row in top.indices[target])
            for top in (proponents, opponents)
        ]
        verdict = f"{data.test_labels[target]}, predicted {test_predictions[target]}"
        print(f"  test {target:>3} ({verdict}): proponents {words[0]}  opponents {words[1]}")

    index = attribution.report(
        options.output_dir / "report",
        inputs=data.train_images,
        labels=data.train_labels,
        target_inputs=data.test_images,
        target_labels=data.test_labels,
        train_predictions=train_predictions,
        target_predictions=test_predictions,
        class_names=CLASS_NAMES,
        known_mislabelled=data.flipped,
        rankings=rankings,
        shown_targets=shown,
        settings={**asdict(settings), "proj_dim": options.proj_dim, "checkpoints": len(checkpoints)},
        title="Mislabelled digits",
    )
    print(f"\nReport: {index}")

    found, total = found_at(self_influence, data.flipped), int(data.flipped.sum())
    assert found[1] > 2 * CHECKED_SHARES[1] * total, "self-influence should find flipped labels far better than chance"


if __name__ == "__main__":
    main()
