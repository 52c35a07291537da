"""Trace a ResNet-50 on a folder of images, one subfolder a class: which training images support a prediction?

Any such data will do, as Animals-10: ``DATA/dog/*.jpg``, ``DATA/cat/*.jpg`` ..., or ``DATA/train/dog`` and
``DATA/test/dog``. The network comes from torchvision or, where that is missing, from transformers.

    # weights that were trained on these classes: attribute at once
    python examples/image_folder.py --data-dir DATA --model-path animals.pt --train-subset 2000 --test-subset 100
    # other weights (a state dict; or a folder or name of transformers'): train on for some epochs, then attribute
    python examples/image_folder.py --data-dir DATA --model-path microsoft/resnet-50 --epochs 3 --learning-rate 0.01
    # no weights: from scratch
    python examples/image_folder.py --data-dir DATA

Without ``--data-dir`` a small folder is written from CIFAR-10 or from scikit-learn's digits, whichever exists.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from image_rows import ImageRows, draw, find_images, write_image_folder
from recorded_training import load_weights, train_or_reuse
from run_directory import claim_directory
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from vision_data import load_vision

from tracer import Attribution, attribute
from tracer.metrics import class_agreement


def build_model(num_classes: int, narrow: bool) -> nn.Module:
    """Return an untrained ResNet-50, from torchvision or else from transformers.

    Args:
        num_classes: The number of logits.
        narrow: A network of the same kind, much cheaper, for tests.

    Returns:
        A network that takes images ``[B, 3, H, W]``; its output is logits ``[B, num_classes]``, or has them as
        ``logits``. `tracer` takes either.

    Raises:
        SystemExit: Neither package is installed.
    """
    if importlib.util.find_spec("torchvision") is not None:
        resnet: Any = importlib.import_module("torchvision.models.resnet")
        if narrow:
            small: nn.Module = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=num_classes)
            return small
        large: nn.Module = resnet.resnet50(weights=None, num_classes=num_classes)
        return large
    if importlib.util.find_spec("transformers") is None:
        raise SystemExit("A ResNet-50 comes from torchvision or transformers; install one: pip install torchvision")
    from transformers import ResNetConfig, ResNetForImageClassification

    shape: dict[str, Any] = {"num_labels": num_classes}
    if narrow:
        shape |= {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "layer_type": "basic"}
    model: nn.Module = ResNetForImageClassification(ResNetConfig(**shape))
    return model


def load_pretrained(model: nn.Module, source: str) -> bool:
    """Put weights into a model; a head for other classes stays untrained.

    Args:
        model: The model.
        source: A file of `torch.save` or safetensors; a folder that transformers saved; or a name that it knows.

    Returns:
        Whether the head is the source's too, so that nothing need be trained.

    Raises:
        SystemExit: The weights are of another network.
    """
    path = Path(source)
    if path.is_file():
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
        if isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
    else:
        if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torchvision") is not None:
            raise SystemExit(f"--model-path {source} is no file; with torchvision expected a file with a state dict.")
        from transformers import ResNetForImageClassification

        state = ResNetForImageClassification.from_pretrained(source).state_dict()
    ours = model.state_dict()
    fitting = {name: value for name, value in state.items() if name in ours and ours[name].shape == value.shape}
    missing = sorted(set(ours) - set(fitting))
    head = [name for name in missing if name.startswith(("fc.", "classifier."))]
    if head != missing:
        others = [name for name in missing if name not in head]
        raise SystemExit(f"--model-path {source} has no fitting {', '.join(others[:3])} ...: it is of another network.")
    model.load_state_dict({**ours, **fitting})
    return not head


@torch.no_grad()
def predict(model: nn.Module, rows: ImageRows, batch_size: int) -> np.ndarray:
    """Return the predicted class index of each row, ``[N]``."""
    model.eval()
    outputs = (model(images) for images, _ in DataLoader(rows, batch_size))
    return torch.cat([getattr(output, "logits", output).argmax(1) for output in outputs]).numpy()


def cross_entropy(output: Any, labels: Tensor) -> Tensor:
    """Return the mean loss of a batch, of logits or of what has them as ``logits``."""
    return nn.functional.cross_entropy(getattr(output, "logits", output), labels)


def checkpoints_of(model: nn.Module, train: ImageRows, options: argparse.Namespace) -> list[tuple[Path, float]]:
    """Return the given weights as the one checkpoint, or train and return what was kept.

    Args:
        model: The network, untrained; it is left with the last checkpoint's weights.
        train: The rows.
        options: As `parse` gives them.

    Returns:
        The path and the learning rate of each.

    Raises:
        SystemExit: There is nothing trained to attribute: the head is new, and no epochs were asked for.
    """
    complete = options.model_path is not None and load_pretrained(model, options.model_path)
    if options.epochs == 0:
        if not complete:
            raise SystemExit("--epochs 0 needs a --model-path whose head is trained on these classes.")
        path = options.output_dir / "weights.pt"
        torch.save(model.state_dict(), path)
        return [(path, options.learning_rate)]
    checkpoints = train_or_reuse(
        model, train, options.output_dir / "checkpoints",
        epochs=options.epochs, batch_size=options.batch_size, learning_rate=options.learning_rate,
        loss=cross_entropy, seed=options.seed, keep=options.checkpoints,
    )  # fmt: skip
    load_weights(model, checkpoints[-1][0])
    return checkpoints


def print_top(found: Attribution, train: ImageRows, test: ImageRows, predicted: np.ndarray, names: list[str]) -> None:
    """Print the strongest training images for and against the label of some test images."""
    top, low = found.top(3), found.top(3, kind="opponents")
    print("\nStrongest training images for and against the label of a test image")
    for target in range(min(4, len(test))):
        path = test.paths[target]
        print(f"  {path.parent.name}/{path.name}, predicted {names[predicted[target]]}")
        for word, rows in (("for", top.indices[target]), ("against", low.indices[target])):
            print(
                f"    {word:<9}" + ", ".join(f"{train.paths[row].parent.name}/{train.paths[row].name}" for row in rows)
            )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="one subfolder a class (a small one is written)")
    parser.add_argument("--model-path", help="weights to begin with: a file, or a folder or name of transformers'")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/image_folder"))
    parser.add_argument("--train-subset", type=int, help="how many training images, drawn at random (all)")
    parser.add_argument("--test-subset", type=int, default=100, help="how many test images are targets (100)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of plain SGD, constant (0.02)")
    parser.add_argument("--epochs", type=int, help="0 with --model-path, else 8")
    parser.add_argument("--checkpoints", type=int, default=4, help="how many training keeps (4)")
    parser.add_argument("--image-size", type=int, default=224, help="side of the square that images are cut to (224)")
    parser.add_argument("--proj-dim", type=int, default=2048, help="numbers stored of each gradient (2048)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny network on 32 x 32 digits: a few seconds")
    options = parser.parse_args(arguments)
    if options.epochs is None:
        options.epochs = 0 if options.model_path else 8
    if options.quick:
        options.train_subset, options.test_subset, options.image_size, options.proj_dim = 120, 20, 32, 256
        options.epochs, options.checkpoints, options.learning_rate = min(options.epochs, 3), 2, 0.1
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Find the images, train or take weights, attribute, print and report."""
    options = parse(arguments)
    directory = options.data_dir
    if directory is None:
        directory = options.output_dir / "images"
        if not directory.exists():
            write_image_folder(load_vision("digits" if options.quick else "auto", None), directory, per_class=50)
    folder = find_images(directory, options.seed)
    train = draw(folder.train, options.train_subset, options.image_size, options.seed)
    test = draw(folder.test, options.test_subset, options.image_size, options.seed)
    names = (
        "model_path", "train_subset", "test_subset", "batch_size", "learning_rate", "epochs", "checkpoints",
        "image_size", "proj_dim", "seed", "quick",
    )  # fmt: skip
    claim_directory(options.output_dir, {name: getattr(options, name) for name in names})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model = build_model(len(folder.class_names), narrow=options.quick)
    print(
        f"{len(train):,} training and {len(test):,} test images of {len(folder.class_names)} classes; "
        f"{type(model).__name__} of {sum(part.numel() for part in model.parameters()):,} parameters"
    )
    checkpoints = checkpoints_of(model, train, options)
    predicted = predict(model, test, options.batch_size)
    print(f"Test accuracy: {np.mean(predicted == np.array(test.labels)):.1%}")

    found = attribute(
        model, "image_classification", train, test, checkpoints,
        save_dir=options.output_dir / "store", batch_size=options.batch_size, proj_dim=options.proj_dim,
        seed=options.seed,
    )  # fmt: skip
    print_top(found, train, test, predicted, folder.class_names)
    agreement = class_agreement(found.by("scores").top(5).indices, train.labels, test.labels)
    by_cosine = class_agreement(found.top(5).indices, train.labels, test.labels)
    print(
        f"\nProponents of their target's class among the first five: {agreement.mean:.0%} by tracin, "
        f"{by_cosine.mean:.0%} by cosine (chance {agreement.chance:.0%})"
    )
    index = found.report(
        options.output_dir / "report",
        inputs=np.stack([train.pixels(row) for row in range(len(train))]),
        labels=train.labels,
        target_inputs=np.stack([test.pixels(row) for row in range(len(test))]),
        target_labels=test.labels,
        target_predictions=predicted,
        class_names=folder.class_names,
        settings={name: str(getattr(options, name)) for name in names},
        title=f"Influence on {directory.name}",
    )
    print(f"Report: {index}")
    assert agreement.mean > 2 * agreement.chance, "proponents should be of their target's class far oftener than chance"


if __name__ == "__main__":
    main()
