"""The same influence scores through captum, traker, dattri and tracer, side by side in one process.

One checkpoint of a freshly trained network, N training rows and M targets: each library computes an [N, M] matrix from
gradients. The plain pass is one forward and backward of the same N + M rows. Errors are those of inner products of
gradients, relative to the product of their exact norms, root mean square over all pairs (for traker, which scales its
features by a constant, after the best constant). Exact inner products are tracer's own in float64, which tests compare
with a loop of autograd. Peak memory is what a run adds to the process's own memory at most.

captum's fast mode runs with the batch size of 16, 64 and 256 that is fastest; dattri and traker with the defaults that
they have for a CPU, traker without half precision, and the case's batch size.

Install the peers with ``pip install -e '.[peers]'``, then run: python benchmarks/peers.py
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from featurize import RESULTS
from models import ResNet9, mlp
from timing import alternate, machine, peak_mb, ratio, table, write_results
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tracer import Tracer, attribute


@dataclass
class Case:
    """A model at a checkpoint, training rows and targets.

    Attributes:
        name: What it is called in tables.
        model: The model, in eval mode.
        train: Inputs and labels of the N training rows.
        targets: Inputs and labels of the M targets.
        batch_size: For every library.
        exact: ``[N, M]``, inner products of exact loss gradients, computed in float64.
        scale: ``[N, M]``, products of their norms.
        exact_only: Whether only exact methods are compared.
    """

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    batch_size: int
    exact: np.ndarray | None = None
    scale: np.ndarray | None = None
    exact_only: bool = False

    def plain_pass(self) -> None:
        """Compute batch gradients of all rows."""
        for inputs, labels in (self.train, self.targets):
            for x, y in zip(inputs.split(self.batch_size), labels.split(self.batch_size), strict=True):
                self.model.zero_grad(set_to_none=True)
                F.cross_entropy(self.model(x), y).backward()

    def loaders(self) -> tuple[DataLoader, DataLoader]:
        """Return loaders of training rows and targets, in order."""
        train, targets = TensorDataset(*self.train), TensorDataset(*self.targets)
        return DataLoader(train, self.batch_size), DataLoader(targets, self.batch_size)


def images(shape: tuple[int, ...], count: int) -> tuple[Tensor, Tensor]:
    """CIFAR-10 from ``$TRACER_DATA/cifar10_10k.npz`` where there is one, else random numbers of the same size."""
    path = Path(os.environ.get("TRACER_DATA", "")) / "cifar10_10k.npz"
    if path.is_file() and shape == (3, 32, 32):
        with np.load(path) as data:
            x = torch.from_numpy(data["x_train"][:count]).permute(0, 3, 1, 2).float().div(255.0)
            return (x - 0.45) / 0.25, torch.from_numpy(data["y_train"][:count])
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *shape, generator=generator), torch.randint(0, 10, (count,), generator=generator)


def make_case(name: str, model: nn.Module, shape: tuple[int, ...], sizes: tuple[int, int, int], steps: int) -> Case:
    """Train for some steps and compute exact inner products."""
    num_train, num_targets, batch_size = sizes
    x, y = images(shape, num_train + num_targets)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for rows in torch.randperm(steps * 32, generator=torch.Generator().manual_seed(0)).split(32):
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows % len(x)]), y[rows % len(x)]).backward()
        optimizer.step()
    model.eval()
    train, targets = (x[:num_train], y[:num_train]), (x[num_train:], y[num_train:])
    case = Case(name, model, train, targets, batch_size)
    double = copy.deepcopy(model).double(), (train[0].double(), train[1]), (targets[0].double(), targets[1])
    exact = run_tracer(Case(name, *double, batch_size), projector="none")
    case.exact, case.scale = exact["scores"], np.outer(*exact["norms"])
    return case


def run_tracer(case: Case, **options: Any) -> dict[str, Any]:
    """Featurize, score and finalize with tracer, to a store on disk."""
    with tempfile.TemporaryDirectory() as folder:
        found = attribute(
            case.model,
            "image_classification",
            case.train,
            case.targets,
            [(case.model.state_dict(), 1.0)],
            save_dir=folder,
            batch_size=case.batch_size,
            **options,
        )
        tracer: Tracer = found.tracer
        tables = tracer.store.checkpoint(0), tracer.store.targets("targets", 0)
        norms = [np.abs(t.column("loss_grad")[:]) * t.column("gradient_norm")[:] for t in tables]
        width = tables[0].dim * (2 if tables[0].storage == "float16" else 4)  # exact scores store no features
        return {"scores": np.array(found.scores), "bytes": width, "norms": norms}


def run_captum(case: Case, fast: bool, batch_size: int) -> dict[str, Any]:
    """TracInCP of captum; it stores nothing."""
    from captum.influence import TracInCP

    def load(model: nn.Module, path: str) -> float:
        return 1.0

    influence = TracInCP(
        case.model,
        TensorDataset(*case.train),
        ["checkpoint"],
        checkpoints_load_func=load,
        loss_fn=nn.CrossEntropyLoss(reduction="sum" if fast else "none"),
        batch_size=batch_size,
        sample_wise_grads_per_batch=fast,
    )
    return {"scores": influence.influence(case.targets, show_progress=False).T.numpy(), "bytes": 0}


def run_dattri(case: Case, proj_dim: int) -> dict[str, Any]:
    """Projected TracIn of dattri; it stores nothing."""
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    def loss(params: dict[str, Tensor], data: tuple[Tensor, Tensor]) -> Tensor:
        x, y = data
        return F.cross_entropy(torch.func.functional_call(case.model, params, x.unsqueeze(0)), y.unsqueeze(0))

    task = AttributionTask(loss_func=loss, model=case.model, checkpoints=[case.model.state_dict()])
    options = {"proj_dim": proj_dim, "proj_max_batch_size": 32, "device": "cpu"}
    attributor = TracInAttributor(task, torch.ones(1), False, options, device="cpu")
    with torch.no_grad():
        scores = attributor.attribute(*case.loaders())
    return {"scores": scores.numpy(), "bytes": 0}


def run_traker(case: Case, proj_dim: int) -> dict[str, Any]:
    """Featurizing of traker, with the inner products of its features; its own scores are of another estimator."""
    import logging

    from trak import TRAKer

    with tempfile.TemporaryDirectory() as folder:
        features, loss_grads = [], []
        for part, (x, y) in (("train", case.train), ("targets", case.targets)):
            traker = TRAKer(
                model=copy.deepcopy(case.model),
                task="image_classification",
                train_set_size=len(x),
                save_dir=f"{folder}/{part}",
                device="cpu",
                proj_dim=proj_dim,
                use_half_precision=False,
                logging_level=logging.ERROR,
            )
            traker.load_checkpoint(case.model.state_dict(), model_id=0)
            for xs, ys in zip(x.split(case.batch_size), y.split(case.batch_size), strict=True):
                traker.featurize((xs, ys), num_samples=len(xs))
            features.append(np.array(traker.saver.current_store["grads"]))
            loss_grads.append(-np.array(traker.saver.current_store["out_to_loss"]).reshape(-1, 1))
        left, right = (loss_grad * feature for loss_grad, feature in zip(loss_grads, features, strict=True))
        scores = left @ right.T
    assert case.exact is not None
    return {"scores": scores * (case.exact * scores).sum() / np.square(scores).sum(), "bytes": 4 * proj_dim}


@dataclass(frozen=True)
class Contender:
    """A library with what it is run with.

    Attributes:
        package: The module that must be installed.
        run: Computes the matrix; called with the case and one of the settings.
        settings: What to try; the fastest is reported and named.
        slow: Whether it takes minutes on ResNet-9, and runs there only when asked for.
        exact: Whether its inner products are exact but for rounding.
    """

    package: str
    run: Callable[..., dict[str, Any]]
    settings: tuple[dict[str, Any], ...] = ({},)
    slow: bool = False
    exact: bool = False


EXACT_CASE = "ResNet-9, 512 x 64, exact scores"
BATCH_SIZES = tuple({"batch_size": size} for size in (16, 64, 256))
CONTENDERS = {
    "tracer, sketch k=4096, float16": Contender("torch", run_tracer),
    "tracer, sketch k=512, float16": Contender("torch", lambda case: run_tracer(case, proj_dim=512)),
    "tracer, exact": Contender("torch", lambda case: run_tracer(case, projector="none"), exact=True),
    "captum TracInCP, fast": Contender(
        "captum", lambda case, **s: run_captum(case, True, **s), BATCH_SIZES, exact=True
    ),
    "captum TracInCP, exact": Contender("captum", lambda case: run_captum(case, False, case.batch_size), exact=True),
    "dattri TracIn, k=512": Contender("dattri", lambda case: run_dattri(case, 512), slow=True),
    "traker featurize, k=512": Contender("trak", lambda case: run_traker(case, 512), slow=True),
}


def fastest(case: Case, contender: Contender) -> dict[str, Any]:
    """Run once with each setting and return the fastest."""
    if len(contender.settings) == 1:
        return contender.settings[0]
    seconds = []
    for setting in contender.settings:
        start = time.perf_counter()
        contender.run(case, **setting)
        seconds.append(time.perf_counter() - start)
    return contender.settings[int(np.argmin(seconds))]


def _keep(result: dict[str, Any], run: Callable[[], dict[str, Any]]) -> None:
    result.update(run())


def measure(case: Case, rounds: int, only: str) -> Iterator[dict[str, Any]]:
    """Run every installed library whose name has ``only`` in it and yield a row for each."""
    yield {
        "case": case.name,
        "library": "plain forward and backward",
        "ratio": 1.0,
        "peak_mb": peak_mb(case.plain_pass),
    }
    for name, contender in CONTENDERS.items():
        too_slow = contender.slow and isinstance(case.model, ResNet9) and only != name
        if only not in name or too_slow or (case.exact_only and not contender.exact):
            continue
        if find_spec(contender.package) is None:
            print(f"{name}: {contender.package} is not installed")
            continue
        setting = fastest(case, contender)
        result: dict[str, Any] = {}
        run = functools.partial(_keep, result, functools.partial(contender.run, case, **setting))
        seconds = alternate({"plain": case.plain_pass, "run": run}, rounds, warmup=1 if rounds > 1 else 0)
        assert case.exact is not None and case.scale is not None
        known = case.scale > 0  # a row that the model is certain of has slope zero in float32
        error = np.sqrt(np.mean(np.square((result["scores"] - case.exact)[known] / case.scale[known])))
        chosen = "".join(f", {key.replace('_', ' ')} {value}" for key, value in setting.items())
        row = {
            "case": case.name,
            "library": name + chosen,
            "seconds": float(np.median(seconds["run"])),
            "ratio": ratio(seconds, "run", "plain"),
            "peak_mb": peak_mb(run),
            "bytes": result["bytes"],
            "error": float(error),
        }
        print(f"{case.name}: {row['library']}: {row['ratio']:.1f} plain passes, error {error:.2g}", flush=True)
        yield row


def cases(wanted: str) -> Iterator[Case]:
    """Yield the cases whose name has ``wanted`` in it."""
    sizes = {"MLP 784-256-256-10, 512 x 64": (512, 64, 64), "ResNet-9, 128 x 32": (128, 32, 32)}
    for name, (num_train, num_targets, batch_size) in sizes.items():
        if wanted in name:
            is_mlp = name.startswith("MLP")
            model, shape = (mlp(784, 256, 256, 10), (784,)) if is_mlp else (ResNet9(), (3, 32, 32))
            yield make_case(name, model, shape, (num_train, num_targets, batch_size), 10)
    if wanted in EXACT_CASE:
        case = make_case(EXACT_CASE, ResNet9(), (3, 32, 32), (512, 64, 64), 10)
        yield dataclasses.replace(case, exact_only=True)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw what each library costs, a panel for each case, on a logarithmic scale with the plain pass as a line."""
    from matplotlib.figure import Figure

    timed = [row for row in rows if "seconds" in row]
    names = list(dict.fromkeys(row["case"] for row in timed))
    counts = [sum(row["case"] == name for row in timed) for name in names]
    figure = Figure(figsize=(9, 0.36 * len(timed) + 0.55 * len(names) + 0.6), layout="constrained")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": counts})[:, 0]
    for name, axes in zip(names, panels, strict=True):
        mine = [row for row in timed if row["case"] == name][::-1]
        colors = ["#1f5fbf" if row["library"].startswith("tracer") else "#8a949e" for row in mine]
        bars = axes.barh([row["library"] for row in mine], [row["ratio"] for row in mine], color=colors)
        values = [row["ratio"] for row in mine]
        labels = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]
        axes.bar_label(bars, labels, padding=4, fontsize=9)
        axes.axvline(1.0, color="#333333", linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_title(name, fontsize=11, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    panels[-1].set_xlim(0.7, 3 * max(row["ratio"] for row in timed))
    panels[-1].set_xlabel("time over one plain forward and backward of all rows (dashed: 1)")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print a table and write JSON and PNG."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="libraries whose name has this in it; a full name runs slow ones too"
    )
    parser.add_argument("--case", default="", help="cases whose name has this in it")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for case in cases(options.case):
        rows += measure(case, options.rounds, options.only)
    columns = {"case": "case", "library": "library", "seconds": "seconds", "ratio": "plain passes"}
    more = {"peak_mb": "peak MB", "bytes": "bytes a row", "error": "error"}
    print(f"\n{table(rows, columns | more)}\n\n{machine()}")
    part = "_part" if options.only or options.case else ""
    print(write_results(options.output_dir, f"peers{part}", rows))
    plot(rows, options.output_dir / f"peers{part}.png")


if __name__ == "__main__":
    main()
