"""The answer to a question in words: documents with the tokens that carry their scores, as text, HTML or JSON."""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from tracer._core.text import printable

_SHARE = 0.5
"""The share of a document's positive (or negative) token scores that marked tokens carry together."""

_AROUND = 12
"""The tokens shown on both sides of a marked one."""

_SHOWN_TOKENS = 5


@dataclass(frozen=True)
class ExplainedDocument:
    """A training document behind an answer.

    Attributes:
        number: Its number in the data; with ``unit="block"`` the number of the block among training examples.
        score: Its score, the sum over its training examples; positive if it is a proponent.
        examples: The training examples of the store that it consists of.
        group: Its group, or None.
        tokens: The text of its tokens.
        token_scores: The score of each token, ``[T]``, by exact gradients; 0 for tokens that are not predicted. None if
            scores were not split.
        documents: The sums of token scores over the documents of a block, by number; None if it is no block.
        id: Its id in the data's ``id_column``, or None.
    """

    number: int
    score: float
    examples: list[int]
    group: str | None
    tokens: list[str]
    token_scores: Float64[np.ndarray, " T"] | None
    documents: dict[int, float] | None = None
    id: str | int | None = None

    @property
    def text(self) -> str:
        """The text."""
        return "".join(self.tokens)

    def strongest_tokens(self, count: int = _SHOWN_TOKENS) -> list[int]:
        """Return the positions of the tokens that carry most of the score, in its sign, strongest first."""
        signed = self._signed
        found = np.argsort(-signed, kind="stable")[:count]
        return [int(place) for place in found if signed[place] > 0]

    @property
    def _signed(self) -> Float64[np.ndarray, " T"]:
        if self.token_scores is None:
            return np.zeros(len(self.tokens))
        return -self.token_scores if self.score < 0 else self.token_scores

    def marked(self) -> list[int]:
        """Return the positions, ascending, of the strongest tokens that together carry half of the score's side."""
        signed = np.maximum(self._signed, 0)
        order = np.argsort(-signed, kind="stable")
        reached = np.cumsum(signed[order]) >= _SHARE * signed.sum()
        count = int(np.argmax(reached)) + 1 if signed.any() else 0
        return sorted(order[:count].tolist())

    def to_dict(self) -> dict[str, Any]:
        """Return the document in types of JSON."""
        found: dict[str, Any] = {"document": self.number, "score": self.score, "examples": self.examples}
        found |= {"id": self.id, "group": self.group, "text": self.text}
        if self.token_scores is not None:
            pairs = zip(self.tokens, self.token_scores.tolist(), strict=True)
            found["tokens"] = [{"text": text, "score": score} for text, score in pairs]
        if self.documents is not None:
            found["documents"] = [{"document": each, "score": score} for each, score in self.documents.items()]
        return found


@dataclass(frozen=True)
class Explanation:
    """The training documents behind a completion, as `Attribution.explain` returns them.

    Attributes:
        prompts: The text of each prompt.
        completions: The text of each completion.
        rather_than: The text of each other completion; None without.
        generated: Whether the completions were generated.
        estimator: The estimator of the documents' scores.
        kind: ``proponents`` or ``opponents``.
        token_estimator: The estimator of the tokens' scores; None if they were not split.
        documents: The documents, strongest first.
    """

    prompts: list[str]
    completions: list[str]
    rather_than: list[str] | None
    generated: bool
    estimator: str
    kind: str
    token_estimator: str | None
    documents: list[ExplainedDocument]

    def to_dict(self) -> dict[str, Any]:
        """Return everything in types of JSON."""
        names = ("prompts", "completions", "rather_than", "generated", "estimator", "kind", "token_estimator")
        found = {name: getattr(self, name) for name in names}
        return {**found, "documents": [each.to_dict() for each in self.documents]}

    def __str__(self) -> str:
        """Return the question and the documents as text, in which brackets mark the strongest tokens."""
        lines = [f"{'generated' if self.generated else 'completion'}: {text}" for text in self._questions()]
        for rank, each in enumerate(self.documents, 1):
            lines += ["", f"{rank}. {self._title(each)}", "   " + _excerpt(each).replace("\n", "\n   ")]
            if strongest := each.strongest_tokens():
                assert each.token_scores is not None  # there are strongest ones
                shown = (f"{_inner(each.tokens[place])!r} {each.token_scores[place]:+.3g}" for place in strongest)
                lines.append(f"   tokens: {', '.join(shown)}")
        return printable("\n".join(lines))

    def _questions(self) -> list[str]:
        pairs = zip(self.prompts, self.completions, self.rather_than or [""] * len(self.prompts), strict=True)
        return [
            f"{prompt!r} -> {own!r}" + (f" rather than {other!r}" if self.rather_than else "")
            for prompt, own, other in pairs
        ]

    def _title(self, document: ExplainedDocument) -> str:
        name = "document" if document.documents is None else "block"
        title = f"score {document.score:.4g}, {name} {document.number if document.id is None else document.id}"
        if document.documents is not None:
            parts = sorted(document.documents.items(), key=lambda each: -abs(each[1]))
            title += " of documents " + ", ".join(f"{number} ({score:+.3g})" for number, score in parts[:5])
        return title + ("" if document.group is None else f", group {document.group}")

    def _repr_html_(self) -> str:
        """Return the documents for a notebook; colours are token scores, blue for positive and red for negative."""
        question = "".join(f"<p>{html.escape(text)}</p>" for text in self._questions())
        rows = [
            f"<li value='{rank}'><b>{html.escape(self._title(each))}</b><div style='white-space:pre-wrap'>"
            f"{_coloured(each)}</div></li>"
            for rank, each in enumerate(self.documents, 1)
        ]
        return f"{question}<ol>{''.join(rows)}</ol>"


def _excerpt(document: ExplainedDocument) -> str:
    """Return the parts of a text around marked tokens, which are in brackets."""
    marked = set(document.marked())
    near = {place + step for place in marked or {0} for step in range(-_AROUND, _AROUND + 1)}
    found: list[str] = []
    for place in range(len(document.tokens)):
        if place in near:
            found.append(_bracketed(document.tokens[place]) if place in marked else document.tokens[place])
        elif place == 0 or place - 1 in near:
            found.append(" … ")
    return "".join(found).strip()


def _inner(token: str) -> str:
    """Return a token without the white space around it, unless it is nothing else."""
    return token.strip() or token


def _bracketed(token: str) -> str:
    if token.strip():
        return token.replace(_inner(token), f"[{_inner(token)}]", 1)
    return f"[{token!r}]".replace("'", "") + "\n" * token.count("\n")


def _coloured(document: ExplainedDocument) -> str:
    scores = document.token_scores
    if scores is None or not np.abs(scores).max(initial=0):
        return html.escape(document.text)
    found = []
    for token, score in zip(document.tokens, scores.tolist(), strict=True):
        style = _style(score / np.abs(scores).max())
        text = html.escape(token.replace("\n", "↵\n") if style else token)  # a line's end has no background to see
        found.append(f"<span style='{style}' title='{score:.3g}'>{text}</span>")
    return "".join(found)


def _style(share: float) -> str:
    colour = "66,133,244" if share > 0 else "219,68,55"
    return f"background:rgba({colour},{abs(share) * 0.6:.2f})" if abs(share) >= 0.05 else ""
