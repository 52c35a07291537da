"""The settings of language-model data: from columns of text to tokens, rows and batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypedDict

from tracer._core.validation import check_choice, check_count
from tracer.errors import InputError, InputTypeError, nearest_name

REPACKED = ("bfd", "bfd_split", "wrapped")
GIVEN = ("given", "given_wrapped")
PACKINGS = ("none", *REPACKED, *GIVEN)


def _setting(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TextSettings:
    """Settings of tokens and batches; they mean what TRL's ``SFTConfig`` means by them.

    A *document* is an example of the data set. With packing, documents are put into *blocks* of ``max_length`` tokens.
    Documents of ``bfd``, ``bfd_split`` and ``given`` do not see each other; those of ``wrapped`` and ``given_wrapped``
    follow each other in one sequence, as in plain pre-training, so a document sees those before it in its block.
    """

    split: str = _setting("train", "The split of the data; a slice such as train[:1000] works too.")
    text_column: str = _setting("text", "The column of plain texts.")
    group_column: str | None = _setting(None, "A column that groups documents, such as their source; None: no groups.")
    id_column: str | None = _setting(
        None, "A column of ids by which documents are known; targets that have it too are known by it."
    )
    loss_on: str = _setting(
        "auto",
        "The tokens that count: all, those of the completion, or those of the assistant (marked by the chat "
        "template). auto: of the completion if there is a column prompt, else all.",
        ("auto", "all", "completion", "assistant"),
    )
    chat_template: str | None = _setting(None, "A chat template or its file; None: the tokenizer's own.")
    add_eos: bool = _setting(True, "End texts and completions by the tokenizer's end-of-sequence token.")
    max_length: int | None = _setting(1024, "The most tokens of a document, or the tokens of a block.")
    truncation: str = _setting("keep_start", "The end of a long document that is kept.", ("keep_start", "keep_end"))
    packing: str = _setting(
        "none",
        "Put documents into blocks: bfd (best-fit decreasing, long documents are cut), bfd_split (long documents "
        "are split) or wrapped (one after the other, split where a block is full). given, given_wrapped: the data "
        "are such blocks, with input_ids and seq_lengths, doc_ids, segment_ids or position_ids.",
        PACKINGS,
    )
    unit: str = _setting(
        "document", "The unit of a training example: a document (or its part in a block) or a block.",
        ("document", "block"),
    )  # fmt: skip
    batch_tokens: int = _setting(
        8192, "The most tokens of a batch, with padding; halved as often as memory does not suffice."
    )
    streaming: bool = _setting(False, "Iterate the data set instead of downloading it whole.")

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.metadata["choices"]:
                check_choice(each.name, getattr(self, each.name), each.metadata["choices"])
        check_count(self.batch_tokens, "batch_tokens")
        if self.max_length is not None:
            check_count(self.max_length, "max_length")
        elif self.packing in REPACKED:
            raise InputError(f"packing={self.packing!r} expects max_length, the tokens of a block; got None.")
        columns = (self.group_column, self.id_column)
        if self.unit == "block" and (self.packing == "none" or columns != (None, None)):
            raise InputError(
                "unit='block' expects packing and no group_column or id_column, since a block may hold several "
                "documents; choose a packing, or unit='document'."
            )
        if self.streaming and self.packing in REPACKED:
            raise InputError(
                f"packing={self.packing!r} reads documents in another order than a stream yields them; pass "
                f"streaming=False, or packing='none'."
            )


class TextOptions(TypedDict, total=False):
    """The fields of `TextSettings` as keyword arguments."""

    split: str
    text_column: str
    group_column: str | None
    id_column: str | None
    loss_on: str
    chat_template: str | None
    add_eos: bool
    max_length: int | None
    truncation: str
    packing: str
    unit: str
    batch_tokens: int
    streaming: bool


def text_settings(options: Mapping[str, Any]) -> TextSettings:
    """Return the settings from keyword arguments, or raise InputTypeError naming the nearest known one."""
    for name in options:
        if name not in TextOptions.__annotations__:
            raise InputTypeError(
                f"there is no setting {name!r} of texts; {nearest_name(name, TextOptions.__annotations__)}"
            )
    return TextSettings(**options)
