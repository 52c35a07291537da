"""A small job, everything included: 500 examples, 50 targets and five checkpoints of a small network, beside captum.

Two questions. *First* is a new process: its imports, and one call. *Repeated* is one more call in the same process,
into a new store. captum's TracInCP runs in fast mode, exactly, with the same batch size, and stores nothing. Times are
the processor's, and seconds by the clock, which also has the waiting for the disk. They are read as ratios.

Run: python benchmarks/small_jobs.py [--rounds 9]
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from featurize import RESULTS
from timing import alternate, ratio, table, write_results
from torch import nn
from torch.utils.data import TensorDataset

NUM_TRAIN, NUM_TARGETS, BATCH_SIZE = 500, 50, 64


def job() -> tuple[nn.Module, tuple, tuple, list[tuple[dict[str, torch.Tensor], float]]]:
    """Return a network, training examples, targets and checkpoints with their learning rates."""
    torch.manual_seed(0)
    x, y = torch.randn(NUM_TRAIN + NUM_TARGETS, 64), torch.randint(0, 10, (NUM_TRAIN + NUM_TARGETS,))
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    checkpoints = []
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        checkpoints.append(({name: value.clone() for name, value in model.state_dict().items()}, 0.1))
    return model, (x[:NUM_TRAIN], y[:NUM_TRAIN]), (x[NUM_TRAIN:], y[NUM_TRAIN:]), checkpoints


def of_tracer(**options: Any) -> np.ndarray:
    """Return scores ``[N, M]`` of `attribute`, whose store is removed later."""
    from tracer import attribute

    model, train, targets, checkpoints = job()
    folder = tempfile.mkdtemp(dir=_folder.name)
    given = model, "image_classification", train, targets, checkpoints
    return np.array(attribute(*given, save_dir=folder, batch_size=BATCH_SIZE, **options).scores)


def of_captum() -> np.ndarray:
    """Return the exact scores, ``[N, M]``, of captum."""
    from captum.influence import TracInCP

    model, train, targets, checkpoints = job()

    def load(model: nn.Module, number: str) -> float:
        weights, rate = checkpoints[int(number)]
        model.load_state_dict(weights)
        return rate

    influence = TracInCP(
        model,
        TensorDataset(*train),
        [str(number) for number in range(len(checkpoints))],
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum"),
        batch_size=BATCH_SIZE,
        sample_wise_grads_per_batch=True,
    )
    return influence.influence(targets, show_progress=False).T.numpy()


JOBS: dict[str, Callable[[], np.ndarray]] = {
    "captum": of_captum,
    "tracer": of_tracer,
    "tracer, exact": lambda: of_tracer(projector="none"),
}
_folder = tempfile.TemporaryDirectory()


def in_new_process(name: str) -> None:
    """Run a job once in a process of its own."""
    subprocess.run([sys.executable, __file__, "--only", name], check=True)


def children_clock() -> float:
    """Return the processor time of processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


def measured(rounds: int) -> list[dict[str, Any]]:
    """Return a row for each job: its time over captum's, first and repeated, by processor and by clock."""
    first = {name: lambda name=name: in_new_process(name) for name in JOBS}
    questions = {
        "first, processor": (first, children_clock),
        "first, clock": (first, time.perf_counter),
        "repeated, processor": (JOBS, time.process_time),
        "repeated, clock": (JOBS, time.perf_counter),
    }
    rows: list[dict[str, Any]] = [{"job": name} for name in JOBS]
    for question, (jobs, clock) in questions.items():
        seconds = alternate(jobs, rounds, clock=clock)
        for row in rows:
            row[question] = ratio(seconds, row["job"], "captum")
    exact = of_captum()
    for row in rows:
        row["correlation"] = float(np.corrcoef(JOBS[row["job"]]().ravel(), exact.ravel())[0, 1])
    return rows


def main() -> None:
    """Measure, print and write ``small_jobs.json``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--only", choices=JOBS, help="run one job once")
    options = parser.parse_args()
    logging.disable()  # these models have learned nothing, as tracer would say
    warnings.simplefilter("ignore")
    if options.only:
        JOBS[options.only]()
        return
    rows = measured(options.rounds)
    print(table(rows, {key: key for key in rows[0]}))
    print(f"\nWrote {write_results(options.output_dir, 'small_jobs', rows)}")


if __name__ == "__main__":
    main()
