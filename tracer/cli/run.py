"""``tracer run``: `attribute` from a file of settings, or its plan.

After Ctrl-C the current batch is finished, computed values are saved, and then the run stops.
"""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import click
import numpy as np
import torch.distributed as dist

from tracer.api.settings import chosen_storage
from tracer.cli.app import INTERRUPTED, typed_command
from tracer.cli.job import RANKING, Job
from tracer.cli.output import print_result
from tracer.cli.plan import make_plan, plan_text
from tracer.cli.settings import BY_NAME, SettingsCommand, check_required, read_settings
from tracer.data.datasets import DataSource
from tracer.errors import IncompleteError, InputError
from tracer.types import Batch


@click.command("run", cls=SettingsCommand)
@click.argument("config", required=False, type=click.Path())
@click.option("--dry-run", is_flag=True, help="Show the plan and its cost from a few timed batches; store nothing.")
def run(config: str | None, dry_run: bool, **flags: Any) -> None:
    r"""Trace targets to training examples over the checkpoints of a training run.

    CONFIG is a TOML file of settings; each is also a flag, which overrides the file. Model and data are named as
    package.module:callable and imported from the current directory first. Run it again with the same store and it
    resumes; Ctrl-C stops it without losing a finished batch.

    Examples:
        With training.py in the current directory:
          tracer run --model training:build_model --task image_classification \
              --train training:train_set --targets training:test_set \
              --checkpoints 'checkpoints/epoch_*.pt' --learning-rate 0.1 --save-dir runs/first --dry-run
        or the same from a file, with one setting changed:
          tracer run tracer.toml --proj-dim 1024
    """
    settings = read_settings(config, flags)
    check_required(settings, config)
    execute(Job.load(settings), settings, dry_run, lambda: next_steps(config, flags, settings, ("train", "targets")))


def execute(job: Job, settings: dict[str, Any], dry_run: bool, advice: Callable[[], str]) -> None:
    """Run a job, or show its plan, and print the result."""
    _check_alone(settings)
    if dry_run:
        plan = make_plan(job)
        print_result({**plan, "notes": job.notes}, "\n\n".join([plan_text(plan), *job.notes]))
        return
    found = _run(click.get_current_context(), job, settings)
    result = {"save_dir": job.save_dir, "checkpoints": len(job.checkpoints), **found, "notes": job.notes}
    if found["complete"]:
        done = f"Stored {found['train_rows']:,} training examples and {found['targets']:,} targets in {job.save_dir}."
        parts = [done, advice()]
    else:
        parts = [
            f"This process's shard is stored in {job.save_dir}; those of other processes are missing. When all "
            f"processes are done, run the same command in each once more."
        ]
    print_result(result, "\n".join([*job.notes, *parts]))


def _run(ctx: click.Context, job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """Run `attribute`; an interruption ends the program and prints the command that resumes it."""
    exact = not chosen_storage(settings, settings.get("estimator")).stores_features
    sizes = {"train_rows": len(job.train), "targets": len(job.targets)}
    try:
        with Interruption() as interruption:
            # Exact scores hold a block of targets, and would take one that ended early for a complete one.
            train, targets = (interruption.guard(source, immediately=exact) for source in (job.train, job.targets))
            try:
                found = job.run(train, targets)
            except IncompleteError:
                if interruption.is_requested():
                    raise KeyboardInterrupt from None
                if "process" not in settings:
                    raise
                return {**sizes, "complete": False}
            if interruption.is_requested():
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        click.echo(f"Interrupted; finished batches are stored. To continue:\n  {typed_command(ctx)}", err=True)
        ctx.exit(INTERRUPTED)
    name = found.exp_name if len(job.targets) else None
    missing = [len(found.tracer.remaining(model_id, name)) for model_id in range(len(job.checkpoints))]
    complete = not any(missing)
    return {**sizes, "complete": complete, "warnings": found.warnings() if complete else []}


def _check_alone(settings: dict[str, Any]) -> None:
    """Raise `InputError` in one of several processes that would all do the same work."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and "process" not in settings and not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            f"This is one of {count} processes of torchrun (WORLD_SIZE={count}), and torch.distributed is not "
            f"initialized, so all would do the same work; call torch.distributed.init_process_group in the module that "
            f"builds the model, or pass --process."
        )


def next_steps(
    config: str | None, flags: dict[str, Any], settings: dict[str, Any], shown: tuple[str, ...], texts: str = ""
) -> str:
    """Return commands on the store, with flags for whatever their file does not set or sets to other values."""
    in_file = config is not None and not flags["save_dir"]
    store = shlex.quote(str(config) if in_file else settings["save_dir"])

    def as_flags(*names: str) -> str:
        needed = [name for name in names if name in settings and not (in_file and flags[name] is None)]
        return "".join(f" {BY_NAME[name].flag} {shlex.quote(str(settings[name]))}" for name in needed)

    ranking = as_flags(*RANKING)
    if "targets" not in settings:
        return f"Next:\n  tracer self-influence {store}{ranking} -k 20{texts}"
    return f"""\
Next:
  tracer top {store}{ranking} -k 5{texts}
  tracer self-influence {store}{ranking} -k 20{texts}
  tracer export {store}{ranking} scores.csv
  tracer report {store}{ranking}{as_flags(*shown)} --output-dir report"""


class Interruption:
    """A context in which the first Ctrl-C ends the batches of a source and the second one interrupts immediately.

    >>> with Interruption() as interruption:
    ...     interruption.is_requested()
    False
    """

    def __init__(self) -> None:
        self._requested = self.in_batches = False
        self._before: Any = None

    def is_requested(self) -> bool:
        """Return whether Ctrl-C was pressed."""
        return self._requested

    def guard(self, source: DataSource, *, immediately: bool) -> DataSource:
        """Return a source whose batches end after Ctrl-C, with ``KeyboardInterrupt`` now or at the next request."""
        return _InterruptibleSource(source, self, immediately)

    def __enter__(self) -> Interruption:
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        repeated, self._requested = self._requested, True
        if repeated or not self.in_batches:
            raise KeyboardInterrupt
        click.echo("\nStopping after this batch; Ctrl-C again stops immediately.", err=True)


class _InterruptibleSource(DataSource):
    def __init__(self, source: DataSource, interruption: Interruption, immediately: bool) -> None:
        self._source, self._interruption, self._immediately = source, interruption, immediately

    def __len__(self) -> int:
        return len(self._source)

    def batches(self, indices: np.ndarray) -> Iterator[tuple[Batch, np.ndarray]]:
        interruption = self._interruption
        if interruption.is_requested():
            raise KeyboardInterrupt
        interruption.in_batches = True
        try:
            for each in self._source.batches(indices):
                yield each
                if interruption.is_requested():  # by a signal during the yield
                    if self._immediately:
                        raise KeyboardInterrupt
                    return  # an ordinary end: the caller finalizes what it has, so that it is saved
        finally:
            interruption.in_batches = False
