"""What scores of stored rows cost, beside a bare matrix product of the same shapes and beside the disk.

A store with one checkpoint of N made-up rows of k values is written through the store's own writer, once for each
storage, with targets of its own. Then, in one process and in turn:

- bare: ``torch.matmul`` of float32 rows ``[N, k]`` and targets ``[M, k]`` that are in memory already. Where N rows in
  float32 would take more than ``--bare-gb`` it is timed on as many as fit, and the time scaled up.
- scores: everything that `finalize_scores` does, up to scores that are durable in the store, from the page cache.
- top: the 10 strongest rows of each target, both ends, up to an answer that is durable in the store.
- query: the same without storing anything, as `Tracer.query` does once it has the targets' features.
- cold: query after the store's files were synced and dropped from the page cache; and the same files read plainly, in
  8 MB pieces, dropped likewise.
- traker, where it is installed: `BasicScoreComputer.get_scores` on float32 features in memory, its score kernel.
- captum, where it is installed: `_gradient_dot_product` on float32 features in memory, the product that TracInCP
  takes of gradients. captum keeps no features: to score again it computes all gradients again, which is not timed here
  (benchmarks/peers.py does). TracInCPFastRandProj keeps features, but answers by approximate nearest neighbours and
  gives no scores, so it cannot be compared.

Ratios are medians over rounds of a contender's time over the bare product's of the same round. Peaks are what a run
adds to the process's own memory, which pages of files do not count to.

Run it: python benchmarks/scoring.py --rows 10000,100000 --targets 8,1000
        with --quick: small sizes, to scoring_quick.json and .png
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from featurize import RESULTS
from timing import machine, peak_mb, synchronize, table, write_results
from torch import Tensor

from tracer.scoring.estimators import Estimate
from tracer.scoring.scorer import Scorer
from tracer.store import RowTable, Store
from tracer.store.manifest import Manifest

STORAGES = ("float32", "float16", "int8")
BATCH, K = 2048, 10
COLUMNS = {
    "rows": "rows",
    "targets": "targets",
    "work": "work",
    "ms": "ms",
    "ratio": "over bare",
    "best_ratio": "best over best bare",
    "peak_mb": "peak MB",
    "mb_s": "MB/s read",
}


@dataclass
class Contender:
    """Something that is timed.

    Attributes:
        name: What it is called in tables.
        work: What is timed.
        prepare: What is done before each time.
        scale: By what its time is multiplied.
        read_bytes: How much it reads, where that is of interest.
        seconds: Of each round.
    """

    name: str
    work: Callable[[], Any]
    prepare: Callable[[], None] = lambda: None
    scale: float = 1.0
    read_bytes: int | None = None
    seconds: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Take the time once."""
        self.prepare()
        synchronize()
        start = time.perf_counter()
        self.work()
        synchronize()
        self.seconds.append(self.scale * (time.perf_counter() - start))


def made_up(dim: int) -> np.ndarray:
    """Return ``[BATCH, dim]`` normal values, which `features_of` turns into as many rows as are wanted."""
    return np.random.default_rng(0).standard_normal((BATCH, dim), np.float32)


def features_of(base: np.ndarray, num_rows: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first row and values of batches, ``[n, k]``, float32: each time moved by one column."""
    for number, start in enumerate(range(0, num_rows, BATCH)):
        yield start, np.roll(base, number, axis=1)[: num_rows - start]


def fill(rows: RowTable, base: np.ndarray) -> None:
    """Write made-up rows as featurizing does, and finalize them."""
    for start, features in features_of(base, rows.num_rows):
        ones = np.ones(len(features), np.float32)
        rows.write(
            np.arange(start, start + len(features)),
            features,
            loss=ones,
            loss_grad=ones,
            loss_hess=ones,
            gradient_norm=ones,
            fingerprint=np.zeros(len(features), np.uint64),
        )
    rows.set_attributes(finalized=True)
    rows.close()


def make_store(folder: Path, storage: str, num_rows: int, base: np.ndarray, targets: Sequence[int]) -> Scorer:
    """Write a store and return what answers from it."""
    settings = {"train_set_size": num_rows, "feature_dim": base.shape[1], "storage": storage}
    store = Store.open(folder, Manifest(settings))
    fill(store.create_checkpoint(0, "made up", 1.0), base)
    for num_targets in targets:
        fill(store.create_targets(f"m{num_targets}", 0, num_targets), base[::-1])
    return Scorer(store, torch.device("cpu"), progress=False)


def feature_files(scorer: Scorer) -> list[Path]:
    """Return the files of the checkpoint's features."""
    return sorted(path for path in (scorer.store.path / "checkpoints/0/features/c").rglob("*") if path.is_file())


def evict(scorer: Scorer) -> None:
    """Drop the store's features from the page cache."""
    for path in feature_files(scorer):
        descriptor = os.open(path, os.O_RDWR)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_plainly(scorer: Scorer) -> None:
    """Read the store's features in pieces of 8 MB, one file after the other."""
    buffer = bytearray(8 << 20)
    for path in feature_files(scorer):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def forget(scorer: Scorer, name: str) -> Callable[[], None]:
    """Return what removes earlier answers."""
    return lambda: shutil.rmtree(scorer.store.path / name, ignore_errors=True)


def peers(features: Tensor, targets: Tensor, scale: float) -> Iterator[Contender]:
    """Yield the score kernels of the peers that are installed, on features in memory."""
    try:
        computer = importlib.import_module("trak.score_computers").BasicScoreComputer
    except ImportError:
        print("traker is not installed: left out")
    else:
        kernel = computer(dtype=torch.float32, device=torch.device("cpu"))
        scores = torch.zeros(len(features), len(targets))
        yield Contender("traker, get_scores", lambda: kernel.get_scores(features, targets, scores), scale=scale)
    try:
        product = importlib.import_module("captum.influence._utils.common")._gradient_dot_product
    except ImportError:
        print("captum is not installed: left out")
    else:
        yield Contender("captum, _gradient_dot_product", lambda: product((features,), (targets,)), scale=scale)


def query(scorer: Scorer, name: str, k: int) -> Any:
    """Answer for targets in memory without storing anything."""
    rows = scorer.store.targets(name, 0)
    return scorer.query([rows], [0], range(scorer.num_rows), k, "proponents", Estimate())


def measure(
    folder: Path, num_rows: int, targets: Sequence[int], dim: int, rounds: int, bare_bytes: float
) -> list[dict[str, Any]]:
    """Write the stores of one size and return rows of the table."""
    base = made_up(dim)
    scorers = {each: make_store(folder / each, each, num_rows, base, targets) for each in STORAGES}
    held = min(num_rows, max(BATCH, int(bare_bytes // (4 * dim))))
    features = torch.empty(held, dim)
    for start, part in features_of(base, held):
        features[start : start + len(part)] = torch.from_numpy(part)
    found = []
    for num_targets in targets:
        found += measure_targets(scorers, features, num_rows, num_targets, base, rounds)
    return found


def measure_targets(
    scorers: dict[str, Scorer], features: Tensor, num_rows: int, num_targets: int, base: np.ndarray, rounds: int
) -> list[dict[str, Any]]:
    """Let all contenders of one size take turns and return rows of the table."""
    name, scale, k = f"m{num_targets}", num_rows / len(features), min(K, num_rows)
    parts = list(features_of(np.ascontiguousarray(base[::-1]), num_targets))
    right = torch.from_numpy(np.concatenate([part for _, part in parts]))
    contenders = [Contender("bare", lambda: features @ right.T, scale=scale), *peers(features, right, scale)]
    for storage, scorer in scorers.items():
        size = sum(path.stat().st_size for path in feature_files(scorer))
        contenders += [
            Contender(
                f"{storage}, scores",
                lambda s=scorer: s.scores(name, Estimate(), None),
                prepare=forget(scorer, "scores"),
            ),
            Contender(
                f"{storage}, top",
                lambda s=scorer: s.top(name, k, "proponents", Estimate(), None),
                prepare=forget(scorer, "top"),
            ),
            Contender(f"{storage}, query", lambda s=scorer: query(s, name, k)),
        ]
        if hasattr(os, "posix_fadvise"):
            drop = lambda s=scorer: evict(s)  # noqa: E731
            contenders += [
                Contender(f"{storage}, cold query", lambda s=scorer: query(s, name, k), drop, read_bytes=size),
                Contender(f"{storage}, cold plain read", lambda s=scorer: read_plainly(s), drop, read_bytes=size),
            ]
    for number in range(rounds + 1):
        for contender in contenders:
            contender.run()
            if number == 0:
                contender.seconds.clear()
    bare = contenders[0]
    rows = []
    for contender in contenders:
        contender.prepare()
        ratios = [mine / other for mine, other in zip(contender.seconds, bare.seconds, strict=True)]
        seconds = statistics.median(contender.seconds)
        rows.append(
            {
                "rows": num_rows,
                "targets": num_targets,
                "dim": base.shape[1],
                "work": contender.name,
                "ms": 1e3 * seconds,
                "ratio": statistics.median(ratios),
                "best_ratio": min(contender.seconds) / min(bare.seconds),
                "peak_mb": peak_mb(contender.work),
                "mb_s": None if contender.read_bytes is None else contender.read_bytes / seconds / 1e6,
                "seconds": contender.seconds,
            }
        )
        print(f"  N={num_rows} M={num_targets} {contender.name}: {rows[-1]['ratio']:.2f}", flush=True)
    return rows


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the ratios as bars, one panel for each number of rows and targets, with the bare product as a line."""
    from matplotlib.figure import Figure

    sizes = list(dict.fromkeys((row["rows"], row["targets"]) for row in rows))
    works = [work for work in dict.fromkeys(row["work"] for row in rows) if work != "bare"]
    figure = Figure(figsize=(4 + 3 * len(sizes), 0.3 * len(works) + 1.5), layout="constrained")
    colors = {"float32": "#5b6770", "float16": "#1f5fbf", "int8": "#d9730d"}
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for axes, size in zip(panels, sizes, strict=True):
        found = {row["work"]: row["ratio"] for row in rows if (row["rows"], row["targets"]) == size}
        values = [found[work] for work in works][::-1]
        shades = [colors.get(work.partition(",")[0], "#a9b2b8") for work in works][::-1]
        axes.barh(works[::-1], values, color=shades)
        for position, value in enumerate(values):
            axes.text(value, position, f" {value:.2f}", va="center", fontsize=8)
        axes.axvline(1.0, color="#333333", linewidth=1, linestyle="--")
        axes.set_xlim(0, 1.2 * max(values))
        axes.set_title(f"{size[0]:,} rows, {size[1]:,} targets", fontsize=10)
        axes.set_xlabel("time over a bare product")
        for spine in ("top", "right"):
            axes.spines[spine].set_visible(False)
    figure.savefig(path, dpi=150)


def numbers(text: str) -> list[int]:
    """Return the integers of a list such as ``8,1000``."""
    return [int(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=numbers, default=[10_000, 100_000], help="numbers of train rows")
    parser.add_argument("--targets", type=numbers, default=[8, 1000], help="numbers of targets")
    parser.add_argument("--dim", type=int, default=4096, help="values of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bare-gb", type=float, default=4.0, help="the most memory of float32 rows")
    parser.add_argument("--folder", type=Path, help="where the stores are written for a while; all of them take disk")
    parser.add_argument("--quick", action="store_true", help="small sizes, rough figures")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    sizes = [500] if options.quick else options.rows
    targets, dim = ([20], 64) if options.quick else (options.targets, options.dim)
    rounds = 1 if options.quick else options.rounds
    rows: list[dict[str, Any]] = []
    for num_rows in sizes:
        folder = Path(tempfile.mkdtemp(prefix="tracer-benchmark-", dir=options.folder))
        try:
            rows += measure(folder, num_rows, targets, dim, rounds, options.bare_gb * 1e9)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{table(rows, COLUMNS)}\n\n{machine()}")
    name = "scoring_quick" if options.quick else "scoring"
    print(write_results(options.output_dir, name, rows))
    plot(rows, options.output_dir / f"{name}.png")


if __name__ == "__main__":
    main()
