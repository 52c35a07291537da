"""What each process of `test_collecting_processes` runs: trainings by two processes, each in another way and folder.

Each writes to ``rank<number>.json`` what it found: the error, or nothing. The first one also writes what was collected.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from collecting_cases import EXACT, N, X, Y, batches, features, mlp, sgd
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from tracer import GradientCollector
from tracer.errors import TracerError

STEPS, SIZES = 7, (4, 3)


def rows_of(rank: int, step: int) -> torch.Tensor:
    """Return the rows of a process in a step; the processes' batches differ in size."""
    return batches(STEPS, SIZES[rank], seed=rank)[step]


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def divided_adam(model: nn.Module) -> torch.optim.Optimizer:
    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)


def run(way: str, folder: Path, rank: int) -> None:
    """Train for `STEPS` steps, in two runs if the way says so."""
    make = {"adam": adam, "divided": divided_adam}.get(way, sgd)
    model = mlp()
    optimizer = make(model)
    options = {"every": "loss" if way == "loss" else 2, **EXACT}
    options |= {"preconditioner": "adam"} if way in ("adam", "divided") else {}
    options |= {"second_pass": True} if way in ("second pass", "apart, second pass") else {}
    options |= {"second_pass": rank == 1} if way == "one second pass" else {}
    options |= {"memory_bytes": 100} if way == "files" else {}
    views = way == "views"
    wrapped = model if way.startswith("apart") else DistributedDataParallel(model, gradient_as_bucket_view=views)
    ended = 4 if way == "resumed" else STEPS
    for first, last in [(0, ended), (ended, STEPS)]:
        if first == last:
            break
        options["resume"] = first > 0
        with GradientCollector(wrapped, optimizer, folder / "run", "classification", N, **options) as collector:
            for step in range(first, last):
                train(way, collector, wrapped, optimizer, rows_of(rank, step), rank)
    if rank == 0:
        torch.save({"features": features(collector), "weights": model.state_dict()}, folder / "found.pt")


def train(
    way: str, collector: GradientCollector, model: nn.Module, optimizer: torch.optim.Optimizer, rows, rank
) -> None:
    """Make a step."""
    optimizer.zero_grad()
    parts = rows.split(2) if way in ("accumulated", "views") else [rows]
    if way == "uneven" and rank == 0:
        parts = rows.split(2)
    for number, part in enumerate(parts):
        waits = number + 1 < len(parts)
        with model.no_sync() if waits else contextlib.nullcontext(), collector.batch((X[part], Y[part]), part):
            loss = nn.functional.cross_entropy(model(X[part]), Y[part]) * len(part) / len(rows)
            loss.backward()
    if way == "clipped":
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()
    collector.step(loss=float(loss) + rank)


def hugging_face(folder: Path, rank: int) -> None:
    """Train with a trainer that saves a checkpoint, and once more from there."""
    from trainer_cases import bert, hf_trainer

    from tracer.api.collecting.huggingface import HuggingFaceCollectorCallback

    options = {"weight_decay": 0.0, "save_strategy": "steps", "save_steps": 4, "max_steps": 7}
    for resumed in (False, folder / "out" / "checkpoint-4"):
        callback = HuggingFaceCollectorCallback(folder / "run", "text_classification", 12, every=3, **EXACT)
        model = bert()
        hf_trainer(folder, model, callback, **options).train(resume_from_checkpoint=resumed and str(resumed))
    if rank == 0:
        torch.save({"features": features(callback.recorder), "weights": model.state_dict()}, folder / "found.pt")


def main() -> None:
    """Join the other process for each way, run it, and write what was found."""
    torch.set_num_threads(1)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    for way in sys.argv[2:]:
        folder = Path(sys.argv[1]) / way
        meeting = f"file://{folder / 'meeting'}"  # a group for each way: an error in one leaves nothing to the next
        limit = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", meeting, limit, rank=rank, world_size=size)
        error = None
        try:
            if way == "hugging face":
                hugging_face(folder, rank)
            else:
                run(way, folder, rank)
        except TracerError as caught:
            error = f"{type(caught).__name__}: {caught}"
        (folder / f"rank{rank}.json").write_text(json.dumps(error))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
