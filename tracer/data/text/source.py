"""Batches of tokenized rows: of similar lengths, and of at most so many tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int64

from tracer.data.datasets import DataSource
from tracer.data.example_ids import ExampleId, check_ids
from tracer.data.text.encoding import Encoder, is_chat
from tracer.data.text.packing import GROUP
from tracer.data.text.reading import import_datasets, read_dataset
from tracer.data.text.rows import TextRows, Tokens, collate, plan_rows
from tracer.data.text.settings import REPACKED, TextSettings
from tracer.data.text.sides import SidesEncoder
from tracer.errors import InputError
from tracer.types import Batch

_COLUMNS = ("input_ids", "labels", "sizes", "owners")
_SHOWN_TOKENS = 1024
WINDOW = 1024
"""The rows that are sorted by length: neighbours stay neighbours, so files are written one after the other."""


class TextSource(DataSource):
    """Tokenized rows of a data set; get one from `text_source`.

    Attributes:
        rows: The rows.
        loads_by_index: Whether a few examples cost no pass over all of them, as they do of a stream.
        groups: The group of each row, ``[N]``, and the groups' names; None without a column of groups.
        is_chat: Whether the data are conversations.
        in_sides: Whether examples are for an encoder-decoder.
        pad_token: The token of padding.
    """

    def __init__(
        self, documents: Any, rows: TextRows, settings: TextSettings, tokenizer: Any, pad_token: int, in_order: bool
    ) -> None:
        self._in_order, self.is_chat, self.in_sides = in_order, documents.is_chat, rows.in_sides
        self._tokenizer, self.loads_by_index = tokenizer, not settings.streaming
        values = documents.columns.get(settings.group_column)
        self._ids = documents.columns.get(settings.id_column)
        self.rows, self._documents, self._settings, self.pad_token = rows, documents, settings, pad_token
        self.groups: tuple[Int64[np.ndarray, " N"], list[str]] | None = None
        if values is not None:
            names, numbers = np.unique([str(value) for value in values], return_inverse=True)
            self.groups = numbers[rows.examples].astype(np.int64), names.tolist()

    def __len__(self) -> int:
        return len(self.rows.bounds)

    def id_of(self, row: int) -> ExampleId | None:
        """Return the id of the document that a row is of, if there is a column of ids."""
        return None if self._ids is None else self._ids[int(self.rows.examples[row])]

    @cached_property
    def ids(self) -> list[ExampleId] | None:
        """The id of each row: its document's, with the part's number if that has several; None without ids."""
        if self._ids is None:
            return None
        counts = np.bincount(self.rows.examples)
        found: list[ExampleId] = []
        seen: dict[int, int] = {}
        for example in self.rows.examples.tolist():
            part = seen[example] = seen.get(example, -1) + 1
            found.append(self._ids[example] if counts[example] == 1 else f"{self._ids[example]}:{part}")
        return check_ids(found, len(self), f"id_column={self._settings.id_column!r}")

    def batches(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[Batch, Int64[np.ndarray, " b"]]]:
        """Yield batches of exactly these rows; longest first within a window, unless they are to keep their order."""
        for start in range(0, len(indices), WINDOW):
            window = indices[start : start + WINDOW]
            documents = self._documents.load(self.rows, window)
            for own in self._planned(window):
                tokens = [self.rows.tokens(row, documents) for row in own.tolist()]
                yield collate(tokens, self.pad_token, self._settings.unit == "block", self.in_sides), own

    def _planned(self, window: Int64[np.ndarray, " n"]) -> Iterator[Int64[np.ndarray, " b"]]:
        """Yield the rows of each batch of a window."""
        order = np.arange(len(window))
        if not self._in_order:
            order = np.argsort(-self.rows.lengths[window], kind="stable")
        for chosen in bucketed(self.rows.sizes(window), order, self._settings.batch_tokens):
            yield window[chosen]

    def trial_batches(self, count: int) -> Iterator[Batch]:
        """Yield the first batch of a window, whose rows are its longest, then batches from all of its lengths."""
        planned = list(self._planned(np.arange(min(len(self), WINDOW))))
        spaced = (np.arange(count - 1) + 0.5) * len(planned) / max(1, count - 1)
        for place in [0, *spaced.astype(np.int64).tolist()][: len(planned)]:
            yield from (batch for batch, _ in self.batches(np.sort(planned[place])))

    def shown(self, batch: Batch) -> list[list[int]]:
        """Return the tokens of each row of a batch, of an encoder-decoder both sides without padding."""
        if not self.in_sides:
            return batch["input_ids"].tolist()
        labels = batch["labels"].masked_fill(batch["labels"] < 0, self.pad_token)
        both = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), labels.tolist(), strict=True)
        return [tokens[: sum(mask)] + own for tokens, mask, own in both]

    def borders(self, row: int) -> list[int]:
        """Return the positions, in what `shown` returns of a row, at which its documents begin and end.

        Before them may be those that they have as context. Both sides of an encoder-decoder are one document.
        """
        first, scored, last = self.rows.bounds[row].tolist()
        ends = np.cumsum(self.rows.pieces[first:last, 2] - self.rows.pieces[first:last, 1]).tolist()
        return [0, ends[-1]] if self.in_sides else [0, *ends][scored - first :]

    def texts(self, indices: Int64[np.ndarray, " n"]) -> list[str]:
        """Return the beginnings of the texts of rows."""
        found: dict[int, str] = {}
        for batch, inds in self.batches(indices):
            for row, tokens in zip(inds.tolist(), self.shown(batch), strict=True):
                start, *_, stop = self.borders(row)
                own = tokens[start : min(stop, start + _SHOWN_TOKENS)]
                found[row] = self._tokenizer.decode(own, clean_up_tokenization_spaces=False)
        return [found[row] for row in indices.tolist()]


def text_source(
    data: Any,
    tokenizer: Any,
    settings: TextSettings,
    name: str = "data",
    in_order: bool = False,
    in_sides: bool = False,
) -> TextSource:
    """Return the rows of data as `read_dataset` takes them, tokenized.

    With ``in_order``, for targets, rows keep their order; with ``in_sides`` they are those of an encoder-decoder. A
    stream is iterated once to count its rows, which are numbered in its own order, and again for each pass, which must
    yield the same.

    Raises:
        InputError: If no example has a token to predict, or the data do not fit the settings.
    """
    dataset = read_dataset(data, settings.split, settings.streaming, name)
    if in_order and settings.id_column not in (dataset.column_names or ()):
        settings = replace(settings, id_column=None)
    encoder = SidesEncoder(tokenizer, settings) if in_sides else Encoder(tokenizer, settings)
    pad = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
    is_stream = isinstance(dataset, import_datasets().IterableDataset)
    if is_stream and settings.packing in REPACKED:
        raise InputError(
            f"{name} is a stream; expected a data set that is read whole for packing={settings.packing!r}."
        )
    documents: Any = _Stream(dataset, encoder, settings, name) if is_stream else _Encoded(dataset, encoder, settings)
    rows = plan_rows(documents, settings, in_sides)
    if not len(rows.bounds):
        raise InputError(
            f"{name} has {rows.num_documents} examples, and none has a token to predict; check split=, loss_on= and "
            f"max_length=."
        )
    return TextSource(documents, rows, settings, tokenizer, pad, in_order)


class _Encoded:
    """A data set that is tokenized once, into a file beside the data if they come from one."""

    def __init__(self, dataset: Any, encoder: Encoder | SidesEncoder, settings: TextSettings) -> None:
        if dataset.format["type"] == "custom":
            raise InputError(
                "the data set has a transform (set_transform), which may give other examples each time; write what it "
                "gives into the data by map()."
            )
        dataset = dataset.with_format(None)
        self.is_chat = is_chat(next(iter(dataset), {}))
        self.columns = {name: list(dataset[name]) for name in _kept(settings, dataset.column_names)}
        self._tokens = dataset.map(encoder, remove_columns=dataset.column_names).with_format("numpy")

    def __iter__(self) -> Iterator[Tokens]:
        for start in range(0, len(self._tokens), GROUP):
            yield from self._pairs(self._tokens[start : start + GROUP])

    def load(self, rows: TextRows, window: np.ndarray) -> dict[int, Tokens]:
        """Return the tokens of the documents in some rows."""
        pieces = [rows.pieces[first:last, 0] for first, _, last in rows.bounds[window].tolist()]
        wanted = np.unique(np.concatenate(pieces)).tolist()
        return dict(zip(wanted, self._pairs(self._tokens[wanted]), strict=True))

    def _pairs(self, found: Any) -> Iterator[Tokens]:
        for values in zip(*(found[name] for name in _COLUMNS if name in found), strict=True):
            yield tuple(np.asarray(each, np.int64) for each in values)


class _Stream:
    """A stream that is tokenized in each pass, and compared with the first pass by hashes."""

    def __init__(self, dataset: Any, encoder: Encoder | SidesEncoder, settings: TextSettings, name: str) -> None:
        self._dataset, self._encoder, self._settings, self._name = dataset, encoder, settings, name
        self.columns: dict[str, list[Any]] = {}
        self._hashes: list[int] = []
        self.is_chat = False
        self._position = 0
        self._examples: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Tokens]:
        for number, example in enumerate(self._dataset):
            self.is_chat = is_chat(example) if number == 0 else self.is_chat
            for column in _kept(self._settings, example):
                self.columns.setdefault(column, []).append(example[column])
            tokens = self._encode(example)
            self._hashes.append(_hash(tokens))
            yield tokens

    def load(self, rows: TextRows, window: np.ndarray) -> dict[int, Tokens]:
        """Return the tokens of the documents in some rows, reading on from those before."""
        wanted = np.unique(rows.pieces[rows.bounds[window, 1], 0]).tolist()
        if wanted[0] < self._position or not self._position:
            self._position, self._examples = 0, iter(self._dataset)
        found: dict[int, Tokens] = {}
        for document in wanted:
            for example in self._examples:
                self._position += 1
                if self._position > document:
                    found[document] = self._encode(example)
                    break
            if document not in found or _hash(found[document]) != self._hashes[document]:
                raise InputError(
                    f"{self._name} is iterated at each checkpoint, and this pass differs from the first one at example "
                    f"{document}: it shuffles, changes or ends early. Make the stream yield the same each time, or "
                    f"download it with streaming=False."
                )
        return found

    def _encode(self, example: Any) -> Tokens:
        found = self._encoder(example)
        return tuple(np.array(found[name], np.int64) for name in _COLUMNS if name in found)


def _hash(tokens: Iterable[np.ndarray]) -> int:
    found = 0
    for values in tokens:
        found = xxhash.xxh3_64_intdigest(values.tobytes(), found)
    return found


def _kept(settings: TextSettings, known: Iterable[str]) -> list[str]:
    """Return the columns that are kept beside the tokens; raise InputError if one is not in the data."""
    named = {"group_column": settings.group_column, "id_column": settings.id_column}
    for name, column in named.items():
        if column is not None and column not in known:
            raise InputError(f"{name}={column!r} is not in the data, which have {sorted(known)}.")
    return list(dict.fromkeys(column for column in named.values() if column is not None))


def bucketed(
    sizes: Int64[np.ndarray, "n _"], order: Int64[np.ndarray, " n"], batch_tokens: int
) -> Iterator[Int64[np.ndarray, " b"]]:
    """Yield positions of rows in an order, so that a batch has at most so many tokens or one row.

    What ``sizes`` has in a column is padded to the longest of the batch.
    """
    start, longest = 0, np.zeros(sizes.shape[1], np.int64)
    for stop, position in enumerate(order):
        longest = np.maximum(longest, sizes[position])
        if stop > start and longest.sum() * (stop + 1 - start) > batch_tokens:
            yield order[start:stop]
            start, longest = stop, sizes[position]
    yield order[start:]
