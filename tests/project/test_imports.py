"""What importing the package brings in, and where its public names are defined. Floors: `make lint`."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tracer


def run_python(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


def test_public_names_import_no_optional_package():
    optional = [
        "captum",
        "datasets",
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
