"""The same influence scores through captum, traker, dattri and tracer, side by side in one process.

One checkpoint of a freshly trained network, N training rows and M targets: each library computes an [N, M] matrix from
gradients. The plain pass is one forward and backward of the same N + M rows. Errors are those of inner products of
gradients, relative to the product of their exact norms, root mean square over all pairs (for traker, which scales its
features by a constant, after the best constant).

Install the peers with ``pip install -e '.[peers]'``, then run: python benchmarks/peers.py
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from featurize import RESULTS
from models import ResNet9, mlp
from timing import alternate, machine, ratio, table, write_results
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tracer import Tracer, attribute

SLOW = ("dattri TracIn, k=512", "traker featurize, k=512")
"""What takes minutes on ResNet-9 and runs there only when asked for by its full name."""


@dataclass
class Case:
    """A model at a checkpoint, training rows and targets.

    Attributes:
        name: What it is called in tables.
        model: The model, in eval mode.
        train: Inputs and labels of the N training rows.
        targets: Inputs and labels of the M targets.
        batch_size: For every library.
        exact: ``[N, M]``, inner products of exact loss gradients.
        scale: ``[N, M]``, products of their norms.
    """

    name: str
    model: nn.Module
    train: tuple[Tensor, Tensor]
    targets: tuple[Tensor, Tensor]
    batch_size: int
    exact: np.ndarray | None = None
    scale: np.ndarray | None = None

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
    exact = run_tracer(case, projector="none", storage="float32")
    case.exact, norms = np.array(exact["scores"]), exact["norms"]
    case.scale = np.outer(*norms)
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
        norms = [np.abs(t.column("slope")[:]) * t.column("gradient_norm")[:] for t in tables]
        width = tables[0].dim * (2 if tables[0].storage == "float16" else 4)
        return {"scores": np.array(found.scores), "bytes": width, "norms": norms}


def run_captum(case: Case, fast: bool) -> dict[str, Any]:
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
        batch_size=case.batch_size,
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
        features, slopes = [], []
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
            slopes.append(-np.array(traker.saver.current_store["out_to_loss"]).reshape(-1, 1))
        left, right = (slope * feature for slope, feature in zip(slopes, features, strict=True))
        scores = left @ right.T
    assert case.exact is not None
    return {"scores": scores * (case.exact * scores).sum() / np.square(scores).sum(), "bytes": 4 * proj_dim}


def contenders() -> dict[str, tuple[str, Callable[[Case], dict[str, Any]]]]:
    """Return what runs by name, with the package that it needs."""
    return {
        "tracer, sketch k=4096, float16 store": ("torch", lambda case: run_tracer(case)),
        "tracer, sketch k=512, float16 store": ("torch", lambda case: run_tracer(case, proj_dim=512)),
        "tracer, exact, float32 store": ("torch", lambda case: run_tracer(case, projector="none", storage="float32")),
        "captum TracInCP, fast": ("captum", lambda case: run_captum(case, True)),
        "captum TracInCP, exact": ("captum", lambda case: run_captum(case, False)),
        "dattri TracIn, k=512": ("dattri", lambda case: run_dattri(case, 512)),
        "traker featurize, k=512": ("trak", lambda case: run_traker(case, 512)),
    }


def measure(case: Case, rounds: int, only: str) -> list[dict[str, Any]]:
    """Run every installed library whose name has ``only`` in it and return a row for each."""
    from importlib.util import find_spec

    rows = []
    for name, (package, run) in contenders().items():
        if only not in name or (name in SLOW and case.model.__class__ is ResNet9 and only not in SLOW):
            continue
        if find_spec(package) is None:
            print(f"{name}: {package} is not installed")
            continue
        result: dict[str, Any] = {}
        seconds = alternate(
            {"plain": case.plain_pass, "run": lambda run=run, result=result: result.update(run(case))},  # type: ignore[misc]
            rounds,
            warmup=1 if rounds > 1 else 0,
        )
        assert case.exact is not None and case.scale is not None
        known = case.scale > 0  # a row that the model is certain of has slope zero in float32
        error = np.sqrt(np.mean(np.square((result["scores"] - case.exact)[known] / case.scale[known])))
        rows.append(
            {
                "case": case.name,
                "library": name,
                "seconds": float(np.median(seconds["run"])),
                "ratio": ratio(seconds, "run", "plain"),
                "bytes": result["bytes"],
                "error": float(error),
            }
        )
        print(f"{case.name}: {name}: {rows[-1]['ratio']:.1f} plain passes, error {error:.2g}", flush=True)
    return rows


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", default="", help="libraries whose name has this in it; a full name runs slow ones too"
    )
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for case in (
        make_case("MLP 784-256-256-10, 512 x 64", mlp(784, 256, 256, 10), (784,), (512, 64, 64), 20),
        make_case("ResNet-9, 128 x 32", ResNet9(), (3, 32, 32), (128, 32, 32), 10),
    ):
        rows += measure(case, options.rounds, options.only)
    columns = {"case": "case", "library": "library", "seconds": "seconds", "ratio": "plain passes"}
    print(f"\n{table(rows, {**columns, 'bytes': 'bytes a row', 'error': 'error'})}\n\n{machine()}")
    print(write_results(options.output_dir, "peers_part" if options.only else "peers", rows))


if __name__ == "__main__":
    main()
