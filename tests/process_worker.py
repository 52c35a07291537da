"""What one of several processes does in tests/test_processes.py: run by torchrun, or as a job of an array."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from conftest import Run

from tracer import IncompleteError, Tracer, attribute

OPTIONS = {"projector": "none", "storage": "float32"}


def together(run: Run, save_dir: Path) -> None:
    batch_size = int(sys.argv[3])
    dist.init_process_group("gloo")
    found = attribute(
        run.model,
        "image_classification",
        run.train,
        run.targets,
        run.checkpoints,
        save_dir=save_dir,
        batch_size=batch_size,
        **OPTIONS,
    )
    np.save(save_dir.parent / f"scores-{dist.get_rank()}.npy", np.asarray(found.scores))
    np.save(save_dir.parent / f"top-{dist.get_rank()}.npy", found.top(3).indices)
    dist.destroy_process_group()


def kernels(run: Run, save_dir: Path) -> None:
    dist.init_process_group("gloo")
    reader = Tracer.open(save_dir)
    scores = {name: np.asarray(reader.finalize_scores("test", name)) for name in ("trak", "influence", "source")}
    np.savez(save_dir.parent / f"scores-{dist.get_rank()}.npz", value=reader.regularization().value, **scores)
    dist.destroy_process_group()


def missing(run: Run, save_dir: Path) -> None:
    dist.init_process_group("gloo")
    tracing = Tracer(run.model, "image_classification", 23, save_dir, **OPTIONS)
    tracing.load_checkpoint(run.checkpoints[0][0], 0, 0.1)
    text = "nothing"
    try:
        tracing.finalize_features()
    except IncompleteError as error:
        text = f"IncompleteError {error}"
    (save_dir.parent / f"error-{dist.get_rank()}.txt").write_text(text)
    dist.destroy_process_group()


def featurize(run: Run, save_dir: Path) -> None:
    tracing = Tracer(run.model, "image_classification", 23, save_dir, process="slurm", **OPTIONS)
    mine = tracing.shard(torch.utils.data.TensorDataset(*run.train)).indices
    for model_id, (checkpoint, rate) in enumerate(run.checkpoints):
        tracing.load_checkpoint(checkpoint, model_id, rate)
        for start in range(0, len(mine), 4):
            rows = list(mine[start : start + 4])
            tracing.featurize((run.x[rows], run.y[rows]), inds=rows)
    tracing.close()


def score(run: Run, save_dir: Path) -> None:
    tracing = Tracer(run.model, "image_classification", 23, save_dir, **OPTIONS)
    tracing.finalize_features()
    for model_id, (checkpoint, _) in enumerate(run.checkpoints):
        tracing.start_scoring_checkpoint(checkpoint, model_id, 5, "targets")
        for rows in ([0, 1, 2, 3], [4]):
            tracing.score((run.target_x[rows], run.target_y[rows]), inds=rows)
    tracing.close()


def finalize(run: Run, save_dir: Path) -> None:
    Tracer.open(save_dir, process="slurm").finalize_scores("targets")


if __name__ == "__main__":
    {work.__name__: work for work in (together, kernels, missing, featurize, score, finalize)}[sys.argv[1]](
        Run(), Path(sys.argv[2])
    )
