"""Cost of per-sample gradients by architecture, in plain passes: the models of `make zoo` at batch 16.

    python benchmarks/architectures.py                  # transformers; with timm installed, its models too
    python benchmarks/architectures.py --only Mamba

A plain pass is one forward and one backward of the batch's sum; both run in CPU time, alternating, after all batches
that are checked by default. The models are small, so what is measured is mostly the overhead of each operation.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timing import table, write_results

from tracer import TracerError
from tracer.api.sinks import DroppingSink
from tracer.data.named_tasks import make_task
from tracer.gradients import GradientEngine, isolated
from tracer.gradients.audit import FIRST_BATCHES
from tracer.gradients.selection import select_parameters

RESULTS = Path(__file__).parent / "results"
BATCH_SIZE = 16
LIMIT = 3.0


def entries() -> Iterator[Any]:
    """Yield the entries of the zoo that are trained whole and not refused."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from zoo.tables import make_torchvision_importable

    make_torchvision_importable()
    tables = []
    for module, name in (
        ("decoders", "DECODERS"),
        ("encoders", "ENCODERS"),
        ("vision", "VISION"),
        ("audio_and_mixed", "AUDIO_AND_MIXED"),
        ("timm_models", "TIMM_MODELS"),
    ):
        tables.append(getattr(__import__(f"zoo.{module}", fromlist=[name]), name))
    for each in tables:
        yield from (entry for entry in each if entry.refused is None and entry.fault is None)


def measure(entry: Any, rounds: int) -> dict[str, Any]:
    """Return the row of an entry: its cost, and the parameters that the fallback computes."""
    from zoo.harness import fresh, take

    model = fresh(entry).float()
    batch = in_single(take(entry.batch(), torch.arange(BATCH_SIZE) % 13))
    names = select_parameters(model)
    engine = GradientEngine(model, make_task(entry.task), names)
    parameters = [value for value in model.parameters() if value.requires_grad]

    def plain() -> None:
        outputs = engine.task.outputs(model, batch).output
        torch.autograd.grad(outputs.sum(), parameters, allow_unused=True)

    def ours() -> None:
        engine.compute(batch, BATCH_SIZE, DroppingSink())

    with isolated(model, names, engine.device):
        for _ in range(FIRST_BATCHES + 1):
            ours()
        seconds = alternate({"plain": plain, "ours": ours}, rounds, lambda: forget(model))
    ratio = statistics.median(a / b for a, b in zip(seconds["ours"], seconds["plain"], strict=True))
    modules = sorted({type(model.get_submodule(name.rpartition(".")[0])).__name__ for name in engine.fallback})
    return {
        "model": entry.name,
        "passes": ratio,
        "plain_ms": 1e3 * statistics.median(seconds["plain"]),
        "fallback": list(engine.fallback),
        "modules": ", ".join(modules),
        "alone": engine.runs_samples_alone,
    }


def forget(model: torch.nn.Module) -> None:
    """Drop what modules with a ``train`` method of their own derived from weights in eval mode."""
    for module in model.modules():
        if type(module).train is not torch.nn.Module.train:
            module.train(True)
            module.train(False)


def in_single(batch: Any) -> Any:
    """Return a batch with its floats in float32."""
    if isinstance(batch, torch.Tensor):
        return batch.float() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: in_single(value) for key, value in batch.items()}
    return type(batch)(map(in_single, batch)) if isinstance(batch, (tuple, list)) else batch


def alternate(
    contenders: dict[str, Callable[[], None]], rounds: int, prepare: Callable[[], None]
) -> dict[str, list[float]]:
    """Run the contenders in turn, each prepared, and return the CPU seconds of each round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, work in contenders.items():
            prepare()
            start = time.process_time()
            work()
            seconds[name].append(time.process_time() - start)
    return seconds


def main() -> None:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", help="models whose name has this in it")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for entry in entries():
        if options.only and options.only not in entry.name:
            continue
        try:
            rows.append(measure(entry, options.rounds))
        except (TracerError, ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            skipped[entry.name] = str(error).partition("\n")[0][:100]
            continue
        print(f"{rows[-1]['passes']:6.2f}  {entry.name}  {rows[-1]['modules']}", flush=True)
    for name, reason in skipped.items():
        print(f"not measured: {name}: {reason}")
    rows.sort(key=lambda row: -row["passes"])
    above = sum(row["passes"] > LIMIT for row in rows)
    print(f"\n{table(rows, {'model': 'model', 'passes': 'plain passes', 'modules': 'fallback in'})}")
    print(f"\n{above} of {len(rows)} architectures take more than {LIMIT:g} plain passes at batch {BATCH_SIZE}.")
    print(write_results(options.output_dir, "architectures", rows))


if __name__ == "__main__":
    main()
