"""Error of inner products of gradients against the bytes stored for a row, on three networks trained on real data.

A conv net and an MLP are trained on CIFAR-10, a character language model on Shakespeare's plays, each for 300
to 1,500 steps. Training rows and held-out targets are then scored at the trained weights, exactly
(``projector="none"``, float32) and from stores of every projector, storage and ``proj_dim``, with several projection
seeds. With ``g`` and ``g'`` the loss gradients of a training row and a target:

- error: root mean square over pairs and seeds of ``(estimate - <g, g'>) / (|g| |g'|)``, as if a cosine were estimated.
- error x sqrt(values): the same times the square root of the number of stored values; 1 is the rate of Johnson &
  Lindenstrauss (1984), which a dense random projection has.
- Spearman: rank correlation of estimated with exact scores over training rows, mean over targets and seeds.

Bytes are those of the stored values and of the row's scale. The other columns of a row (loss, slope, curvature, norm,
fingerprint, mark: 25 bytes) are the same for all. ``gaussian`` is left out, being
several times slower than ``rademacher`` and of the same theory. One checkpoint is scored; over several, errors of
independent projections average. Everything is seeded, but another number of threads sums in another order, trains
slightly other weights and so changes the figures, mostly by less than a tenth.

Run it: TRACER_DATA=<folder with cifar10_10k.npz and tinyshakespeare.txt> python benchmarks/fidelity.py
        with --quick: a smaller run with rough numbers, to fidelity_quick.json and .png
        with --hidden 256: a wider MLP, of which ``factored`` keeps no side whole
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from featurize import RESULTS
from models import Decoder, ResNet9, mlp
from timing import machine, table, write_results
from torch import Tensor, nn

from tracer import attribute

Rows = tuple[Tensor, Tensor]
"""Inputs and labels of rows, ``[B, ...]`` each."""

IMAGES, TEXT = "cifar10_10k.npz", "tinyshakespeare.txt"
"""The files of ``$TRACER_DATA``."""

WINDOW = 64
"""The characters of one row of the language model."""

DEFINITIONS = (__doc__ or "").partition("\n\n")[2].partition("\n\nRun it")[0]
"""What the columns of the table mean, which is printed with them."""

COLUMNS = {
    "projector": "projector",
    "storage": "storage",
    "proj_dim": "proj_dim",
    "values": "stored values",
    "bytes": "bytes a row",
    "error": "error",
    "error_times_sqrt": "error x sqrt(values)",
    "spearman": "Spearman",
}
"""From a row's key to the header of the table."""


@dataclass(frozen=True)
class Series:
    """A projector with a storage: one line of the picture.

    Attributes:
        projector: As `Tracer` takes it.
        storage: As `Tracer` takes it.
        largest: The largest ``proj_dim`` that is affordable.
        line: How it is drawn, as matplotlib takes it.
    """

    projector: str
    storage: str
    largest: int
    line: dict[str, Any]

    @property
    def label(self) -> str:
        """What the line is called."""
        return f"{self.projector}, {self.storage}"


SERIES = [
    Series("sketch", "float32", 16384, {"color": "#1f5fbf", "marker": "o"}),
    Series("sketch", "float16", 16384, {"color": "#1f5fbf", "marker": "o", "linestyle": "--", "markerfacecolor": "w"}),
    Series("sketch", "int8", 16384, {"color": "#2e9e6b", "marker": "^", "linestyle": "--"}),
    Series("rademacher", "float32", 4096, {"color": "#d9730d", "marker": "D", "zorder": 3, "linestyle": ":"}),
    Series("factored", "float32", 16384, {"color": "#5b6770", "marker": "s"}),
]
"""What is compared. A dense matrix of 16,384 columns would take several minutes a network."""


@dataclass(frozen=True)
class Settings:
    """How much is run.

    Attributes:
        steps: Training steps of the conv net, the MLP and the language model.
        num_train: N, training rows that are scored.
        num_targets: M, targets.
        proj_dims: The values of ``proj_dim``.
        seeds: Projection seeds.
        hidden: The width of the MLP's two hidden layers.
    """

    steps: tuple[int, int, int] = (300, 1500, 500)
    num_train: int = 96
    num_targets: int = 32
    proj_dims: tuple[int, ...] = (256, 1024, 4096, 16384)
    seeds: tuple[int, ...] = (0, 1, 2)
    hidden: int = 64


FULL = Settings()
QUICK = Settings((60, 300, 60), 32, 16, (256, 1024), (0,))


@dataclass(frozen=True)
class Case:
    """A trained network, the rows that were trained on and targets that were not.

    Attributes:
        name: What it is called in tables.
        model: The network, in eval mode.
        task: The task's name.
        train: N training rows.
        targets: M targets.
        reached: What training reached, in words.
    """

    name: str
    model: nn.Module
    task: str
    train: Rows
    targets: Rows
    reached: str = ""

    @property
    def num_parameters(self) -> int:
        """The number of values of an exact gradient."""
        return sum(parameter.numel() for parameter in self.model.parameters())


@dataclass(frozen=True)
class Scored:
    """What a store gives.

    Attributes:
        scores: ``[N, M]``, inner products of loss gradients.
        scale: ``[N, M]``, products of their exact norms.
        values: The number of values of a row.
        row_bytes: The bytes of a row's values and scale.
    """

    scores: np.ndarray
    scale: np.ndarray
    values: int
    row_bytes: int


def data_folder() -> Path:
    """Return the folder that ``TRACER_DATA`` names, or stop with what is missing."""
    folder = os.environ.get("TRACER_DATA", "")
    missing = [name for name in (IMAGES, TEXT) if not folder or not (Path(folder) / name).is_file()]
    if missing:
        state = f"TRACER_DATA={folder} lacks {' and '.join(missing)}" if folder else "TRACER_DATA is not set"
        raise SystemExit(
            f"{state}: set it to a folder with {IMAGES} (arrays x_train and x_test [n, 32, 32, 3] uint8, y_train and "
            f"y_test [n]: CIFAR-10) and {TEXT} (plain text: Shakespeare's plays)"
        )
    return Path(folder)


def train(model: nn.Module, draw: Callable[[torch.Generator], Rows], steps: int, learning_rate: float) -> None:
    """Train with AdamW and a one-cycle learning rate, and leave the model in eval mode.

    Args:
        model: From inputs to logits ``[..., C]``.
        draw: Draws a batch of inputs and labels ``[...]``.
        steps: How many batches.
        learning_rate: The largest one.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps + 1)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(steps):
        inputs, labels = draw(generator)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(inputs).flatten(0, -2), labels.flatten()).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def image_case(name: str, model: nn.Module, data: tuple[Rows, Rows], settings: Settings, steps: int) -> Case:
    """Train a network on images ``[n, 3, 32, 32]`` or flat ones, and return it with its test accuracy."""
    (x, y), (test_x, test_y) = data

    def draw(generator: torch.Generator) -> Rows:
        rows = torch.randint(len(x), (64,), generator=generator)
        return x[rows], y[rows]

    train(model, draw, steps, learning_rate=0.01 if isinstance(model, ResNet9) else 0.001)
    with torch.no_grad():
        guesses = torch.cat([model(part).argmax(1) for part in test_x.split(250)])
    reached = f"test accuracy {(guesses == test_y).double().mean():.2f} (chance {1 / len(y.unique()):.2f})"
    scored, targets = settings.num_train, settings.num_targets
    rows = (x[:scored], y[:scored]), (test_x[:targets], test_y[:targets])
    return Case(name, model, "image_classification", *rows, reached)


def text_case(text: str, settings: Settings, steps: int) -> Case:
    """Train a character language model on the first nine tenths of a text, and return it with its held-out loss."""
    alphabet = sorted(set(text))
    codes = torch.tensor([alphabet.index(character) for character in text])
    known, held_out = codes.split(len(codes) * 9 // 10)[:2]
    model = Decoder(vocabulary=len(alphabet), dim=96, layers=2, length=WINDOW)
    nn.init.normal_(model.positions.weight, std=0.02)  # as the characters have; at its default it drowns them

    def draw(generator: torch.Generator) -> Rows:
        return windows(known, torch.randint(len(known) - WINDOW, (32,), generator=generator))

    train(model, draw, steps, learning_rate=0.003)
    tested, labels = windows(held_out, spread(held_out, 256))
    with torch.no_grad():
        loss = F.cross_entropy(model(tested).flatten(0, -2), labels.flatten()).item()
    reached = f"held-out loss {loss:.2f} a character (uniform {np.log(len(alphabet)):.2f})"
    name = "character decoder, 2 layers x 96"
    rows = windows(known, spread(known, settings.num_train)), windows(held_out, spread(held_out, settings.num_targets))
    return Case(name, model, "language_modeling", *rows, reached)


def windows(codes: Tensor, starts: Tensor) -> Rows:
    """Return the characters after each start and those one further: ``[n, WINDOW]`` each."""
    found = codes[starts.unsqueeze(1) + torch.arange(WINDOW + 1)]
    return found[:, :-1].contiguous(), found[:, 1:].contiguous()


def spread(codes: Tensor, count: int) -> Tensor:
    """Return evenly spaced starts of windows: ``[count]``."""
    return torch.arange(count) * ((len(codes) - WINDOW) // count)


def cases(folder: Path, settings: Settings) -> Iterator[Case]:
    """Train one network after the other and yield it."""
    with np.load(folder / IMAGES) as data:
        parts = [(data[f"x_{part}"], data[f"y_{part}"]) for part in ("train", "test")]
    images = tuple(
        ((torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255.0 - 0.45) / 0.25, torch.from_numpy(y)) for x, y in parts
    )
    flat = tuple((x.flatten(1), y) for x, y in images)
    torch.manual_seed(0)
    yield image_case("ResNet-9 of width 12", ResNet9(width=12), images, settings, settings.steps[0])
    torch.manual_seed(0)
    sizes = (3072, settings.hidden, settings.hidden, 10)
    yield image_case(f"MLP {'-'.join(map(str, sizes))}", mlp(*sizes), flat, settings, settings.steps[1])
    torch.manual_seed(0)
    yield text_case((folder / TEXT).read_text(encoding="utf-8"), settings, settings.steps[2])


def run_tracer(case: Case, **options: Any) -> Scored:
    """Featurize, score and finalize in a temporary store, as users do.

    Args:
        case: What is scored.
        **options: Of the `Tracer`.

    Returns:
        Scores, and what was stored for them.
    """
    with tempfile.TemporaryDirectory(prefix="tracer-benchmark-") as folder:
        checkpoints = [(case.model.state_dict(), 1.0)]
        rows = max(len(case.train[0]), len(case.targets[0]))
        found = attribute(
            case.model,
            case.task,
            case.train,
            case.targets,
            checkpoints,
            save_dir=folder,
            batch_size=rows,  # one batch: a dense matrix is generated once for it
            progress=False,
            **options,
        )
        with found.tracer as tracer:
            tables = tracer.store.checkpoint(0), tracer.store.targets(found.exp_name, 0)
            norms = [np.abs(t.column("loss_grad")[:]) * t.column("gradient_norm")[:] for t in tables]
            stored = tables[0].raw_features(0, 1)[0][1][0]
            row_bytes = stored.nbytes + tables[0].column("scale")[:1].nbytes
            return Scored(np.array(found.scores), np.outer(*norms), len(stored), row_bytes)


def squared_error(exact: Scored, estimate: Scored) -> float:
    """Return the mean squared error relative to the product of norms, over pairs of which that is not zero."""
    known = exact.scale > 0  # a row that the model is certain of has slope zero in float32
    relative = (estimate.scores - exact.scores)[known].astype(np.float64) / exact.scale[known]
    return float(np.mean(np.square(relative)))


def rank_correlation(exact: np.ndarray, estimate: np.ndarray) -> float:
    """Return Spearman's correlation over rows of two ``[N, M]`` matrices, averaged over columns.

    >>> rank_correlation(np.array([[1.0], [2.0], [9.0]]), np.array([[0.1], [0.2], [0.3]]))
    1.0
    """
    ranks = [scores.argsort(0).argsort(0) - (len(scores) - 1) / 2 for scores in (exact, estimate)]
    variance = (len(exact) ** 2 - 1) / 12
    return float(np.mean(ranks[0] * ranks[1]) / variance)


def measure(case: Case, exact: Scored, series: Series, proj_dim: int, seeds: Sequence[int]) -> dict[str, Any]:
    """Score with each projection seed and return a row of the table."""
    start = time.perf_counter()
    options = {"projector": series.projector, "storage": series.storage, "proj_dim": proj_dim}
    found = [run_tracer(case, seed=seed, **options) for seed in seeds]
    errors = [squared_error(exact, estimate) for estimate in found]
    error = float(np.sqrt(np.mean(errors)))
    return {
        "network": case.name,
        "parameters": case.num_parameters,
        "reached": case.reached,
        **options,
        "values": found[0].values,
        "bytes": found[0].row_bytes,
        "error": error,
        "error_times_sqrt": error * found[0].values ** 0.5,
        "spearman": float(np.mean([rank_correlation(exact.scores, estimate.scores) for estimate in found])),
        "error_by_seed": [value**0.5 for value in errors],
        "seconds": time.perf_counter() - start,
    }


def measure_all(case: Case, settings: Settings, chosen: Sequence[Series]) -> list[dict[str, Any]]:
    """Return the rows of a network, those of fewest bytes first; each is printed as it is found."""
    exact = run_tracer(case, projector="none", storage="float32")
    rows = []
    for series in chosen:
        for proj_dim in settings.proj_dims:
            if proj_dim <= series.largest:
                rows.append(measure(case, exact, series, proj_dim, settings.seeds))
                print(f"  {series.label}, {rows[-1]['bytes']} bytes: {rows[-1]['error']:.3g}", flush=True)
    return sorted(rows, key=lambda row: row["bytes"])


def networks(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each network by its name, in order."""
    return {name: [row for row in rows if row["network"] == name] for name in dict.fromkeys(r["network"] for r in rows)}


def heading(row: dict[str, Any]) -> str:
    """Return what a network is and what its training reached."""
    return f"{row['network']}: {row['parameters']:,} parameters, {row['reached']}"


def plot(rows: Sequence[dict[str, Any]], chosen: Sequence[Series], path: Path) -> None:
    """Draw a panel for each network, with a line for each projector and storage."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    panels = networks(rows)
    figure = Figure(figsize=(4.2 * len(panels), 4.6), layout="constrained")
    all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (name, found) in zip(all_axes, panels.items(), strict=True):
        for series in chosen:
            line = [row for row in found if (row["projector"], row["storage"]) == (series.projector, series.storage)]
            x, y = [row["bytes"] for row in line], [row["error"] for row in line]
            axes.loglog(x, y, label=series.label, markersize=6, linewidth=1.6, **series.line)
        axes.set_title(f"{name}\n", fontsize=12)
        axes.text(0.5, 1.025, found[0]["reached"], transform=axes.transAxes, ha="center", fontsize=9.5, color="#555555")
        axes.set_xlabel("bytes stored for a row")
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    first = all_axes[0]
    first.set_ylabel("relative RMS error of inner products")
    ticks = [2**power for power in range(8, 21, 2) if 2**power <= 2 * first.get_xlim()[1]]
    first.set_xticks(ticks, labels=[f"{tick} B" if tick < 1024 else f"{tick // 1024} KiB" for tick in ticks])
    first.set_xlim(min(row["bytes"] for row in rows) * 0.75, max(row["bytes"] for row in rows) * 1.35)
    first.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for axis in (first.xaxis, first.yaxis):
        axis.set_minor_locator(NullLocator())
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=len(chosen), frameon=False)
    figure.savefig(path, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print tables and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps, rows, seeds and values of proj_dim")
    parser.add_argument("--hidden", type=int, default=FULL.hidden, help="width of the MLP's two hidden layers")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    folder = data_folder()
    start = time.perf_counter()
    settings = replace(QUICK if options.quick else FULL, hidden=options.hidden)
    rows: list[dict[str, Any]] = []
    for case in cases(folder, settings):
        print(f"{case.name}: {case.reached}, {time.perf_counter() - start:.0f} s", flush=True)
        rows += measure_all(case, settings, SERIES)
    for found in networks(rows).values():
        print(f"\n{heading(found[0])}\n\n{table(found, COLUMNS)}")
    print(f"\n{DEFINITIONS}\n\n{settings}\n{machine()}\n{time.perf_counter() - start:.0f} s")
    name = "fidelity_quick" if options.quick else "fidelity"
    print(write_results(options.output_dir, name, rows))
    plot(rows, SERIES, options.output_dir / f"{name}.png")


if __name__ == "__main__":
    main()
