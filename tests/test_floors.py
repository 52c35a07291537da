"""The floors of docs/design.md, checked from the imports themselves: down, or within a room, and never sideways."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tracer

PACKAGE = Path(__file__).resolve().parents[1] / "tracer"

# Each room with its floor and its modules; a package stands for all modules in it.
ROOMS: dict[str, tuple[int, tuple[str, ...]]] = {
    "errors": (0, ("errors",)),
    "types": (0, ("types",)),
    "factors": (0, ("factors",)),
    "tasks": (1, ("tasks", "labels")),
    "batches": (1, ("batches", "fingerprints")),
    "arguments": (1, ("arguments", "rows")),
    "projection": (1, ("projection",)),
    "ranks": (1, ("sharded",)),
    "scoring": (1, ("scoring", "products")),
    "metrics": (1, ("metrics",)),
    "curvature": (1, ("curvature",)),
    "store": (1, ("store",)),
    "summaries": (1, ("summaries",)),
    "processes": (1, ("processes",)),
    "gradients": (2, ("gradients",)),
    "checkpoints": (2, ("checkpoints", "sources", "moments", "optimizers")),
    "row sources": (2, ("rowsource",)),
    "report": (2, ("report",)),
    "store facts": (2, ("storefacts",)),
    "featurize": (3, ("featurize", "together", "cosines")),
    "rank": (3, ("rank", "kernels", "derived")),
    "retraining": (3, ("retraining",)),
    "ideal": (3, ("ideal", "ideal_record")),
    "recording": (3, ("recording",)),
    "tokens": (3, ("tokens",)),
    "integrations": (4, ("integrations",)),
    "questions": (4, ("ranker", "tops", "reader")),
    "facade": (5, ("tracer",)),
    "one call": (6, ("attribution",)),
    "names": (7, ("__init__",)),
    "demo": (8, ("demo",)),
    "command line": (9, ("cli", "__main__")),
}
HOMES = {module: (room, floor) for room, (floor, modules) in ROOMS.items() for module in modules}

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def home(module: str) -> tuple[str, int] | None:
    """Room and floor of a module by its dotted name within the package; `__init__` for the package itself."""
    return HOMES.get(module.partition(".")[0])


def imported_modules(source: str) -> set[str]:
    """Dotted names within the package that a source imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            # `from tracer import x` is the module x, or a public name of the package.
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = whole if node.module == "tracer" else [node.module or ""]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "tracer":
                found.add(".".join(parts[1:]) if len(parts) > 1 and home(parts[1]) else "__init__")
    return found


def violations(module: str, source: str) -> list[str]:
    """What is wrong with the imports of a module, by its dotted name within the package."""
    mine = home(module)
    if mine is None:
        return [f"{module} stands on no floor: add it to ROOMS and to docs/design.md"]
    room, floor = mine
    wrong = []
    for other in sorted(imported_modules(source)):
        other_room, other_floor = home(other) or ("", 0)
        if other_room != room and other_floor >= floor:
            wrong.append(f"{module} ({room}, floor {floor}) imports {other} ({other_room}, floor {other_floor})")
    return wrong


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_go_down_or_stay_in_the_room(path):
    module = ".".join(path.with_suffix("").parts)
    assert violations(module, (PACKAGE / path).read_text(encoding="utf-8")) == []


def test_every_module_of_the_table_exists():
    assert set(HOMES) == {path.with_suffix("").parts[0] for path in MODULES}


def test_the_table_is_that_of_the_design_page():
    page = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line[:3].strip("| ").isdigit()]
    for module, (_, floor) in HOMES.items():
        floors = [int(row.split("|")[1]) for row in rows if f"`{module}`" in row or f"`{module}/`" in row]
        assert floor in floors, f"{module} stands on floor {floor}, the page says {floors}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("scoring", "from tracer.store import Store"),  # sideways
        ("projection.sketch", "from tracer.gradients import LayerCall"),  # up
        ("tasks", "import tracer.batches"),  # sideways
        ("errors", "from tracer import types"),  # sideways on floor 0
        ("rank", "def later():\n    from tracer.ranker import Ranker"),  # hidden in a function
        ("ranker", "from tracer import Tracer"),  # a public name comes from the top
        ("featurize", "import tracer"),
        ("utils", ""),  # on no floor
    ],
)
def test_the_checker_finds_what_is_forbidden(module, source):
    assert len(violations(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ranker", "from tracer import rank"),
        ("store", "from tracer.store.tables import RowTable"),  # one room
        ("projection.sketch", "from tracer.projection import norms"),
        ("tracer", "from tracer.ranker import Ranker\nimport torch"),
    ],
)
def test_the_checker_lets_pass_what_is_allowed(module, source):
    assert violations(module, source) == []


def test_relative_imports_are_found():
    with pytest.raises(AssertionError, match="relative import in line 1"):
        imported_modules("from . import errors")


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


def test_public_names_import_no_optional_package():
    optional = [
        "captum",
        "fast_jl",
        "lightning",
        "matplotlib",
        "peft",
        "pyarrow",
        "selenium",
        "sklearn",
        "transformers",
    ]
    names = "[getattr(tracer, name) for name in tracer.__all__]"
    found = run_python(f"import sys, tracer; {names}; print(*[name for name in {optional} if name in sys.modules])")
    assert found == []


def test_importing_the_package_imports_nothing_heavy():
    assert run_python("import sys, tracer; print(*{'torch', 'numpy', 'zarr'} & set(sys.modules))") == []


def test_every_public_name_has_a_home_and_no_other_name_has():
    assert sorted(name for names in tracer._HOMES.values() for name in names) == sorted(tracer.__all__)
    assert {module.split(".")[1] for module in tracer._HOMES} & set(tracer.__all__) == set()  # a module would hide it
    assert set(tracer.__all__) <= set(dir(tracer))
    with pytest.raises(AttributeError, match="module 'tracer' has no attribute 'trace'"):
        tracer.trace  # noqa: B018
