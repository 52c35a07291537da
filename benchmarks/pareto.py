"""Time, error and bytes of projected gradients, beside other libraries: which settings does no other one beat?

Three networks, briefly trained on real data, and the gradients of their weight matrices and kernels (bergson knows no
others; `all parameters` is tracer's default). Each method writes the projected loss gradients of rows to disk.

- time: processor time of the process for a batch over that of a plain forward and backward, median over rounds in which
  all methods alternate. Without what happens once: opening files, drawing projections, the audits of tracer's first 16
  batches.
- error: with ``g`` and ``g'`` the loss gradients of two rows, root mean square over pairs and projection seeds of
  ``(estimate - <g, g'>) / (|g| |g'|)``. Exact gradients are autograd's in float64, one row at a time.
- bytes: of the stored values of a row.

A method is beaten if another one, of another library, has less time, less error and no more bytes.

Run it: TRACER_DATA=<folder with cifar10_10k.npz and tinyshakespeare.txt> python benchmarks/pareto.py
        bergson is in no extra, since it wants a transformers of its own: pip install bergson==2.5.1
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from featurize import AUDITED, RESULTS
from models import ResNet9, mlp
from pareto_peers import run_bergson, run_factgrass
from peers import images
from timing import alternate, compute_clock, machine, ratio, table, write_results
from torch import Tensor, nn

from tracer import Tracer

WINDOW, VOCABULARY = 64, 65
"""The characters of a row of the GPT-2, and how many there are."""


@dataclass(frozen=True)
class Case:
    """A trained network with rows.

    Attributes:
        name: What it is called in tables.
        model: The network, in eval mode.
        task: The task's name.
        rows: The arguments of the network, and labels: ``[N + M, ...]`` each.
        num_targets: M.
        batch_size: The rows of a timed batch.
        matrices: The names of weight matrices and kernels, of which gradients are projected.
        losses: Loss of each row, ``[B]``, of a network, inputs and labels.
    """

    name: str
    model: nn.Module
    task: str
    rows: tuple[Tensor, Tensor]
    num_targets: int
    batch_size: int
    matrices: tuple[str, ...]
    losses: Callable[[nn.Module, Tensor, Tensor], Tensor]

    def batch(self, start: int = 0, stop: int | None = None) -> tuple[Tensor, Tensor]:
        """Return some rows; by default one timed batch."""
        stop = start + self.batch_size if stop is None else stop
        return self.rows[0][start:stop], self.rows[1][start:stop]

    def plain_pass(self) -> None:
        """Compute the gradient of the mean loss of a batch with respect to all parameters."""
        self.model.zero_grad(set_to_none=True)
        self.losses(self.model, *self.batch()).mean().backward()

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        """Return inner products ``[N, M]`` of exact gradients and the products of their norms."""
        double = copy.deepcopy(self.model).double()
        parameters = [dict(double.named_parameters())[name] for name in self.matrices]

        def gradient(row: int) -> Tensor:
            x, y = self.batch(row, row + 1)
            loss = self.losses(double, x.double() if x.is_floating_point() else x, y).sum()
            return torch.cat([each.flatten() for each in torch.autograd.grad(loss, parameters)])

        count = len(self.rows[0])
        targets = torch.stack([gradient(row) for row in range(count - self.num_targets, count)])
        products, norms = [], []
        for row in range(count - self.num_targets):
            train = gradient(row)
            products.append(targets @ train)
            norms.append(train.norm())
        scale = torch.outer(torch.stack(norms), torch.linalg.vector_norm(targets, dim=1))
        return torch.stack(products).numpy(), scale.numpy()


class Run(Protocol):
    """A store that is being written.

    Attributes:
        bytes: The bytes of a row's values.
    """

    bytes: int

    def write(self, batch: tuple[Tensor, Tensor]) -> None:
        """Compute and write the next rows."""

    def features(self) -> np.ndarray:
        """Close the store and return projected loss gradients, ``[n, k]``."""


class TracerRun:
    """Tracer, to a store on disk."""

    def __init__(self, case: Case, num_rows: int, folder: Path, seed: int, **options: Any) -> None:
        options = {"params": list(case.matrices), "seed": seed, **options}
        self._tracer = Tracer(case.model, case.task, num_rows, folder, progress=False, **options)
        self._tracer.load_checkpoint(case.model.state_dict(), model_id=0)
        self.bytes = 0

    def write(self, batch: tuple[Tensor, Tensor]) -> None:
        """Compute and write the next rows."""
        given: Any = {"input_ids": batch[0], "labels": batch[1]} if batch[0].dtype == torch.int64 else batch
        self._tracer.featurize(given, num_samples=len(batch[0]))

    def features(self) -> np.ndarray:
        """Close the store and return projected loss gradients, ``[n, k]``."""
        self._tracer.close()
        rows = self._tracer.store.checkpoint(0)
        stored = np.concatenate([view for _, view in rows.raw_features(0, rows.num_rows)])
        self.bytes = stored.dtype.itemsize * stored.shape[1]
        scale = rows.column("scale")[:] * rows.column("loss_grad")[:]
        return stored.astype(np.float64) * scale[:, None]


@dataclass(frozen=True)
class Method:
    """A library with a setting.

    Attributes:
        library: What it is called; its line in the picture.
        setting: What is varied.
        start: Opens a store for a case, a number of rows, a folder and a seed; None if it cannot run.
        line: How it is drawn, as matplotlib takes it.
    """

    library: str
    setting: str
    start: Callable[[Case, int, Path, int], Run | None]
    line: Mapping[str, Any] = field(default_factory=dict)


def _tracer(**options: Any) -> Callable[[Case, int, Path, int], Run | None]:
    return lambda case, num_rows, folder, seed: TracerRun(case, num_rows, folder, seed, **options)


def _peer(run: Callable[..., Run | None], size: int) -> Callable[[Case, int, Path, int], Run | None]:
    return lambda case, num_rows, folder, seed: run(case, num_rows, folder, seed, size)


SKETCH = {"color": "#1f5fbf", "marker": "o"}
PROJECTED = {"linestyle": "--", "markerfacecolor": "w"}
FACTORED = {"color": "#2e9e6b", "marker": "^", **PROJECTED}
BERGSON = {"color": "#d9730d", "marker": "D"}
FACTGRASS = {"color": "#8a949e", "marker": "s"}


_LABELS = {
    "tracer, projected norms": ((-6, -10), "right"),
    "tracer, factored, projected norms": ((6, -10), "left"),
    "bergson 2.5.1": ((1, 8), "left"),
    "FactGraSS": ((-6, -10), "right"),
}
"""Where labels stand that would meet others above and to the right of their points."""


def methods(num_matrices: int) -> list[Method]:
    """Return what is compared; sizes a layer, such as ``p``, give a network of so many matrices its bytes."""
    fast = {"norms": "projected"}
    dims = (512, 1024, 4096)
    found = [Method("tracer", f"k = {k}", _tracer(proj_dim=k), SKETCH) for k in dims]
    found += [
        Method("tracer, projected norms", f"k = {k}", _tracer(proj_dim=k, **fast), SKETCH | PROJECTED) for k in dims
    ]
    found.append(Method("tracer, all parameters", "k = 4096", _tracer(params=None), SKETCH))
    for p in (8, 16, 32):
        options = {"projector": "factored", "proj_dim": p * p * num_matrices, **fast}
        found.append(Method("tracer, factored, projected norms", f"{p} x {p}", _tracer(**options), FACTORED))
    found += [Method("bergson 2.5.1", f"p = {p}", _peer(run_bergson, p), BERGSON) for p in (8, 16, 32)]
    found += [Method("FactGraSS", f"{p * p} a layer", _peer(run_factgrass, p * p), FACTGRASS) for p in (8, 16, 32)]
    return found


def measure(case: Case, rounds: int, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield a row for each method."""
    products, scale = case.exact()
    known, count = scale > 0, len(case.rows[0])
    errors: dict[str, list[float]] = {}
    steps: dict[str, Callable[[], None]] = {"plain": case.plain_pass}
    sizes: dict[str, int] = {}
    timed_runs: list[Run] = []
    chosen = {f"{each.library}, {each.setting}": each for each in methods(len(case.matrices))}
    with tempfile.TemporaryDirectory() as root:
        for name, method in chosen.items():
            for seed in seeds:
                run = method.start(case, count, Path(root, name, str(seed)), seed)
                if run is None:
                    break
                run.write(case.rows)
                features = run.features()
                split = count - case.num_targets
                if "all parameters" not in name:
                    found = features[:split] @ features[split:].T
                    errors.setdefault(name, []).append(float(np.mean(((found - products)[known] / scale[known]) ** 2)))
                sizes[name] = run.bytes
            if name in sizes:
                num_rows = (rounds + 3) * case.batch_size + 2 * AUDITED
                timed = method.start(case, num_rows, Path(root, name, "timed"), 0)
                assert timed is not None
                timed.write(case.batch())
                for _ in range(AUDITED):  # batches of which a row is audited, small ones
                    timed.write(case.batch(0, 2))
                timed_runs.append(timed)
                steps[name] = lambda timed=timed: timed.write(case.batch())
        seconds = alternate(steps, rounds, 1, compute_clock())
        for run in timed_runs:
            run.features()
    for name in sizes:
        yield {
            "case": case.name,
            "library": chosen[name].library,
            "setting": chosen[name].setting,
            "ratio": ratio(seconds, name, "plain"),
            "error": float(np.sqrt(np.mean(errors[name]))) if name in errors else None,
            "bytes": sizes[name],
            "plain_ms": 1e3 * float(np.median(seconds["plain"])),
        }


def beaten(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Return a case, a setting of tracer, and one of others that has less time, less error, no more bytes there."""
    found = []
    with_error = [row for row in rows if row["error"] is not None]
    for mine in (row for row in with_error if row["library"].startswith("tracer")):
        for other in (row for row in with_error if not row["library"].startswith("tracer")):
            less = other["ratio"] < mine["ratio"] and other["error"] < mine["error"]
            if other["case"] == mine["case"] and less and other["bytes"] <= mine["bytes"]:
                mine_name, other_name = (f"{each['library']}, {each['setting']}" for each in (mine, other))
                found.append((mine["case"], mine_name, other_name))
    return found


def train(model: nn.Module, losses: Callable[..., Tensor], x: Tensor, y: Tensor, steps: int) -> None:
    """Take a few steps of Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(x), (32,), generator=generator)
        optimizer.zero_grad()
        losses(model, x[rows], y[rows]).mean().backward()
        optimizer.step()
    model.eval()


def image_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of each row."""
    return F.cross_entropy(model(x), y, reduction="none")


def token_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each row's next tokens."""
    return F.cross_entropy(model(x).logits[:, :-1].transpose(1, 2), y[:, 1:], reduction="none").mean(1)


def image_case(name: str, model: nn.Module, shape: tuple[int, ...], sizes: tuple[int, int, int], steps: int) -> Case:
    """Return a trained network for images, with ``sizes``: N, M and the batch."""
    x, y = images(shape, 1000)
    train(model, image_losses, x, y, steps)
    kept = sizes[0] + sizes[1]
    matrices = tuple(key for key, value in model.named_parameters() if value.ndim > 1)
    return Case(name, model, "image_classification", (x[:kept], y[:kept]), *sizes[1:], matrices, image_losses)


def gpt2(dim: int, sizes: tuple[int, int, int], steps: int) -> Case:
    """Return a character GPT-2 of four layers, trained on ``$TRACER_DATA/tinyshakespeare.txt``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    text = (Path(os.environ["TRACER_DATA"]) / "tinyshakespeare.txt").read_text(encoding="utf-8")
    index = {letter: number for number, letter in enumerate(sorted(set(text)))}
    tokens = torch.tensor([index[letter] for letter in text[: 2000 * WINDOW]]).view(-1, WINDOW)
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=WINDOW, n_embd=dim, n_layer=4, n_head=4)
    model = GPT2LMHeadModel(config)
    train(model, token_losses, tokens, tokens, steps)
    kept = tokens[: sizes[0] + sizes[1]]
    matrices = tuple(key for key, value in model.named_parameters() if ".h." in key and value.ndim > 1)
    name = f"GPT-2, 4 layers x {dim}, {WINDOW} tokens, batch {sizes[2]}"
    return Case(name, model, "language_modeling", (kept, kept), *sizes[1:], matrices, token_losses)


def cases(quick: bool) -> Iterator[tuple[Case, int]]:
    """Yield networks, with how many times the rounds are repeated."""
    yield image_case("MLP 784-256-256-10, batch 256", mlp(784, 256, 256, 10), (784,), (224, 32, 256), 50), 2
    yield gpt2(128, (96, 32, 32), 10 if quick else 100), 1
    if not quick:
        yield gpt2(256, (48, 16, 16), 100), 1
        yield image_case("ResNet-9, batch 16", ResNet9(), (3, 32, 32), (32, 16, 16), 30), 1


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw error against time, a panel for each network; labels are bytes."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["case"] for row in rows))
    lines = {each.library: each.line for each in methods(1)}
    figure = Figure(figsize=(11, 4.2 * -(-len(names) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(names) // 2), 2, squeeze=False).flatten()
    for axes, name in zip(panels, names, strict=False):
        for library, line in lines.items():
            mine = [row for row in rows if (row["case"], row["library"]) == (name, library) and row["error"]]
            if not mine:
                continue
            axes.plot([row["ratio"] for row in mine], [row["error"] for row in mine], label=library, **line)
            place, side = _LABELS.get(library, ((6, 4), "left"))
            for row in mine:
                text, point = f"{row['bytes'] / 1024:.2g}", (row["ratio"], row["error"])
                axes.annotate(text, point, place, textcoords="offset points", fontsize=8, ha=side, color=line["color"])
        axes.set_yscale("log")
        axes.margins(x=0.12, y=0.1)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}")
        axes.tick_params(axis="y", which="both", labelsize=8)
        axes.set_title(name, fontsize=10, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.axvline(1.0, color="#333333", linewidth=1, linestyle="--")
        axes.set_xlabel("processor time over a plain forward and backward")
        axes.set_ylabel("error of inner products")
    panels[0].legend(fontsize=8, frameon=False)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.suptitle("Error against time; numbers are kB a row (left and low is better)", fontsize=11)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print a table and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="two networks, one projection seed")
    parser.add_argument("--only", default="", help="networks whose name has this in it")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for case, repeat in cases(options.quick):
        if options.only in case.name:
            rows += measure(case, repeat * options.rounds, (0,) if options.quick else (0, 1))
            print(f"{case.name}: done", flush=True)
    columns = {"case": "case", "library": "library", "setting": "setting"}
    print(f"\n{table(rows, columns | {'ratio': 'time', 'error': 'error', 'bytes': 'bytes a row'})}\n\n{machine()}")
    for name, mine, other in beaten(rows):
        print(f"{name}: {mine} is beaten by {other}")
    print(write_results(options.output_dir, "pareto", rows))
    plot(rows, options.output_dir / "pareto.png")


if __name__ == "__main__":
    main()
