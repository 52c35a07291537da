"""Rows of training examples: which pieces of which documents they hold, and which of their tokens are predicted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from tracer.data.text.encoding import IGNORED
from tracer.data.text.packing import GROUP, Piece, pack
from tracer.data.text.settings import GIVEN, TextSettings

Tokens = tuple[np.ndarray, ...]
"""A document's input ids and labels, ``[n]`` each; of a given block also its documents' sizes, and their numbers."""


@dataclass(frozen=True)
class TextRows:
    """The rows of a set of examples: ranges of the list of pieces, of which the last ones are predicted.

    Attributes:
        pieces: ``[P, 3]``: the example of each piece in the data, its first token, and the one after its last.
        bounds: ``[N, 3]`` for each row: its first piece, the first one that is predicted, and the one after its last.
        lengths: ``[N]``, the tokens of each row.
        isolated: Whether documents of one row do not see each other.
        owners: ``[P]``, the number of each piece's document: that of its example in the data or, in a block that was
            given, the one it was given or else its place among the pieces.
        num_documents: The number of examples in the data.
        in_sides: Whether a row has two pieces, the input of an encoder and the labels of a decoder.
    """

    pieces: Int64[np.ndarray, "P 3"]
    bounds: Int64[np.ndarray, "N 3"]
    lengths: Int64[np.ndarray, " N"]
    isolated: bool
    owners: Int64[np.ndarray, " P"]
    num_documents: int
    in_sides: bool = False

    def sizes(self, window: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, "n _"]:
        """Return the lengths of what is padded apart in some rows: of the whole row, or of both sides."""
        if not self.in_sides:
            return self.lengths[window][:, None]
        pieces = self.pieces[self.bounds[window, 0][:, None] + np.arange(2)]
        return pieces[:, :, 2] - pieces[:, :, 1]

    @property
    def longest(self) -> int:
        """The most tokens that a model reads of a row at once."""
        return int(self.sizes(np.arange(len(self.bounds))).max())

    @property
    def documents(self) -> Int64[np.ndarray, " N"]:
        """The document of each row, or of its first piece that is predicted."""
        return self.owners[self.bounds[:, 1]]

    @property
    def examples(self) -> Int64[np.ndarray, " N"]:
        """The example of the data that each row comes from, or its first piece that is predicted."""
        return self.pieces[self.bounds[:, 1], 0]

    def tokens(self, row: int, of: Any) -> dict[str, Int64[np.ndarray, " T"]]:
        """Return the model's inputs for a row; ``of`` has the tokens of documents by number."""
        first, scored, last = self.bounds[row].tolist()
        columns: dict[str, list[np.ndarray]] = {name: [] for name in ("input_ids", "labels", "positions", "segments")}
        for number, (document, start, stop) in enumerate(self.pieces[first:last].tolist()):
            tokens, labels = (values[start:stop] for values in of[document][:2])
            if self.isolated or first + number < scored:
                labels = labels.copy()
                labels[: 1 if first + number >= scored else None] = IGNORED
            columns["input_ids"].append(tokens)
            columns["labels"].append(labels)
            columns["positions"].append(np.arange(len(tokens)))
            columns["segments"].append(np.full(len(tokens), number + 1))
        found = {name: np.concatenate(parts) for name, parts in columns.items()}
        if not self.isolated:
            found["positions"] = np.arange(len(found["positions"]))
        return found


def plan_rows(documents: Iterable[Tokens], settings: TextSettings, in_sides: bool = False) -> TextRows:
    """Return the rows of documents, in which rows without a predicted token are left out."""
    pieces: list[np.ndarray] = []
    bounds: list[np.ndarray] = []
    owners: list[np.ndarray] = []
    isolated = "wrapped" not in settings.packing and not in_sides
    by_document = settings.unit == "document"
    before = count = 0
    for group in _groups(documents):
        sizes = np.array([len(tokens) for tokens, *_ in group], np.int64)
        if settings.packing in GIVEN or in_sides:
            blocks = [_given(number, each[2]) for number, each in enumerate(group)]
        else:
            blocks = pack(sizes, settings.packing, settings.max_length, settings.truncation == "keep_end")
        flat = np.array([piece for block in blocks for piece in block], np.int64).reshape(-1, 3)
        counts = np.array([len(block) for block in blocks], np.int64)
        ends = np.cumsum(counts)
        starts = ends - counts
        if in_sides:
            rows = np.stack([starts, starts + 1, ends], 1)
        elif by_document:
            own = np.arange(len(flat))
            firsts = own if isolated else np.repeat(starts, counts)
            rows = np.stack([firsts, own, own + 1], 1)
        else:
            rows = np.stack([starts, starts, ends], 1)
        predicted = _predicted(flat, group, firsts=np.arange(len(flat)) if isolated else starts)
        total = np.concatenate([[0], np.cumsum(predicted)])
        rows = rows[total[rows[:, 2]] > total[rows[:, 1]]]
        if any(len(each) > 3 for each in group):
            owners.append(np.concatenate([each[3] for each in group]))
        elif settings.packing in GIVEN:
            owners.append(before + np.arange(len(flat)))
        flat[:, 0] += count
        if settings.packing not in GIVEN:
            owners.append(flat[:, 0])
        pieces.append(flat)
        bounds.append(rows + before)
        before, count = before + len(flat), count + len(group)
    every = np.concatenate([np.zeros((0, 3), np.int64), *pieces])
    ranges = np.concatenate([np.zeros((0, 3), np.int64), *bounds])
    total = np.concatenate([[0], np.cumsum(every[:, 2] - every[:, 1])])
    numbers = np.concatenate([np.zeros(0, np.int64), *owners])
    return TextRows(every, ranges, total[ranges[:, 2]] - total[ranges[:, 0]], isolated, numbers, count, in_sides)


def _given(example: int, sizes: np.ndarray) -> list[Piece]:
    """Return the pieces of a block that the data have."""
    stops = np.cumsum(sizes).tolist()
    return [(example, stop - size, stop) for size, stop in zip(sizes.tolist(), stops, strict=True)]


def _groups(documents: Iterable[Tokens]) -> Iterator[list[Tokens]]:
    group: list[Tokens] = []
    for each in documents:
        group.append(each)
        if len(group) == GROUP:
            yield group
            group = []
    if group:
        yield group


def _predicted(pieces: np.ndarray, group: list[Tokens], firsts: np.ndarray) -> Int64[np.ndarray, " P"]:
    """Return the number of predicted tokens in each piece; nothing predicts the first token of ``firsts``."""
    starts_row = np.zeros(len(pieces), bool)
    starts_row[firsts] = True
    counts = [
        int((group[document][1][start + int(is_first) : stop] != IGNORED).sum())
        for (document, start, stop), is_first in zip(pieces.tolist(), starts_row.tolist(), strict=True)
    ]
    return np.array(counts, np.int64)


def collate(
    rows: list[dict[str, np.ndarray]], pad_token: int, packed: bool = False, in_sides: bool = False
) -> dict[str, Any]:
    """Return a batch of rows, padded at the end.

    Args:
        rows: The tokens of each, from `TextRows.tokens`.
        pad_token: The token of padding.
        packed: Whether rows hold several documents; models find the borders by ``position_ids`` that start again, and
            only if there is no ``attention_mask`` and no cache.
        in_sides: Whether rows are for an encoder-decoder; the tokens of segment 1 are the encoder's.

    Returns:
        ``input_ids`` and ``labels``, ``[B, T]``; and ``attention_mask``, or ``position_ids`` and ``segment_ids``, which
        number the documents of a row from 1 on and are 0 for padding. Of an encoder-decoder ``input_ids`` and
        ``attention_mask``, ``[B, S]``, and ``labels``, ``[B, T]``.
    """
    if in_sides:
        own = [row["segments"] == 1 for row in rows]
        inputs = [row["input_ids"][mask] for row, mask in zip(rows, own, strict=True)]
        labels = [row["labels"][~mask] for row, mask in zip(rows, own, strict=True)]
        mask = _padded([np.ones_like(each) for each in inputs], 0)
        return {"input_ids": _padded(inputs, pad_token), "attention_mask": mask, "labels": _padded(labels, IGNORED)}

    def padded(name: str, value: int) -> Tensor:
        return _padded([row[name] for row in rows], value)

    if packed:
        batch = {"input_ids": padded("input_ids", 0), "labels": padded("labels", IGNORED)}
        documents = {"position_ids": padded("positions", 0), "segment_ids": padded("segments", 0)}
        return {**batch, **documents, "use_cache": False}
    batch = {"input_ids": padded("input_ids", pad_token), "labels": padded("labels", IGNORED)}
    return {**batch, "attention_mask": (padded("segments", 0) > 0).long()}


def _padded(values: list[np.ndarray], fill: int) -> Tensor:
    found = torch.full((len(values), max(map(len, values))), fill, dtype=torch.long)
    for place, each in enumerate(values):
        found[place, : len(each)] = torch.from_numpy(each)
    return found
