"""Find shuffled labels in MNIST, Fashion-MNIST or CIFAR-10 with a residual net: train, self-influence, analysis.

With ``--shuffle-label`` a tenth of the training labels is replaced by other classes, which are written to
``shuffled_labels.csv``. A ResNet-9, ResNet-23 or ResNet-56 is trained on them and leaves checkpoints. Rows of high
self-influence (TracInCP; Pruthi et al. 2020, section 4.1) are those whose own gradient step helped them most, as it is
with labels that the other rows do not explain.

The three stages only share files, so each can be run alone, or elsewhere, and is not done twice:

    python examples/shuffled_labels.py --shuffle-label --stages train
    python examples/shuffled_labels.py --shuffle-label --stages self-influence
    python examples/shuffled_labels.py --shuffle-label --stages analysis

Without ``--stages`` all three run. Data: standard files under ``--data-dir``; else what `vision_data` finds.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recorded_training import load_weights, train_or_reuse
from run_directory import claim_directory
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from vision_data import DATASETS, VisionData, load_vision
from vision_models import MODELS, build_model

from tracer import Attribution, Tracer, attribute, load_checkpoints
from tracer.metrics import mislabel_detection

STAGES = ("train", "self-influence", "analysis")
CHECKED_SHARES = (0.05, 0.1, 0.2, 0.3)


def shuffle_labels(labels: np.ndarray, share: float, num_classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Replace a share of labels by other classes, each equally likely.

    Args:
        labels: ``[N]``.
        share: From 0 to 1.
        num_classes: How many classes there are.
        seed: Of rows and new labels.

    Returns:
        The labels ``[N]``, and a bool for each that says whether it was replaced.
    """
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(labels), size=round(share * len(labels)), replace=False)
    given, shuffled = labels.copy(), np.zeros(len(labels), dtype=bool)
    given[rows] = (labels[rows] + rng.integers(1, num_classes, size=len(rows))) % num_classes
    shuffled[rows] = True
    return given, shuffled


def write_shuffled(path: Path, data: VisionData, given: np.ndarray, shuffled: np.ndarray) -> None:
    """Write the rows whose labels were replaced, with the old and the new class."""
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file, lineterminator="\n")
        lines.writerow(["row", "true_label", "given_label", "true_class", "given_class"])
        for row in np.flatnonzero(shuffled):
            pair = int(data.train_labels[row]), int(given[row])
            lines.writerow([row, *pair, *(data.class_names[label] for label in pair)])


def read_shuffled(path: Path, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels as trained on and a bool for each that was replaced, from what `write_shuffled` wrote.

    Args:
        path: The file.
        labels: ``[N]``, the true labels.

    Returns:
        Two arrays ``[N]``.

    Raises:
        SystemExit: There is no such file: nothing was trained yet.
    """
    if not path.exists():
        raise SystemExit(f"{path} is missing: run the stage train first (--stages train).")
    given, shuffled = labels.copy(), np.zeros(len(labels), dtype=bool)
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            given[int(line["row"])], shuffled[int(line["row"])] = int(line["given_label"]), True
    return given, shuffled


def train_stage(data: VisionData, options: argparse.Namespace) -> None:
    """Shuffle labels, train on them and keep checkpoints."""
    given, shuffled = shuffle_labels(data.train_labels, options.shuffle_label, len(data.class_names), options.seed)
    write_shuffled(options.output_dir / "shuffled_labels.csv", data, given, shuffled)
    print(f"Training {options.model} on {len(given):,} images of {data.name}; {shuffled.sum()} labels are shuffled.")
    images, _ = data.tensors()
    train_or_reuse(
        make_model(data, options),
        TensorDataset(images, torch.as_tensor(given)),
        options.output_dir / "checkpoints",
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )


def self_influence_stage(data: VisionData, options: argparse.Namespace) -> None:
    """Featurize all rows at all checkpoints and write their self-influence to ``self_influence.npy``."""
    checkpoints = load_checkpoints(options.output_dir / "checkpoints")
    given, _ = read_shuffled(options.output_dir / "shuffled_labels.csv", data.train_labels)
    train_images, test_images = data.tensors()
    found = attribute(
        make_model(data, options),
        "image_classification",
        (train_images, torch.as_tensor(given)),
        (test_images, torch.as_tensor(data.test_labels)),
        checkpoints,
        save_dir=options.output_dir / "store",
        proj_dim=options.proj_dim,
        seed=options.seed,
    )
    np.save(options.output_dir / "self_influence.npy", found.self_influence())
    print(f"Self-influence of {len(given):,} rows at {len(checkpoints)} checkpoints: self_influence.npy")


def analysis_stage(data: VisionData, options: argparse.Namespace) -> None:
    """Print what the ranking finds, compared with the loss and chance, write a report, and check the claim."""
    given, shuffled = read_shuffled(options.output_dir / "shuffled_labels.csv", data.train_labels)
    scores_path = options.output_dir / "self_influence.npy"
    if not scores_path.exists():
        raise SystemExit(f"{scores_path} is missing: run the stage self-influence first (--stages self-influence).")
    self_influence = np.load(scores_path)
    (train_images, test_images), labels = data.tensors(), torch.as_tensor(given)
    model, losses = make_model(data, options), []
    for path, _ in load_checkpoints(options.output_dir / "checkpoints"):
        load_weights(model, path)
        logits = predict(model, train_images)
        losses.append(nn.functional.cross_entropy(logits, labels, reduction="none").numpy())
    predictions, test_predictions = logits.argmax(1), predict(model, test_images).argmax(1)
    accuracy = float((test_predictions.numpy() == data.test_labels).mean())
    print(f"Test accuracy at the last checkpoint: {accuracy:.1%} of {len(data.test_labels):,}")
    rankings = {"loss, mean over checkpoints": np.mean(losses, axis=0), "loss at the last checkpoint": losses[-1]}
    result: dict[str, Any] = {"test_accuracy": accuracy, "num_shuffled": int(shuffled.sum())}
    if shuffled.any():
        result["recall"] = print_recall({"self-influence": self_influence, **rankings}, shuffled)
    print_suspects(self_influence, given, predictions.numpy(), shuffled, data)
    (options.output_dir / "analysis.json").write_text(json.dumps(result, indent=2))

    if not options.no_report:
        write_report(options, data, given, shuffled, (predictions, test_predictions), rankings)
    if shuffled.any():
        found = result["recall"]["self-influence"]["0.2"]
        assert found > 0.4, f"a fifth of the rows should hold over twice chance's share of shuffled labels, not {found}"


def write_report(
    options: argparse.Namespace,
    data: VisionData,
    given: np.ndarray,
    shuffled: np.ndarray,
    predictions: tuple[Tensor, Tensor],
    rankings: dict[str, np.ndarray],
) -> None:
    """Write the report from the store alone; ``predictions`` are of training and test images."""
    index = Attribution(Tracer.open(options.output_dir / "store"), "targets").report(
        options.output_dir / "report",
        inputs=data.train_images,
        labels=given,
        target_inputs=data.test_images,
        target_labels=data.test_labels,
        train_predictions=predictions[0],
        target_predictions=predictions[1],
        class_names=data.class_names,
        known_mislabelled=shuffled if shuffled.any() else None,
        rankings=rankings,
        settings=settings_of(options, data),
        title=f"Shuffled labels in {data.name}",
    )
    print(f"\nReport: {index}")


def print_recall(rankings: dict[str, np.ndarray], shuffled: np.ndarray) -> dict[str, dict[str, float]]:
    """Print and return which share of shuffled labels is found when the rows that rank highest are checked."""
    print(f"\nShare of the {shuffled.sum()} shuffled labels found when rows are checked from the top")
    print(f"{'':<30}" + "".join(f"{f'top {share:.0%}':>10}" for share in CHECKED_SHARES) + f"{'ROC AUC':>10}")
    recall = {}
    for name, scores in rankings.items():
        found = mislabel_detection(scores, shuffled)
        recall[name] = {str(share): found.recall_at(share) for share in CHECKED_SHARES}
        print(f"{name:<30}" + "".join(f"{value:>10.0%}" for value in recall[name].values()) + f"{found.roc_auc:>10.3f}")
    print(f"{'chance':<30}" + "".join(f"{share:>10.0%}" for share in CHECKED_SHARES) + f"{0.5:>10.3f}")
    return recall


def print_suspects(
    scores: np.ndarray,
    given: np.ndarray,
    predictions: np.ndarray,
    shuffled: np.ndarray,
    data: VisionData,
    count: int = 8,
) -> None:
    """Print the rows of highest self-influence."""
    print("\nHighest self-influence   (* shuffled)")
    for row in np.argsort(-scores, kind="stable")[:count]:
        label, seen = data.class_names[given[row]], data.class_names[predictions[row]]
        true = f", truly {data.class_names[data.train_labels[row]]}" if shuffled[row] else ""
        print(
            f"  row {row:>6}{'*' if shuffled[row] else ' '} {scores[row]:>12,.4g}  {label}; the model says {seen}{true}"
        )


def make_model(data: VisionData, options: argparse.Namespace) -> nn.Module:
    """Return the untrained network, the same for a seed; torch's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        return build_model(options.model, len(data.class_names), data.train_images.shape[-1], options.width)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return logits ``[N, C]``."""
    return torch.cat([model(part) for part in images.split(256)])


def settings_of(options: argparse.Namespace, data: VisionData) -> dict[str, Any]:
    """Return what the results depend on."""
    names = ("model", "width", "shuffle_label", "epochs", "batch_size", "learning_rate", "proj_dim", "seed")
    sizes = {"data": data.name, "num_train": len(data.train_labels), "num_test": len(data.test_labels)}
    return {**sizes, **{name: getattr(options, name) for name in names}}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DATASETS, default="auto", help="auto takes the first that exists")
    parser.add_argument("--data-dir", type=Path, help="directory of the standard files")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/shuffled_labels"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="which to run (all)")
    parser.add_argument("--model", choices=MODELS, default="resnet9")
    parser.add_argument("--width", type=int, help="channels of the first convolution (as published)")
    parser.add_argument(
        "--shuffle-label", type=float, nargs="?", const=0.1, default=0.0, metavar="SHARE",
        help="share of training labels that is replaced (without a number 0.1; without the option none)",
    )  # fmt: skip
    parser.add_argument("--train-subset", type=int, help="how many training images, drawn at random (all)")
    parser.add_argument("--test-subset", type=int, help="how many test images (all)")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of plain SGD, constant (0.01)")
    parser.add_argument("--proj-dim", type=int, default=2048, help="numbers stored of each gradient (2048)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-report", action="store_true", help="leave the report out of the analysis")
    parser.add_argument("--quick", action="store_true", help="small digits, a narrow net, a few seconds")
    options = parser.parse_args(arguments)
    if not 0 <= options.shuffle_label <= 0.5:
        parser.error(f"--shuffle-label must be in 0 to 0.5; got {options.shuffle_label}")
    if options.quick:
        quick = {"dataset": "digits", "width": 8, "train_subset": 400, "test_subset": 20, "epochs": 8, "batch_size": 32}
        vars(options).update({**quick, "proj_dim": 256})
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that were asked for."""
    options = parse(arguments)
    data = load_vision(options.dataset, options.data_dir)
    data = data.subset(options.train_subset, options.test_subset, options.seed)
    claim_directory(options.output_dir, settings_of(options, data))
    stages = {"train": train_stage, "self-influence": self_influence_stage, "analysis": analysis_stage}
    for name in STAGES:
        if name in options.stages:
            stages[name](data, options)


if __name__ == "__main__":
    main()
