"""LoGra of logix behind one signature; see `quality_peers`.

logix 0.1.1 (Choe et al. 2024): gradients of linear layers between two random matrices, of rank 64 by default, whitened
by their own second moments, layer by layer, with a damping of 1e-10 by default. It wants a Python below 3.11, but runs
on newer ones: ``pip install --no-deps --ignore-requires-python logix-ai==0.1.1``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from quality_methods import Case, Found, Method, Rows, method, row_losses
from quality_tracer import stored_bytes
from torch import nn


def logix_scores(case: Case, folder: Path, **options: Any) -> Found:
    """Influence at the last checkpoint, of stored projected gradients.

    Args:
        case: What is scored.
        folder: Where it keeps them.
        **options: As its ``compute_influence_all`` takes them.

    Returns:
        Scores.
    """
    from logix import LogIX, LogIXScheduler

    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"root_dir: {folder}\n")
    model = case.states()[-1]
    run = LogIX("scores", config=str(folder / "config.yaml"))
    run.watch(model)
    for _ in LogIXScheduler(run, lora="random", hessian="raw", save="grad"):
        log_rows(run, model, case.train, case.batch_size)
        run.finalize()
    loader = run.build_log_dataloader(batch_size=case.batch_size)
    run.eval()
    run.setup({"grad": ["log"]})
    log_rows(run, model, case.targets, case.sizes[1])
    found = run.compute_influence_all(run.get_log(), loader, **options)
    scores = np.empty(case.sizes)
    scores[[int(name) for name in found["tgt_ids"]]] = found["influence"].numpy().T
    row_bytes = sum(path.stat().st_size for path in folder.rglob("*.mmap")) or stored_bytes(folder)
    return Found("", scores, row_bytes=row_bytes / case.sizes[0])


def log_rows(run: Any, model: nn.Module, rows: Rows, batch_size: int) -> None:
    """Let it see the gradients of rows, whose names are their numbers."""
    start = 0
    for x, y in zip(*(column.split(batch_size) for column in rows), strict=True):
        with run(data_id=[str(number) for number in range(start, start + len(y))]):
            model.zero_grad()
            row_losses(model(x), y).sum().backward()
        start += len(y)


def logix_methods() -> list[Method]:
    """Return LoGra."""
    return [method("logix LoGra, last checkpoint", logix_scores, [{}, {"damping": 1e-3}])]
