"""What is released: a wheel and an sdist that hold what they should, and run where only their dependencies are.

The wheel is installed into a new environment that has the distributions that its metadata asks for, each linked from
here instead of downloaded, and nothing else: no checkout, no test tools, no optional packages.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock

import tracer

pytest.importorskip("build", reason="build is not installed; the extra dev brings it")
yaml = pytest.importorskip("yaml")
requirements = pytest.importorskip("packaging.requirements")

ROOT = Path(__file__).resolve().parents[2]
NOT_RELEASED = shutil.ignore_patterns(
    ".git", ".venv", ".*_cache", "__pycache__", "*.pyc", "*.egg-info", "build", "dist", "runs"
)
ATTRIBUTE = """
import torch, tracer
x, y = torch.randn(12, 4), torch.arange(12) % 3
model = torch.nn.Linear(4, 3)
checkpoints = [(model.state_dict(), 0.1)]
found = tracer.attribute(model, "image_classification", (x, y), (x[:2], y[:2]), checkpoints, save_dir="store")
print(tracer.__file__, found.scores.shape)
"""


def files(folder: Path, *under: str) -> set[str]:
    """The files below some folders, as they are called from ``folder``; byte code is no file."""
    found = (path for name in under for path in (folder / name).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in found if "__pycache__" not in path.parts}


def distributions_for(metadata: importlib.metadata.PackageMetadata) -> dict[str, importlib.metadata.Distribution]:
    """The installed distributions that these metadata ask for, without extras, and those that they ask for."""
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = metadata.get_all("Requires-Dist")
    while waiting:
        asked = requirements.Requirement(waiting.pop())
        if asked.name.lower() in found or (asked.marker and not asked.marker.evaluate({"extra": ""})):
            continue
        found[asked.name.lower()] = distribution = importlib.metadata.distribution(asked.name)
        assert asked.specifier.contains(distribution.version), f"{asked} is wanted, {distribution.version} is here"
        waiting.extend(distribution.requires or [])
    return found


def link_distribution(distribution: importlib.metadata.Distribution, site_packages: Path) -> None:
    """Link what a distribution has installed into another environment."""
    for name in {path.parts[0] for path in distribution.files or () if path.parts[0] not in ("..", "__pycache__")}:
        target = site_packages / name
        if not target.exists():
            target.symlink_to(Path(str(distribution.locate_file(name))).resolve())


@pytest.fixture(scope="session")
def shared(tmp_path_factory, worker_id):
    """A folder that the processes of one test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "release"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def dist(shared):
    """The folder with wheel and sdist; the wheel is made from the sdist, as `build` does unless told otherwise."""
    folder = shared / "dist"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            shutil.copytree(ROOT, shared / "source", ignore=NOT_RELEASED)
            command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(shared / "source")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="session")
def source(shared, dist):
    """The project as it was built."""
    return shared / "source"


@pytest.fixture(scope="session")
def wheel(dist):
    return next(dist.glob("*.whl"))


@pytest.fixture(scope="session")
def wheel_files(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


@pytest.fixture(scope="session")
def sdist_files(dist):
    with tarfile.open(next(dist.glob("*.tar.gz"))) as archive:
        return {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}


@pytest.fixture(scope="session")
def metadata(wheel):
    return next(iter(importlib.metadata.distributions(path=[str(wheel)]))).metadata


@pytest.fixture(scope="session")
def environment(shared, wheel, metadata):
    """An environment with the wheel and what it asks for."""
    folder = shared / "environment"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            venv.create(folder, with_pip=False, symlinks=True)
            site_packages = next(folder.glob("lib/python*/site-packages"))
            for distribution in distributions_for(metadata).values():
                link_distribution(distribution, site_packages)
            python = ["--python", str(folder / "bin" / "python")]
            install = ["-m", "pip", *python, "install", "--quiet", "--no-index", "--no-deps", str(wheel)]
            subprocess.run([sys.executable, *install], check=True)
    return folder


def run_in(environment: Path, folder: Path, *command: str) -> str:
    """What a command of the environment prints, run in an empty folder."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "COV"))}
    done = subprocess.run(
        [str(environment / "bin" / command[0]), *command[1:]],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**variables, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel_files, source):
    assert "tracer/py.typed" in wheel_files
    assert {name for name in wheel_files if ".dist-info/" not in name} == files(source, "tracer")


def test_the_sdist_holds_the_project(sdist_files, source):
    wanted = files(source, "tracer", "docs", "examples", ".ci")
    wanted |= {name for name in files(source, "tests", "benchmarks") if name.endswith(".py")}
    wanted |= {"README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "pyproject.toml", "constraints.txt", "Makefile"}
    assert wanted - sdist_files == set()


def test_the_sdist_holds_no_leftovers(sdist_files):
    leftovers = re.compile(r"(^|/)(\.venv|\.git|runs|dist|build|__pycache__|\.\w+_cache)/|\.py[cod]$|^docs/_build")
    assert [name for name in sorted(sdist_files) if leftovers.search(name)] == []


def test_the_metadata_name_the_package(metadata, wheel_files):
    assert (metadata["Name"], metadata["Version"]) == ("tracin", tracer.__version__)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert any(name.endswith("licenses/LICENSE") for name in wheel_files)


def test_the_citation_has_the_version_and_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == tracer.__version__
    assert {"title", "message", "authors"} <= set(citation)
    papers = {entry["url"].rsplit("/", 1)[1] for entry in citation["references"]}
    assert {"2002.08484", "2303.14186"} <= papers  # TracIn, TRAK


def test_the_changelog_has_the_version():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## .*\b{re.escape(tracer.__version__)}\b", changelog, re.MULTILINE)


def test_the_environment_has_no_more_than_the_wheel_asks_for(environment):
    script = "import importlib.util as u; print([u.find_spec(name) for name in ('sklearn', 'matplotlib', 'pytest')])"
    assert run_in(environment, environment, "python", "-c", script).split() == ["[None,", "None,", "None]"]


def test_the_installed_package_attributes(environment, tmp_path):
    path, shape = run_in(environment, tmp_path, "python", "-c", ATTRIBUTE).split(maxsplit=1)
    assert Path(path).is_relative_to(environment)
    assert shape.strip() == "(12, 2)"


def test_the_readmes_snippet_prints_what_it_says_where_only_the_package_is_installed(environment, tmp_path):
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", readme(), re.DOTALL).groups()
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert run_in(environment, tmp_path, "python", "-c", code).split() == printed.split()


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_extra_for_hugging_face_has_all_that_its_trainer_needs(metadata):
    asked = map(requirements.Requirement, metadata.get_all("Requires-Dist"))
    found = {each.name for each in asked if each.marker and each.marker.evaluate({"extra": "hf"})}
    assert {"transformers", "datasets", "peft", "accelerate"} <= found


def test_the_installed_command_says_its_version(environment, tmp_path):
    assert tracer.__version__ in run_in(environment, tmp_path, "tracer", "--version")


def test_the_installed_demo_finds_flipped_labels(environment, tmp_path):
    demo = json.loads(run_in(environment, tmp_path, "tracer", "demo", "--quick", "--json"))
    assert demo["found"]["self-influence"][0] > 0.5 * demo["flipped"]  # of a tenth of the rows; 0.1 is chance
    assert (tmp_path / demo["store"] / "zarr.json").exists()
