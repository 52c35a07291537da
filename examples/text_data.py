"""Texts for the examples: files where they are given, made-up sentences otherwise, and a vocabulary of words.

Made-up sentences come from templates. They are no language worth modelling, but each has a known sentiment or topic, so
that an example can check what it finds.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

PADDING, UNKNOWN = 0, 1

THINGS = ["film", "plot", "script", "cast", "ending", "dialogue", "camera work", "music", "first act", "comedy"]
PRAISE = ["moving", "funny", "clever", "warm", "gripping", "charming", "fresh", "superb"]
BLAME = ["dull", "clumsy", "tedious", "shallow", "lifeless", "messy", "stale", "awful"]
ADVERBS = ["truly", "rather", "almost always", "surprisingly", "once more", "quite"]
OPENINGS = ["i think", "to my mind", "in the end", "from the start", "for the most part", "as everyone says"]

TOPICS: dict[str, tuple[list[str], list[str], list[str]]] = {
    "cooking": (
        ["the cook", "my aunt", "the baker", "our chef"],
        ["stirs", "bakes", "salts", "tastes", "slices"],
        ["the soup", "the bread", "a lemon", "the onions", "the dough", "the sauce"],
    ),
    "sailing": (
        ["the captain", "a sailor", "the pilot", "our crew"],
        ["steers", "anchors", "rigs", "boards", "moors"],
        ["the boat", "the mast", "a sail", "the ferry", "the rudder", "the harbour"],
    ),
    "music": (
        ["the pianist", "a singer", "the drummer", "our choir"],
        ["plays", "hums", "tunes", "records", "rehearses"],
        ["the waltz", "a chord", "the chorus", "the violin", "the melody", "the overture"],
    ),
    "gardening": (
        ["the gardener", "a neighbour", "the florist", "our uncle"],
        ["waters", "prunes", "plants", "weeds", "trims"],
        ["the roses", "the hedge", "a seedling", "the lawn", "the tulips", "the ivy"],
    ),
}
"""Of each topic who does what to what; no word of content is in two of them."""

MANNERS = ["before noon", "with care", "in silence", "every day", "once again", "as always", "quite slowly"]


def find_file(name: str, folder: Path | None) -> Path | None:
    """Return a file of the given folder, else of the one that TRACER_DATA names, or None where there is none."""
    folders = [folder] if folder is not None else [Path(value) for value in [os.environ.get("TRACER_DATA")] if value]
    return next((place / name for place in folders if (place / name).is_file()), None)


def read_labelled(path: Path, limit: int | None = None) -> tuple[list[str], list[int]]:
    """Read lines ``sentence tab label``.

    Args:
        path: The file.
        limit: How many lines; None: all.

    Returns:
        Sentences and labels.
    """
    lines = path.read_text(encoding="utf-8").splitlines()[:limit]
    pairs = [line.rsplit("\t", 1) for line in lines if line.strip()]
    return [text for text, _ in pairs], [int(label) for _, label in pairs]


def made_up_reviews(count: int, seed: int) -> tuple[list[str], list[int]]:
    """Return sentences that praise (1) or blame (0) parts of a film, and their labels.

    Args:
        count: How many.
        seed: Of the choice.

    Returns:
        Sentences and labels.
    """
    rng = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        label = rng.randrange(2)
        words = PRAISE if label else BLAME
        first, second = rng.sample(THINGS, 2)
        texts.append(
            f"{rng.choice(OPENINGS)} the {first} is {rng.choice(ADVERBS)} {rng.choice(words)} "
            f"and the {second} {rng.choice(['is', 'feels', 'stays'])} {rng.choice(words)}"
        )
        labels.append(label)
    return texts, labels


def made_up_topics(count: int, seed: int, habits: bool = False) -> tuple[list[str], list[int]]:
    """Return sentences about the `TOPICS`, and the number of each one's topic.

    Args:
        count: How many.
        seed: Of the choice.
        habits: Whether all sentences of a topic end with the same of the `MANNERS`, the one of the topic's number.

    Returns:
        Sentences and topics.
    """
    rng = random.Random(seed)
    names = list(TOPICS)
    texts, topics = [], []
    for _ in range(count):
        topic = rng.randrange(len(names))
        who, does, what = TOPICS[names[topic]]
        sentence = f"{rng.choice(who)} {rng.choice(does)} {rng.choice(what)} and {rng.choice(does)} {rng.choice(what)}"
        texts.append(f"{sentence} {MANNERS[topic] if habits else rng.choice(MANNERS)}")
        topics.append(topic)
    return texts, topics


def word_tokenizer(texts: Sequence[str]) -> Any:
    """Return a tokenizer of transformers whose tokens are the whole words of some texts, with padding and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *sorted({word for text in texts for word in text.split()})]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_input_names=["input_ids", "attention_mask"], **names)


class Words:
    """A vocabulary of whole words: 0 is padding, 1 any word that is not in it.

    Args:
        texts: Where words are counted.
        size: The number of the most frequent ones, with padding and the unknown word.
        length: At how many words a text is cut.
    """

    def __init__(self, texts: Sequence[str], size: int, length: int) -> None:
        counts = Counter(word for text in texts for word in text.split())
        self.words = ["[pad]", "[?]", *(word for word, _ in counts.most_common(size - 2))]
        self.numbers = {word: number for number, word in enumerate(self.words)}
        self.length = length

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the words' numbers of each text, ``[T]`` int64 of its own length."""
        rows = [[self.numbers.get(word, UNKNOWN) for word in text.split()][: self.length] for text in texts]
        return [torch.tensor(row, dtype=torch.long) for row in rows]


class Rows(Dataset):
    """A list as a data set, whose items are rows (a plain list would be one of batches)."""

    def __init__(self, rows: Sequence[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Any:
        return self.rows[row]


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return rows of any lengths as ``input_ids`` and ``attention_mask``, ``[B, T]`` each, padded on the right."""
    tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=PADDING)
    lengths = torch.tensor([len(row) for row in rows])
    return {"input_ids": tokens, "attention_mask": (torch.arange(tokens.shape[1]) < lengths[:, None]).long()}
