"""The tables of the quality benchmark: every method of a task, one measure of all tasks, and who leads each task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from quality_grading import Truth
from timing import table

from tracer.metrics import LDS, lds

COLUMNS = {
    "method": "method",
    "lds": "LDS",
    "interval": "95 % interval",
    "removal": "removal",
    "auc_own": "AUC, own",
    "auc_harm": "AUC, harm",
    "seconds": "CPU seconds",
    "ratio": "plain passes",
    "peak_mb": "peak MB",
    "row_bytes": "bytes a row",
    "note": "note",
}
"""From a row's key to the header of the table."""


def heading(row: dict[str, Any]) -> str:
    """Return what a task is and what its training reached."""
    ceiling = "" if row["ceiling"] is None else f", LDS of a perfect predictor about {row['ceiling']:.2f}"
    return (
        f"{row['title']}: {row['parameters']:,} parameters, {row['train']:,} rows, {row['targets']} targets with "
        f"accuracy {row['targets_accuracy']:.3f} and loss {row['targets_loss']:.2f} (rows {row['train_accuracy']:.3f} "
        f"and {row['train_loss']:.3f}); {row['subsets']} halves x {row['seeds']} seeds{ceiling}"
    )


def best_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of a table: each method's default, and the best of its other settings where it has some.

    >>> rows = [{"method": "a", "setting": {}, "lds": 0.1}, {"method": "a", "setting": {"x": 2.0}, "lds": 0.3}]
    >>> [row["method"] for row in best_of(rows)]
    ['a', 'a, best of 2: x=2']
    """
    chosen = []
    for name in dict.fromkeys(row["method"] for row in rows):
        same = [row for row in rows if row["method"] == name]
        chosen.append(same[0])
        graded = [row for row in same if "lds" in row]
        best = max(graded, key=lambda row: row["lds"], default=same[0])
        if best is not same[0]:
            setting = ", ".join(f"{key}={number(value)}" for key, value in best["setting"].items())
            chosen.append(best | {"method": f"{name}, best of {len(same)}: {setting}"})
    return chosen


def number(value: Any) -> str:
    """Return a setting's value as it is printed."""
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with its cells as texts where numbers alone would not do."""
    low, high = row.get("lds_interval", (None, None))
    interval = None if low is None else f"{low:.3f} to {high:.3f}"
    decimals = {
        key: None if row.get(key) is None else f"{row[key]:.3f}" for key in ("lds", "removal", "auc_own", "auc_harm")
    }
    sizes = {key: f"{row[key]:,.0f}" if key in row else None for key in ("row_bytes", "peak_mb")}
    return row | decimals | sizes | {"interval": interval, "note": row.get("error", row.get("own_error", ""))}


def report(rows: Sequence[dict[str, Any]], definitions: str) -> str:
    """Return the tables of all tasks, after what their columns mean."""
    parts = [definitions]
    for task in [row for row in rows if "title" in row]:
        mine = [row for row in rows if row["task"] == task["task"]]
        graded = best_of([row for row in mine if "method" in row])
        columns = {key: header for key, header in COLUMNS.items() if any(shown(row).get(key) for row in graded)}
        lines = [f"{row['agreement']}: Spearman {row['spearman']:.5f}" for row in mine if "agreement" in row]
        parts.append("\n".join([heading(task), "", table([shown(row) for row in graded], columns), "", *lines]))
    return "\n\n".join(parts)


def summary(rows: Sequence[dict[str, Any]], key: str) -> str:
    """Return one measure of all methods on all tasks: each method's default, and in brackets its best setting.

    Args:
        rows: As they are written.
        key: ``lds``, ``removal``, ``auc_own``, ``auc_harm`` or ``ratio``.

    Returns:
        A Markdown table, a line a method.
    """
    tasks = [row["task"] for row in rows if "title" in row]
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.get(key) is None or "method" not in row:
            continue
        same = [r[key] for r in rows if (r["task"], r.get("method")) == (row["task"], row["method"]) and r.get(key)]
        line = lines.setdefault(row["method"], {"method": row["method"]})
        if row["setting"] or row["task"] in line:
            line.setdefault(row["task"], f"- ({max(same):.3f})")
        elif key == "ratio":
            line[row["task"]] = f"{row[key]:,.0f}" if row[key] >= 100 else f"{row[key]:.3g}"
        else:
            best = f" ({max(same):.3f})" if len(same) > 1 and max(same) > row[key] else ""
            line[row["task"]] = f"{row[key]:.3f}{best}"
    return table(list(lines.values()), {"method": "method", **{task: task for task in tasks}})


LIBRARIES = ("tracer", "captum", "traker", "dattri", "kronfluence", "bergson", "logix")
"""What methods' names begin with; the others are baselines."""

MORE_TRAINING = ("3 runs", "half strength", "collected")
"""Methods that need other trainings than the one that is explained, which nothing is compared with."""


def library_of(method: str) -> str:
    """Return whose method it is: one of `LIBRARIES` or ``baseline``."""
    return next((name for name in LIBRARIES if method.startswith(f"{name} ")), "baseline")


def described(row: dict[str, Any]) -> str:
    """Return a method's name with its setting."""
    return row["method"] + "".join(f", {key}={number(value)}" for key, value in row["setting"].items())


def leaders_of(rows: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]] | None:
    """Return tracer's best row at defaults, the best of others at theirs, and the best of others at any setting.

    Args:
        rows: Of one task.

    Returns:
        The rows, or None where one of them is missing.
    """
    graded = [row for row in rows if "lds" in row and not any(part in row["method"] for part in MORE_TRAINING)]
    ours = [row for row in graded if library_of(row["method"]) == "tracer" and not row["setting"]]
    others = [row for row in graded if library_of(row["method"]) not in ("tracer", "baseline")]
    defaults = [row for row in others if not row["setting"]]
    if not ours or not defaults:
        return None
    best, default, any_setting = (max(each, key=lambda row: row["lds"]) for each in (ours, defaults, others))
    return best, default, any_setting


def comparisons(graded: Sequence[tuple[dict[str, Any], np.ndarray]], truth: Truth) -> Iterator[dict[str, Any]]:
    """Compare tracer's best method with the best of other libraries, on the same resamples of subsets.

    Args:
        graded: Rows with an interval, and their scores.
        truth: What retraining says.

    Yields:
        A row for the best default of the others and one for their best setting, with the interval of the difference.
    """
    found = leaders_of([row for row, _ in graded])
    if found is None:
        return

    def scored(wanted: dict[str, Any]) -> LDS:
        (scores,) = (scores for row, scores in graded if row is wanted)
        return lds(scores, truth.masks, truth.outputs)

    best, *others = found
    for other in {described(row): row for row in others}.values():
        ours, theirs = scored(best), scored(other)
        names = f"{described(best)} | {described(other)}"
        yield {"comparison": names, "difference": ours.mean - theirs.mean, "interval": list(ours.difference(theirs))}


def leaders(rows: Sequence[dict[str, Any]]) -> str:
    """Return who predicts each task best at defaults: a Markdown table, a line a task.

    Args:
        rows: As they are written.

    Returns:
        The table, and below it the comparisons of leaders that were made on the same resamples.
    """
    lines, notes = [], []
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        found = leaders_of([row for row in mine if "method" in row])
        if found is None:
            continue
        columns = dict(zip(("tracer", "default", "best"), map(measured, found), strict=True))
        lines.append({"task": task, **columns, "leads": "yes" if above(found[0], found[2]) else "no"})
        for row in mine:
            if row.get("comparison", "").startswith(f"{described(found[0])} | "):
                low, high = row["interval"]
                notes.append(f"{task}: {row['comparison']}: {row['difference']:+.3f} ({low:+.3f} to {high:+.3f})")
    headers = {"task": "task", "tracer": "tracer", "default": "others", "best": "others, best setting"}
    return "\n".join([table(lines, headers | {"leads": "above all intervals"}), "", *notes])


def above(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Return whether a row's interval lies above the other's LDS."""
    return row["lds_interval"][0] > other["lds"]


def measured(row: dict[str, Any]) -> str:
    """Return a method's name with its LDS and interval."""
    low, high = row.get("lds_interval", (float("nan"), float("nan")))
    return f"{described(row)}: {row['lds']:.3f} ({low:.3f} to {high:.3f})"
