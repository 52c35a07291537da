"""The plan of a run and its cost, estimated by `attribute` itself on a few batches in a temporary store."""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tracer._core.processes import this_process
from tracer._core.text import listing
from tracer._core.validation import check_model
from tracer.cli.job import Job
from tracer.cli.output import format_facts, format_size, format_table, format_time
from tracer.data.datasets import DataSource, IteratedSource
from tracer.gradients.verification import seconds_checked
from tracer.store import Store
from tracer.store.arrays.metadata import NODE
from tracer.store.arrays.store_path import store_path
from tracer.store.feature_storage import FeatureStorage
from tracer.store.manifest import Manifest
from tracer.store.table_schema import table_layouts
from tracer.training.load_state import check_headers
from tracer.types import Batch

TRIAL_BATCHES, TRIAL_CHECKPOINTS = 3, 2
"""The number of batches of each side and of checkpoints in the trial; the first batch only warms up."""


def make_plan(job: Job) -> dict[str, Any]:
    """Run a few batches and return the work and its estimated cost; raises whatever the run would raise on them."""
    for path, _ in job.checkpoints:
        check_headers(check_model(job.model), path, job.options.get("checkpoint_key"))
    samples = [_Sample(source, name) for source, name in ((job.train, "train"), (job.targets, "targets"))]
    before = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tracer-plan-") as folder:
        trial_options = {"save_dir": Path(folder) / "store", "progress": False, "process": None, "resume": True}
        found = job.run(samples[0], samples[1], TRIAL_CHECKPOINTS, **trial_options)
        after, reader = time.perf_counter(), found.tracer
        reader.close()
        trial = reader.store.manifest
    manifest = dataclasses.replace(trial, settings={**trial.settings, "train_set_size": len(job.train)})
    missing = _missing(job, manifest)
    train_seconds, target_seconds = (sample.row_seconds for sample in samples)
    began = min(sample.began for sample in samples if len(sample))
    between = after - began - sum(sample.seconds for sample in samples)  # between the batches: weights, files
    checks = sum(sample.check_seconds for sample in samples)  # of the first batches: later ones have hardly any
    fixed = began - before + len(missing) * (between + checks) / min(len(missing), TRIAL_CHECKPOINTS)
    num_processes = this_process(job.options.get("process")).count
    num_train, num_targets = (sum(each) for each in zip(*missing, strict=True))
    names = ("path", "learning_rate", "train_rows_missing", "targets_missing")
    checkpoints = [(str(path), rate, *left) for (path, rate), left in zip(job.checkpoints, missing, strict=True)]
    once = fixed + (num_train * train_seconds + num_targets * target_seconds) / num_processes
    passes = (
        math.ceil(len(job.targets) / max(1, len(samples[1]))) if not manifest.feature_storage.stores_features else 1
    )
    return {
        "save_dir": job.save_dir,
        "train_rows": len(job.train),
        "num_targets": len(job.targets),
        "settings": dict(manifest.settings),
        "checkpoints": [dict(zip(names, each, strict=True)) for each in checkpoints],
        "num_values": sum(math.prod(shape) for shape in manifest.settings["params"].values()),
        "seconds": once,  # of the missing work, by one process
        # with the most passes over the training examples that memory may require
        "worst_seconds": once + (passes - 1) * num_train * train_seconds / num_processes,
        "train_seconds_per_row": train_seconds,  # at one checkpoint, including loading
        "target_seconds_per_row": target_seconds,
        "disk_bytes": len(missing) * _checkpoint_bytes(manifest, len(job.targets)),  # existing features included
        "score_bytes": 4 * len(job.train) * len(job.targets),
        "peak_bytes": _peak_bytes(),  # of the process so far; None if the system does not report it
        "device_bytes": torch.cuda.max_memory_allocated(reader.device) if reader.device.type == "cuda" else None,
        "memory_bytes": int(job.options.get("memory_bytes", 1 << 30)),
    }


def plan_text(plan: dict[str, Any]) -> str:
    """Return a plan for people."""
    settings, params = plan["settings"], list(plan["settings"]["params"])
    times = format_time(plan["seconds"])
    if plan["worst_seconds"] > 1.1 * plan["seconds"]:
        worst = format_time(plan["worst_seconds"])
        times += f" to {worst}, depending on how many target gradients fit into memory"
    memory = "unknown on this system" if plan["peak_bytes"] is None else f"{format_size(plan['peak_bytes'])} so far"
    if plan["device_bytes"] is not None:
        memory += f", {format_size(plan['device_bytes'])} on the GPU"
    storage = FeatureStorage(settings["storage"])
    stored = f"stored as {storage.name}" if storage.stores_features else "not stored: exact gradients"
    train_ms, target_ms = (1000 * plan[f"{side}_seconds_per_row"] for side in ("train", "target"))
    facts = [
        ("store", plan["save_dir"]),
        ("task", settings["task"]["name"]),
        ("training set", f"{plan['train_rows']:,} examples"),
        ("targets", f"{plan['num_targets']:,} examples"),
        ("parameters", f"{len(params)} with {plan['num_values']:,} values: {listing(params)}"),
        ("features", f"{settings['feature_dim']:,} values an example ({settings['projector']['kind']}), {stored}"),
        ("time", f"about {times}; {train_ms:.2f} ms a training example, {target_ms:.2f} ms a target"),
        ("disk", f"{format_size(plan['disk_bytes'])}; all scores, on demand: {format_size(plan['score_bytes'])}"),
        ("peak memory", f"{memory} in the trial; scoring takes up to {format_size(plan['memory_bytes'])} more"),
    ]
    headers = ("id", "checkpoint", "learning rate", "examples to do", "targets to do")
    rows = [(model_id, *each.values()) for model_id, each in enumerate(plan["checkpoints"])]
    text = f"{format_facts(facts)}\n\n{format_table(headers, rows)}"
    if any(each["learning_rate"] is None for each in plan["checkpoints"]):
        text += "\n\nCheckpoints have no learning rate: each weighs 1. Pass --learning-rate for TracIn's weights."
    return text


class _Sample(DataSource):
    """The first batches of a source; measures the time until each next one is requested, and that of checks in it."""

    def __init__(self, source: DataSource, name: str) -> None:
        before = time.perf_counter()
        batches = list(source.trial_batches(TRIAL_BATCHES))
        loaded, self._source = time.perf_counter() - before, IteratedSource(batches, name)
        self._load_seconds = loaded / max(1, len(self._source))
        self.began, self.seconds, self.check_seconds = 0.0, 0.0, 0.0
        self._timed_rows, self._timed_seconds = 0, 0.0

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, indices: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
        for each in self._source.batches(indices):
            before, checked_before = time.perf_counter(), seconds_checked()
            yield each
            spent, checked = time.perf_counter() - before, seconds_checked() - checked_before
            self.seconds += spent
            self.check_seconds += checked
            self.began, is_warm = self.began or before, self.began > 0
            if is_warm:
                self._timed_rows += len(each[1])
                self._timed_seconds += spent - checked

    @property
    def row_seconds(self) -> float:
        """The time of one example including loading, without checks; from the first batch if there is no other."""
        first = self.seconds - self.check_seconds, len(self)
        spent, rows = (self._timed_seconds, self._timed_rows) if self._timed_rows else first
        return self._load_seconds + spent / max(1, rows)


def _missing(job: Job, manifest: Manifest) -> list[tuple[int, int]]:
    """Return the missing training examples and targets of each checkpoint; an existing store must fit the settings."""
    sizes, path = (len(job.train), len(job.targets)), store_path(job.save_dir)
    model_ids = range(len(job.checkpoints))
    if not (path / NODE).exists():
        return [sizes for _ in model_ids]
    store = Store.open(job.save_dir, manifest, resume=bool(job.options.get("resume", True)))
    exp_name = str(job.ranking.get("exp_name", "targets"))
    left = []
    for model_id in model_ids:
        rows = len(store.checkpoint(model_id).remaining()) if store.catalog.has_checkpoint(model_id) else sizes[0]
        has_targets = store.catalog.has_targets(exp_name, model_id)
        left.append((rows, len(store.targets(exp_name, model_id).remaining()) if has_targets else sizes[1]))
    return left


def _checkpoint_bytes(manifest: Manifest, num_targets: int) -> int:
    """Return the bytes of a checkpoint's files: its features, or the cosines that replace them."""
    total = 0 if manifest.feature_storage.stores_features else 4 * manifest.train_set_size * num_targets
    kinds = ((manifest.train_set_size, manifest.storage), (num_targets, manifest.feature_storage.of_targets))
    for num_rows, storage in kinds:
        layouts = table_layouts(num_rows, manifest.feature_dim, storage, num_rows)
        total += sum(layout.data_bytes for layout in layouts.values())
    return total


def _peak_bytes() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else 1024 * int(peak)
