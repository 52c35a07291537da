"""Examples of encoder-decoders: a prompt that the encoder reads, and a completion that the decoder predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tracer.data.text.encoding import IGNORED
from tracer.data.text.settings import TextSettings
from tracer.errors import InputError


class SidesEncoder:
    """Makes tokens and labels of an example with a tokenizer, as scripts for `Seq2SeqTrainer` do.

    An example has a ``prompt`` and a ``completion``, both texts, or ``input_ids`` and ``labels``. ``max_length`` bounds
    each side.

    Raises:
        InputError: If settings are for other models.
    """

    def __init__(self, tokenizer: Any, settings: TextSettings) -> None:
        chosen = {"packing": settings.packing, "unit": settings.unit, "loss_on": settings.loss_on}
        allowed = {"packing": ("none",), "unit": ("document",), "loss_on": ("auto", "completion")}
        for name, value in chosen.items():
            if value not in allowed[name]:
                raise InputError(
                    f"{name}={value!r} is for causal models; an encoder-decoder expects {allowed[name][0]!r}."
                )
        self._tokenizer, self._settings = tokenizer, settings

    def __call__(self, example: Mapping[str, Any]) -> dict[str, list[int]]:
        """Return ``input_ids`` and ``labels`` of both sides, one after the other, and the sides' ``sizes``."""
        if "input_ids" in example and "labels" in example:
            mask = example.get("attention_mask") or [1] * len(example["input_ids"])
            before = [token for token, own in zip(example["input_ids"], mask, strict=True) if own]
            labels = list(example["labels"])
        elif all(isinstance(example.get(name), str) for name in ("prompt", "completion")):
            before, labels = self.prompt(example["prompt"]), self._completion(example["completion"])
        else:
            raise InputError(
                f"an encoder-decoder expects columns prompt and completion, of texts, or input_ids and labels; got "
                f"{sorted(example)}."
            )
        before, labels = self._cut(before), self._cut(labels)
        if not before:
            raise InputError(f"an example has no token for the encoder: {dict(example)!r:.80}.")
        tokens = [token if token >= 0 else self._tokenizer.pad_token_id or 0 for token in labels]
        return {
            "input_ids": before + tokens,
            "labels": [IGNORED] * len(before) + labels,
            "sizes": [len(before), len(labels)],
        }

    def prompt(self, prompt: Any) -> list[int]:
        """Return the tokens of a prompt."""
        if not isinstance(prompt, str):
            raise InputError("an encoder-decoder expects a prompt that is a text or tokens; got messages.")
        return list(self._tokenizer(text=prompt)["input_ids"])

    def _completion(self, completion: str) -> list[int]:
        tokens, end = list(self._tokenizer(text_target=completion)["input_ids"]), self._tokenizer.eos_token_id
        ends = end is None or not self._settings.add_eos or tokens[-1:] == [end]
        return tokens if ends else [*tokens, end]

    def _cut(self, tokens: list[int]) -> list[int]:
        most = self._settings.max_length
        if most is None or len(tokens) <= most:
            return tokens
        return tokens[-most:] if self._settings.truncation == "keep_end" else tokens[:most]
