"""Trace a regression on a table: find wrong targets, and name the rows that moved a prediction.

scikit-learn's diabetes data (442 patients, 10 measurements; the target is the progression of the disease after a year),
or a CSV file of numbers of your own (``--csv FILE --target COLUMN``, such as California housing). The targets of some
training rows are moved by two standard deviations (``--corrupt``), and a small perceptron is trained on them.

``--loss squared`` is tracer's task ``regression``. ``--loss huber`` is a task given by its loss alone: a function
``(model, batch) -> loss of each row``, as robust losses, quantiles and ranking losses can be.

Run it: python examples/tabular_regression.py
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from recorded_training import load_weights, train_or_reuse
from run_directory import claim_directory
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tracer import attribute
from tracer.metrics import mislabel_detection
from tracer.retraining import Recipe, retrain

CHECKED_SHARES = (0.05, 0.1, 0.2, 0.3)

LEAST_ROWS = 20
"""How many rows a table needs."""

CLAIMED_ROWS = 100
"""From how many training rows on the script asserts what it found; with fewer, chance decides and it only reports."""


class Table(NamedTuple):
    """Standardized rows.

    Attributes:
        train_x: ``[N, D]``.
        train_y: ``[N]``, some of them corrupted.
        corrupted: ``[N]``, bool.
        test_x: ``[M, D]``.
        test_y: ``[M]``.
        columns: The names of the D columns.
        unit: One standard deviation of the target in its own unit, and its mean.
    """

    train_x: Tensor
    train_y: Tensor
    corrupted: np.ndarray
    test_x: Tensor
    test_y: Tensor
    columns: list[str]
    unit: tuple[float, float]


def read_csv(path: Path, target: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return the numeric columns of a CSV file with a header; rows with gaps are left out.

    Args:
        path: The file.
        target: The column that is predicted.

    Returns:
        Inputs ``[N, D]``, targets ``[N]`` and the names of the D columns.

    Raises:
        SystemExit: The file cannot be read, there is no such column, or there are too few rows of numbers.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SystemExit(f"{path} cannot be read as a CSV file: {error}.") from None
    names = list(lines[0]) if lines else []
    if target not in names:
        raise SystemExit(f"{path} has no column {target!r}; it has {', '.join(names) or 'no rows'}. Pass --target.")

    def is_number(text: str | None) -> bool:
        try:
            return bool(np.isfinite(float(text or "")))
        except ValueError:
            return False

    numeric = [name for name in names if sum(is_number(line[name]) for line in lines) > len(lines) / 2]
    rows = [[float(line[name]) for name in numeric] for line in lines if all(is_number(line[name]) for name in numeric)]
    if target not in numeric or len(rows) < LEAST_ROWS:
        raise SystemExit(
            f"{path} has {len(rows)} rows of numbers, columns {', '.join(numeric)}; {LEAST_ROWS} rows are needed."
        )
    values, place = np.array(rows), numeric.index(target)
    return np.delete(values, place, axis=1), values[:, place], [name for name in numeric if name != target]


def load_table(options: argparse.Namespace) -> Table:
    """Read, split, standardize by the training rows, and corrupt some of their targets."""
    if options.csv is not None:
        x, y, columns = read_csv(options.csv, options.target)
    else:
        from sklearn.datasets import load_diabetes  # not needed with --csv

        held = load_diabetes(scaled=False)
        x, y, columns = held.data, held.target, [str(name) for name in held.feature_names]
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(y))[: options.rows]
    train, test = np.split(order, [round(0.75 * len(order))])
    x = (x - x[train].mean(0)) / (x[train].std(0) + 1e-12)
    mean, spread = float(y[train].mean()), float(y[train].std())
    y = (y - mean) / spread
    corrupted = np.zeros(len(train), dtype=bool)
    corrupted[rng.choice(len(train), size=round(options.corrupt * len(train)), replace=False)] = True
    moved = y[train] + 2.0 * corrupted * rng.choice([-1.0, 1.0], size=len(train))
    train_x, train_y, test_x, test_y = (
        torch.as_tensor(values, dtype=torch.float32) for values in (x[train], moved, x[test], y[test])
    )
    return Table(train_x, train_y, corrupted, test_x, test_y, columns, (spread, mean))


def huber_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the Huber loss of each row, ``[B]``: what tracer needs of a task of your own."""
    x, y = batch
    return nn.functional.huber_loss(model(x), y, reduction="none")


LOSSES: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "squared": ("regression", nn.functional.mse_loss),
    "huber": (huber_loss, nn.functional.huber_loss),
}
"""The task for tracer, and the mean loss that is trained on."""


def make_layers(num_columns: int) -> nn.Module:
    """Return a perceptron with one output a row, ``[B, D]`` to ``[B]``."""
    return nn.Sequential(
        nn.Linear(num_columns, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0)
    )


def make_model(num_columns: int, seed: int) -> nn.Module:
    """Return an untrained perceptron, the same for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_layers(num_columns)


def print_found(rankings: dict[str, np.ndarray], corrupted: np.ndarray) -> None:
    """Print which share of the corrupted targets is found when the rows that rank highest are checked."""
    print(f"\nShare of the {corrupted.sum()} corrupted targets found when rows are checked from the top")
    print(f"{'':<34}" + "".join(f"{f'top {share:.0%}':>9}" for share in CHECKED_SHARES))
    for name, scores in rankings.items():
        found = mislabel_detection(scores, corrupted)
        print(f"{name:<34}" + "".join(f"{found.recall_at(share):>9.0%}" for share in CHECKED_SHARES))
    print(f"{'chance':<34}" + "".join(f"{share:>9.0%}" for share in CHECKED_SHARES))


def print_highest(table: Table, scores: np.ndarray, fitted: Tensor, num_rows: int = 10) -> None:
    """Print the rows that rank highest, in the data's unit: there where none is known to be wrong.

    Args:
        table: The rows.
        scores: ``[N]``.
        fitted: ``[N]``, the predictions of the training rows.
        num_rows: How many.
    """
    spread, mean = table.unit
    print("\nNo target was corrupted. Training rows of the highest self-influence")
    print(f"{'row':<8}{'self-influence':>16}{'target':>10}{'predicted':>11}")
    for row in np.argsort(-scores)[:num_rows]:
        target, seen = (float(values[row]) * spread + mean for values in (table.train_y, fitted))
        print(f"{row:<8}{scores[row]:>16.3g}{target:>10.4g}{seen:>11.4g}")


def print_movers(table: Table, predicted: Tensor, raises: np.ndarray, num_targets: int = 3) -> None:
    """Print the rows that moved some predictions most, up or down, in the data's unit.

    Args:
        table: The rows.
        predicted: ``[M]``.
        raises: ``[N, M]``, how much a row raises each prediction.
        num_targets: How many predictions.
    """
    spread, mean = table.unit
    print("\nTraining rows whose removal would move a prediction most, by estimate (* corrupted)")
    for target in range(min(num_targets, len(predicted))):
        truth, seen = (float(values[target]) * spread + mean for values in (table.test_y, predicted))
        print(f"  test row {target}: target {truth:.0f}, predicted {seen:.0f}")
        for row in np.argsort(-np.abs(raises[:, target]))[:3]:
            of_row, mark = float(table.train_y[row]) * spread + mean, "*" if table.corrupted[row] else " "
            print(f"    without row {row:>3}{mark} (target {of_row:>4.0f}): {-raises[row, target] * spread:+.1f}")


def print_removal(table: Table, raises: np.ndarray, options: argparse.Namespace) -> None:
    """Remove the rows that raise each of some predictions most, train again, and print what became of it."""
    num_targets, num_seeds = (3, 3) if options.quick else (6, 10)
    num_targets, removed = min(num_targets, len(table.test_y)), min(20, len(raises) // 5)
    masks = np.ones((num_targets + 1, len(raises)), dtype=bool)
    for target in range(num_targets):
        masks[target + 1, np.argsort(-raises[:, target])[:removed]] = False
    recipe = Recipe(learning_rate=options.learning_rate, batch_size=16, epochs=options.epochs)
    targets, seed = (table.test_x[:num_targets], table.test_y[:num_targets]), options.seed
    build = functools.partial(make_layers, table.train_x.shape[1])
    train = table.train_x, table.train_y
    truth = retrain(
        build, "regression", train, targets, masks, recipe, seeds=range(seed, seed + num_seeds), paired=True,
        save_dir=options.output_dir / "retrained",
    )  # fmt: skip
    spread = table.unit[0]
    print(f"\nWithout the {removed} rows that raise a prediction most (trained again with {num_seeds} seeds)")
    print(f"{'test row':<12}{'estimate':>10}{'retrained':>11}")
    for target in range(num_targets):
        change = float(truth.outputs[target + 1, target] - truth.outputs[0, target]) * spread
        estimate = -float(raises[~masks[target + 1], target].sum()) * spread
        print(f"{target:<12}{estimate:>+10.1f}{change:>+11.1f}")
        assert change < 0 or len(raises) < CLAIMED_ROWS, "without the rows that raise a prediction it should fall"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, help="a CSV file with a header (scikit-learn's diabetes data)")
    parser.add_argument("--target", default="target", help="the column of it that is predicted")
    parser.add_argument("--rows", type=int, help="how many rows, drawn at random (all)")
    parser.add_argument("--loss", choices=sorted(LOSSES), default="squared")
    parser.add_argument("--corrupt", type=float, default=0.1, help="share of corrupted training targets, or 0 (0.1)")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=0.02, help="of plain SGD, constant (0.02)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/tabular_regression"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    options = parser.parse_args(arguments)
    if options.corrupt != 0 and not 0.01 <= options.corrupt <= 0.4:
        parser.error(f"--corrupt must be 0 or in 0.01 to 0.4; got {options.corrupt}")
    if options.rows is not None and options.rows < LEAST_ROWS:
        parser.error(f"--rows must be {LEAST_ROWS} or more, for a quarter of them are test rows; got {options.rows}")
    if options.epochs < 1:
        parser.error(f"--epochs must be 1 or more; got {options.epochs}")
    if options.quick:
        options.epochs = 20
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, attribute, and print what is found."""
    options = parse(arguments)
    table, (task, loss) = load_table(options), LOSSES[options.loss]  # first: a wrong table must not claim the directory
    names = ("target", "rows", "loss", "corrupt", "epochs", "learning_rate", "seed")
    source = "diabetes" if options.csv is None else str(options.csv)
    claim_directory(options.output_dir, {"data": source} | {name: getattr(options, name) for name in names})
    num_train, num_columns = table.train_x.shape
    print(
        f"{num_train:,} rows of {num_columns} columns, {table.corrupted.sum()} with corrupted targets; "
        f"{options.loss} loss"
    )
    train = TensorDataset(table.train_x, table.train_y)
    model = make_model(num_columns, options.seed)
    checkpoints = train_or_reuse(
        model, train, options.output_dir / "checkpoints",
        epochs=options.epochs, batch_size=16, learning_rate=options.learning_rate, loss=loss, seed=options.seed,
    )  # fmt: skip

    # Scores of `target="output"`, the default of influence, are of the prediction, in the direction in which the loss
    # of the target falls. With labels above all predictions that is always upwards.
    test_labels = table.test_y if options.loss == "huber" else torch.full_like(table.test_y, 100.0)
    found = attribute(
        model, task, train, (table.test_x, test_labels), checkpoints,
        save_dir=options.output_dir / "store", estimator="influence", proj_dim=1024,
    )  # fmt: skip
    load_weights(model, checkpoints[-1][0])
    with torch.no_grad():
        fitted, predicted = model(table.train_x), model(table.test_x)
    explained = 1 - float((predicted - table.test_y).square().mean() / table.test_y.var(correction=0))
    print(f"Test rows: R² {explained:.2f}")
    self_influence = found.self_influence()
    wrong = table.corrupted
    rankings = {
        "self-influence": self_influence,
        "residual at the last checkpoint": (fitted - table.train_y).abs().numpy(),
        "target's distance from the mean": table.train_y.abs().numpy(),
    }
    if wrong.any():
        print_found(rankings, wrong)
    else:
        print_highest(table, self_influence, fitted)
    if options.loss == "squared":  # there the output is the prediction itself
        print_movers(table, predicted, np.asarray(found.scores))
        print_removal(table, np.asarray(found.scores), options)
    if wrong.any() and num_train >= CLAIMED_ROWS:
        share = mislabel_detection(self_influence, wrong).recall_at(0.2)
        assert share > 0.4, (
            f"a fifth of the rows should hold over twice chance's share of corrupted targets, not {share:.0%}"
        )


if __name__ == "__main__":
    main()
