"""What attribution is graded on: eight networks with their rows, recipes and sizes.

``N`` training rows, ``M`` targets. The digits come with scikit-learn; the others are read from the folder that
``TRACER_DATA`` names, else from ``../shared/data`` beside the repository, and left out with a line that says so where
their file is missing. Everything is seeded.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from fidelity import IMAGES, TEXT, WINDOW, spread, windows
from models import Block, Decoder, ResNet9, mlp
from quality_methods import Rows, row_losses
from torch import Tensor, nn

from tracer.retraining import Recipe

SENTENCES, HELD_OUT_SENTENCES = "sst2_train.tsv", "sst2_dev.tsv"
NUM_WORDS, NUM_POSITIONS = 2_000, 32
"""The vocabulary and the longest sentence of the sentiment tasks."""

NUM_SENTIMENTS = 1_000
"""The sentences that a pretrained classifier is fine-tuned on."""


@dataclass(frozen=True)
class Data:
    """Rows to train on and to explain.

    Attributes:
        train: The N training rows, with the labels that are trained on.
        targets: The M targets.
        flipped: ``[N]``, bool, whose label is wrong; None where no label was flipped.
    """

    train: Rows
    targets: Rows
    flipped: np.ndarray | None = None


@dataclass(frozen=True)
class Task:
    """A network with its training, and how much is retrained to grade scores.

    Attributes:
        name: What it is called on the command line.
        title: What it is called in tables.
        kind: The tracer task.
        make_model: Builds the untrained network.
        load: Reads the rows; raises FileNotFoundError where they are missing.
        recipe: How the attributed networks and those of the subsets are trained.
        checkpoint_epochs: After which epochs weights are kept.
        last_layer: The module that gives the logits.
        num_subsets: Random halves of the training rows that networks are trained on, for the LDS.
        num_seeds: Networks a subset, whose outputs are averaged.
        num_removals: Trainings without some rows; 0 for none.
        num_removed: How many rows such a training leaves out.
    """

    name: str
    title: str
    kind: str
    make_model: Callable[[], nn.Module]
    load: Callable[[], Data]
    recipe: Recipe
    checkpoint_epochs: tuple[int, ...]
    last_layer: str
    num_subsets: int = 100
    num_seeds: int = 1
    num_removals: int = 0
    num_removed: int = 1


class SentenceClassifier(nn.Module):
    """A transformer encoder on word numbers, trained from scratch; word 0 is padding, which the mean leaves out."""

    def __init__(self, dim: int = 32, layers: int = 1, heads: int = 4) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(NUM_WORDS, dim), nn.Embedding(NUM_POSITIONS, dim)
        self.blocks = nn.Sequential(*(Block(dim, heads, False) for _ in range(layers)))
        self.head = nn.Linear(dim, 2)
        nn.init.normal_(self.words.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.1)

    def forward(self, words: Tensor) -> Tensor:
        """``[B, T]`` to logits ``[B, 2]``."""
        x = self.blocks(self.words(words) + self.positions(torch.arange(words.shape[1], device=words.device)))
        known = (words != 0).to(x.dtype).unsqueeze(-1)
        return self.head((x * known).sum(1) / known.sum(1).clamp(min=1))


class TextDecoder(Decoder):
    """A causal language model whose positions are as small as its characters or words."""

    def __init__(self, vocabulary: int, dim: int = 64, layers: int = 1, heads: int = 4, length: int = WINDOW) -> None:
        super().__init__(vocabulary, dim, layers, heads, length)
        nn.init.normal_(self.positions.weight, std=0.02)


class SentimentDecoder(TextDecoder):
    """A decoder of words with another head, which reads the mean over a sentence's words."""

    def __init__(self) -> None:
        super().__init__(NUM_WORDS, 64, 2, length=NUM_POSITIONS)
        self.head = nn.Linear(64, 2)

    def forward(self, words: Tensor) -> Tensor:
        """``[B, T]`` to logits ``[B, 2]``."""
        known = (words != 0).unsqueeze(-1)
        return self.head((self.states(words) * known).sum(1) / known.sum(1).clamp(min=1))


def pretrain(model: nn.Module, rows: Rows) -> dict[str, Tensor]:
    """Train a decoder on rows for three epochs, and return its weights."""
    steps = 3 * len(rows[0]) // 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / steps))
    for _ in range(3):
        for chosen in torch.randperm(len(rows[0])).split(64):
            optimizer.zero_grad()
            row_losses(model(rows[0][chosen]), rows[1][chosen]).mean().backward()
            optimizer.step()
            falling.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@functools.cache
def pretrained() -> dict[str, Tensor]:
    """Train a decoder on 16,000 windows of Shakespeare's plays, and return its weights."""
    codes = encoded_text(data_file(TEXT).read_text(encoding="utf-8"))
    torch.manual_seed(0)
    return pretrain(TextDecoder(len(alphabet()), 96, 3), windows(codes, spread(codes, 16_000)))


def pretrained_decoder() -> TextDecoder:
    """Return a new decoder with the weights of the pretraining."""
    state, model = pretrained(), TextDecoder(len(alphabet()), 96, 3)
    model.load_state_dict(state)
    return model


@functools.cache
def pretrained_on_sentences() -> dict[str, Tensor]:
    """Train a decoder on the words of SST-2's sentences that `sentiments` does not train on, and return its weights."""
    words, _ = encoded_sentences(sentence_lines(SENTENCES)[NUM_SENTIMENTS:], word_numbers())
    torch.manual_seed(0)
    model = TextDecoder(NUM_WORDS, 64, 2, length=NUM_POSITIONS)
    found = pretrain(model, (words[:, :-1], words[:, 1:]))
    return {name: value for name, value in found.items() if not name.startswith("head")}


def pretrained_classifier() -> SentimentDecoder:
    """Return a new classifier with the weights of the pretraining, and a new head."""
    state, model = pretrained_on_sentences(), SentimentDecoder()
    model.load_state_dict(state, strict=False)
    return model


def small_conv_net() -> nn.Module:
    """Return a conv net for digits of 8 by 8 pixels: 3,818 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 10),
    )


def digits(num_train: int = 1_000, num_targets: int = 200, flip_rate: float = 0.0, images: bool = False) -> Data:
    """Split scikit-learn's digits, and flip some of the training labels to another digit.

    Args:
        num_train: N.
        num_targets: M.
        flip_rate: The share of training labels that is flipped.
        images: Whether inputs are ``[B, 1, 8, 8]`` rather than ``[B, 64]``.

    Returns:
        The rows, inputs between 0 and 1.
    """
    from sklearn.datasets import load_digits

    found = load_digits()
    rng = np.random.default_rng(0)
    order = rng.permutation(len(found.target))[: num_train + num_targets]
    x, y = torch.as_tensor(found.data[order] / 16.0, dtype=torch.float32), torch.as_tensor(found.target[order]).long()
    x = x.view(-1, 1, 8, 8) if images else x
    flipped = np.zeros(num_train, dtype=bool)
    flipped[rng.choice(num_train, round(flip_rate * num_train), replace=False)] = True
    shift = torch.as_tensor(rng.integers(1, 10, num_train) * flipped)
    train = x[:num_train], (y[:num_train] + shift) % 10
    return Data(train, (x[num_train:], y[num_train:]), flipped if flip_rate else None)


def data_file(name: str) -> Path:
    """Return the path of a file of the data folder.

    Args:
        name: The file's.

    Returns:
        Its path.

    Raises:
        FileNotFoundError: There is no such file; the message says where it was looked for.
    """
    folder = Path(os.environ.get("TRACER_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / name).is_file():
        raise FileNotFoundError(f"there is no {name} in {folder}; TRACER_DATA names the folder to look in")
    return folder / name


def cifar(num_train: int = 1_000, num_targets: int = 100, size: int = 16) -> Data:
    """Read CIFAR-10 images and average their pixels down to ``size`` by ``size``."""
    with np.load(data_file(IMAGES)) as data:
        arrays = data["x_train"][:num_train], data["y_train"][:num_train]
        held_out = data["x_test"][:num_targets], data["y_test"][:num_targets]
    parts = []
    for x, y in (arrays, held_out):
        images = (torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255.0 - 0.45) / 0.25
        parts.append((F.adaptive_avg_pool2d(images, size), torch.from_numpy(y)))
    return Data(parts[0], parts[1])


def sentence_lines(name: str) -> list[list[str]]:
    """Return the text and the label of SST-2's sentences."""
    return [line.rsplit("\t", 1) for line in data_file(name).read_text(encoding="utf-8").splitlines()]


def word_numbers(num_lines: int | None = None) -> dict[str, int]:
    """Return the numbers of the most frequent words of the first sentences: 0 is padding, 1 any other word."""
    counts = Counter(word for text, _ in sentence_lines(SENTENCES)[:num_lines] for word in text.split())
    return {word: number for number, (word, _) in enumerate(counts.most_common(NUM_WORDS - 2), start=2)}


def encoded_sentences(lines: list[list[str]], numbers: dict[str, int]) -> Rows:
    """Return sentences as word numbers, and their labels."""
    words = torch.zeros(len(lines), NUM_POSITIONS, dtype=torch.long)
    for row, (text, _) in zip(words, lines, strict=True):
        known = [numbers.get(word, 1) for word in text.split()][:NUM_POSITIONS]
        row[: len(known)] = torch.tensor(known)
    return words, torch.tensor([int(label) for _, label in lines])


def sentences(num_train: int = 1_500, num_targets: int = 100) -> Data:
    """Read SST-2 sentences, in words of the training rows."""
    numbers = word_numbers(num_train)
    return Data(
        encoded_sentences(sentence_lines(SENTENCES)[:num_train], numbers),
        encoded_sentences(sentence_lines(HELD_OUT_SENTENCES)[:num_targets], numbers),
    )


def sentiments(num_targets: int = 100) -> Data:
    """Read SST-2 sentences, in words of all sentences: what a decoder of words is fine-tuned on."""
    numbers = word_numbers()
    return Data(
        encoded_sentences(sentence_lines(SENTENCES)[:NUM_SENTIMENTS], numbers),
        encoded_sentences(sentence_lines(HELD_OUT_SENTENCES)[:num_targets], numbers),
    )


@functools.cache
def alphabet() -> dict[str, int]:
    """Return the number of each character of Shakespeare's plays."""
    found = sorted(set(data_file(TEXT).read_text(encoding="utf-8")))
    return {character: number for number, character in enumerate(found)}


def encoded_text(text: str) -> Tensor:
    """Return the numbers of a text's characters, without those that the plays lack."""
    return torch.tensor([alphabet()[character] for character in text if character in alphabet()])


def reviews(num_train: int = 400, num_targets: int = 40) -> Data:
    """Read windows of SST-2's sentences, joined: what a decoder of plays is fine-tuned on."""
    lines = data_file(SENTENCES).read_text(encoding="utf-8").splitlines()
    codes = encoded_text(" . ".join(line.rsplit("\t", 1)[0] for line in lines))
    rows = windows(codes, torch.arange(num_train + num_targets) * WINDOW)
    return Data(tuple(each[:num_train] for each in rows), tuple(each[num_train:] for each in rows))


def characters(num_train: int = 1_000, num_targets: int = 100) -> Data:
    """Read windows of Shakespeare's plays: training rows from the first nine tenths, targets from the rest."""
    codes = encoded_text(data_file(TEXT).read_text(encoding="utf-8"))
    known, held_out = codes.split(len(codes) * 9 // 10)[:2]
    return Data(windows(known, spread(known, num_train)), windows(held_out, spread(held_out, num_targets)))


TASKS = [
    Task(
        name="logistic",
        title="digits, logistic regression",
        kind="image_classification",
        make_model=lambda: mlp(64, 10),
        load=digits,
        recipe=Recipe(learning_rate=0.5, batch_size=50, epochs=30),
        checkpoint_epochs=(1, 3, 8, 18, 30),
        last_layer="0",
        num_subsets=200,
        num_removals=100,
    ),
    Task(
        name="mlp",
        title="digits, MLP 64-64-10",
        kind="image_classification",
        make_model=lambda: mlp(64, 64, 10),
        load=digits,
        recipe=Recipe(learning_rate=0.1, momentum=0.9, batch_size=50, epochs=20, schedule="linear"),
        checkpoint_epochs=(1, 3, 6, 12, 20),
        last_layer="2",
        num_subsets=200,
        num_seeds=2,
        num_removals=100,
        num_removed=20,
    ),
    Task(
        name="flipped",
        title="digits, conv net, 10 % of labels flipped",
        kind="image_classification",
        make_model=small_conv_net,
        load=lambda: digits(flip_rate=0.1, images=True),
        recipe=Recipe(learning_rate=0.1, momentum=0.9, batch_size=50, epochs=20, schedule="linear"),
        checkpoint_epochs=(1, 3, 6, 12, 20),
        last_layer="5",
        num_subsets=200,
        num_seeds=2,
        num_removals=50,
        num_removed=20,
    ),
    Task(
        name="cifar",
        title="CIFAR-10 at 16 x 16, ResNet-9 of width 8",
        kind="image_classification",
        make_model=lambda: ResNet9(width=8),
        load=cifar,
        recipe=Recipe(learning_rate=0.02, momentum=0.9, batch_size=50, epochs=12, schedule="linear"),
        checkpoint_epochs=(2, 4, 7, 12),
        last_layer="head",
        num_seeds=2,
    ),
    Task(
        name="sst2",
        title="SST-2, transformer encoder from scratch",
        kind="text_classification",
        make_model=SentenceClassifier,
        load=sentences,
        recipe=Recipe("adamw", learning_rate=1.5e-3, weight_decay=0.01, batch_size=50, epochs=5, schedule="linear"),
        checkpoint_epochs=(1, 2, 3, 5),
        last_layer="head",
        num_seeds=4,
    ),
    Task(
        name="shakespeare",
        title="Shakespeare, character decoder",
        kind="language_modeling",
        make_model=lambda: TextDecoder(65),
        load=characters,
        recipe=Recipe("adamw", learning_rate=5e-3, weight_decay=0.01, batch_size=10, epochs=8, schedule="linear"),
        checkpoint_epochs=(1, 2, 4, 8),
        last_layer="head",
        num_seeds=2,
    ),
    Task(
        name="finetuned",
        title="SST-2 as text, decoder pretrained on Shakespeare",
        kind="language_modeling",
        make_model=pretrained_decoder,
        load=reviews,
        recipe=Recipe("adamw", learning_rate=3e-4, weight_decay=0.01, batch_size=16, epochs=3, schedule="linear"),
        checkpoint_epochs=(1, 2, 3),
        last_layer="head",
        num_subsets=50,
    ),
    Task(
        name="classified",
        title="SST-2, decoder pretrained on other sentences",
        kind="text_classification",
        make_model=pretrained_classifier,
        load=sentiments,
        recipe=Recipe("adamw", learning_rate=1e-3, weight_decay=0.01, batch_size=16, epochs=3, schedule="linear"),
        checkpoint_epochs=(1, 2, 3),
        last_layer="head",
        num_subsets=50,
    ),
]
"""What is measured, the small ones first."""
