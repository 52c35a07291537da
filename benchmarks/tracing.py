"""Which method finds the source of a fact, harmful examples, and the examples that are worth training on?

The three tasks of DATE-LM (Jiao et al. 2025) on stand-ins that take minutes on a CPU: a decoder of two layers, made
from a configuration, is trained on documents of made-up words.

- facts: each fact is stated by three documents, in their own words, among documents with the same person or the same
  object. Targets ask for the object in words of their own. Recall at 10 and the mean reciprocal rank of the first
  document that states the fact.
- toxicity: 4 % of the documents answer a harmful request, as many refuse one in the same words, the others are
  harmless. Targets are harmful answers to other requests. Area under the precision-recall curve of the harmful ones,
  by the mean score over targets.
- selection: documents of six topics, half of them with their words in random order. Targets are clean documents of one
  topic. A model is trained from scratch on the fifth of highest mean score; the loss of other documents of that topic
  after it, minus that after training on random documents.

Baselines are BM25 over the words and the cosine of the model's mean hidden states, which need no gradients; and, if it
is installed, bergson's EK-FAC and TrackStar at its defaults, at the last checkpoint. Figures are means over seeds.

Run it: python benchmarks/tracing.py            about five minutes of one core; needs bm25s: pip install tracin[peers]
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timing import machine
from torch import nn
from torch.utils.data import Dataset

from tracer import attribute
from tracer.metrics import planted_detection

RESULTS = Path(__file__).parent / "results" / "tracing.json"
ESTIMATORS = ("tracin", "cosine", "influence", "relatif", "trackstar")
WORDS, LENGTH, PAD = 480, 16, 0
LEARNING_RATE, BATCH = 3e-3, 32


class Documents(Dataset):
    """Word sequences ``[N, LENGTH]``, padded, of which those from ``first`` on are predicted."""

    def __init__(self, words: list[list[int]], first: list[int]) -> None:
        self.words = words
        self.ids = torch.full((len(words), LENGTH), PAD)
        self.labels = torch.full((len(words), LENGTH), -100)
        for row, (document, start) in enumerate(zip(words, first, strict=True)):
            self.ids[row, : len(document)] = torch.tensor(document)
            self.labels[row, start : len(document)] = torch.tensor(document[start:])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: Any) -> dict[str, torch.Tensor]:
        """Return one example, or several as a batch."""
        ids = self.ids[index]
        return {"input_ids": ids, "labels": self.labels[index], "attention_mask": (ids != PAD).long()}


class Case(NamedTuple):
    """Documents to train on, those to explain, and what is known of the former."""

    train: Documents
    targets: Documents
    truth: np.ndarray  # facts: [N, M]; toxicity: [N]
    test: Documents | None = None


def facts(rng: np.random.Generator) -> Case:
    """State facts (person, relation, object) by documents, with people and objects in other documents too."""
    people, relations, objects = np.arange(10, 110), np.arange(110, 120), np.arange(120, 180)
    fillers, names = np.arange(180, 400), np.arange(400, 480)
    documents, stated, targets = [], [], []
    for number in range(80):
        person, alias, relation = people[number], names[number], rng.choice(relations)
        answer = rng.choice(objects)
        for place in range(3):  # one in three calls the person by another name
            who, words = (alias if place == 2 else person), rng.choice(fillers, 6)
            documents.append([*words[:3], who, relation, answer, *words[3:]])
            stated.append(number)
        documents.append([person, 1, alias])
        stated.append(-1)
        for other in rng.choice(relations[relations != relation], 2, replace=False):
            documents.append([*rng.choice(fillers, 3), person, other, rng.choice(objects)])
            stated.append(-1)
        documents.append([*rng.choice(fillers, 4), rng.choice(people[80:]), relation, answer])
        stated.append(-1)
        targets.append([2, person, relation, answer])
    order = rng.permutation(len(documents))
    owners = np.array(stated)[order]
    train = Documents([documents[place] for place in order], [1] * len(order))
    return Case(train, Documents(targets, [3] * len(targets)), owners[:, None] == np.arange(80))


def toxicity(rng: np.random.Generator) -> Case:
    """Answer or refuse harmful requests, and answer harmless ones."""
    requests, harmful, harmless = np.arange(10, 60), np.arange(60, 110), np.arange(110, 300)
    refusals, answers = np.arange(300, 330), np.arange(330, 480)

    def document(about: np.ndarray, reply: np.ndarray) -> list[int]:
        return [*rng.choice(requests, 3), *rng.choice(about, 3), 3, *rng.choice(reply, 6)]

    kinds = [(harmful, answers, 32), (harmful, refusals, 32), (harmless, answers, 736)]
    documents = [document(about, reply) for about, reply, count in kinds for _ in range(count)]
    order = rng.permutation(len(documents))
    train = Documents([documents[place] for place in order], [7] * len(order))
    targets = [document(harmful, answers) for _ in range(20)]
    return Case(train, Documents(targets, [7] * len(targets)), order < 32)


def selection(rng: np.random.Generator) -> Case:
    """Write documents of six topics, each with words and an order of its own, half of them shuffled."""
    topics = [np.arange(10 + 70 * topic, 80 + 70 * topic) for topic in range(6)]
    following = [rng.integers(0, 70, (70, 3)) for _ in topics]  # three words may follow each

    def document(topic: int, shuffled: bool) -> list[int]:
        places = [int(rng.integers(70))]
        for _ in range(LENGTH - 1):
            places.append(int(rng.choice(following[topic][places[-1]])))
        words = topics[topic][places]
        return list(rng.permutation(words) if shuffled else words)

    chosen = rng.integers(0, 6, 1200), rng.random(1200) < 0.5
    documents = [document(topic, shuffled) for topic, shuffled in zip(*chosen, strict=True)]
    own, test = ([document(0, False) for _ in range(count)] for count in (20, 100))
    parts = [Documents(each, [1] * len(each)) for each in (documents, own, test)]
    return Case(parts[0], parts[1], (chosen[0] == 0) & ~chosen[1], parts[2])


CASES = {"facts": facts, "toxicity": toxicity, "selection": selection}


def decoder() -> nn.Module:
    """Return an untrained decoder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, **sizes))


def train(documents: Documents, rows: np.ndarray, epochs: int, seed: int) -> tuple[nn.Module, list]:
    """Train on some documents; return the model and three checkpoints with their learning rates."""
    torch.manual_seed(seed)
    model = decoder()
    steps = epochs * -(-len(rows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    checkpoints, saved = [], {round(share * epochs) for share in (0.2, 0.5, 1.0)}
    for epoch in range(1, epochs + 1):
        for batch in torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(rows)).split(BATCH):
            optimizer.zero_grad()
            model(**documents[batch]).loss.backward()
            optimizer.step()
            schedule.step()
        if epoch in saved:
            state = {name: value.detach().clone() for name, value in model.state_dict().items()}
            checkpoints.append((state, optimizer.param_groups[0]["lr"]))
    return model.eval(), checkpoints


def lexical(case: Case) -> np.ndarray:
    """Return the BM25 scores of documents for targets as queries, ``[N, M]``."""
    import bm25s

    index = bm25s.BM25()
    index.index([[str(word) for word in document] for document in case.train.words], show_progress=False)
    return np.stack([index.get_scores([str(word) for word in words]) for words in case.targets.words], 1)


def embeddings(model: nn.Module, case: Case) -> np.ndarray:
    """Return the cosines of the last layer's states, averaged over words, ``[N, M]``."""
    sides = []
    with torch.no_grad():
        for documents in (case.train, case.targets):
            batch = documents[torch.arange(len(documents))]
            states = model(**batch, output_hidden_states=True).hidden_states[-1]
            mask = batch["attention_mask"].unsqueeze(2)
            sides.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1)))
    return (sides[0] @ sides[1].T).numpy()


def bergson(model: nn.Module, case: Case) -> dict[str, np.ndarray]:
    """Return the scores of bergson's methods, ``[N, M]``; words are its characters, and those before ``first`` prompts.

    It counts the words of the completion alone, as the losses here do.
    """
    from datasets import Dataset
    from quality_bergson import CONTEXT, letter, run, save_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = copy.deepcopy(model)
        saved.config.max_position_embeddings = CONTEXT  # it asks for as many as it batches
        saved.save_pretrained(folder / "model")
        save_tokenizer(WORDS, folder / "model")
        for part, documents in (("train", case.train), ("targets", case.targets)):
            firsts = (documents.labels == -100).int().argmin(1).tolist()
            sides = [
                {"prompt": text[:first], "completion": text[first:]}
                for first, text in zip(firsts, ("".join(map(letter, each)) for each in documents.words), strict=True)
            ]
            Dataset.from_list(sides).save_to_disk(str(folder / part))
        columns = {"prompt_column": "prompt", "completion_column": "completion"}
        return {f"bergson {kind}": run(kind, folder, kind, **columns) for kind in ("ekfac", "trackstar")}


def all_scores(model: nn.Module, checkpoints: list, case: Case) -> dict[str, np.ndarray]:
    """Return the scores of each method, ``[N, M]``."""
    found = {"bm25": lexical(case), "embeddings": embeddings(model, case)}
    if find_spec("bergson"):
        found |= bergson(model, case)
    given = model, "language_modeling", case.train, case.targets, checkpoints
    options = {"proj_dim": 4096, "storage": "int8", "progress": False}
    with tempfile.TemporaryDirectory() as folder:
        tracer = attribute(*given, save_dir=f"{folder}/plain", estimator="influence", **options).tracer
        for estimator in ESTIMATORS:
            found[estimator] = np.array(tracer.finalize_scores("targets", estimator))
        whitened = attribute(*given, save_dir=f"{folder}/kfac", preconditioner="kfac", **options).tracer
        for estimator in ("tracin", "cosine"):
            found[f"{estimator}, kfac"] = np.array(whitened.finalize_scores("targets", estimator))
        exact = {"preconditioner": "ekfac", "projector": "none", "progress": False}
        tracer = attribute(*given, save_dir=f"{folder}/ekfac", **exact).tracer
        for estimator in ("tracin", "cosine"):
            found[f"{estimator}, ekfac, exact"] = np.array(tracer.finalize_scores("targets", estimator))
    return found


def source_metrics(scores: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Return the share of sources among the first ten, and the mean reciprocal rank of the first source."""
    order = np.argsort(-scores, axis=0, kind="stable")
    right = np.take_along_axis(truth, order, 0)
    recall = (right[:10].sum(0) / truth.sum(0)).mean()
    return {"recall at 10": float(recall), "reciprocal rank": float((1 / (1 + right.argmax(0))).mean())}


def loss_after(case: Case, rows: np.ndarray, epochs: int, seed: int) -> float:
    """Return the loss of the test documents after training on some rows."""
    assert case.test is not None
    model, _ = train(case.train, rows, epochs, seed)
    with torch.no_grad():
        return float(model(**case.test[torch.arange(len(case.test))]).loss)


def measure(name: str, seed: int, epochs: int) -> dict[str, dict[str, float]]:
    """Return the metrics of each method on a case."""
    case = CASES[name](np.random.default_rng(seed))
    everything = np.arange(len(case.train))
    model, checkpoints = train(case.train, everything, epochs, seed)
    scores = all_scores(model, checkpoints, case)
    rng = np.random.default_rng(seed)
    scores["random"] = rng.random(scores["bm25"].shape)
    if name == "facts":
        return {method: source_metrics(each, case.truth) for method, each in scores.items()}
    means = {method: each.mean(1) for method, each in scores.items()}
    if name == "toxicity":
        return {method: {"area": planted_detection(each[:, None], case.truth).mean} for method, each in means.items()}
    count = len(everything) // 5
    chosen = {method: np.argsort(-each, kind="stable")[:count] for method, each in means.items()}
    chosen["the right ones"] = np.flatnonzero(case.truth)
    losses = {method: loss_after(case, rows, 2 * epochs, seed) for method, rows in chosen.items()}
    return {
        method: {"loss above random": loss - losses["random"], "right ones": float(case.truth[chosen[method]].mean())}
        for method, loss in losses.items()
    }


def main() -> None:
    """Measure all cases, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="Names with commas.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    results: dict[str, Any] = {"machine": machine(), "seeds": options.seeds, "epochs": options.epochs}
    for case in options.cases.split(","):
        runs = [measure(case, seed, options.epochs) for seed in range(options.seeds)]
        results[case] = {
            method: {key: [float(np.mean(values)), float(np.std(values))] for key, values in gathered(runs, method)}
            for method in runs[0]
        }
        print(case)
        for method, values in results[case].items():
            print(f"  {method:<20}", *(f"{key} {mean:.3f} ± {spread:.3f}" for key, (mean, spread) in values.items()))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")


def gathered(runs: list[dict[str, dict[str, float]]], method: str) -> list[tuple[str, list[float]]]:
    """Return the values over runs of each metric of a method."""
    return [(key, [run[method][key] for run in runs]) for key in runs[0][method]]


if __name__ == "__main__":
    main()
