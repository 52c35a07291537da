"""Featurize and score on several processes with torchrun, and get what one process gets.

Under torchrun, with ``torch.distributed`` initialised, `tracer.attribute` divides the rows among the processes: each
writes blocks of rows of its own into one store, and all return the same attribution. Nothing else in a script changes.
The first process trains, while the others wait.

    torchrun --standalone --nproc-per-node 2 examples/torchrun_digits.py --output-dir runs/torchrun_digits
    python examples/torchrun_digits.py --compare 2      # the same, compared with one process

A run that was killed is started again with the same number of processes, and computes only what is missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from recorded_training import train_or_reuse
from run_directory import claim_directory
from torch import nn
from torch.utils.data import TensorDataset
from vision_data import load_vision

from tracer import Attribution, Tracer, attribute, load_checkpoints, verify


def make_model() -> nn.Module:
    """Return a conv net of about 9,000 parameters, always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 30),
            nn.ReLU(),
            nn.Linear(30, 10),
        )


def load_rows(num_train: int, num_targets: int) -> tuple[TensorDataset, TensorDataset]:
    """Return training rows and targets of the digits; each process has all and reads its own."""
    data = load_vision("digits", None).subset(num_train, num_targets, seed=0)
    train_images, test_images = data.tensors()
    train = TensorDataset(train_images, torch.as_tensor(data.train_labels))
    return train, TensorDataset(test_images, torch.as_tensor(data.test_labels))


@contextmanager
def processes() -> Iterator[int]:
    """Join the other processes where torchrun started this one.

    Yields:
        This process's number.
    """
    if "RANK" not in os.environ:
        yield 0
        return
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def work(options: argparse.Namespace) -> None:
    """Train in the first process, then featurize and score in all."""
    train, targets = load_rows(options.num_train, options.num_targets)
    with processes() as rank:
        count = dist.get_world_size() if dist.is_initialized() else 1
        model, checkpoint_dir = make_model(), options.output_dir / "checkpoints"
        if rank == 0:
            train_or_reuse(
                model, train, checkpoint_dir, epochs=options.epochs, batch_size=32, learning_rate=0.05, keep=3
            )
        if dist.is_initialized():
            dist.barrier()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
            model = model.cuda()
        found = attribute(
            model, "image_classification", train, targets, load_checkpoints(checkpoint_dir),
            save_dir=store_of(options.output_dir, count), proj_dim=options.proj_dim, storage="float32",
        )  # fmt: skip
        mine = list(found.tracer.shard(train).indices)
        print(f"process {rank} of {count}: {f'rows {mine[0]} to {mine[-1]}' if mine else 'no rows'}", flush=True)
        scores = np.asarray(found.scores)  # all call it: each computes a share
        if rank == 0:
            np.save(options.output_dir / f"scores_{count}.npy", scores)


def store_of(directory: Path, processes: int) -> Path:
    """Return the directory of the store of a run of so many processes."""
    return directory / f"store_{processes}"


def compare(options: argparse.Namespace) -> None:
    """Run alone, then under torchrun, and say how much stored rows, scores and top rows differ."""
    print("One process:")
    work(options)
    print(f"{options.compare} processes, started by torchrun:", flush=True)
    own = [str(Path(__file__).resolve()), *(["--quick"] if options.quick else [])]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.compare)]
    started = subprocess.run(
        [sys.executable, *launch, *own, "--worker", "--output-dir", str(options.output_dir)],
        check=False, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if started.returncode:
        raise SystemExit(f"torchrun ended with {started.returncode}:\n{started.stderr}")
    print("".join(f"{line}\n" for line in sorted(started.stdout.splitlines()) if line.startswith("process")), end="")
    alone, together = (Tracer.open(store_of(options.output_dir, count)) for count in (1, options.compare))
    one, many = (np.load(options.output_dir / f"scores_{count}.npy") for count in (1, options.compare))
    difference = float(np.abs(one - many).max() / np.abs(one).max())
    rows = np.abs(alone.self_influence() / together.self_influence() - 1).max()
    tops = [Attribution(reader, "targets").top(5) for reader in (alone, together)]
    same = float((tops[0].indices == tops[1].indices).mean())
    print(f"\nscores [{one.shape[0]:,} x {one.shape[1]}] differ by {difference:.0e} of the largest at most")
    print(f"self-influence differs by {rows:.0e} of its value at most; {same:.1%} of the top five rows are the same")
    intact = verify(store_of(options.output_dir, options.compare)).ok
    print(f"the store of {options.compare} processes is {'whole' if intact else 'damaged'}")
    assert intact and not len(together.remaining(0)), "all rows should be stored and whole"
    assert difference < 1e-5 and rows < 1e-4, "several processes should give the scores of one"
    assert same > 0.99, "several processes should rank as one does"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/torchrun_digits"))
    parser.add_argument("--compare", type=int, metavar="N", help="start N processes and compare with one")
    parser.add_argument("--proj-dim", type=int, default=1024, help="numbers stored of each gradient (1024)")
    parser.add_argument("--quick", action="store_true", help="few rows; compares two processes with one")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one of those that --compare starts
    options = parser.parse_args(arguments)
    sizes = (256, 20, 3) if options.quick else (1297, 200, 12)
    options.num_train, options.num_targets, options.epochs = sizes
    if options.quick:
        options.proj_dim = 256
        options.compare = options.compare or 2
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Do one process's work, or compare several processes with one."""
    options = parse(arguments)
    settings = {name: getattr(options, name) for name in ("num_train", "num_targets", "epochs", "proj_dim")}
    if int(os.environ.get("RANK", 0)) == 0:
        claim_directory(options.output_dir, settings)
    if options.compare and not options.worker:
        compare(options)
    else:
        work(options)


if __name__ == "__main__":
    main()
