"""What recording costs beside plain training, and how well the checkpoints of each schedule stand for all steps.

Overhead: two models of one start are trained, one recorded and one not, in turns of one step each, so that both see
the same machine. The ratio is the recorded one's time over the plain one's, all of it: the hook of the optimizer, the
recorder's calls, every file and the last state. Files are synced to the disk, as always. Medians over repeats. On a
machine that does other things too this ratio swings by some percent; the seconds inside the recorder's own calls, over
those of plain training, swing less, and leave out the hook (a microsecond a step) and what files do to the caches.

Schedules: a small net is trained on handwritten digits (scikit-learn's), with the gradients of all rows and targets
after every step. The sum of first-order terms over all steps, with the rows that each step used, is TracIn before
anything is left out (Pruthi et al. 2020, section 3.2). How its scores agree with those of a few checkpoints is the mean
over targets of Spearman's rank correlation over train rows, with the sums of learning rates and with the last ones. It
says nothing about retraining.

Collecting: the same two models in turns, one with a `GradientCollector`. The ratio is that of medians of the process's
CPU time for a step. No step ends a segment: what that costs depends on the number of training rows alone. The first
ten steps, of which four are checked against passes of their own, are not measured.

Run it: python benchmarks/recorder.py            all, a few minutes
        python benchmarks/recorder.py --quick    small sizes, rough figures
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from models import Decoder, ResNet9
from timing import machine, synchronize, table, write_results
from torch import Tensor, nn

from tracer import CheckpointRecorder, GradientCollector, open_recording
from tracer.training.recording import Even, Geometric, LossDecrease, Schedule, make_schedule
from tracer.training.recording.record import CheckpointRecord
from tracer.training.recording.schedules import thin

RESULTS = Path(__file__).parent / "results"
COST_COLUMNS = {
    "model": "model",
    "megabytes": "MB a checkpoint",
    "step_ms": "ms a step",
    "steps": "steps",
    "every": "every",
    "checkpoints": "saved",
    "overhead": "overhead %",
    "low": "lowest",
    "high": "highest",
    "inside": "inside the recorder %",
}
QUALITY_COLUMNS = {"every": "every", "checkpoints": "checkpoints", "sum": "sum of rates", "last": "last rate"}

COLLECTING_COLUMNS = {
    "model": "model",
    "collecting": "collecting",
    "step_ms": "ms a plain step",
    "overhead": "overhead %",
    "steps": "steps",
}


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def _loss(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), torch.arange(len(x), device=x.device) % 10)


Case = tuple[int, Callable[[], nn.Module], Callable[[], Tensor]]
"""How many steps, the model, and a batch."""

CASES: dict[str, Case] = {
    "MLP, batch 128": (3000, _mlp, lambda: torch.randn(128, 784)),
    "ResNet-9 (width 16), batch 32": (100, lambda: ResNet9(width=16), lambda: torch.randn(32, 3, 32, 32)),
}


def _row_losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return each row's cross-entropy, of sequences the mean over positions, ``[B]``."""
    losses = nn.functional.cross_entropy(model(batch[0]).movedim(-1, 1), batch[1], reduction="none")
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def _tokens(rows: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randint(0, 500, (rows, length)), torch.randint(0, 500, (rows, length))


COLLECTED: dict[str, tuple[int, Callable[[], nn.Module], Callable[[], tuple[Tensor, Tensor]]]] = {
    "MLP 784-256-256-10, 128 rows": (200, _mlp, lambda: (torch.randn(128, 784), torch.randint(0, 10, (128,)))),
    "decoder, 4 layers of 256, 8 x 128 tokens": (12, lambda: Decoder(500, 256), lambda: _tokens(8, 128)),
    "decoder, 4 layers of 512, 4 x 256 tokens": (5, lambda: Decoder(500, 512, heads=8), lambda: _tokens(4, 256)),
}
"""Steps, the model, and a batch."""

COLLECTORS: dict[str, dict[str, Any]] = {
    "factored, k=4096": {"projector": "factored"},
    "sketch, k=4096": {},
    "sketch, k=4096, Adam": {"preconditioner": "adam"},
    "sketch, k=4096, second pass": {"second_pass": True},
}


def measure_collecting(part: float) -> list[dict[str, Any]]:
    """Return a row for each model and way of collecting, from a part of the cases' steps."""
    rows = []
    for name, (steps, make, draw) in COLLECTED.items():
        for label, options in COLLECTORS.items():
            if "factored" not in label and name == [*COLLECTED][-1]:
                continue  # they take minutes
            torch.manual_seed(0)
            batch, count = draw(), max(2, round(part * steps))
            plain, collected = _steps_in_turn(make, batch, options, count)
            ratio = statistics.median(collected) / statistics.median(plain)
            found = {"model": name, "collecting": label, "step_ms": 1000 * statistics.median(plain)}
            rows.append(found | {"overhead": 100 * (ratio - 1), "steps": count})
            print(f"  {name}, {label}: {rows[-1]['overhead']:.0f} %", flush=True)
    return rows


def _steps_in_turn(
    make: Callable[[], nn.Module], batch: tuple[Tensor, Tensor], options: dict[str, Any], count: int
) -> tuple[list[float], list[float]]:
    """Return the CPU seconds of plain and of collected steps, after ten of each that are checked thoroughly."""
    kind = torch.optim.AdamW if options.get("preconditioner") else torch.optim.SGD
    rows = torch.arange(len(batch[0]))
    seconds: tuple[list[float], list[float]] = [], []
    trained = []
    for _ in seconds:
        torch.manual_seed(1)
        model = make()
        trained.append((model, kind(model.parameters(), lr=1e-3)))
    with tempfile.TemporaryDirectory() as folder:
        collector = GradientCollector(*trained[1], folder, _row_losses, 1000, every=10**9, **options)
        for number in range(10 + count):
            for place in (0, 1) if number % 2 else (1, 0):
                model, optimizer = trained[place]
                start = time.process_time()
                optimizer.zero_grad()
                with collector.batch(batch, rows) if place else contextlib.nullcontext():
                    _row_losses(model, batch).mean().backward()
                optimizer.step()
                if place:
                    collector.step()
                if number >= 10:
                    seconds[place].append(time.process_time() - start)
        collector.close(save=False)
    return seconds


def overhead(case: Case, every: int | str, steps: int, folder: Path, device: str) -> dict[str, Any]:
    """Train two models in turns, one of them recorded.

    Args:
        case: Makes the model and a batch.
        every: The recorder's schedule.
        steps: How many steps each is trained.
        folder: Where the recording goes.
        device: Where the models are.

    Returns:
        Seconds of both and what was recorded.
    """
    _, make, draw = case
    torch.manual_seed(0)
    batch = draw().to(device)
    seconds = {"plain": 0.0, "recorded": 0.0}
    trained = {}
    for name in seconds:
        torch.manual_seed(1)
        model = make().to(device)
        trained[name] = model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def call(work: Callable[[], None]) -> None:
        nonlocal inside
        start = time.perf_counter()
        work()
        inside += time.perf_counter() - start

    def step(name: str) -> None:
        model, optimizer = trained[name]
        optimizer.zero_grad()
        loss = _loss(model, batch)
        loss.backward()
        optimizer.step()
        if name == "recorded":
            call(lambda: recorder.step(loss))

    def timed(name: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        synchronize()
        seconds[name] += time.perf_counter() - start

    for _ in range(3):  # before anything is recorded
        step("plain")
    begin = time.perf_counter()
    recorder = CheckpointRecorder(*trained["recorded"], folder, every=every)
    inside = time.perf_counter() - begin
    seconds["recorded"] += inside
    for number in range(steps):
        for name in sorted(seconds, reverse=bool(number % 2)):
            timed(name, lambda name=name: step(name))
    timed("recorded", lambda: call(recorder.close))
    found = open_recording(folder).checkpoints
    return {**seconds, "inside": inside, "checkpoints": len(found), "megabytes": found[-1].path.stat().st_size / 1e6}


def measure_cost(part: float, repeats: int, device: str, folder: Path | None) -> list[dict[str, Any]]:
    """Return a row for each model and schedule, from a part of the cases' steps."""
    rows = []
    for name, case in CASES.items():
        steps = max(1, round(part * case[0]))
        for every in ("geometric", 100):
            runs = []
            for _ in range(repeats):
                with tempfile.TemporaryDirectory(dir=folder) as directory:
                    runs.append(overhead(case, every, steps, Path(directory), device))
            percent = sorted(100 * (run["recorded"] / run["plain"] - 1) for run in runs)
            rows.append(
                {
                    "model": name,
                    "megabytes": runs[0]["megabytes"],
                    "step_ms": 1000 * statistics.median(run["plain"] for run in runs) / steps,
                    "steps": steps,
                    "every": every,
                    "checkpoints": runs[0]["checkpoints"],
                    "overhead": statistics.median(percent),
                    "low": percent[0],
                    "high": percent[-1],
                    "inside": 100 * statistics.median(run["inside"] / run["plain"] for run in runs),
                }
            )
    return rows


class Course:
    """A training run of a small net on digits, with all inner products of gradients after each step.

    Attributes:
        rates: The learning rate of each of the T steps.
        losses: Its loss.
        exact: ``[N, M]``, the sum over all steps of what the rows of its batch did.
        products: ``[T, N, M]``, float32, of loss gradients after each step.
    """

    def __init__(self, steps: int, num_rows: int, num_targets: int, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        x, y = torch.as_tensor(x / 16, dtype=torch.float32), torch.as_tensor(y)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[: num_rows + num_targets]
        self._x, self._y, self._rows = x[order], y[order], num_rows
        torch.manual_seed(seed)
        self._model = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 10))
        optimizer = torch.optim.SGD(self._model.parameters(), lr=0.3)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=steps, cycle_momentum=False)
        self.rates: list[float] = []
        self.losses: list[float] = []
        self.exact = np.zeros((num_rows, num_targets))
        after = []
        before = self._products()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            batch = torch.randint(0, num_rows, (32,), generator=generator)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self._model(self._x[batch]), self._y[batch])
            loss.backward()
            optimizer.step()
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.losses.append(loss.item())
            np.add.at(self.exact, batch.numpy(), self.rates[-1] / len(batch) * before[batch.numpy()])
            scheduler.step()
            before = self._products()
            after.append(before)
        self.products = np.stack(after)

    def _products(self) -> np.ndarray:
        """Return ``[N, M]``, the inner products of the loss gradients of train rows and targets."""
        values = {name: value.detach() for name, value in self._model.named_parameters()}

        def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            logits = torch.func.functional_call(self._model, values, (x[None],))
            return nn.functional.cross_entropy(logits, y[None])

        grads = torch.vmap(torch.func.grad(loss), (None, 0, 0))(values, self._x, self._y)
        flat = torch.cat([grad.flatten(1) for grad in grads.values()], dim=1)
        return (flat[: self._rows] @ flat[self._rows :].T).numpy()

    def checkpoints(self, schedule: Schedule | None, most: int | None) -> list[CheckpointRecord]:
        """Return what a recorder would have kept; with no schedule, the last state alone."""
        kept: list[CheckpointRecord] = []
        stride, total = 1, 0.0
        for step, (rate, loss) in enumerate(zip(self.rates, self.losses, strict=True), start=1):
            total += rate
            level = schedule.level(step, loss) if schedule else 0
            if level // stride > (kept[-1].level if kept else 0) // stride or step == len(self.rates):
                new = CheckpointRecord(Path(), step, step, None, loss, (rate,), (total,), False, level)
                kept, stride, left_out = thin([*kept, new], stride, most, step == len(self.rates))
                total = sum(left_out)
        return kept

    def agreement(self, kept: Sequence[CheckpointRecord], rate: str) -> float:
        """Return the mean over targets of the rank correlation with the sum over all steps."""
        weights = [(one.learning_rate_sums if rate == "sum" else one.learning_rates)[0] for one in kept]
        scores = sum(weight * self.products[one.step - 1] for weight, one in zip(weights, kept, strict=True))
        ranks = [np.argsort(np.argsort(values, axis=0), axis=0) for values in (np.asarray(scores), self.exact)]
        columns = zip(*(one.T for one in ranks), strict=True)
        return float(np.mean([np.corrcoef(mine, theirs)[0, 1] for mine, theirs in columns]))


def measure_quality(steps: int, num_rows: int, num_targets: int, seeds: int) -> list[dict[str, Any]]:
    """Return a row for each schedule, with means over several training runs."""
    schedules: dict[str, tuple[Schedule | None, int | None]] = {
        "1 (all steps)": (Even(1), None),
        f"{steps // 50}": (Even(steps // 50), None),
        f"{steps // 10}": (Even(steps // 10), None),
        f"{steps // 5}": (Even(steps // 5), None),
        '"geometric"': (Geometric(), None),
        "Geometric(1.3)": (Geometric(1.3), None),
        '"loss"': (LossDecrease(), None),
        '"loss", max_checkpoints=10': (LossDecrease(), 10),
        "the last state alone": (None, None),
    }
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in schedules}
    for seed in range(seeds):
        course = Course(steps, num_rows, num_targets, seed)
        for name, (schedule, most) in schedules.items():
            kept = course.checkpoints(schedule and make_schedule(schedule), most)
            found[name].append((len(kept), course.agreement(kept, "sum"), course.agreement(kept, "last")))
    keys = ("checkpoints", "sum", "last")
    return [{"every": name, **dict(zip(keys, np.mean(rows, 0).tolist(), strict=True))} for name, rows in found.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print three tables and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--part", type=float, default=1.0, help="of the steps that each model is trained")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--what", choices=("all", "overhead", "collecting", "schedules"), default="all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="where recordings are written for a while")
    parser.add_argument("--quick", action="store_true", help="small sizes, rough figures")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    part, repeats = (0.02, 1) if options.quick else (options.part, options.repeats)
    cost: list[dict[str, Any]] = []
    quality: list[dict[str, Any]] = []
    collecting: list[dict[str, Any]] = []
    if options.what in ("all", "overhead"):
        cost = measure_cost(part, repeats, options.device, options.folder)
        print(f"\n{table(cost, COST_COLUMNS)}")
    if options.what in ("all", "collecting"):
        collecting = measure_collecting(part)
        print(f"\n{table(collecting, COLLECTING_COLUMNS)}")
    if options.what in ("all", "schedules"):
        quality = measure_quality(*((50, 60, 10, 1) if options.quick else (600, 300, 60, 3)))
        print(f"\n{table(quality, QUALITY_COLUMNS)}")
    print(f"\n{machine()}")
    name = "recorder_quick" if options.quick else "recorder"
    for which, rows in ((name, cost + quality), (name.replace("recorder", "collecting"), collecting)):
        if rows:
            print(write_results(options.output_dir, which, rows))


if __name__ == "__main__":
    main()
