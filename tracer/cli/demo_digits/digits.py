"""The digits, the network and its training.

``digits.npz`` holds the test set of *Optical Recognition of Handwritten Digits* of the UCI Machine Learning Repository
(Alpaydin and Kaynak 1998, https://doi.org/10.24432/C50P49), which scikit-learn has too: 1,797 images of 8 by 8 pixels
with values from 0 to 16, and their labels. License: CC BY 4.0, https://creativecommons.org/licenses/by/4.0/. Values are
those of the original, stored as bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from tracer.errors import InputError
from tracer.training.load_state import load_state
from tracer.training.recording import CheckpointRecorder, load_checkpoints

CLASS_NAMES = [str(digit) for digit in range(10)]
_CHECKPOINT_SHARES = (1 / 15, 1 / 6, 1 / 3, 2 / 3, 1.0)  # of the epochs: early ones too, while the gradients are large
_SIZES = {False: (1297, 500, 32), True: (500, 60, 16)}  # train, test, batch; fewer for a quick look


@dataclass(frozen=True)
class Settings:
    """Everything that the checkpoints depend on."""

    seed: int  # of the split, the flips, the initial weights and the order of batches
    flip_rate: float  # share of flipped training labels
    num_train: int
    num_test: int
    epochs: int
    batch_size: int
    learning_rate: float = 0.1  # of plain SGD, constant

    @classmethod
    def for_demo(
        cls, seed: int = 0, flip_rate: float = 0.1, epochs: int | None = None, quick: bool = False
    ) -> Settings:
        """Return the settings of the demo, with fewer images and epochs for a quick look."""
        if not 0.01 <= flip_rate <= 0.5:
            raise InputError(f"flip_rate is {flip_rate}; expected 0.01 to 0.5.")
        num_train, num_test, batch_size = _SIZES[quick]
        return cls(seed, flip_rate, num_train, num_test, epochs or (12 if quick else 30), batch_size)


@dataclass(frozen=True)
class Digits:
    """Training images, some with a flipped label, and test images with correct labels; pixels are from 0 to 1."""

    train_images: Float[Tensor, "num_train 1 8 8"]
    train_labels: Int64[Tensor, " num_train"]
    flipped: Bool[np.ndarray, " num_train"]
    test_images: Float[Tensor, "num_test 1 8 8"]
    test_labels: Int64[Tensor, " num_test"]


def read_digits() -> tuple[Float[np.ndarray, "1797 8 8"], Int64[np.ndarray, " 1797"]]:
    """Return the images, from 0 to 16, and labels in the package.

    >>> images, labels = read_digits()
    >>> images.shape, int(images.max()), np.bincount(labels)[:3].tolist()
    ((1797, 8, 8), 16, [178, 182, 177])
    """
    with resources.files("tracer.cli.demo_digits").joinpath("digits.npz").open("rb") as file, np.load(file) as arrays:
        return arrays["images"].astype(np.float64), arrays["labels"].astype(np.int64)


def load_data(settings: Settings) -> Digits:
    """Split the digits at random and flip some training labels."""
    pixels, labels = read_digits()
    rng = np.random.default_rng(settings.seed)
    order = rng.permutation(len(labels))
    train, test = order[: settings.num_train], order[-settings.num_test :]
    images = torch.as_tensor(pixels / 16.0, dtype=torch.float32).unsqueeze(1)  # [1797, 1, 8, 8]
    flipped = np.zeros(len(train), dtype=bool)
    flipped[rng.choice(len(train), size=round(settings.flip_rate * len(train)), replace=False)] = True
    shift = rng.integers(1, 10, size=len(train)) * flipped
    train_labels = torch.as_tensor((labels[train] + shift) % 10)
    return Digits(images[train], train_labels, flipped, images[test], torch.as_tensor(labels[test]))


def build_model() -> nn.Module:
    """Return a convolutional network of about 38,000 parameters."""
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
    """Train with plain SGD, as TracIn assumes; return recorded checkpoints with their learning rates."""
    saved_epochs = {max(1, round(share * settings.epochs)) for share in _CHECKPOINT_SHARES}
    with torch.random.fork_rng(devices=[]):  # the caller's random state does not change
        torch.manual_seed(settings.seed)
        model = build_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=settings.learning_rate)
        never = settings.epochs * settings.num_train + 1  # checkpoints are saved after epochs, below
        with CheckpointRecorder(model, optimizer, directory, every=never) as recorder:
            for epoch in range(1, settings.epochs + 1):
                for indices in torch.randperm(settings.num_train).split(settings.batch_size):
                    loss = nn.functional.cross_entropy(model(data.train_images[indices]), data.train_labels[indices])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    recorder.step(loss=loss, epoch=epoch)
                if epoch in saved_epochs:
                    recorder.save()
    return load_checkpoints(directory, learning_rate="last")


def train_or_reuse(
    data: Digits, settings: Settings, directory: Path, log: Callable[[str], object] = print
) -> list[tuple[Path, float]]:
    """Return the checkpoints of an earlier run with the same settings, or train."""
    described, wanted = directory / "training.json", asdict(settings)
    found = json.loads(described.read_text()) if described.exists() else {"settings": wanted, "finished": False}
    if found["settings"] != wanted:
        raise InputError(
            f"{directory} holds checkpoints of other settings: {found['settings']}.\n"
            f"These are: {wanted}.\nChoose another --output-dir, or remove that folder's parent."
        )
    if found["finished"]:
        checkpoints = load_checkpoints(directory / "recording", learning_rate="last")
        log(f"Reusing the {len(checkpoints)} checkpoints in {directory}.")
        return checkpoints
    log(f"Training {settings.epochs} epochs ...")
    directory.mkdir(parents=True, exist_ok=True)
    if described.exists():  # training was killed
        shutil.rmtree(directory / "recording", ignore_errors=True)
    described.write_text(json.dumps(found, indent=2))
    checkpoints = train(data, settings, directory / "recording")
    described.write_text(json.dumps({**found, "finished": True}, indent=2))
    return checkpoints


@torch.no_grad()
def evaluate(
    path: Path, images: Float[Tensor, "N 1 8 8"], labels: Int64[Tensor, " N"]
) -> tuple[Int64[Tensor, " N"], Float[np.ndarray, " N"]]:
    """Return the predicted classes and the losses at a checkpoint."""
    model = build_model()
    model.load_state_dict(load_state(model, path))
    logits = model(images)
    return logits.argmax(dim=1), nn.functional.cross_entropy(logits, labels, reduction="none").numpy()
