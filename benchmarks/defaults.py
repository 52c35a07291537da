"""The measurements that decide the default estimators, as one table.

It reads `benchmarks/results/quality.json` (of `benchmarks/quality.py`) and `benchmarks/results/shortcuts.json` (of
`benchmarks/shortcuts.py`).

Run it: python benchmarks/defaults.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
ESTIMATORS = ("tracin", "cosine", "influence", "trak", "relatif", "relatif_theta")
PLANTED = {
    "shortcut": "examples of a shortcut found",
    "poison": "poisoned examples found",
    "leak": "copies of the target found",
    "source": "examples of the target's source found",
}


def predictions(key: str) -> list[float | None]:
    """Return the mean of ``lds`` or ``removal`` over the tasks that have it, by estimator at its defaults."""
    rows = json.loads((RESULTS / "quality.json").read_text())["rows"]
    found: list[float | None] = []
    for name in ESTIMATORS:
        method = f"tracer {name}, k=1024"
        values = [row[key] for row in rows if row.get("method") == method and not row["setting"] and row.get(key)]
        found.append(float(np.mean(values)) if values else None)
    return found


def table() -> list[str]:
    """Return the lines of the table: a question a row, an estimator a column."""
    planted = json.loads((RESULTS / "shortcuts.json").read_text())
    flipped = planted["wrong labels"]
    rows: dict[str, list[float | None]] = {
        "what would change without many examples? (LDS)": predictions("lds"),
        "without a few? (rank correlation)": predictions("removal"),
        **{text: [planted[case][name]["area"] for name in ESTIMATORS] for case, text in PLANTED.items()},
        "flipped digits among the top 5 (lower is better)": [flipped[name]["in the top 5"] for name in ESTIMATORS],
    }
    lines = ["| | " + " | ".join(f"`{name}`" for name in ESTIMATORS) + " |", "|---" * (len(ESTIMATORS) + 1) + "|"]
    for text, values in rows.items():
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
