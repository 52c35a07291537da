"""The fault campaign of `make faults`: faults of every kind at random moments and places, and what comes of them.

Each trial breaks a copy of a small store, or of a process at work on it. Then all questions are asked, what errors say
is done, everything that is left of the work is done, and all questions are asked again. A trial is as it should be if
no answer was ever wrong and the last ones are right.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.trials import BAD, GOOD, KINDS, Stores, Trial
from faults.world import World

FAULTS = ("kill", "power failure", "full disk", "two processes")
STORAGES, SHARES = ("float32", "float16", "int8", "none"), (0.4, 0.2, 0.2, 0.2)
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
"""A folder whose disk nobody waits for, and which gives no number of a file twice, as `power` expects."""


def campaign(trials: int, seed: int, folder: Path, only: str, minutes: float, jobs: int) -> list[Trial]:
    """Run trials of all kinds, half of them of processes and half of damaged files, a few at a time."""
    kinds, stores, running, done = [*FAULTS, *KINDS], {}, [], []
    weights = np.array([(len(KINDS) / len(FAULTS) if kind in FAULTS else 1) * (only in kind) for kind in kinds])
    end = time.monotonic() + 60 * minutes
    for number in range(seed, seed + trials):
        if time.monotonic() > end:
            break
        rng = np.random.default_rng(number)
        storage, kind = rng.choice(STORAGES, p=SHARES), rng.choice(kinds, p=weights / weights.sum())
        if storage not in stores:
            stores[storage] = Stores(folder, World(str(storage)))
        if kind in KINDS and not stores[storage].files(stores[storage].folder / "whole", kind):
            kind = "marks"
        running.append(Trial(str(kind), number, stores[storage], folder / f"trial{number}").start())
        if len(running) == jobs:
            done.append(ended(running.pop(0)))
    return done + [ended(trial) for trial in running]


def ended(trial: Trial) -> Trial:
    """Wait for a trial, and print what was wrong."""
    if trial.end().outcome in BAD:
        said = "\n  ".join(dict.fromkeys(trial.what))
        print(f"seed {trial.seed}, {trial.stores.world.storage}, {trial.fault}: {trial.outcome}\n  {said}", flush=True)
    return trial


def table(trials: list[Trial]) -> str:
    """Return the outcomes as a table: a line for each kind of fault."""
    outcomes = [*GOOD, *(each for each in BAD if any(trial.outcome == each for trial in trials))]
    lines = ["| fault | trials | " + " | ".join(outcomes) + " |", "|---" * (len(outcomes) + 2) + "|"]
    for name, kinds in [*((kind, {kind}) for kind in (*FAULTS, *KINDS)), ("all", {*FAULTS, *KINDS})]:
        counts = Counter(trial.outcome for trial in trials if trial.fault in kinds)
        if counts:
            cells = [str(counts[each]) for each in outcomes]
            lines.append(f"| {name} | {counts.total()} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the first trial; the next one has the next seed")
    parser.add_argument("--minutes", type=float, default=60, help="after which no trial begins")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--only", default="", help="kinds of faults with this in their name")
    parser.add_argument("--outcome", type=Path, default=Path("build/faults/outcome.md"))
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        begin = time.monotonic()
        trials = campaign(chosen.trials, chosen.seed, Path(folder), chosen.only, chosen.minutes, chosen.jobs)
        seconds = time.monotonic() - begin
    text = f"{len(trials)} trials, seeds {chosen.seed} to {chosen.seed + len(trials) - 1}.\n\n{table(trials)}\n"
    chosen.outcome.parent.mkdir(parents=True, exist_ok=True)
    chosen.outcome.write_text(f"# Outcomes of the fault campaign\n\n{text}")
    print(f"{text}\n{seconds:.0f} s; {chosen.outcome}")
    sys.exit(any(trial.outcome in BAD for trial in trials))


if __name__ == "__main__":
    main()
