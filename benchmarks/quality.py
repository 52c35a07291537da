"""How well scores predict retraining and find wrong labels: tracer, the field's methods and cheap baselines.

Eight networks are trained as usual, and every method gets the same rows, targets and checkpoints. With scores
``[N, M]``, positive for proponents:

- LDS: the linear datamodeling score (Park et al. 2023): the network is trained anew on random halves of the training
  rows; a target's score is Spearman's correlation, over the halves, of the summed scores of a half's rows with the
  target's true output, averaged over targets. The interval is a 95 % bootstrap over halves. Outputs are margins, of
  language models minus the loss, averaged over the seeds of a half.
- removal: Spearman's correlation of the summed scores of removed rows with what leaving them out does to the output,
  averaged over targets: one row at a time for logistic regression, 20 at a time for the other digits. Both trainings
  begin with the same weights and pass the rows in the same order.
- AUC, own: the area under the recovery curve of flipped labels (Pruthi et al. 2020) when rows are checked in the order
  of their influence on themselves, or of a baseline's own ranking; a random order has 0.5.
- AUC, harm: the same in the order of the harm that a row does to the targets, minus the mean of its scores.
- CPU seconds: of the process. Each method runs in one of its own.
- plain passes: these seconds over those of one forward and backward of all rows and targets at every checkpoint.
- peak MB: by how much the method raised the process's own memory at most, of all its settings.
- bytes a row: what lies on disk for a training row, of all checkpoints. Kernels, which do not grow with the rows, are
  not in it.

Methods with a regularization have a row for their default, and where others were tried, one for the best of them by the
LDS itself: more than a user without retraining can know, so the default is what compares. ``3 runs``: checkpoints of
three independently trained networks instead of one.

Install the peers with ``pip install -e '.[peers]'``, and those that ask for a torchvision, which may bring another
torch, or for an older Python, without what they ask for:
        pip install --no-deps kronfluence==1.0.1 einconv einops opt_einsum
        pip install --no-deps bergson==2.5.1 simple-parsing docstring_parser ml_dtypes natsort petname optree torchopt
        pip install --no-deps --ignore-requires-python logix-ai==0.1.1
Then run: python benchmarks/quality.py
        with --tasks logistic,mlp or --methods tracer,random: a part; the other results stay where they are
        with --quick: a small run with rough numbers, to quality_quick.json and .png
        with --show: no run, the tables and figures of what was measured, and who leads each task

What was retrained is kept in the folder that --cache names, and taken up again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from featurize import RESULTS
from fidelity import rank_correlation
from quality_baselines import baseline_methods, logits_of
from quality_collected import collected_methods
from quality_figures import draw
from quality_grading import Truth, grade_all, ground_truth
from quality_methods import Case, Found, Method, clock, first_line, row_losses
from quality_peers import exact_agreement, peer_methods, traker_agreement
from quality_process import ProcessError, in_own_process
from quality_tables import COLUMNS, comparisons, heading, leaders, report, summary
from quality_tasks import TASKS, Data, Task
from quality_tracer import needs_few_parameters, tracer_methods
from timing import machine, peak_mb, write_results

from tracer.retraining import check_smoothness, train_models

DEFINITIONS = (__doc__ or "").partition("\n\n")[2].partition("\n\nInstall")[0]
"""What the columns of the table mean, which is printed with them."""

RUN_SEEDS = (1000, 1001, 1002)
"""Of the attributed networks; those of subsets count from 0."""

PAIRS = [
    ("captum TracInCP", "tracer tracin, exact"),
    ("captum TracInCPFast", "tracer tracin, last layer"),
    ("dattri TracIn, k=512", "tracer tracin, exact"),
]
"""Methods that compute the same thing, whose scores are compared."""


def shortened(task: Task, data: Data) -> tuple[Task, Data]:
    """Return a task and its rows cut down to what takes seconds."""
    recipe = replace(task.recipe, epochs=3)
    small = replace(
        task,
        recipe=recipe,
        checkpoint_epochs=(1, 3),
        num_subsets=min(task.num_subsets, 16),
        num_removals=min(task.num_removals, 8),
    )
    train, targets = (
        tuple(column[:count] for column in rows) for rows, count in ((data.train, 200), (data.targets, 20))
    )
    return small, Data(train, targets, None if data.flipped is None else data.flipped[:200])


def make_case(task: Task, data: Data) -> Case:
    """Train three independent networks, and three at half strength, and return the first one's case."""
    options: dict[str, Any] = {"seeds": RUN_SEEDS, "checkpoint_epochs": task.checkpoint_epochs}
    found = train_models(task.make_model, task.kind, data.train, task.recipe, **options)
    half = train_models(task.make_model, task.kind, data.train, task.recipe.at_strength(0.5), **options)
    runs = [[(kept.state, kept.learning_rate) for kept in trained.checkpoints] for trained in found]
    model = task.make_model()
    model.load_state_dict(found[0].state)
    return Case(
        task=task.kind,
        model=model.eval(),
        train=data.train,
        targets=data.targets,
        checkpoints=runs[0],
        optimizers=[kept.optimizer_state for kept in found[0].checkpoints],
        ensemble=[checkpoint for run in runs for checkpoint in run],
        rate_sums=[kept.learning_rate_sum for trained in found for kept in trained.checkpoints],
        half=[(kept.state, kept.learning_rate_sum) for trained in half for kept in trained.checkpoints],
        last_layer=task.last_layer,
        make_model=task.make_model,
        recipe=task.recipe,
    )


def plain_pass(case: Case) -> float:
    """Return the seconds of one forward and backward of all rows and targets at every checkpoint."""
    start = clock()
    for model in case.states():
        model.eval()
        for rows in (case.train, case.targets):
            for x, y in zip(*(column.split(case.batch_size) for column in rows), strict=True):
                model.zero_grad(set_to_none=True)
                row_losses(model(x), y).mean().backward()
    return clock() - start


def describe(task: Task, case: Case, truth: Truth, seconds: dict[str, float]) -> dict[str, Any]:
    """Return a row that says what was trained and how well it does."""
    reached = {}
    for name, (x, y) in (("train", case.train), ("targets", case.targets)):
        outputs = logits_of(case.model, x)
        reached[f"{name}_loss"] = float(row_losses(outputs, y).mean())
        reached[f"{name}_accuracy"] = float((outputs.argmax(-1) == y).float().mean())
    sizes = {"train": case.sizes[0], "targets": case.sizes[1], "parameters": case.num_parameters}
    retrained = {"subsets": len(truth.masks), "seeds": task.num_seeds, "ceiling": truth.ceiling}
    checkpoints = {"epochs": list(task.checkpoint_epochs), "learning_rates": [rate for _, rate in case.checkpoints]}
    return {"task": task.name, "title": task.title, **sizes, **checkpoints, **reached, **retrained, "seconds": seconds}


def measure(methods: Sequence[Method], case: Case, truth: Truth, data: Data) -> Iterator[dict[str, Any]]:
    """Run the methods one after another, grade them and compare those that should agree.

    Args:
        methods: Which.
        case: What they get.
        truth: What retraining says.
        data: The rows.

    Yields:
        A row for each method and setting, for each agreement, and for each comparison of tracer's best method with
        another library's best.
    """
    plain_pass(case)
    plain = float(np.median([plain_pass(case) for _ in range(3)]))
    graded: list[tuple[dict[str, Any], np.ndarray]] = []
    for method in methods:
        reason = method.unfit(case) or ("" if find_spec(method.package) else f"{method.package} is not installed")
        if reason:
            yield {"method": method.name, "error": f"left out: {reason}"}
            continue
        try:
            rows, kept = in_own_process(partial(attempt, method, case, truth, data, plain))
        except ProcessError as error:
            rows, kept = [{"method": method.name, "setting": {}, "error": str(error)}], {}
        graded += [(rows[number], scores) for number, scores in kept.items()]
        yield from rows
    by_name = {row["method"]: scores for row, scores in graded if not row["setting"]}
    for left, right in PAIRS:
        if left in by_name and right in by_name:
            yield {"agreement": f"{left} | {right}", "spearman": rank_correlation(by_name[right], by_name[left])}
    yield from comparisons(graded, truth)


def attempt(
    method: Method, case: Case, truth: Truth, data: Data, plain: float
) -> tuple[list[dict[str, Any]], dict[int, np.ndarray]]:
    """Run a method and grade what it gives.

    Args:
        method: Which.
        case: What it gets.
        truth: What retraining says.
        data: The rows.
        plain: The seconds of the plain passes.

    Returns:
        Its rows, and the scores of those that have an interval, by their number.
    """
    importlib.import_module(method.package)  # so that no method's memory and seconds are those of an import
    results: list[Found] = []
    with tempfile.TemporaryDirectory(prefix="tracer-benchmark-") as folder:
        try:
            peak = peak_mb(lambda: results.extend(method.run(case, Path(folder))), every=0.01)
        except Exception as error:  # a library that fails on this task has a row that says so
            peak, results = float("nan"), [Found(method.name, error=f"{type(error).__name__}: {first_line(error)}")]
        rows = [row if "error" in row else row | {"peak_mb": peak} for row in grade_all(results, truth, data, plain)]
    kept: dict[int, np.ndarray] = {}
    for number, row in enumerate(rows):
        for found in results:
            if "lds_interval" in row and (found.name, found.setting) == (row["method"], row["setting"]):
                kept[number] = found.scores
    return rows, kept


def agreements(case: Case) -> Iterator[dict[str, Any]]:
    """Compare TRAK with traker: the formula on traker's features, and both libraries on whole gradients."""
    if find_spec("trak") is None or needs_few_parameters(case):
        return
    with tempfile.TemporaryDirectory(prefix="tracer-benchmark-") as folder:
        for name, value in traker_agreement(case, Path(folder) / "features").items():
            yield {"agreement": f"traker | TRAK's formula on its features, {name}", "spearman": value}
        yield {"agreement": "traker | tracer trak, whole gradients", "spearman": exact_agreement(case, Path(folder))}


def merged(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a results file of the same machine that these do not replace, and these.

    Args:
        path: The file, which need not exist.
        rows: The new rows.

    Returns:
        All rows, in the order of the tasks.
    """

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return row["task"], row.get("agreement", ""), row.get("comparison", ""), row.get("method", "")

    def outdated(row: dict[str, Any]) -> bool:
        """Whether a comparison is of a method that was measured again."""
        sides = row.get("comparison", "").split(" | ")
        return any(row["task"] == task and side.startswith(name) for task, _, _, name in new if name for side in sides)

    kept: list[dict[str, Any]] = []
    new = {key(row) for row in rows}
    if path.is_file():
        written = json.loads(path.read_text())
        if written["machine"] == json.loads(json.dumps(machine())):
            kept = [row for row in written["rows"] if key(row) not in new and not outdated(row)]
    order = [task.name for task in TASKS]
    return sorted([*kept, *rows], key=lambda row: order.index(row["task"]))


def measure_task(task: Task, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train, retrain and measure one task; each row is printed as it is found."""
    try:
        data = task.load()
    except FileNotFoundError as error:
        print(f"{task.name}: left out, {error}", flush=True)
        return []
    if options.quick:
        task, data = shortened(task, data)
    start = time.perf_counter()
    case = make_case(task, data)
    trained = time.perf_counter()
    truth = ground_truth(task, data, options.cache)
    seconds = {"three runs": trained - start, "ground truth": time.perf_counter() - trained}
    rows = [describe(task, case, truth, seconds)]
    print(f"\n{heading(rows[0])}, {time.perf_counter() - start:.0f} s", flush=True)
    for share in (1.0, 0.5) if options.smoothness else ():
        smooth = check_smoothness(
            task.make_model,
            task.kind,
            data.train,
            data.targets,
            task.recipe.at_strength(share),
            seeds=RUN_SEEDS[:1],
        )
        print(f"  strength {share}: {smooth}", flush=True)
    wanted = [part.strip() for part in options.methods.split(",") if part.strip()] or [""]
    methods = [*tracer_methods(), *collected_methods(), *peer_methods(), *baseline_methods()]
    chosen = [method for method in methods if any(part in method.name for part in wanted)]
    agreed = () if options.methods else agreements(case)
    for row in chain(measure(chosen, case, truth, data), agreed):
        rows.append({"task": task.name, **row})
        named = row.get("method") or row.get("agreement") or row["comparison"]
        value = row.get("lds", row.get("auc_own", row.get("spearman", row.get("interval"))))
        print(f"  {named} {row.get('setting') or ''}: {row.get('error', value)}", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, retrain, measure, print tables and write JSON and figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", default="", help=f"comma-separated, of {', '.join(task.name for task in TASKS)}")
    parser.add_argument("--methods", default="", help="methods whose name has one of these in it, comma-separated")
    parser.add_argument("--show", action="store_true", help="run nothing; print and draw what was measured")
    parser.add_argument(
        "--smoothness", action="store_true", help="print whether 1 %% other weights have smooth effects"
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows, epochs and subsets, and the digits alone")
    parser.add_argument("--output-dir", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=Path("runs") / "quality", help="where retrained outputs are kept")
    options = parser.parse_args(arguments)
    names = [name for name in options.tasks.split(",") if name] or [
        task.name for task in TASKS if not options.quick or task.name in ("logistic", "mlp", "flipped")
    ]
    unknown = set(names) - {task.name for task in TASKS}
    if unknown:
        parser.error(f"--tasks: {', '.join(sorted(unknown))} not among {', '.join(task.name for task in TASKS)}")
    name = "quality_quick" if options.quick else "quality"
    for task in [task for task in TASKS if task.name in names and not options.show]:
        rows = measure_task(task, options)
        all_rows = merged(options.output_dir / f"{name}.json", rows)
        write_results(options.output_dir, name, all_rows)
        print(report(rows, DEFINITIONS) if rows else "", flush=True)
    path = options.output_dir / f"{name}.json"
    if path.is_file():
        everything = json.loads(path.read_text())["rows"]
        draw(everything, options.output_dir / name)
        for key in ("lds", "auc_own", "auc_harm", "removal", "ratio"):
            if not any(row.get(key) is not None for row in everything):
                continue
            print(f"\n{COLUMNS[key]}, of all that was measured\n\n{summary(everything, key)}")
    beside = [
        row for one in sorted(options.output_dir.rglob("quality.json")) for row in json.loads(one.read_text())["rows"]
    ]
    if beside:
        print(f"\nLDS, who leads each task, of all results in {options.output_dir}\n\n{leaders(beside)}")
    print(f"\n{machine()}\n{path}")


if __name__ == "__main__":
    main()
