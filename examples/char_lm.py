"""Which passages, and which of their characters, taught a language model to predict a passage it has not seen?

A small causal transformer is trained on windows of a plain text, character by character. For windows of a later part
of the text `tracer.attribute` finds the training windows that spoke most for and against each (TracInCP; Pruthi et al.
2020, exact gradients), and `tracer.token_influence` splits each of these scores over the characters of the training
window. The report highlights them.

Run it: python examples/char_lm.py --text shakespeare.txt
Without --text it reads tinyshakespeare.txt of the folder that TRACER_DATA names, else sentences that it makes up.
"""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from text_data import find_file, made_up_topics
from text_training import train_or_reuse
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tracer import Attribution, attribute, token_influence

SHARED = 5
"""How long a run of characters is that counts as shared by two windows."""

LEAST_WINDOW, LEAST_TRAIN = 2 * SHARED, 40
"""Shorter windows hardly share a run; of fewer training windows the four strongest would be no choice."""


class Decoder(nn.Module):
    """A causal transformer over characters.

    Args:
        vocabulary: How many characters there are.
        window: The longest window.
        dim: Of hidden states.
        num_layers: Blocks.
    """

    def __init__(self, vocabulary: int, window: int, dim: int, num_layers: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(window, dim)
        block = nn.TransformerEncoderLayer(
            dim, 4, 4 * dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, num_layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, vocabulary)
        nn.init.normal_(self.characters.weight, std=0.1)
        nn.init.normal_(self.positions.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T]`` to the logits of the next characters ``[B, T, vocabulary]``."""
        hidden = self.characters(x) + self.positions(torch.arange(x.shape[1], device=x.device))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=hidden.dtype)
        return self.head(self.norm(self.blocks(hidden, mask=mask, is_causal=True)))


def next_character_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy of all characters of a batch ``[B, T]`` but the first of each row."""
    return nn.functional.cross_entropy(model(batch)[:, :-1].transpose(1, 2), batch[:, 1:])


def read_text(options: argparse.Namespace) -> str:
    """Return the text that was asked for, else Shakespeare where there is one, else made-up sentences.

    Args:
        options: The command line.

    Returns:
        The text.

    Raises:
        SystemExit: It cannot be read, or is too short for enough windows.
    """
    path = options.text or (None if options.quick else find_file("tinyshakespeare.txt", None))
    name = "made-up sentences" if path is None else path.name
    try:
        text = ".\n".join(made_up_topics(600, options.seed)[0]) if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{path} cannot be read as a text in UTF-8: {error}.") from None
    needed = -(-LEAST_TRAIN * options.window * 10 // 9)  # nine tenths are for training
    if len(text) < needed:
        raise SystemExit(
            f"The text ({name}) has {len(text):,} characters; {LEAST_TRAIN} training windows of {options.window} and "
            f"later ones as targets need {needed:,}. Pass a longer --text or a shorter --window."
        )
    print(f"Text: {name}")
    return text


def windows(text: str, count: int, length: int) -> list[str]:
    """Return ``count`` windows of a text that do not overlap, spread evenly over it."""
    starts = np.linspace(0, len(text) - length, min(count, len(text) // length)).astype(int)
    return [text[start : start + length] for start in starts]


def shared_share(text: str, other: str) -> np.ndarray:
    """Return which characters of a text end a run of `SHARED` characters that another one has too, ``[T]`` bool."""
    runs = {other[start : start + SHARED] for start in range(len(other) - SHARED + 1)}
    return np.array([text[max(0, end - SHARED + 1) : end + 1] in runs for end in range(len(text))])


def marked(text: str, parts: np.ndarray, share: float = 0.2) -> str:
    """Return a text on one line, in brackets the characters of which the strongest parts are."""
    strong = parts >= np.sort(parts)[-max(1, int(share * len(text)))]
    pieces = []
    for position, character in enumerate(text.replace("\n", " ")):
        before = bool(strong[position - 1]) if position else False
        pieces.append("[" if strong[position] and not before else "]" if before and not strong[position] else "")
        pieces.append(character)
    return "".join(pieces) + ("]" if strong[-1] else "")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, help="a plain text file")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/char_lm"))
    parser.add_argument("--window", type=int, default=64, help="characters of a row (64)")
    parser.add_argument("--num-train", type=int, help="training windows (3,000)")
    parser.add_argument("--epochs", type=int, help="passes over them (10)")
    parser.add_argument("--learning-rate", type=float, default=0.2, help="of plain SGD (0.2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tiny model on made-up sentences: a few seconds")
    options = parser.parse_args(arguments)
    if options.num_train is None:
        options.num_train = 256 if options.quick else 3000
    if options.epochs is None:
        options.epochs = 8 if options.quick else 10
    for name, least in (("window", LEAST_WINDOW), ("num_train", LEAST_TRAIN), ("epochs", 1)):
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more; got {getattr(options, name)}")
    options.num_targets = 12 if options.quick else 40
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, attribute, split the strongest scores over characters, and write the report."""
    options = parse(arguments)
    text = read_text(options)
    alphabet = {character: number for number, character in enumerate(sorted(set(text)))}
    held_out = len(text) * 9 // 10
    train = windows(text[:held_out], options.num_train, options.window)
    targets = windows(text[held_out:], options.num_targets, options.window)
    train_codes, target_codes = (
        torch.tensor([[alphabet[character] for character in row] for row in rows]) for rows in (train, targets)
    )  # [N, T] and [M, T]
    print(f"{len(train):,} windows of {options.window} characters for training, {len(targets)} later ones as targets")

    torch.manual_seed(options.seed)
    model = Decoder(len(alphabet), options.window, *((32, 1) if options.quick else (96, 2)))
    checkpoints = train_or_reuse(
        model,
        TensorDataset(train_codes),
        options.output_dir / "checkpoints",
        collate=lambda rows: torch.stack([row for (row,) in rows]),
        loss=next_character_loss,
        epochs=options.epochs,
        batch_size=16,
        learning_rate=options.learning_rate,
        settings={"text": zlib.crc32(text.encode()), "rows": train_codes.shape, "seed": options.seed},
        seed=options.seed,
    )
    found = attribute(
        model,
        "language_modeling",
        (train_codes,),
        (target_codes,),
        checkpoints,
        save_dir=options.output_dir / "store",
        projector="none",
        estimator="tracin",  # whose scores are split over characters
    )
    top = found.top(4)
    shown = list(range(0, len(targets), max(1, len(targets) // 6)))[:6]
    parts = split_scores(found, model, train_codes, target_codes, checkpoints, shown)
    for target in shown[:3]:
        row, score = int(top.indices[target, 0]), float(top.scores[target, 0])
        print(f"\ntarget {target}:        {targets[target]!r}")
        print(f"  strongest row {row:>4}: {train[row]!r}, score {score:.4f}")
        print(f"  where from:         {marked(train[row], parts[target, row])}")
    check(found.scores, parts, train, targets, top.indices[shown], shown)

    index = found.report(
        options.output_dir / "report",
        inputs=train,
        target_inputs=targets,
        shown_targets=shown,
        train_tokens=[list(row) for row in train],
        target_tokens=[list(row) for row in targets],
        token_scores={pair: values.tolist() for pair, values in parts.items()},
        k=4,
        figures=not options.quick,
        title="A language model of characters",
        settings={"window": options.window, "rows": len(train), "epochs": options.epochs},
    )
    print(f"\nReport: {index}")


def split_scores(
    found: Attribution,
    model: nn.Module,
    train: Tensor,
    targets: Tensor,
    checkpoints: Sequence[tuple[Path, float]],
    shown: Sequence[int],
) -> dict[tuple[int, int], np.ndarray]:
    """Return the parts ``[T]`` of the four strongest proponents and opponents of some targets.

    Args:
        found: What `attribute` found.
        model: The model.
        train: ``[N, T]``.
        targets: ``[M, T]``.
        checkpoints: As `attribute` had them.
        shown: Which targets.

    Returns:
        By (target, training row).
    """
    proponents, opponents = found.top(4).indices, found.top(4, kind="opponents").indices
    parts = {}
    for target in shown:
        rows = [int(row) for row in (*proponents[target], *opponents[target])]
        split = token_influence(model, "language_modeling", train[rows], targets[target : target + 1], checkpoints)
        parts.update({(target, row): split[0, number] for number, row in enumerate(rows)})
    return parts


def check(
    scores: np.ndarray,
    parts: dict[tuple[int, int], np.ndarray],
    train: Sequence[str],
    targets: Sequence[str],
    proponents: np.ndarray,
    shown: Sequence[int],
) -> None:
    """Print how well parts and scores fit, and how what is found relates to the texts; assert what is claimed."""
    missed = max(abs(float(scores[row, target]) - values.sum()) for (target, row), values in parts.items())
    largest = max(abs(float(scores[row, target])) for target, row in parts)
    print(f"\nParts of characters sum up to the scores of rows, to {missed / largest:.0e} of the largest.")
    assert missed <= 1e-4 * largest, "parts of characters should sum up to the score of their row"

    own = [
        shared_share(train[row], targets[t]).mean() for t, rows in zip(shown, proponents, strict=True) for row in rows
    ]
    others = [
        shared_share(row, targets[target]).mean() for target in shown for row in train[:: max(1, len(train) // 200)]
    ]
    print(f"Characters that end a run of {SHARED} which the target has too: {np.mean(own):.1%} of those of proponents, "
          f"{np.mean(others):.1%} of those of all rows.")  # fmt: skip
    assert np.mean(own) > 1.5 * np.mean(others), "proponents should share more with their targets than other rows do"

    inside, outside = [], []
    for (target, row), values in parts.items():
        if row in proponents[shown.index(target)]:
            is_shared = shared_share(train[row], targets[target])
            inside += list(values[is_shared] / largest)
            outside += list(values[~is_shared] / largest)
    print(f"Mean part of these characters: {np.mean(inside):.2%} of the largest score; of all others "
          f"{np.mean(outside):.2%}.")  # fmt: skip
    assert np.mean(inside) > np.mean(outside), "a proponent's score should come from what it shares with the target"


if __name__ == "__main__":
    main()
