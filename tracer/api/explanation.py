"""Questions in words: the training documents behind a completion, with the tokens that carry their scores."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64, Int64

from tracer._core.validation import check_choice, check_count, check_integer, check_seed
from tracer.api.explained import ExplainedDocument, Explanation
from tracer.api.query import check_plain, loaded_checkpoint
from tracer.api.question_scores import QuestionScores, TargetWeights
from tracer.data.text.questions import Question, QuestionEncoder, QuestionSource, Text, is_single, token_texts
from tracer.errors import CallOrderError, GradientError, InputError, InputTypeError
from tracer.gradients import isolated
from tracer.gradients.isolation import seed_generators
from tracer.scoring.scorer import KINDS
from tracer.training.lend_weights import weights_in

if TYPE_CHECKING:
    from tracer.api.attribution import Attribution
    from tracer.api.language_inputs import LanguageInputs
    from tracer.api.tracer import Tracer

logger = logging.getLogger("tracer")

_MOST_NEW = 64
"""The most tokens that are generated, if the user does not say."""


def explain(
    _found: Attribution,
    prompt: Text | Sequence[Text],
    completion: Text | Sequence[Text] | None = None,
    *,
    rather_than: Text | Sequence[Text] | None = None,
    k: int = 10,
    kind: str = "proponents",
    exact: int = 0,
    candidates: int = 0,
    tokens: bool = True,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Explanation:
    """Find the training documents behind a completion of a prompt, of a store of `build_store` or `load_store`.

    The completion's loss is explained by ``estimators.top`` and this attribution's checkpoints. Nothing is stored.

    Args:
        prompt: A text, the messages of a chat, or tokens; with a list of them, the mean of their scores is explained.
            In a store of chats, a text is the user's message. Texts are joined as they are, without a space in between.
        completion: The completion, in one of the same forms, or one for each prompt. Padding of tokens, and those after
            the end of the text, do not count; a prompt before them would. Default: what the last checkpoint generates.
        rather_than: Another completion: scores are those of the completion minus those of this one.
        k: The number of documents.
        kind: ``proponents``, whose scores are largest, or ``opponents``.
        exact: Rank this many documents by the store, then these again by exact gradients; for ``tracin`` and
            ``cosine``. 0: rank by the store alone. Without stored features, all are ranked exactly.
        candidates: Rank only the documents of so many training examples, which the index of `build_index` finds; a
            thousand or so hold nearly all of the hundred strongest ones. 0: rank all of them.
        tokens: Split scores over the documents' tokens, by exact gradients; those of an estimator with a kernel are
            split as TracIn.
        max_new_tokens: The most tokens that are generated. Default: 64, or as many as the model has positions for.
        temperature: The temperature of sampling; 0: the likeliest tokens.
        seed: The seed of sampling.

    Returns:
        The documents, strongest first.

    Raises:
        CallOrderError: If the store's tokenizer and data are not loaded, or a checkpoint's weights are not known.
        InputError: If a completion has no tokens, or an argument is out of range.
        InputTypeError: If a prompt or completion is of another type.
        MismatchError: If the data or weights are not those of the store.
    """
    inputs, tracer = _loaded(_found)
    k, exact = check_count(k, "k"), check_integer(exact, "exact", 0)
    check_choice("kind", kind, KINDS)
    check_plain(tracer, "explain()")
    tracer.flush()
    scores = QuestionScores(_found, tracer, inputs)
    if exact or not scores.has_features:
        scores.check_exact()
    if check_integer(candidates, "candidates", 0):
        scores.check_candidates(candidates, max(k, exact))
    encoder = QuestionEncoder(
        inputs.tokenizer, inputs.settings, _is_chat(_found, inputs), inputs.most_tokens, inputs.train.in_sides
    )
    prompts = [prompt] if is_single(prompt) else list(prompt)
    if not prompts:
        raise InputError("prompt is an empty list; expected one prompt at least.")
    answers = _as_many(completion, len(prompts), "completion")
    others = _as_many(rather_than, len(prompts), "rather_than")
    if answers is None:
        most = None if max_new_tokens is None else check_count(max_new_tokens, "max_new_tokens")
        sampling = most, temperature, check_seed(seed)
        questions = _generated(_found, inputs, tracer, [encoder.prompt(each) for each in prompts], *sampling)
    else:
        questions = [encoder.question(*pair) for pair in zip(prompts, answers, strict=True)]
    contrasted = [] if others is None else [encoder.question(*pair) for pair in zip(prompts, others, strict=True)]
    given = inputs.train.pad_token, inputs.settings.batch_tokens, inputs.train.in_sides
    source = QuestionSource([*questions, *contrasted], *given)
    scores.ask(source, TargetWeights.of(len(questions), len(contrasted)))
    ranked = _ranked(scores, inputs, k, kind, exact, candidates)
    documents = list(_documents(ranked, scores, inputs, tokens))
    shown: list[list[str]] = [[], [], []]
    for each, other in zip(questions, [*contrasted, *[None] * len(questions)], strict=False):
        for text, own in zip(shown, (each.prompt, each.completion, other.completion if other else ()), strict=True):
            text.append("".join(token_texts(inputs.tokenizer, own)))
    return Explanation(
        shown[0], shown[1], shown[2] if contrasted else None, completion is None, _found.estimators.top, kind,
        scores.split_estimator if tokens else None, documents,
    )  # fmt: skip


def _loaded(found: Attribution) -> tuple[LanguageInputs, Tracer]:
    from tracer.api.tracer import Tracer

    if found.language is None or not isinstance(found.tracer, Tracer):
        raise CallOrderError(
            "explain() needs the model, tokenizer and data of a language model's store; call "
            "tracer.load_store(save_dir).explain(prompt), or use what build_store returns."
        )
    return found.language, found.tracer


def _is_chat(found: Attribution, inputs: LanguageInputs) -> bool:
    recorded = found.tracer.store.manifest.info.get("language", {}).get("chat", inputs.train.is_chat)
    return bool(recorded)


def _as_many(value: Any, count: int, name: str) -> list[Any] | None:
    """Return a completion for each prompt."""
    if value is None:
        return None
    values = [value] if is_single(value) else list(value) if hasattr(value, "__iter__") else value
    if not isinstance(values, list):
        raise InputTypeError(f"{name} is a {type(value).__name__}; expected a text, messages or tokens.")
    if len(values) != count:
        raise InputError(f"{name} has {len(values)} texts for {count} prompts; expected one for each.")
    return values


@torch.inference_mode(False)
def _generated(
    found: Attribution,
    inputs: LanguageInputs,
    tracer: Tracer,
    prompts: Sequence[list[int]],
    max_new_tokens: int | None,
    temperature: float,
    seed: int,
) -> list[Question]:
    """Return prompts with the tokens that the last checkpoint generates after each."""
    model: Any = tracer.model
    if not callable(getattr(model, "generate", None)):
        raise InputError(f"{type(model).__name__} has no method generate; pass completion=.")
    if not isinstance(temperature, (int, float)) or not 0 <= temperature < float("inf"):
        raise InputError(f"temperature={temperature!r}; expected a number of 0 or more.")
    if not all(prompts):
        raise InputError("a prompt has no token to generate from; pass another prompt, or completion=.")
    # A decoder begins with a token of its own instead of the prompt.
    before = [1 if inputs.train.in_sides else len(prompt) for prompt in prompts]
    most = [_most_new(length, max_new_tokens, inputs.most_tokens) for length in before]
    last = max(found.model_ids or tracer.store.catalog.checkpoint_ids())
    loaded = loaded_checkpoint(tracer, last, inputs.folders)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    tokenizer, answers = inputs.tokenizer, []
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {each for each in (tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])) if each is not None}
    sampling |= {"eos_token_id": sorted(ends) or None, "pad_token_id": inputs.train.pad_token}
    with weights_in(model, loaded.weights), isolated(model, [], tracer.device), torch.no_grad():
        seed_generators(tracer.device, seed)
        for prompt, start, count in zip(prompts, before, most, strict=True):
            ids = torch.tensor([prompt], device=tracer.device)
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": True}
            whole = model.generate(**given, max_new_tokens=count, **sampling)[0].tolist()
            answer = whole[start:]
            places = [place for place, token in enumerate(answer) if token in ends]
            answers.append(Question(prompt, answer[: places[0] + 1] if places else answer))
    return answers


def _most_new(length: int, chosen: int | None, positions: int | None) -> int:
    """Return how many tokens may be generated after a prompt of some length."""
    if positions is None:
        return chosen or _MOST_NEW
    count = chosen or max(1, min(_MOST_NEW, positions - length))
    if length + count > positions:
        raise InputError(
            f"a prompt with max_new_tokens={count} has {length + count} tokens, and the model has {positions} "
            f"positions; shorten it{'' if chosen is None else ', or lower max_new_tokens'}."
        )
    return count


@dataclass(frozen=True)
class _Ranked:
    """Documents in their order: number, score and training examples of each."""

    numbers: Int64[np.ndarray, " k"]
    scores: Float64[np.ndarray, " k"]
    rows: list[np.ndarray]


def _ranked(scores: QuestionScores, inputs: LanguageInputs, k: int, kind: str, exact: int, candidates: int) -> _Ranked:
    """Rank documents by the store, and the first ones by exact gradients if asked to."""
    # A block may hold several documents; it is ranked as a whole, and its documents by their tokens.
    by_block = inputs.settings.unit == "block"
    numbers = np.arange(len(inputs.train)) if by_block else inputs.train.rows.documents
    sign = -1.0 if kind == "opponents" else 1.0
    found = scores.candidates(candidates, kind) if candidates else np.arange(len(numbers))
    present = np.unique(numbers[found])
    among = np.flatnonzero(np.isin(numbers, present))
    if not scores.has_features or exact:
        chosen = present
        if scores.has_features and exact < len(present):
            chosen = _strongest(scores.of_store(among), numbers, present, sign, exact)
        rows = np.flatnonzero(np.isin(numbers, chosen))
        values = np.zeros(len(numbers))
        values[rows] = scores.exactly(rows)
        present = np.sort(chosen)
    else:
        values = scores.of_store(among)
    best = _strongest(values, numbers, present, sign, k)
    summed = np.bincount(numbers, values)
    return _Ranked(best, summed[best], [np.flatnonzero(numbers == each) for each in best])


def _strongest(
    values: np.ndarray, numbers: np.ndarray, present: np.ndarray, sign: float, count: int
) -> Int64[np.ndarray, " k"]:
    """Return the documents of largest summed values times a sign, ties by their number."""
    summed = sign * np.bincount(numbers, values)[present]
    return present[np.argsort(-summed, kind="stable")[:count]]


def _documents(
    ranked: _Ranked, scores: QuestionScores, inputs: LanguageInputs, with_tokens: bool
) -> Iterator[ExplainedDocument]:
    """Yield the documents with their text and, if wanted, the scores of their tokens."""
    source = inputs.train
    rows = np.unique(np.concatenate(ranked.rows))
    parts: dict[int, np.ndarray] = {}
    if with_tokens:
        try:
            parts = scores.by_token(rows)
        except GradientError as error:
            logger.warning("scores are not split over tokens: %s", error)
    shown = ((source.shown(batch), inds.tolist()) for batch, inds in scores.examples(rows))
    ids = {row: own for tokens, inds in shown for row, own in zip(inds, tokens, strict=True)}
    for number, score, own in zip(ranked.numbers.tolist(), ranked.scores.tolist(), ranked.rows, strict=True):
        document: list[int] = []
        values: list[np.ndarray] = []
        by_document: dict[int, float] = {}
        for row in own.tolist():
            borders, (_, scored, last) = source.borders(row), source.rows.bounds[row].tolist()
            if source.in_sides and row in parts:  # which are those of the labels
                parts[row] = np.pad(parts[row], (borders[-1] - len(parts[row]), 0))
            document += ids[row][borders[0] : borders[-1]]
            if row in parts:
                values.append(parts[row][borders[0] : borders[-1]])
                for owner, start, stop in zip(source.rows.owners[scored:last], borders[:-1], borders[1:], strict=True):
                    by_document[int(owner)] = by_document.get(int(owner), 0.0) + float(parts[row][start:stop].sum())
        group = None if source.groups is None else source.groups[1][source.groups[0][own[0]]]
        name = source.id_of(own[0])
        of_block = by_document if inputs.settings.unit == "block" and values else None
        texts, split = token_texts(inputs.tokenizer, document), np.concatenate(values) if values else None
        yield ExplainedDocument(number, score, own.tolist(), group, texts, split, of_block, name)
