"""``tracer run``: both passes of `attribute`, from a file of settings, or its plan."""

from __future__ import annotations

import os
import shlex
from typing import Any

import click
import torch.distributed as dist

from tracer.cli.app import INTERRUPTED, typed_command
from tracer.cli.interrupts import Interruption
from tracer.cli.job import Job
from tracer.cli.output import json_option, show
from tracer.cli.plan import make_plan
from tracer.cli.settings import BY_NAME, SettingsCommand, check_required, read_settings, setting_flags
from tracer.errors import IncompleteError, InputError

EXAMPLES = r"""
With training.py in the current directory:
  tracer run --model training:build_model --task image_classification \
      --train training:train_set --targets training:test_set \
      --checkpoints 'checkpoints/epoch_*.pt' --learning-rate 0.1 --save-dir runs/first --dry-run
or the same from a file, with one setting changed:
  tracer run tracer.toml --proj-dim 1024
"""


@click.command("run", cls=SettingsCommand, examples=EXAMPLES)
@click.argument("config", required=False, type=click.Path())
@click.option("--dry-run", is_flag=True, help="Show the plan, with costs from a few timed batches; store nothing.")
@json_option
@setting_flags
def command(config: str | None, dry_run: bool, as_json: bool, **flags: Any) -> None:
    """Trace targets to training rows over the checkpoints of a training run.

    CONFIG is a TOML file of settings; each is also a flag, which wins. Model and data are named as
    package.module:callable and looked for from the current directory first. Called again, a run takes up what the
    store holds; Ctrl-C stops it without losing a finished batch.
    """
    settings = read_settings(config, flags)
    check_required(settings, config)
    job = Job.load(settings)
    _check_alone(settings)
    if dry_run:
        plan = make_plan(job)
        show(as_json, {**plan.as_dict(), "notes": job.notes}, "\n\n".join([plan.as_text(), *job.notes]))
        return
    found = _run(click.get_current_context(), job, settings)
    rows = {"train_rows": found["train_rows"], "targets": found["targets"]}
    summary = {"save_dir": job.save_dir, "checkpoints": len(job.checkpoints), **rows, "complete": found["complete"]}
    done = f"{found['train_rows']:,} training rows and {found['targets']:,} targets are stored in {job.save_dir}."
    parts = [done, _next_steps(config, flags, settings)] if found["complete"] else [_share_done(job.save_dir)]
    show(as_json, {**summary, "notes": job.notes}, "\n".join([*job.notes, *parts]))


def _run(ctx: click.Context, job: Job, settings: dict[str, Any]) -> dict[str, Any]:
    """Run `attribute`; an interruption ends the program with the command that goes on."""
    exact = settings.get("projector") == "none" and _stores_nothing(settings)
    try:
        with Interruption() as interruption:
            train, targets = (interruption.rows(rows, at_once=exact) for rows in (job.train, job.targets))
            try:
                found = job.run(train, targets)
            except IncompleteError:
                if interruption.asked():
                    raise KeyboardInterrupt from None
                if "process" not in settings:
                    raise
                return {"train_rows": len(job.train), "targets": len(job.targets), "complete": False}
            if interruption.asked():
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        click.echo(f"Interrupted; what was finished is stored. To go on:\n  {typed_command(ctx)}", err=True)
        ctx.exit(INTERRUPTED)
    missing = [len(found.tracer.remaining(model_id, found.exp_name)) for model_id in range(len(job.checkpoints))]
    return {"train_rows": len(job.train), "targets": len(job.targets), "complete": not any(missing)}


def _check_alone(settings: dict[str, Any]) -> None:
    """Refuse to be one of several processes that would all do the same work."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and "process" not in settings and not (dist.is_available() and dist.is_initialized()):
        raise InputError(
            f"This is one of {count} processes of torchrun (WORLD_SIZE={count}), and torch.distributed is not "
            f"initialised: all would do the same work. Call torch.distributed.init_process_group in the module that "
            f"builds the model, or pass --process."
        )


def _stores_nothing(settings: dict[str, Any]) -> bool:
    """Tell whether gradients are compared without being stored, as `attribute` decides it."""
    kernel = settings.get("estimator") in ("influence", "trak")
    return settings.get("storage", "float32" if kernel else "none") == "none"


def _share_done(save_dir: str) -> str:
    return (
        f"This process's share is stored in {save_dir}; rows of other processes are missing. When all processes are "
        f"done, run the same command in each once more."
    )


def _next_steps(config: str | None, flags: dict[str, Any], settings: dict[str, Any]) -> str:
    """Return commands on the store; they spell out whatever the file that they name does not say, or says otherwise."""
    in_file = config is not None and not flags["save_dir"]
    store = shlex.quote(str(config) if in_file else settings["save_dir"])

    def spelled(*names: str) -> str:
        told = [name for name in names if name in settings and not (in_file and flags[name] is None)]
        return "".join(f" {BY_NAME[name].flag} {shlex.quote(str(settings[name]))}" for name in told)

    ranking = spelled("exp_name", "estimator", "target", "regularization")
    return "\n".join(
        [
            "Next:",
            f"  tracer top {store}{ranking} -k 5",
            f"  tracer self-influence {store}{ranking} -k 20",
            f"  tracer export {store}{ranking} scores.csv",
            f"  tracer report {store}{ranking}{spelled('train', 'targets')} --output-dir report",
        ]
    )
