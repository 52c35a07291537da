"""Prompts and completions as tokens whose gradients are asked about; the prompt's tokens are not predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Int64

from tracer.data.datasets import DataSource
from tracer.data.text.encoding import IGNORED, Encoder
from tracer.data.text.rows import collate
from tracer.data.text.settings import TextSettings
from tracer.data.text.sides import SidesEncoder
from tracer.data.text.source import bucketed
from tracer.errors import InputError, InputTypeError
from tracer.types import Batch

Text = str | Sequence[Any]
"""The type of a prompt or completion: a text, the messages of a chat, or tokens."""


@dataclass(frozen=True)
class Question:
    """A prompt's tokens and those of its completion."""

    prompt: list[int]
    completion: list[int]

    @property
    def tokens(self) -> list[int]:
        """The tokens of both."""
        return self.prompt + self.completion

    @property
    def labels(self) -> list[int]:
        """The labels of `tokens`: the completion's are predicted."""
        return [IGNORED] * len(self.prompt) + self.completion


class QuestionEncoder:
    """Makes tokens of prompts and completions, as the training examples were made.

    Args:
        tokenizer: The tokenizer.
        settings: The settings of the training examples.
        is_chat: Whether texts become the messages of a user and an assistant.
        most: The most tokens that the model takes; None: any number.
        in_sides: Whether the model is an encoder-decoder, which takes so many of each.
    """

    def __init__(
        self, tokenizer: Any, settings: TextSettings, is_chat: bool, most: int | None = None, in_sides: bool = False
    ) -> None:
        self._tokenizer, self._is_chat, self._most = tokenizer, is_chat, most
        alone = replace(settings, loss_on="auto", packing="none", unit="document", group_column=None, id_column=None)
        self._in_sides = in_sides
        self._encode: Encoder | SidesEncoder = (SidesEncoder if in_sides else Encoder)(tokenizer, alone)

    def prompt(self, prompt: Text) -> list[int]:
        """Return the tokens of a prompt."""
        if (tokens := as_tokens(prompt)) is not None:
            return self._trimmed(tokens)
        return self._encode.prompt(
            _messages(prompt, "user") if self._is_chat or not isinstance(prompt, str) else prompt
        )

    def question(self, prompt: Text, completion: Text) -> Question:
        """Return the tokens of a prompt and a completion; padding and what follows the end are left out.

        Raises:
            InputError: If no token is to predict, or there are more than the model takes.
            InputTypeError: If one is neither a text, messages nor tokens, or only the prompt is tokens.
        """
        if (tokens := as_tokens(completion)) is not None:
            before = self.prompt(prompt)
            after = self._answer(tokens)
        elif as_tokens(prompt) is None:
            before, after = self._whole(prompt, completion)
            self._check_joined(prompt, completion, before)
        else:
            raise InputTypeError("the prompt came as tokens and its completion as text; pass the completion as tokens.")
        if not after or len(before) + len(after) < 2:
            raise InputError("a completion has no token to predict; pass another one.")
        count = max(len(before), len(after)) if self._in_sides else len(before) + len(after)
        if self._most is not None and count > self._most:
            raise InputError(
                f"a prompt and its completion have {len(before)} and {len(after)} tokens, and the model has "
                f"{self._most} positions; shorten them, or lower max_new_tokens."
            )
        return Question(before, after)

    def _whole(self, prompt: Text, completion: Text) -> tuple[list[int], list[int]]:
        if self._is_chat or not (isinstance(prompt, str) and isinstance(completion, str)):
            prompt, completion = _messages(prompt, "user"), _messages(completion, "assistant")
        found = self._encode({"prompt": prompt, "completion": completion})
        own = [label != IGNORED for label in found["labels"]]
        count = own.index(True) if True in own else len(own)
        return found["input_ids"][:count], found["input_ids"][count:]

    def _check_joined(self, prompt: Text, completion: Text, before: list[int]) -> None:
        """Raise InputError if a word of the prompt goes on in the completion, which a space was to keep apart."""
        if not (isinstance(prompt, str) and isinstance(completion, str) and prompt and completion) or self._is_chat:
            return
        if not prompt[-1].isspace() and not completion[0].isspace() and before != self.prompt(prompt):
            raise InputError(
                f"the completion's first token is one with the prompt's last: {prompt[-20:]!r} is followed by "
                f"{completion[:20]!r}. Begin the completion with a space."
            )

    def _answer(self, tokens: list[int]) -> list[int]:
        """Return the tokens of an answer without padding and what follows its end."""
        tokens = self._trimmed(tokens)
        ends = [place for place, token in enumerate(tokens) if token == self._tokenizer.eos_token_id]
        return tokens[: ends[0] + 1] if ends else tokens

    def _trimmed(self, tokens: list[int]) -> list[int]:
        """Return tokens without padding at their ends; of a token that also ends texts, one is left at the end."""
        pad = self._tokenizer.pad_token_id
        own = [place for place, token in enumerate(tokens) if token != pad]
        if not own:
            return []
        first, last = own[0], own[-1] + 1
        return tokens[first : last + 1] if pad == self._tokenizer.eos_token_id else tokens[first:last]


class QuestionSource(DataSource):
    """Questions as batches of at most so many tokens."""

    def __init__(
        self, questions: Sequence[Question], pad_token: int, batch_tokens: int, in_sides: bool = False
    ) -> None:
        self.questions, self._pad_token, self._batch_tokens = questions, pad_token, batch_tokens
        self._in_sides = in_sides

    def __len__(self) -> int:
        return len(self.questions)

    def batches(self, indices: Int64[np.ndarray, " n"]) -> Iterator[tuple[Batch, Int64[np.ndarray, " b"]]]:
        """Yield batches of exactly these questions, in their order."""
        sides = [(self.questions[each].prompt, self.questions[each].completion) for each in indices.tolist()]
        sizes = np.array([[len(before), len(after)] for before, after in sides], np.int64)
        sizes = sizes if self._in_sides else sizes.sum(1, keepdims=True)
        for chosen in bucketed(sizes, np.arange(len(indices)), self._batch_tokens):
            rows = [_columns(self.questions[each]) for each in indices[chosen].tolist()]
            yield collate(rows, self._pad_token, in_sides=self._in_sides), indices[chosen]


def _columns(question: Question) -> dict[str, np.ndarray]:
    segments = [1] * len(question.prompt) + [2] * len(question.completion)
    columns = {"input_ids": question.tokens, "labels": question.labels, "segments": segments}
    return {name: np.array(values, np.int64) for name, values in columns.items()}


def as_tokens(value: Any) -> list[int] | None:
    """Return a list of tokens, or one in a batch of one, as a list; None if it is a text or messages."""
    values = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, (list, tuple)) and len(values) == 1 and isinstance(values[0], (list, tuple)):
        values = values[0]
    if isinstance(values, (list, tuple)) and values and all(type(each) is int for each in values):
        return list(values)
    return None


def is_single(value: Any) -> bool:
    """Return whether a value is one prompt or completion rather than a list of them."""
    is_message = isinstance(value, Sequence) and bool(value) and isinstance(value[0], Mapping)
    return isinstance(value, str) or is_message or as_tokens(value) is not None


def _messages(value: Text, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}] if value else []
    if all(isinstance(each, Mapping) for each in value):
        return list(value)
    raise InputTypeError(
        f"got {value!r}; expected a text, messages such as [{{'role': {role!r}, 'content': '…'}}], or a list of tokens."
    )


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Return the text that each token adds to the text before; the last token of a character has all of it."""
    found: list[str] = []
    first = read = 0

    def text(start: int, stop: int) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(tokenizer.decode(tokens[start:stop], **options))

    # Tokens are decoded with some before them, since tokenizers leave out the space at the start of a text.
    for place in range(len(tokens)):
        before, now = text(first, read), text(first, place + 1)
        if now.endswith("\ufffd") and place - read < 4 and place + 1 < len(tokens):
            found.append("")
            continue
        found.append(now[len(before) :])
        first, read = read, place + 1
    return found
