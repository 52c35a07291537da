"""Examples of a data set as tokens and labels, with the semantics of TRL's ``SFTTrainer``."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tracer.data.text.settings import GIVEN, TextSettings
from tracer.errors import InputError

logger = logging.getLogger("tracer")

IGNORED = -100
"""The label of tokens that are not predicted."""


def with_template(settings: TextSettings) -> TextSettings:
    """Return settings with the text of a chat template in place of its file's name."""
    template = settings.chat_template
    if template is None or "{" in template:
        return settings
    if not Path(template).is_file():
        raise InputError(f"chat_template={template!r} is neither a template nor a file.")
    return replace(settings, chat_template=Path(template).read_text(encoding="utf-8"))


class Encoder:
    """Makes tokens and labels of an example with a tokenizer.

    An example has ``input_ids``, and perhaps ``labels``; or ``messages`` (or ``conversations``) of a chat; or a
    ``prompt`` and a ``completion``, both texts or both messages; or a text.
    """

    def __init__(self, tokenizer: Any, settings: TextSettings) -> None:
        self._tokenizer, self._settings = tokenizer, settings
        self._template, self._warned = with_template(settings).chat_template, False

    def __call__(self, example: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return ``input_ids`` and ``labels``, of which -100 are not predicted."""
        example = _attended(example)
        tokens, masks = self._tokens(example)
        labels = example.get("labels") if "input_ids" in example else None
        if labels is None:
            bits = zip(*masks, strict=True) if masks else ((),) * len(tokens)
            labels = [token if all(mask) else IGNORED for token, mask in zip(tokens, bits, strict=True)]
        if not isinstance(labels, Sequence):
            raise InputError(f"labels is {labels!r}; expected a label for each of the {len(tokens)} tokens.")
        labels = list(labels)
        if len(labels) != len(tokens):
            raise InputError(f"an example has {len(tokens)} input_ids and {len(labels)} labels; expected as many.")
        found = {"input_ids": tokens, "labels": labels}
        return {**found, **_segments(example, len(tokens))} if self._settings.packing in GIVEN else found

    def prompt(self, prompt: Any) -> list[int]:
        """Return the tokens of a prompt, a text or messages, after which a completion begins."""
        if isinstance(prompt, str):
            return self._plain(prompt)
        return self._chat({}, prompt, False, add_generation_prompt=True)[0]

    def _tokens(self, example: Mapping[str, Any]) -> tuple[list[int], list[list[int]]]:
        """Return the tokens, and the masks of those that count."""
        on, text = self._settings.loss_on, self._settings.text_column
        if "input_ids" in example:
            found = {"completion": "completion_mask", "assistant": "assistant_masks"}
            wanted = [found[on]] if on in found else list(found.values()) if on == "auto" else []
            masks = [list(example[name]) for name in wanted if example.get(name) is not None]
            if on in found and not masks:
                raise InputError(f"loss_on={on!r} expects a column {found[on]!r} beside input_ids.")
            return list(example["input_ids"]), masks
        example = _with_roles(example)
        if "prompt" in example and "completion" in example:
            return self._completion(example)
        if on == "completion":
            raise InputError(f"loss_on='completion' expects columns prompt and completion; got {sorted(example)}.")
        if "messages" in example:
            return self._chat(example, example["messages"], on == "assistant")
        if on == "assistant":
            raise InputError(f"loss_on='assistant' expects a column messages; got {sorted(example)}.")
        if not isinstance(example.get(text), str):
            raise InputError(
                f"expected a column of texts {text!r}, 'messages', 'prompt' and 'completion', or 'input_ids'; got "
                f"{sorted(example)}. Name the column of texts by text_column=."
            )
        return self._plain(self._ended(example[text])), []

    def _completion(self, example: Mapping[str, Any]) -> tuple[list[int], list[list[int]]]:
        on, prompt, completion = self._settings.loss_on, example["prompt"], example["completion"]
        masks: list[list[int]] = []
        if isinstance(prompt, str) and isinstance(completion, str):
            if on == "assistant":
                raise InputError("loss_on='assistant' expects messages; prompt and completion are texts.")
            before, whole = self._plain(prompt), self._plain(prompt + self._ended(completion))
        else:
            before, _ = self._chat(example, prompt, False, add_generation_prompt=True)
            whole, masks = self._chat(example, list(prompt) + list(completion), on == "assistant")
        if whole[: len(before)] != before and not self._warned:
            self._warned = True
            logger.warning(
                "the tokens of a prompt differ from the first tokens of prompt and completion, so the mask of the "
                "completion may be off by some tokens; check spaces at the end of prompts: %.80r",
                prompt,
            )
        if on != "all":
            masks.append([int(place >= len(before)) for place in range(len(whole))])
        return whole, masks

    def _chat(
        self, example: Mapping[str, Any], messages: Any, assistant: bool, **options: Any
    ) -> tuple[list[int], list[list[int]]]:
        tools = example.get("tools")
        options |= {"tools": json.loads(tools) if isinstance(tools, str) else tools, "chat_template": self._template}
        options |= {"return_assistant_tokens_mask": True} if assistant else {}
        options |= example.get("chat_template_kwargs") or {}
        if self._template is None and not getattr(self._tokenizer, "chat_template", None):
            raise InputError("the tokenizer has no chat template for messages; pass one by chat_template=.")
        found = self._tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)
        if not assistant:
            return list(found["input_ids"]), []
        if 1 not in found["assistant_masks"]:
            raise InputError(
                "loss_on='assistant' finds no token of the assistant in an example: its messages have none, or the "
                "chat template does not mark them by {% generation %}; pass a template that does by chat_template=."
            )
        return list(found["input_ids"]), [list(found["assistant_masks"])]

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text=text)["input_ids"])

    def _ended(self, text: str) -> str:
        end = self._tokenizer.eos_token if self._settings.add_eos else None
        return text if end is None or text.endswith(end) else text + end


def is_chat(example: Mapping[str, Any]) -> bool:
    """Return whether an example of the data is a conversation rather than text."""
    if "input_ids" in example:
        return False
    named = example.get("messages") or example.get("conversations")
    return bool(named) or not isinstance(example.get("prompt", ""), str)


def _attended(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an example of tokens without its padding, which ``attention_mask`` leaves out."""
    mask = example.get("attention_mask") if "input_ids" in example else None
    if mask is None or all(mask):
        return example
    values = {name: value for name, value in example.items() if name in _OF_TOKENS and value is not None}
    return {
        **example,
        **{name: [one for one, own in zip(value, mask, strict=True) if own] for name, value in values.items()},
    }


_OF_TOKENS = ("input_ids", "labels", "completion_mask", "assistant_masks", "segment_ids", "doc_ids", "position_ids")


def _segments(example: Mapping[str, Any], length: int) -> dict[str, list[int]]:
    """Return the ``sizes`` of the documents in a block and, if it has ``doc_ids``, their numbers, ``owners``."""
    if "input_ids" in example and example.get("seq_lengths") is not None:
        sizes = list(example["seq_lengths"])
    else:
        by = next((name for name in ("doc_ids", "segment_ids", "position_ids") if example.get(name) is not None), None)
        if by is None or "input_ids" not in example:
            raise InputError(
                f"blocks that are given have input_ids and one of seq_lengths, doc_ids, segment_ids or position_ids; "
                f"got {sorted(example)}."
            )
        values = list(example[by])
        changes = [place for place in range(1, len(values)) if values[place] != values[place - 1]]
        if by == "position_ids":
            changes = [place for place in range(1, len(values)) if values[place] == 0]
        bounds = [0, *changes, len(values)]
        sizes = [stop - start for start, stop in zip(bounds[:-1], bounds[1:], strict=True) if stop > start]
    if sum(sizes) != length or min(sizes, default=1) < 1:
        raise InputError(f"a block has {length} input_ids and documents of {sizes} tokens; expected as many.")
    starts = [sum(sizes[:place]) for place in range(len(sizes))]
    ids = example.get("doc_ids")
    if ids is not None and not all(isinstance(each, int) for each in ids):
        raise InputError(f"doc_ids has {ids[0]!r}; expected the number of each token's document, from 0 on.")
    return {"sizes": sizes} if ids is None else {"sizes": sizes, "owners": [ids[start] for start in starts]}


def _with_roles(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return an example with ``conversations`` of ``from`` and ``value`` as one with ``messages``."""
    turns = example.get("conversations")
    if not turns or "messages" in example:
        return example
    named = [
        {"role": turn.get("role", turn.get("from")), "content": turn.get("content", turn.get("value"))}
        for turn in turns
    ]
    return {**example, "messages": named}
