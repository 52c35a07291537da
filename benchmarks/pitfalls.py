"""Where scores mislead, and what to do about it: six pitfalls of training-data attribution, each in a small run.

Networks are trained on scikit-learn's handwritten digits (300 rows, 100 targets, an MLP 64-32-10 where nothing else is
said). Gradients are exact, so nothing that is seen here comes from projections. Everything is seeded, but another
number of threads or another processor sums in another order and changes the figures a little. In all tables:

- LDS: the linear datamodeling score (Park et al. 2023) against networks trained on 100 random halves of the rows, two
  seeds each. Its 95 % intervals, which are in the file of results, reach 0.01 to 0.05 to either side; those of
  differences on the same halves are narrower.
- checkpoints weigh 1, where nothing else is said.

Run it: python benchmarks/pitfalls.py
        with --only momentum,adam: a part; the other results stay where they are
        with --quick: a smaller run with rough numbers, to pitfalls_quick.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featurize import RESULTS
from pitfalls_rows import augmentation, batch_norm, duplicates
from pitfalls_runs import Settings
from pitfalls_training import adam, late_checkpoints, momentum, schedules
from timing import table, write_results

DEFINITIONS = (__doc__ or "").partition("\n\n")[2].partition("\n\nRun it")[0]
"""What the tables have in common, which is printed before them."""

QUICK = Settings(num_train=120, num_targets=30, num_subsets=20, seeds=(0,))


@dataclass(frozen=True)
class Pitfall:
    """One table.

    Attributes:
        title: What it is about.
        run: Measures it.
        columns: From a row's key to the header of the table.
        meaning: What the columns mean.
    """

    title: str
    run: Callable[[Settings], list[dict[str, Any]]]
    columns: dict[str, str]
    meaning: str


PITFALLS = {
    "late": Pitfall(
        "Late checkpoints",
        late_checkpoints,
        {
            "run": "run",
            "checkpoints": "checkpoints",
            "loss": "loss",
            "slope": "median 1 - p",
            "lost_slopes": "1 - p lost",
            "lost_gradients": "gradient lost",
            "half": "rows for half",
            "tracin": "LDS tracin",
            "cosine": "LDS cosine",
            "influence": "LDS influence",
            "ridge": "its λ",
        },
        "Rows for half: how many rows hold half of the sum of all absolute TracIn scores. 1 - p lost: share of rows "
        "whose 1 - p is 0 if it is subtracted in float32. Gradient lost: share of rows whose whole loss gradient is 0 "
        "in float16.",
    ),
    "schedules": Pitfall(
        "Learning-rate schedules",
        schedules,
        {
            "schedule": "schedule",
            "checkpoints": "after epochs",
            "rule": "weights",
            "spearman": "Spearman",
            "pearson": "Pearson",
            "total": "score / change",
        },
        "Correlations are with TracInIdeal of a run with batches of one row, over rows, mean over targets. Score / "
        "change: the sum of a target's scores over what its loss fell by, median over targets; 1 is right.",
    ),
    "momentum": Pitfall(
        "Momentum",
        momentum,
        {
            "momentum": "m",
            "ratio": "score / score at m = 0",
            "same": "Spearman with m = 0",
            "total": "score / change",
            "spearman": "Spearman with TracInIdeal",
            "lds": "LDS",
        },
        "The rate is 0.003 (1 - m), so that runs move alike, with batches of one row; for the LDS 0.2 (1 - m) with "
        "batches of 20. Score / change: as for schedules.",
    ),
    "adam": Pitfall(
        "Adam",
        adam,
        {
            "method": "scores",
            "lds": "LDS",
            "gain": "over the first, 95 %",
            "spearman_0.0": "Spearman, β₁ = 0",
            "pearson_0.0": "Pearson, β₁ = 0",
            "total_0.0": "score / change, β₁ = 0",
            "spearman_0.9": "Spearman, β₁ = 0.9",
            "pearson_0.9": "Pearson, β₁ = 0.9",
            "total_0.9": "score / change, β₁ = 0.9",
        },
        "LDS: AdamW. Correlations: with TracInIdeal of two other runs, Adam with batches of one row.",
    ),
    "batch_norm": Pitfall(
        "Batch norm",
        batch_norm,
        {
            "network": "network",
            "step": "step",
            "loss": "loss",
            "cosine": "cosine",
            "ratio": "norm ratio",
            "step_cosine": "cosine of sums",
            "lds": "LDS",
            "cosine_settled": "settled: cosine",
            "ratio_settled": "norm ratio",
            "step_cosine_settled": "cosine of sums",
            "lds_settled": "LDS",
        },
        "The gradient of a row in eval mode against that which it has in a batch of 20 in training mode: mean cosine, "
        "median of the norms' ratio, cosine of the sums over the batch. Settled: the same with running statistics "
        "computed anew at the checkpoint's weights. LDS: TracIn with that checkpoint alone.",
    ),
    "augmentation": Pitfall(
        "Augmentation",
        augmentation,
        {
            "checkpoints": "checkpoints",
            "rows": "rows",
            "tracin": "LDS tracin",
            "gain": "over as they are, 95 %",
            "cosine": "LDS cosine",
            "same": "Spearman with 16 other views",
            "size": "size",
        },
        "Training saw each image moved by up to one pixel. Spearman and size (root mean square): of TracIn scores, "
        "against the mean over 16 other views.",
    ),
    "duplicates": Pitfall(
        "Duplicated rows",
        duplicates,
        {
            "copies": "copies",
            "left_out": "left out",
            "true": "true change",
            "tracin": "tracin",
            "trak": "trak",
            "influence": "influence",
            "tracin_pearson": "Pearson tracin",
            "trak_pearson": "Pearson trak",
            "influence_pearson": "Pearson influence",
        },
        "Softmax regression, 10 rows with copies. True change: of the targets' margins when one copy or all copies of "
        "a row are left out; beside it what scores say: root mean squares relative to a row without copies. Pearson: "
        "of scores with true changes, over these 10 rows and 10 rows without copies, mean over targets.",
    ),
}
"""By the names that ``--only`` takes."""


def kept_results(path: Path, chosen: Collection[str]) -> list[dict[str, Any]]:
    """Return the rows of a file of results that belong to other pitfalls than those chosen; none without a file."""
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["pitfall"] in PITFALLS and row["pitfall"] not in chosen]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the pitfalls, print a table of each and write the results.

    Args:
        arguments: The command line; None: that of the process.

    Raises:
        SystemExit: A name is not known.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", help=f"names, with commas between them, of {', '.join(PITFALLS)}")
    parser.add_argument("--quick", action="store_true", help="fewer rows, targets and subsets")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    chosen = options.only.split(",") if options.only else list(PITFALLS)
    unknown = [name for name in chosen if name not in PITFALLS]
    if unknown:
        raise SystemExit(f"--only {','.join(unknown)} is not known; expected names of {', '.join(PITFALLS)}")
    print(DEFINITIONS)
    name_of_file = "pitfalls_quick" if options.quick else "pitfalls"
    results = kept_results(options.output_dir / f"{name_of_file}.json", chosen)
    for name in chosen:
        pitfall, start = PITFALLS[name], time.perf_counter()
        rows = pitfall.run(QUICK if options.quick else Settings())
        print(f"\n## {pitfall.title}\n\n{pitfall.meaning}\n\n{table(rows, pitfall.columns)}", flush=True)
        print(f"\n{time.perf_counter() - start:.0f} s")
        results += [{"pitfall": name, **row} for row in rows]
    results.sort(key=lambda row: list(PITFALLS).index(row["pitfall"]))
    print(f"\n{write_results(options.output_dir, name_of_file, results)}")


if __name__ == "__main__":
    main()
