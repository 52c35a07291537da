"""What more processes bring: the same work on one store by 1, 2 and 4 processes.

For each number of processes, a ResNet-9 (width 16) on made-up images is featurized, scored and ranked from nothing by
processes that `torch.distributed` (gloo) joins, each with an equal share of the machine's threads. A phase's time is
from when all are ready until all are done, so starting Python and drawing data are left out. Phases:

- featurize: every train row, with the store's writing, up to rows that are durable;
- targets: every target row;
- scores: `finalize_scores`, up to scores that are durable;
- top: the 10 strongest rows of each target, both ends.

Beside it: one plain forward and backward of the same batches in one process with all threads. On a machine whose cores
one process already keeps busy more processes cannot be faster: what this shows there is what sharing costs. All
results are compared: scores of all numbers of processes are equal.

Run it: python benchmarks/distributed.py
        with --quick: small sizes, to distributed_quick.json
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from featurize import RESULTS
from models import ResNet9
from timing import machine, table, write_results

from tracer import Tracer

PHASES = ("featurize", "targets", "scores", "top")
COLUMNS = {"processes": "processes", "phase": "phase", "seconds": "s", "ratio": "over plain pass", "speedup": "speedup"}


def data(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Made-up images and labels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 3, 32, 32, generator=generator), torch.randint(0, 10, (rows,), generator=generator)


def network() -> torch.nn.Module:
    """The model, the same in every process."""
    torch.manual_seed(0)
    return ResNet9(width=16)


def plain_pass(rows: int, batch_size: int) -> float:
    """Return the seconds of one forward and backward of all batches."""
    model, (x, y) = network(), data(rows, 1)
    model.eval()
    start = time.perf_counter()
    for first in range(0, rows, batch_size):
        part = slice(first, first + batch_size)
        torch.nn.functional.cross_entropy(model(x[part]), y[part], reduction="sum").backward()
    return time.perf_counter() - start


def work(rank: int, count: int, port: int, folder: str, sizes: dict[str, int]) -> None:
    """Do one process's share and let the first one write down the times.

    Args:
        rank: The process's number.
        count: How many there are.
        port: Where they meet.
        folder: Where the store goes, and the times.
        sizes: ``rows``, ``targets``, ``batch_size``, ``proj_dim``.
    """
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    model = network()
    state = model.state_dict()
    train, targets = data(sizes["rows"], 1), data(sizes["targets"], 2)
    store = Path(folder) / "store"
    options = {"proj_dim": sizes["proj_dim"], "progress": False}
    tracer = Tracer(model, "image_classification", sizes["rows"], store, **options)
    seconds = {}

    def timed(phase: str, call: Callable[[], Any]) -> Any:
        dist.barrier()
        start = time.perf_counter()
        result = call()
        dist.barrier()
        seconds[phase] = time.perf_counter() - start
        return result

    def feed(step: Callable[..., None], columns: tuple[torch.Tensor, torch.Tensor]) -> None:
        mine = tracer.shard(columns[0]).indices
        for first in range(0, len(mine), sizes["batch_size"]):
            rows = mine[first : first + sizes["batch_size"]]
            step((columns[0][rows.start : rows.stop], columns[1][rows.start : rows.stop]), inds=rows)
        tracer.flush()

    tracer.load_checkpoint(state, 0, 0.1)
    timed("featurize", lambda: feed(tracer.featurize, train))
    tracer.finalize_features()
    tracer.start_scoring_checkpoint(state, 0, sizes["targets"], "test")
    timed("targets", lambda: feed(tracer.score, targets))
    scores = timed("scores", lambda: tracer.finalize_scores("test"))
    timed("top", lambda: tracer.top("test", 10))
    if rank == 0:
        np.save(Path(folder) / "scores.npy", np.asarray(scores))
        (Path(folder) / "seconds.txt").write_text("\n".join(f"{phase} {seconds[phase]}" for phase in PHASES))
    dist.barrier()
    dist.destroy_process_group()


def run(count: int, sizes: dict[str, int]) -> tuple[dict[str, float], np.ndarray]:
    """Return the seconds of each phase and all scores, by this many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(work, (count, port, folder, sizes), count, start_method="forkserver")
        lines = (Path(folder) / "seconds.txt").read_text().splitlines()
        return {name: float(value) for name, value in map(str.split, lines)}, np.load(Path(folder) / "scores.npy")


def measure(counts: list[int], sizes: dict[str, int], rounds: int) -> list[dict[str, Any]]:
    """Run all numbers of processes in turn, several times, and return the medians.

    Args:
        counts: The numbers of processes.
        sizes: As `work` takes them.
        rounds: How often.

    Returns:
        A row for each number of processes and phase.
    """
    seconds: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    plain, scores = [], []
    for number in range(rounds):
        plain.append(plain_pass(sizes["rows"], sizes["batch_size"]))
        for count in counts:
            found, matrix = run(count, sizes)
            seconds[count].append(found)
            scores.append(matrix)
            print(f"  round {number + 1}, {count} processes: {sum(found.values()):.1f} s", flush=True)
    scale = np.abs(scores[0]).max()
    assert all(np.abs(other - scores[0]).max() <= 1e-3 * scale for other in scores), "scores differ"
    rows = []
    for count in counts:
        for phase in PHASES:
            times = [found[phase] for found in seconds[count]]
            first = [found[phase] for found in seconds[counts[0]]]
            rows.append(
                {
                    "processes": count,
                    "phase": phase,
                    "seconds": statistics.median(times),
                    "ratio": statistics.median(a / b for a, b in zip(times, plain, strict=True)),
                    "speedup": statistics.median(a / b for a, b in zip(first, times, strict=True)),
                }
            )
    return rows


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=lambda text: [int(part) for part in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--targets", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small sizes, rough figures")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    sizes = {"rows": options.rows, "targets": options.targets, "batch_size": 64, "proj_dim": 4096}
    if options.quick:
        sizes = {"rows": 64, "targets": 8, "batch_size": 8, "proj_dim": 64}
    rows = measure(options.processes, sizes, 1 if options.quick else options.rounds)
    print(f"\n{table(rows, COLUMNS)}\n\n{machine()}")
    name = "distributed_quick" if options.quick else "distributed"
    print(write_results(options.output_dir, name, rows))


if __name__ == "__main__":
    main()
