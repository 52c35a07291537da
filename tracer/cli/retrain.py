"""``tracer retrain`` and ``tracer lds``: models trained on subsets, and how well scores predict them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from torch import nn

from tracer._core.files import write_whole
from tracer.cli.job import build, load_examples, load_task, resolve
from tracer.cli.output import ResultCommand, format_table, print_result
from tracer.cli.settings import read_settings
from tracer.cli.stores import Integers, RankingCommand, open_view
from tracer.data.datasets import DataSource
from tracer.errors import InputError
from tracer.metrics import lds as grade
from tracer.report.lds_chart import method_chart
from tracer.report.png import png
from tracer.retraining import Recipe, random_subsets
from tracer.retraining import retrain as retrain_models
from tracer.scoring.estimators import ESTIMATORS
from tracer.types import Batch

_NEEDED = ("model", "task", "train", "targets")
_MARGINS = ("classification", "image_classification", "text_classification")  # their f is a margin: higher is better
_DEFAULT = Recipe()


@click.command("retrain", cls=ResultCommand)
@click.argument("config", type=click.Path())
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--subsets", type=click.IntRange(min=2), default=100, show_default=True, help="The number of subsets.")
@click.option("--fraction", type=float, default=0.5, show_default=True, help="The share of examples in each.")
@click.option("--seeds", type=Integers(), default=[0, 1], help="Seeds of the models of each subset. Default: 0,1.")
@click.option("--train-fn", help="Your own training loop (model, rows), as module:callable, in place of the recipe.")
@click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), default=_DEFAULT.optimizer, show_default=True)
@click.option("--learning-rate", type=float, default=_DEFAULT.learning_rate, show_default=True)
@click.option("--momentum", type=float, default=_DEFAULT.momentum, show_default=True)
@click.option("--weight-decay", type=float, default=_DEFAULT.weight_decay, show_default=True)
@click.option("--batch-size", type=int, default=_DEFAULT.batch_size, show_default=True)
@click.option("--epochs", type=int, default=_DEFAULT.epochs, show_default=True)
@click.option(
    "--schedule", type=click.Choice(["constant", "linear", "cosine"]), default=_DEFAULT.schedule, show_default=True
)
def retrain(
    config: str, out: Path, subsets: int, fraction: float, seeds: list[int], train_fn: str | None, **recipe: Any
) -> None:
    """Train models on subsets of the training examples, for `tracer lds`.

    CONFIG is the TOML file of a run, of which model, task, train and targets are used; the model must be a callable
    that builds an untrained one. Train as the explained model was trained. OUT is a .npz file with masks [subsets, N],
    outputs and losses [subsets, targets], averaged over seeds. Models are stored next to it, in OUT.models: call it
    again after an interruption, or with more subsets, and only missing models are trained.

    Examples:
        tracer retrain tracer.toml truth.npz --subsets 100 --learning-rate 0.1 --epochs 20
        tracer retrain tracer.toml truth.npz --train-fn training:fit
        tracer lds tracer.toml truth.npz --estimators tracin,influence
    """
    settings = _settings(config, out)
    train, targets = (_whole(load_examples({**settings, "batch_size": 1 << 30}, name)[0], name) for name in _NEEDED[2:])
    make_model: Callable[[], nn.Module] = lambda: build(settings["model"], "model")  # noqa: E731
    masks = random_subsets(subsets, train[1], fraction)
    how: dict[str, Any] = {"train_fn": resolve(train_fn, "train_fn")} if train_fn else {"recipe": Recipe(**recipe)}
    given = make_model, load_task(settings["task"]), train[0], targets[0], masks
    found = retrain_models(*given, seeds=seeds, save_dir=f"{out}.models", **how)
    used = np.array(found.seeds)
    write_whole(
        out, lambda file: np.savez(file, masks=found.masks, outputs=found.outputs, losses=found.losses, seeds=used)
    )
    text = f"{out}: {len(masks)} subsets of {int(masks[0].sum()):,} of {train[1]:,} examples, {len(seeds)} models each"
    print_result({"path": out, "subsets": len(masks), "targets": targets[1], "seeds": seeds}, text)


def _settings(config: str, out: Path) -> dict[str, Any]:
    """Return the settings of a file, or raise InputError if it lacks one, or ``out`` is no .npz file."""
    if out.suffix != ".npz":
        raise InputError(f"OUT is {out}; expected a name that ends in .npz.")
    settings = read_settings(config, {})
    missing = [name for name in _NEEDED if name not in settings]
    if missing:
        raise InputError(f"{config} lacks {', '.join(missing)}.")
    return settings


def _whole(source: DataSource, name: str) -> tuple[Batch, int]:
    """Return all examples of a source as one batch, and their number."""
    batches = [batch for batch, _ in source.batches(np.arange(len(source)))]
    if len(batches) != 1:
        raise InputError(
            f"{name} comes in {len(batches)} batches; retraining draws batches of its own, so expected a data set or "
            f"tensors, not a loader."
        )
    return batches[0], len(source)


@click.command("lds", cls=RankingCommand)
@click.argument("store")
@click.argument("truth", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--estimators", help="Separated by commas; compared on the same subsets. Default: --estimator.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Also write a PNG (needs matplotlib).")
def lds(store: str, truth: Path, estimators: str | None, plot: Path | None, **options: Any) -> None:
    """Show how well scores predict training on subsets.

    The linear datamodeling score is, for each target, Spearman's correlation over subsets of summed scores with the
    output after training on the subset (Park et al. 2023), and its mean over targets with a 95 % interval: 1 is best, 0
    is chance. TRUTH comes from `tracer retrain`, or is a .npz file with masks [subsets, N], and outputs and losses
    [subsets, targets].

    Examples:
        tracer lds runs/first truth.npz
        tracer lds runs/first truth.npz --estimators tracin,cosine,influence --plot lds.png
    """
    names, given = _names(estimators), _read_truth(truth)
    found: dict[str, Any] = {}
    for name in names:
        view = open_view(store, **(options if name is None else {**options, "estimator": name}))
        task = view.reader.store.manifest.settings["task"]["name"]
        outputs = given["outputs"] if task in _MARGINS else -given["losses"]
        found[view.found.estimators.scores] = grade(np.asarray(view.found.scores), given["masks"], outputs)
    rows = [(name, each.mean, *each.interval) for name, each in found.items()]
    if plot is not None:
        values = [(each.mean, *each.interval) for each in found.values()]
        chart = png(method_chart("Linear datamodeling score, with 95 % intervals", list(found), values))
        write_whole(plot, lambda file: file.write(chart))
    result = {name: {"lds": each.mean, "interval": each.interval} for name, each in found.items()}
    text = format_table(("estimator", "LDS", "95 % from", "to"), rows)
    shape = given["masks"].shape[0], given["outputs"].shape[1]
    print_result({"subsets": shape[0], "targets": shape[1], "estimators": result}, text)


def _names(estimators: str | None) -> list[str | None]:
    """Return the estimators of ``--estimators``, or raise InputError; None stands for that of ``--estimator``."""
    if estimators is None:
        return [None]
    names = [name.strip() for name in estimators.split(",")]
    if unknown := [name for name in names if name not in ESTIMATORS]:
        raise InputError(f"--estimators names {unknown}; expected some of {', '.join(ESTIMATORS)}.")
    return [*names]


def _read_truth(path: Path) -> dict[str, np.ndarray]:
    """Return masks, outputs and losses of a file, or raise InputError."""
    wanted = ("masks", "outputs", "losses")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in wanted}
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(
            f"{path} cannot be read as a .npz file with {', '.join(wanted)} ({error}); `tracer retrain` writes one."
        ) from error
