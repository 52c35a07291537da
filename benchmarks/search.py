"""What a question costs with the index of `tracer index`, and which of the strongest examples it finds.

A GPT of two layers is trained on the characters of tiny Shakespeare, and the gradients of N overlapping windows of its
text are stored: rows of k int8 values with the structure of real ones, neighbours sharing most of their text. Questions
are windows of the held-out end of the text. In one process and in turn, as CPU time:

- read: all stored features are read once, from the page cache, as 64-bit words that are summed
- exact: the 100 strongest examples of a question by all stored features, as `Tracer.query` finds them
- candidates: the same among candidates that the index finds, ranked by their stored features
- index alone: 1,000 candidates, without ranking them by stored features
- faiss, where it is installed (``pip install faiss-cpu``): likewise 1,000 candidates, of an index of 1,024 clusters
  over the same principal components, eight bits each

Recall is the share of the 100 strongest examples that are found; without ranking, among the candidates.

Run it: TRACER_DATA=... python benchmarks/search.py            about five minutes of one core
        with --made-up --rows 1000000 --dim 4096: times of made-up rows, to search_made_up.json
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import table, write_results

from tracer import Tracer
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import InMemoryTable
from tracer.scoring.scorer import Scorer
from tracer.scoring.search_index import SearchIndex, load_index
from tracer.store import Store
from tracer.store.manifest import Manifest
from tracer.store.revisions import Revisions

RESULTS = Path(__file__).parent / "results"
LENGTH, QUESTIONS, K, HELD_OUT = 32, 40, 100, 115_000
CLUSTERS, PROBES = 1024, (32, 128, 512)


def windows(text: np.ndarray, count: int) -> torch.Tensor:
    """Return windows ``[count, LENGTH]`` that begin at even intervals."""
    starts = np.linspace(0, len(text) - LENGTH, count).astype(np.int64)
    return torch.from_numpy(text[starts[:, None] + np.arange(LENGTH)])


def trained(text: np.ndarray, vocabulary: int, steps: int) -> torch.nn.Module:
    """Return a small GPT trained on random windows."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": vocabulary, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = torch.from_numpy(text[rng.integers(0, len(text) - LENGTH, (32, 1)) + np.arange(LENGTH)])
        optimizer.zero_grad()
        model(rows, labels=rows).loss.backward()
        optimizer.step()
    return model.eval()


def build(folder: Path, num_rows: int, dim: int, steps: int) -> None:
    """Store the gradients of windows of the text, and those of the questions as targets."""
    text = np.frombuffer((Path(os.environ["TRACER_DATA"]) / "tinyshakespeare.txt").read_bytes(), np.uint8)
    characters, ids = np.unique(text, return_inverse=True)
    model = trained(ids[:-HELD_OUT], len(characters), steps)
    rows, questions = windows(ids[:-HELD_OUT], num_rows), windows(ids[-HELD_OUT:], QUESTIONS)
    with Tracer(model, "language_modeling", num_rows, folder, dim, storage="int8", progress=False) as tracer:
        tracer.load_checkpoint(model.state_dict(), model_id=0, learning_rate=1.0)
        for first in range(0, num_rows, 256):
            batch = rows[first : first + 256]
            tracer.featurize({"input_ids": batch, "labels": batch}, num_samples=len(batch))
        tracer.finalize_features()
        tracer.start_scoring_checkpoint(model.state_dict(), 0, QUESTIONS, "questions")
        tracer.score({"input_ids": questions, "labels": questions}, num_samples=QUESTIONS)


def build_made_up(folder: Path, num_rows: int, dim: int) -> None:
    """Store made-up rows whose columns fall in size, for times at sizes that take hours to featurize."""
    rng = np.random.default_rng(0)
    store = Store.open(folder, Manifest({"train_set_size": num_rows, "feature_dim": dim, "storage": "int8"}))
    base = (rng.standard_normal((2048, dim)) / np.arange(1, dim + 1) ** 0.5).astype(np.float32)
    opened = (
        (num_rows, store.create_checkpoint(0, "a", 1.0)),
        (QUESTIONS, store.create_targets("questions", 0, QUESTIONS)),
    )
    for count, rows in opened:
        with rows:
            for first in range(0, count, len(base)):
                features = (base + 0.3 * base[rng.permutation(len(base))])[: count - first]
                ones, norm = np.ones(len(features), np.float32), np.linalg.norm(features, axis=1)
                columns = {"loss": ones, "loss_grad": ones, "loss_hess": ones, "gradient_norm": norm}
                places = np.arange(first, first + len(features))
                rows.write(places, features, fingerprint=np.zeros(len(features), np.uint64), **columns)
            rows.set_attributes(finalized=True)


def questions_of(store: Store) -> list[InMemoryTable]:
    """Return each question alone."""
    targets = store.targets("questions", 0)
    raw = np.concatenate([view for _, view in targets.raw_features(0, QUESTIONS)]).astype(np.float32)
    features = raw * targets.column("scale")[:, None]
    columns = [np.array(targets.column(name)) for name in ("loss_grad", "gradient_norm")]
    places = [slice(number, number + 1) for number in range(QUESTIONS)]
    return [InMemoryTable(features[each], *(column[each] for column in columns), "int8") for each in places]


def recall(found: list[np.ndarray], exact: list[np.ndarray]) -> float:
    """Return the mean share of what is exact that was found."""
    return float(np.mean([len(np.intersect1d(*pair)) / len(pair[1]) for pair in zip(found, exact, strict=True)]))


def vectors(estimate: Estimate, questions: list[InMemoryTable]) -> list[np.ndarray]:
    """Return what each question multiplies weighted features by, up to a positive factor."""
    found = []
    for each in questions:
        weight = estimate.target_weights(each.column("loss_grad"), each.column("gradient_norm"))
        found.append((each.raw_features(0, 1)[0][1] * np.sign(weight)[:, None]).astype(np.float32))
    return found


def clusters(known: SearchIndex, questions: list[np.ndarray]) -> dict[int, Callable[[int], Any]]:
    """Return searches of a FAISS index by their number of probed clusters; none where it is not installed."""
    try:
        import faiss
    except ImportError:
        return {}
    faiss.omp_set_num_threads(1)
    rows = known.codes.astype(np.float32) * known.scale
    index = faiss.index_factory(rows.shape[1], f"IVF{CLUSTERS},SQ8", faiss.METRIC_INNER_PRODUCT)
    index.train(rows[:: max(1, len(rows) // (64 * CLUSTERS))])
    index.add(rows)
    targets = [each @ known.basis for each in questions]

    def search(probes: int) -> Callable[[int], np.ndarray]:
        def found(number: int) -> np.ndarray:
            index.nprobe = probes
            return np.asarray(index.search(targets[number], 1000)[1][0])

        return found

    return {probes: search(probes) for probes in PROBES}


def measured(
    store: Store, estimator: str, candidates: list[int], rounds: int, with_faiss: bool = True
) -> list[dict[str, Any]]:
    """Return the time of each way to ask over that of the exact scan, and its recall."""
    estimate, scorer = Estimate(estimator), Scorer(store, torch.device("cpu"), False)
    questions, num_rows = questions_of(store), store.manifest.train_set_size
    start = time.process_time()
    scorer.build_index(estimate, None, 128)
    built = time.process_time() - start

    def read(number: int) -> None:
        with store.checkpoint(0) as rows:
            for _, view in rows.raw_features(0, num_rows):
                view.view(np.int64).sum()

    def ask(count: int) -> Callable[[int], np.ndarray]:
        chosen = (range(num_rows), K, "proponents", estimate, count)
        return lambda number: scorer.query([questions[number]], [0], *chosen).indices[0]

    ways: dict[str, Callable[[int], Any]] = {"read": read, "exact": ask(0)}
    ways |= {f"candidates {count}": ask(count) for count in candidates}
    known, targets = load_index(store, Revisions(store, [0]), estimate), vectors(estimate, questions)
    ways["index alone"] = lambda number: known.candidates(targets[number], 1000, True, torch.device("cpu"), 1 << 30)
    if with_faiss:
        ways |= {f"faiss, {probes} clusters": way for probes, way in clusters(known, targets).items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = time.process_time()
            way(number % QUESTIONS)
            if number:
                seconds[name].append(time.process_time() - start)
    exact = [ways["exact"](number) for number in range(QUESTIONS)]
    found = []
    for name, way in ways.items():
        shared = None if name == "read" else recall([way(number) for number in range(QUESTIONS)], exact)
        times = {
            f"over_{base}": statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))
            for base in ("read", "exact")
        }
        found.append({"estimator": estimator, "way": name, "recall": shared, **times})
    found.append(
        {"estimator": estimator, "way": "build the index", "over_exact": built / statistics.median(seconds["exact"])}
    )
    return found


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--candidates", default="300,1000")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--made-up", action="store_true", help="Made-up rows, for times at other sizes.")
    parser.add_argument("--store", type=Path, help="Keep the store here, and use it if it exists.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = options.store or Path(folder) / "store"
        if not path.exists():
            if options.made_up:
                build_made_up(path, options.rows, options.dim)
            else:
                build(path, options.rows, options.dim, options.steps)
        store = Store.open_existing(path)
        found = []
        for estimator in ("cosine",) if options.made_up else ("cosine", "tracin"):
            counts = [int(each) for each in options.candidates.split(",")]
            found += measured(store, estimator, counts, options.rounds, not options.made_up)
    sizes = {"rows": store.manifest.train_set_size, "dim": store.manifest.feature_dim}
    found = [{**sizes, **each} for each in found]
    print(
        table(
            found, {name: name.replace("_", " ") for name in ("estimator", "way", "over_read", "over_exact", "recall")}
        )
    )
    write_results(options.output, "search_made_up" if options.made_up else "search", found)


if __name__ == "__main__":
    main()
