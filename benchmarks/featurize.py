"""What featurizing costs, as a multiple of one plain forward and backward of the same batches.

Both alternate in one process: the plain pass computes the gradient of the batch's mean loss in train mode, as a
training step does before the optimizer; featurizing includes fingerprints, projection and writing to a store on disk.
The first 16 batches, which are checked and audited, come before; the median of the 2nd to the 16th is a figure of its
own. Times are the process's own processor time, on a GPU the wall clock's. The forward alone is of the same batch,
without gradients. Peaks are what a pass adds to the process's own memory.

Run it: python benchmarks/featurize.py              the table of works
        python benchmarks/featurize.py --scaling    how the cost changes with batch size, proj_dim, width and tokens
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from models import Decoder, ResNet9, mlp
from timing import alternate, compute_clock, machine, peak_mb, ratio, table, write_results
from torch import Tensor, nn

from tracer import Tracer

RESULTS = Path(__file__).parent / "results"
AUDITED = 15
"""The batches after the first of which a sample is audited."""


@dataclass(frozen=True)
class Work:
    """A model with a batch, and what it is featurized with.

    Attributes:
        name: What it is called in tables.
        model: The model.
        batch: Inputs and labels.
        task: The task's name.
        options: More options of the Tracer.
    """

    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    task: str
    options: dict[str, Any] = field(default_factory=dict)

    def plain_pass(self) -> None:
        """Compute the gradient of the mean loss with respect to all parameters."""
        self.model.train()
        for parameter in self.model.parameters():
            parameter.grad = None
        output = self.model(self.batch[0])
        F.cross_entropy(output.flatten(0, -2), self.batch[1].flatten()).backward()

    def forward(self) -> None:
        """Compute the outputs alone, in eval mode."""
        self.model.eval()
        with torch.no_grad():
            self.model(self.batch[0])


def resnet9(batch_size: int = 64) -> Work:
    """ResNet-9 on images of CIFAR-10's size."""
    batch = torch.randn(batch_size, 3, 32, 32), torch.randint(0, 10, (batch_size,))
    return Work(f"ResNet-9, 32 x 32 images, batch {batch_size}", ResNet9(), batch, "image_classification")


def decoder(batch_size: int = 32, tokens: int = 64, dim: int = 256, layers: int = 4) -> Work:
    """A character decoder."""
    sequence = torch.randint(0, 65, (batch_size, tokens + 1))
    batch = sequence[:, :-1].contiguous(), sequence[:, 1:].contiguous()
    name = f"decoder, {layers} layers x {dim}, {tokens} tokens, batch {batch_size}"
    return Work(name, Decoder(dim=dim, layers=layers), batch, "language_modeling")


def perceptron(batch_size: int = 512, **options: Any) -> Work:
    """An MLP on vectors of MNIST's size."""
    batch = torch.randn(batch_size, 784), torch.randint(0, 10, (batch_size,))
    name = f"MLP 784-256-256-10, batch {batch_size}" + (", last layer only" if options else "")
    return Work(name, mlp(784, 256, 256, 10), batch, "image_classification", options)


def measure(work: Work, rounds: int, proj_dim: int = 4096) -> dict[str, Any]:
    """Alternate plain passes and featurizing of one batch, new rows each time, and return the row of a table."""
    folder = Path(tempfile.mkdtemp(prefix="tracer-benchmark-"))
    rows, repeats = len(work.batch[0]), rounds + AUDITED + 4  # the check, the audited, two to warm up, one for memory
    clock = compute_clock()
    try:
        tracer = Tracer(work.model, work.task, rows * repeats, folder, proj_dim=proj_dim, **work.options)
        tracer.load_checkpoint(work.model.state_dict(), model_id=0)
        tracer.featurize(work.batch, num_samples=rows)  # with its self-check
        contenders = {
            "plain": work.plain_pass,
            "forward": work.forward,
            "featurize": lambda: tracer.featurize(work.batch, num_samples=rows),
        }
        audited = alternate({"featurize": contenders["featurize"]}, AUDITED, 0, clock)["featurize"]
        seconds = alternate(contenders, rounds, 2, clock)
        work.model.zero_grad(set_to_none=True)
        peaks = {name: peak_mb(contenders[name]) for name in ("featurize", "plain")}
        tracer.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {
        "work": work.name,
        "parameters": sum(parameter.numel() for parameter in work.model.parameters()),
        "proj_dim": proj_dim,
        "plain_ms": 1e3 * statistics.median(seconds["plain"]),
        "featurize_ms": 1e3 * statistics.median(seconds["featurize"]),
        "forward_ratio": ratio(seconds, "forward", "plain"),
        "ratio": ratio(seconds, "featurize", "plain"),
        "audited_ratio": statistics.median(audited) / statistics.median(seconds["plain"]),
        "plain_mb": peaks["plain"],
        "featurize_mb": peaks["featurize"],
        "rounds": rounds,
    }


def works() -> Iterator[tuple[Work, int, int]]:
    """Yield each work of the table with ``proj_dim`` and how many times its rounds are repeated, being short."""
    yield resnet9(), 4096, 1
    for proj_dim in (4096, 1024):
        yield decoder(), proj_dim, 1
        yield decoder(8, dim=768), proj_dim, 1
        yield decoder(2, 256, 1536, layers=1), proj_dim, 1
    for proj_dim in (4096, 1024):
        yield perceptron(), proj_dim, 8
    yield perceptron(params="4"), 4096, 8


def scaling() -> Iterator[tuple[str, Any, Work, int]]:
    """Yield what is varied, its value, the work and ``proj_dim``."""
    for batch_size in (16, 64, 256):
        yield "batch size, MLP", batch_size, perceptron(batch_size), 4096
    for batch_size in (8, 32):
        yield "batch size, decoder", batch_size, decoder(batch_size), 4096
    for proj_dim in (512, 1024, 4096, 16384):
        yield "proj_dim, decoder", proj_dim, decoder(), proj_dim
    for dim in (128, 256, 512):
        yield "width, decoder", dim, decoder(16, dim=dim), 4096
    for tokens in (16, 64, 256):
        yield "tokens, decoder", tokens, decoder(8, tokens), 4096


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the ratios as bars, with the plain pass as a line."""
    from matplotlib.figure import Figure

    labels = [f"{row['varied']} = {row['value']}" if "varied" in row else _label(row) for row in rows]
    figure = Figure(figsize=(9, 0.42 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(labels[::-1], [row["ratio"] for row in rows][::-1], color="#1f5fbf")
    axes.axvline(1.0, color="#333333", linewidth=1, linestyle="--")
    axes.set_xlabel("time over one plain forward and backward (dashed: 1)")
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    figure.savefig(path, dpi=150)


def _label(row: dict[str, Any]) -> str:
    return f"{row['work']}, k = {row['proj_dim']}"


def main() -> None:
    """Measure, print a table and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--only", help="works whose name has this in it")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    wanted: Callable[[str], bool] = lambda name: not options.only or options.only in name  # noqa: E731
    if options.scaling:
        for varied, value, work, proj_dim in scaling():
            if wanted(work.name):
                rows.append({"varied": varied, "value": value, **measure(work, options.rounds, proj_dim)})
                print(f"{varied} = {value}: {rows[-1]['ratio']:.2f}", flush=True)
        columns = {"varied": "varied", "value": "value"}
    else:
        for work, proj_dim, repeat in works():
            if wanted(work.name):
                rows.append(measure(work, repeat * options.rounds, proj_dim))
                print(f"{work.name}, k = {proj_dim}: {rows[-1]['ratio']:.2f}", flush=True)
        columns = {"work": "work", "proj_dim": "k"}
    more = {
        "parameters": "parameters",
        "plain_ms": "plain ms",
        "featurize_ms": "featurize ms",
        "forward_ratio": "forward alone",
        "ratio": "ratio",
        "audited_ratio": "audited",
        "plain_mb": "plain MB",
        "featurize_mb": "featurize MB",
    }
    print(f"\n{table(rows, {**columns, **more})}\n\n{machine()}")
    name = "featurize_scaling" if options.scaling else "featurize"
    print(write_results(options.output_dir, name, rows))
    plot(rows, options.output_dir / f"{name}.png")


if __name__ == "__main__":
    main()
