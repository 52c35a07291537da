r"""Plain TracIn in one call: the whole train x target matrix from a folder of ``.pt`` weights.

Any training run that saved ``model.state_dict()`` now and then will do. What the script needs to know of yours are
three functions, named as ``package.module:function`` and called without arguments:

    python examples/weights_folder.py --weights-dir runs/mine/weights --learning-rate 0.05 \
        --model mine.model:build --train mine.data:train_rows --targets mine.data:test_rows

``--model`` returns the network; ``--train`` and ``--targets`` each return a data set, a tuple of tensors ``(x, y)`` or
a list of batches. Without them handwritten digits are trained on first, and leave such a folder.

Scores are exact, without a projection: ``score(z, z') = sum over checkpoints of lr * <gradient of L(z), gradient of
L(z')>`` (TracInCP; Pruthi et al. 2020). They go to ``tracin.npy``, and some of them are computed again one by one.
"""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from run_directory import claim_directory
from torch import Tensor, nn
from torch.utils.data import default_collate
from vision_data import load_vision

from tracer import attribute


def digits_model() -> nn.Module:
    """Return an untrained conv net of about 9,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 30),
        nn.ReLU(),
        nn.Linear(30, 10),
    )


def digits_train() -> tuple[Tensor, Tensor]:
    """Return 400 training rows of the digits."""
    data = load_vision("digits", None).subset(400, 50, seed=0)
    return data.tensors()[0], torch.as_tensor(data.train_labels)


def digits_targets() -> tuple[Tensor, Tensor]:
    """Return 50 test rows of the digits."""
    data = load_vision("digits", None).subset(400, 50, seed=0)
    return data.tensors()[1], torch.as_tensor(data.test_labels)


SAVED_EPOCHS = (1, 2, 4, 8, 12)
"""After which epochs on the digits weights are saved."""


def train_digits(directory: Path, learning_rate: float) -> None:
    """Train on the digits as anyone might, and save the weights of some epochs under names without leading zeros."""
    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model, (x, y) = digits_model(), digits_train()
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    for epoch in range(1, SAVED_EPOCHS[-1] + 1):
        for rows in torch.randperm(len(y)).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        if epoch in SAVED_EPOCHS:
            torch.save(model.state_dict(), directory / f"epoch_{epoch}.pt")


def weights_in_order(directory: Path, pattern: str) -> list[Path]:
    """Return the files of a folder in the order of the numbers in their names: ``epoch_2.pt`` before ``epoch_10.pt``.

    Args:
        directory: The folder.
        pattern: A shell pattern.

    Returns:
        The paths.

    Raises:
        SystemExit: There are none.
    """

    def place(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.stem)]

    found = sorted(directory.glob(pattern), key=place)
    if not found:
        raise SystemExit(
            f"{directory} has no file {pattern}; pass --weights-dir, and --pattern if they are named otherwise."
        )
    return found


def rates_of(rates: Sequence[float], num_files: int) -> list[float]:
    """Return a learning rate for each file.

    Args:
        rates: One, or one for each file.
        num_files: How many files.

    Returns:
        As many rates as files.

    Raises:
        SystemExit: The numbers differ.
    """
    if len(rates) not in (1, num_files):
        raise SystemExit(f"{len(rates)} learning rates came for {num_files} files; pass one, or one for each file.")
    return list(rates) * num_files if len(rates) == 1 else list(rates)


def named_function(name: str) -> Callable[[], Any]:
    """Return the function that ``package.module:function`` names; modules of the current folder count too.

    Args:
        name: The name.

    Returns:
        The function.

    Raises:
        SystemExit: It has another form, or there is no such function.
    """
    module, _, function = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found: Callable[[], Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise SystemExit(f"{name!r} was not found ({error}); expected package.module:function.") from None
    return found


def one_by_one(
    model: nn.Module,
    train: Any,
    targets: Any,
    checkpoints: Sequence[tuple[Path, float]],
    pairs: Sequence[tuple[int, int]],
) -> list[float]:
    """Return the scores of some pairs by the formula: two gradients at each checkpoint, in float64.

    Args:
        model: The network.
        train: Rows, indexed one by one.
        targets: Likewise.
        checkpoints: Weights and learning rates.
        pairs: Train row and target of each score.

    Returns:
        The scores.
    """
    model = model.double().eval()

    def gradient(rows: Any, index: int) -> Tensor:
        x, y = default_collate([row_of(rows, index)])
        loss = nn.functional.cross_entropy(model(x.double()), y)
        return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])

    scores = np.zeros(len(pairs))
    for path, learning_rate in checkpoints:
        model.load_state_dict(torch.load(path, weights_only=True))
        for place, (row, target) in enumerate(pairs):
            scores[place] += learning_rate * float(gradient(train, row) @ gradient(targets, target))
    return scores.tolist()


def row_of(rows: Any, index: int) -> tuple[Tensor, Tensor]:
    """Return one row ``(x, y)`` of a data set or of a tuple of tensors."""
    x, y = (part[index] for part in rows) if isinstance(rows, tuple) else rows[index]
    return x, y


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights-dir", type=Path, help="the folder (by default the digits' in --output-dir)")
    parser.add_argument("--pattern", default="*.pt", help="which files of it (*.pt); .safetensors works too")
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[0.05], help="one, or one for each file")
    parser.add_argument("--model", default="weights_folder:digits_model", metavar="MODULE:FUNCTION")
    parser.add_argument("--train", default="weights_folder:digits_train", metavar="MODULE:FUNCTION")
    parser.add_argument("--targets", default="weights_folder:digits_targets", metavar="MODULE:FUNCTION")
    parser.add_argument("--task", default="image_classification", help="as attribute takes it")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/weights_folder"))
    parser.add_argument("--checked", type=int, default=8, help="scores computed again one by one (8; classifiers only)")
    parser.add_argument("--quick", action="store_true", help="check fewer scores again")
    options = parser.parse_args(arguments)
    if options.quick:
        options.checked = 3
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Compute the matrix, say what is in it, and check it."""
    options = parse(arguments)
    folder = options.weights_dir
    if folder is None:
        folder = options.output_dir / "weights"
        if not list(folder.glob("*.pt")):
            names = [Path(f"epoch_{epoch}.pt") for epoch in SAVED_EPOCHS]
            rates_of(options.learning_rate, sum(name.match(options.pattern) for name in names))  # before any training
            print(f"Training on digits; weights go to {folder}")
            train_digits(folder, options.learning_rate[0])
    paths = weights_in_order(folder, options.pattern)
    rates = rates_of(options.learning_rate, len(paths))
    claim_directory(options.output_dir, {"weights": [path.name for path in paths], "learning_rates": rates})
    model, train, targets = (named_function(name)() for name in (options.model, options.train, options.targets))
    checkpoints = list(zip(paths, rates, strict=True))

    found = attribute(
        model, options.task, train, targets, checkpoints, save_dir=options.output_dir / "store", projector="none"
    )  # fmt: skip
    scores = np.asarray(found.scores)
    np.save(options.output_dir / "tracin.npy", scores)
    print(f"{len(paths)} checkpoints: " + ", ".join(f"{path.name} (lr {rate:g})" for path, rate in checkpoints))
    print(f"tracin.npy: {scores.shape[0]:,} train rows x {scores.shape[1]:,} targets, float32, exact")
    print(f"\n{'target':<8}{'strongest proponents':<36}{'strongest opponents'}")
    for target in range(min(5, scores.shape[1])):
        order = np.argsort(-scores[:, target])
        ends = (" ".join(f"{row}:{scores[row, target]:+.3g}" for row in rows) for rows in (order[:3], order[:-4:-1]))
        print(f"{target:<8}" + "".join(f"{end:<36}" for end in ends).rstrip())

    if options.task.endswith("_classification") and options.task != "binary_classification" and options.checked:
        rng = np.random.default_rng(0)
        pairs = [
            (int(rng.integers(scores.shape[0])), int(rng.integers(scores.shape[1]))) for _ in range(options.checked)
        ]
        slow = np.array(one_by_one(model, train, targets, checkpoints, pairs))
        error = np.abs(slow - [scores[pair] for pair in pairs]).max() / np.abs(scores).max()
        print(f"\n{len(pairs)} scores computed one by one differ by {error:.0e} of the largest score at most")
        assert error < 1e-5, "scores should be the sums over checkpoints of learning rate times gradient products"


if __name__ == "__main__":
    main()
