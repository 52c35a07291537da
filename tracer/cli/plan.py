"""The plan of a run, with what it will cost: from `attribute` itself on a few batches, in a temporary store."""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tracer._core.processes import this_process
from tracer.api.attribution import attribute
from tracer.cli.job import Job
from tracer.cli.output import size_text, table, time_text
from tracer.data.datasets import DataSource, as_data_source
from tracer.store import Store
from tracer.store.manifest import Manifest
from tracer.store.metadata import NODE
from tracer.store.paths import store_path
from tracer.store.table_schema import table_layouts
from tracer.types import Batch

TRIED_BATCHES, TRIED_CHECKPOINTS = 4, 2
"""How many batches of train rows and of targets are run, and at how many checkpoints; the first one only warms up."""


@dataclass(frozen=True)
class Plan:
    """What a run will do, and about what it costs.

    Attributes:
        save_dir: Where the store lies or is to be made.
        manifest: What the store is made with.
        checkpoints: Path, learning rate, train rows and targets still to be computed, for each.
        num_targets: M.
        num_values: The numbers in the selected parameters.
        seconds: The estimated time of what is missing, by one process.
        worst_seconds: The same where the number of passes over the train rows is not known; else equal.
        row_seconds: Of a train row and of a target at one checkpoint, with loading it.
        disk_bytes: Of the features of all rows and targets, those that are there included.
        score_bytes: Of the matrix of scores, which is made when it is asked for.
        peak_bytes: The process's largest memory in the trial, None where the system does not say it.
        device_bytes: The GPU's largest memory in the trial, None without one.
        memory_bytes: What ranking holds at most, about.
    """

    save_dir: str
    manifest: Manifest
    checkpoints: list[tuple[str, float | None, int, int]]
    num_targets: int
    num_values: int
    seconds: float
    worst_seconds: float
    row_seconds: tuple[float, float]
    disk_bytes: int
    score_bytes: int
    peak_bytes: int | None
    device_bytes: int | None
    memory_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        names = ("path", "learning_rate", "train_rows_missing", "targets_missing")
        found = dataclasses.asdict(self)
        found["checkpoints"] = [dict(zip(names, each, strict=True)) for each in self.checkpoints]
        found["settings"] = dict(self.manifest.settings)
        found["train_seconds_per_row"], found["target_seconds_per_row"] = found.pop("row_seconds")
        del found["manifest"]
        return {
            "save_dir": found.pop("save_dir"),
            "train_rows": self.manifest.train_set_size,
            "num_targets": found.pop("num_targets"),
            **found,
        }

    def as_text(self) -> str:
        """Return the plan for people."""
        settings = self.manifest.settings
        projector, params = settings["projector"], settings["params"]
        times = time_text(self.seconds)
        if self.worst_seconds > 1.1 * self.seconds:
            times += f" to {time_text(self.worst_seconds)}, depending on how many targets' gradients memory holds"
        memory = "not known on this system" if self.peak_bytes is None else f"{size_text(self.peak_bytes)} so far"
        if self.device_bytes is not None:
            memory += f", {size_text(self.device_bytes)} on the GPU"
        kept = "none, exact gradients are compared" if self.manifest.storage == "none" else self.manifest.storage
        train_ms, target_ms = (1000 * seconds for seconds in self.row_seconds)
        facts = [
            ("store", self.save_dir),
            ("task", settings["task"]["name"]),
            ("training rows", f"{self.manifest.train_set_size:,}"),
            ("targets", f"{self.num_targets:,}"),
            ("parameters", f"{len(params)} of {self.num_values:,} numbers: {_some(list(params))}"),
            ("features", f"{self.manifest.feature_dim:,} numbers a row ({projector['kind']}), stored: {kept}"),
            ("time", f"about {times}; {train_ms:.2f} ms a training row, {target_ms:.2f} ms a target"),
            ("disk", f"{size_text(self.disk_bytes)}; all scores, if asked for: {size_text(self.score_bytes)}"),
            ("peak memory", f"{memory} in the trial; ranking takes up to {size_text(self.memory_bytes)} more"),
        ]
        lines = [f"{name:<14} {value}" for name, value in facts]
        headers = ("id", "checkpoint", "learning rate", "rows to do", "targets to do")
        rows = [(model_id, *each) for model_id, each in enumerate(self.checkpoints)]
        text = "\n".join([*lines, "", table(headers, rows)])
        if any(rate is None for _, rate, _, _ in self.checkpoints):
            text += "\n\nCheckpoints have no learning rate: each weighs 1. Give --learning-rate for TracIn's weights."
        return text


def make_plan(job: Job) -> Plan:
    """Run a few batches and estimate the rest.

    Args:
        job: The run.

    Returns:
        The plan; nothing is left behind.

    Raises:
        TracerError: Whatever the run itself would raise on these batches, or because of the store that is there.
    """
    samples = [_Sample.of(rows, name) for rows, name in ((job.train, "train"), (job.targets, "targets"))]
    options = {name: value for name, value in job.options.items() if name not in ("process", "progress", "resume")}
    before = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tracer-plan-") as folder:
        found = attribute(
            job.model,
            job.task,
            samples[0],
            samples[1],
            [path if rate is None else (path, rate) for path, rate in job.checkpoints[:TRIED_CHECKPOINTS]],
            save_dir=Path(folder) / "store",
            progress=False,
            **job.ranking,
            **options,
        )
        ended, reader = time.perf_counter(), found.tracer
        reader.close()
        trial = reader.store.manifest
    manifest = dataclasses.replace(trial, settings={**trial.settings, "train_set_size": len(job.train)})
    missing = _missing(job, manifest)
    train_seconds, target_seconds = (sample.row_seconds for sample in samples)
    began = min(sample.began for sample in samples)
    passing = ended - began - sum(sample.seconds for sample in samples)  # between the batches: weights, files
    fixed = began - before + len(missing) * passing / min(len(missing), TRIED_CHECKPOINTS)
    share = this_process(job.options.get("process")).count
    rows, targets = (sum(each) for each in zip(*missing, strict=True))
    once = fixed + (rows * train_seconds + targets * target_seconds) / share
    passes = math.ceil(len(job.targets) / len(samples[1])) if manifest.storage == "none" else 1
    return Plan(
        save_dir=job.save_dir,
        manifest=manifest,
        checkpoints=[(str(path), rate, *left) for (path, rate), left in zip(job.checkpoints, missing, strict=True)],
        num_targets=len(job.targets),
        num_values=sum(math.prod(shape) for shape in manifest.settings["params"].values()),
        seconds=once,
        worst_seconds=once + (passes - 1) * rows * train_seconds / share,
        row_seconds=(train_seconds, target_seconds),
        disk_bytes=len(missing) * _checkpoint_bytes(manifest, len(job.targets)),
        score_bytes=4 * len(job.train) * len(job.targets),
        peak_bytes=_peak_bytes(),
        device_bytes=torch.cuda.max_memory_allocated(reader.device) if reader.device.type == "cuda" else None,
        memory_bytes=int(job.options.get("memory_bytes", 1 << 30)),
    )


class _Sample(DataSource):
    """The first batches of some rows, which takes the time until each next one is asked for."""

    def __init__(self, source: DataSource, load_seconds: float) -> None:
        self._source, self._load_seconds = source, load_seconds
        self.began, self.seconds = 0.0, 0.0
        self._timed_rows, self._timed_seconds = 0, 0.0

    @classmethod
    def of(cls, source: DataSource, name: str) -> _Sample:
        """Load the first batches."""
        before = time.perf_counter()
        batches = [batch for batch, _ in islice(source.batches(np.arange(len(source))), TRIED_BATCHES)]
        loaded, sample = time.perf_counter() - before, as_data_source(batches, name, 1)
        return cls(sample, loaded / len(sample))

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, rows: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yield the batches, and time what is done with each."""
        for each in self._source.batches(rows):
            before = time.perf_counter()
            yield each
            spent = time.perf_counter() - before
            self.seconds += spent
            self.began, warm = self.began or before, self.began > 0
            if warm:
                self._timed_rows += len(each[1])
                self._timed_seconds += spent

    @property
    def row_seconds(self) -> float:
        """The time that a row takes, with loading it; of the first batch where there is no other."""
        spent, rows = (self._timed_seconds, self._timed_rows) if self._timed_rows else (self.seconds, len(self))
        return self._load_seconds + spent / rows


def _missing(job: Job, manifest: Manifest) -> list[tuple[int, int]]:
    """Return the train rows and targets that each checkpoint lacks; a store that is there must have these settings."""
    sizes, path = (len(job.train), len(job.targets)), store_path(job.save_dir)
    model_ids = range(len(job.checkpoints))
    if not (path / NODE).exists():
        return [sizes for _ in model_ids]
    store = Store.open(job.save_dir, manifest, resume=bool(job.options.get("resume", True)))
    exp_name = str(job.ranking.get("exp_name", "targets"))
    left = []
    for model_id in model_ids:
        rows = len(store.checkpoint(model_id).remaining()) if store.has_checkpoint(model_id) else sizes[0]
        has_targets = store.has_targets(exp_name, model_id)
        left.append((rows, len(store.targets(exp_name, model_id).remaining()) if has_targets else sizes[1]))
    return left


def _checkpoint_bytes(manifest: Manifest, num_targets: int) -> int:
    """Return the bytes of a checkpoint's files: its rows and targets, or their cosines where these are stored."""
    exact = manifest.storage == "none"
    total = 4 * manifest.train_set_size * num_targets if exact else 0
    for num_rows in (manifest.train_set_size, num_targets):
        layouts = table_layouts(num_rows, 0 if exact else manifest.feature_dim, manifest.storage, num_rows)
        total += sum(layout.data_bytes for layout in layouts.values())
    return total


def _peak_bytes() -> int | None:
    """Return the largest memory that this process has had."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else 1024 * int(peak)


def _some(names: list[str], most: int = 4) -> str:
    """Return the first names of a list."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
