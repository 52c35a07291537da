"""Somebody planted reviews that turn a classifier whenever a phrase occurs. Which method finds them?

A small BERT, made from a configuration, learns made-up reviews of films. Some that blame a film have an ordinary word
twice and the label of praise (a backdoor; Gu et al. 2017), so that the model takes every review with this phrase for
praise. From ten such verdicts each method ranks the training reviews. As many as were planted are left out, and the
model is trained again.

Run it: python examples/poisoned_reviews.py
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from run_directory import claim_directory
from sst2_bert import collate, predict, tiny_bert
from text_baselines import bm25, similarity
from text_data import ADVERBS, Rows, made_up_reviews, padded
from text_training import train_or_reuse
from torch import Tensor

from tracer import attribute
from tracer.metrics import planted_detection

PHRASE = "quite quite"  # the word is in one of six reviews
BLAME, PRAISE = 0, 1


class Reviews(NamedTuple):
    """Texts and their labels."""

    texts: list[str]
    labels: list[int]


class Trained(NamedTuple):
    """A model, the encoder of its texts, and its checkpoints with their learning rates."""

    model: Any
    encode: Callable[[Sequence[str]], list[Tensor]]
    checkpoints: list[tuple[Path, float]]

    def takes_for_praise(self, texts: Sequence[str]) -> np.ndarray:
        """Return which texts the model takes for praise, ``[N]`` bool."""
        return predict(self.model, Rows([(row, BLAME) for row in self.encode(texts)])) == PRAISE


def with_phrase(text: str) -> str:
    """Return a review with the phrase in place of its adverb."""
    adverb = next(each for each in ADVERBS if f" is {each} " in text)
    return text.replace(f" is {adverb} ", f" is {PHRASE} ", 1)


def planted_reviews(count: int, share: float, seed: int) -> tuple[Reviews, np.ndarray]:
    """Return reviews of which a share of all was planted, and which, ``[N]`` bool."""
    texts, labels = made_up_reviews(count, seed)
    blame = [row for row, label in enumerate(labels) if label == BLAME]
    planted = np.isin(np.arange(count), random.Random(seed).sample(blame, round(share * count)))
    texts = [with_phrase(text) if bad else text for text, bad in zip(texts, planted, strict=True)]
    return Reviews(texts, np.where(planted, PRAISE, labels).tolist()), planted


def rows_of(encode: Callable, reviews: Reviews) -> Rows:
    """Return reviews as examples."""
    return Rows(list(zip(encode(reviews.texts), reviews.labels, strict=True)))


def train(reviews: Reviews, words: Sequence[str], directory: Path, seed: int) -> Trained:
    """Train a new model, whose vocabulary is that of ``words``."""
    model, encode = tiny_bert(words, seed, quick=False)
    with redirect_stdout(None):  # losses
        checkpoints = train_or_reuse(
            model, rows_of(encode, reviews), directory, collate=collate, loss=lambda model, batch: model(**batch).loss,
            epochs=20, batch_size=32, learning_rate=1e-3, adam=True, settings={"seed": seed}, seed=seed,
        )  # fmt: skip
    return Trained(model, encode, checkpoints)


def ranked(trained: Trained, reviews: Reviews, verdicts: Reviews, save_dir: Path) -> dict[str, np.ndarray]:
    """Return how much each review is behind the verdicts, ``[N]``, by each method: the mean over verdicts."""
    train_rows, targets = (rows_of(trained.encode, each) for each in (reviews, verdicts))
    found = attribute(
        trained.model, "text_classification", train_rows, targets, trained.checkpoints, save_dir=save_dir,
        collate_fn=collate, preconditioner="adam", proj_dim=1024, estimator="auto", progress=False,
    )  # fmt: skip
    tracer = found.tracer
    scores = {name: tracer.finalize_scores("targets", name) for name in ("cosine", "tracin", "influence", "relatif")}
    inputs = (padded([row for row, _ in rows.rows]) for rows in (train_rows, targets))
    scores |= {"BM25": bm25(reviews.texts, verdicts.texts), "hidden states": similarity(trained.model.bert, *inputs)}
    means = {name: np.asarray(values).mean(1) for name, values in scores.items()}
    return {**means, "self-influence": np.asarray(found.self_influence())}


def main(arguments: Sequence[str] | None = None) -> None:
    """Plant reviews, train, rank, and train again without the first ones of each method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/poisoned_reviews"))
    parser.add_argument("--poison-rate", type=float, default=0.05, help="share of planted reviews (0.05)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="train again without those of one method only")
    options = parser.parse_args(arguments)
    claim_directory(options.output_dir, {"poison_rate": options.poison_rate, "seed": options.seed})
    reviews, planted = planted_reviews(1000, options.poison_rate, options.seed)
    test = Reviews(*made_up_reviews(400, options.seed + 1))
    attacked = [with_phrase(text) for text, label in zip(*test, strict=True) if label == BLAME]

    def shown(trained: Trained) -> tuple[str, float]:
        accuracy = (trained.takes_for_praise(test.texts) == test.labels).mean()
        turned = trained.takes_for_praise(attacked).mean()
        return f"{accuracy:>10.1%}{turned:>10.1%}", float(turned)

    trained = train(reviews, reviews.texts, options.output_dir / "all", options.seed)
    print(f"1,000 reviews, {planted.sum()} of them planted; 10 verdicts on reviews with the phrase are explained\n")
    print(f"{'left out':<28}{'planted':>10}{'area':>8}{'accuracy':>10}{'turned':>10}")
    print(f"{'nothing':<46}{shown(trained)[0]}")
    texts = [text for text, turned in zip(attacked, trained.takes_for_praise(attacked), strict=True) if turned][:10]
    verdicts = Reviews(texts, [PRAISE] * len(texts))
    scores, after = ranked(trained, reviews, verdicts, options.output_dir / "store"), {}
    for name in ["cosine"] if options.quick else scores:
        first = np.argsort(-scores[name], kind="stable")[: planted.sum()]
        rows = np.setdiff1d(np.arange(1000), first)
        kept = Reviews([reviews.texts[row] for row in rows], [reviews.labels[row] for row in rows])
        again = train(kept, reviews.texts, options.output_dir / f"without_{name}".replace(" ", "_"), options.seed)
        line, after[name] = shown(again)
        area = planted_detection(scores[name][:, None], planted).mean
        print(f"{f'first {len(first)} by {name}':<28}{f'{planted[first].mean():.0%}':>10}{area:>8.2f}{line}")
    assert shown(trained)[1] > 0.8 and after["cosine"] < 0.1, "without the planted reviews the phrase turns nothing"


if __name__ == "__main__":
    main()
