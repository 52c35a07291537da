"""The pages run as they are written, their links lead somewhere, and every public name is in them.

Each page's ``python`` blocks run one after another in one namespace and an empty folder. A ``text`` block right after a
``python`` block is what it prints, with ``...`` for anything.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import io
import logging
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import tracer
from tracer import projection
from tracer.gradients import layers

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
FOLDERS = [DOCS, DOCS / "examples", DOCS / "results"]
GUIDES = [ROOT / "README.md", *(path for folder in FOLDERS for path in sorted(folder.glob("*.md")))]
PAGES = [*GUIDES, *sorted((DOCS / "api").glob("*.md"))]
RUNNABLE = [path for path in PAGES if "```python" in path.read_text(encoding="utf-8")]
OPTIONAL = ("captum", "datasets", "lightning", "matplotlib", "peft", "pandas", "sklearn", "transformers")
FENCE = re.compile(r"^```(\w*|\{[\w-]+\}[^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").as_posix()


class Snippet(NamedTuple):
    line: int
    code: str
    printed: str | None


def snippets(page: str) -> list[Snippet]:
    """The python blocks of a page, each with the text block that follows it directly."""
    found: list[Snippet] = []
    end = -1
    for match in FENCE.finditer(page):
        language, body = match.groups()
        if language == "python":
            found.append(Snippet(page.count("\n", 0, match.start(2)) + 1, body, None))
        elif language == "text" and found and not page[end : match.start()].strip():
            found[-1] = found[-1]._replace(printed=body)
        end = match.end()
    return found


def prose(page: str) -> str:
    return FENCE.sub("", page)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower().replace("`", "")).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {slug(heading) for heading in headings}


def broken_links(path: Path) -> list[str]:
    """The relative links of a page that lead to no file, or to no heading of a page."""
    broken = []
    for target in LINK.findall(prose(path.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    return broken


@pytest.fixture
def _as_found(tmp_path, monkeypatch):
    """An empty folder; registries, logging, random state and the folder are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(projection, "_KINDS", dict(projection._KINDS))
    monkeypatch.setattr(layers, "_RULES", dict(layers._RULES))
    loggers = logging.getLogger(), logging.getLogger("tracer")
    before = [(logger, logger.level, list(logger.handlers)) for logger in loggers]
    with torch.random.fork_rng():
        yield
    for logger, level, handlers in before:
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.mark.usefixtures("_as_found")
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("path", RUNNABLE, ids=page_name)
def test_snippets_run_and_print_what_the_page_says(path):
    namespace: dict[str, object] = {"__name__": "__main__"}
    checker, options = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for snippet in snippets(path.read_text(encoding="utf-8")):
        for package in OPTIONAL:
            if package in snippet.code and importlib.util.find_spec(package) is None:
                pytest.skip(f"{package} is not installed, which line {snippet.line} needs; the lines above it ran")
        where = f"{path.relative_to(ROOT)}, line {snippet.line}"
        printed = io.StringIO()
        code = compile("\n" * (snippet.line - 1) + snippet.code, str(path), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if snippet.printed is not None:
            got = printed.getvalue()
            assert checker.check_output(snippet.printed, got, options), f"{where} prints\n{got}"


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CHANGELOG.md"], ids=page_name)
def test_links_lead_somewhere(path):
    assert broken_links(path) == []


def test_every_public_name_is_in_the_docs():
    text = "\n".join(path.read_text(encoding="utf-8") for path in GUIDES)  # the API pages have all names anyway
    assert [name for name in tracer.__all__ if not re.search(rf"\b{name}\b", text)] == []


def test_every_exception_has_its_section():
    names = [name for name in tracer.__all__ if name.endswith("Error") and name != "TracerError"]
    headings = anchors(ROOT / "docs" / "errors.md")
    assert [name for name in names if name.lower() not in headings] == []


@pytest.mark.parametrize("folder", [DOCS, DOCS / "api", DOCS / "examples"], ids=page_name)
def test_every_page_is_linked_from_the_index_of_its_folder(folder):
    linked = LINK.findall(prose((folder / "index.md").read_text(encoding="utf-8")))
    assert [path.name for path in folder.glob("*.md") if path.name not in {*linked, "index.md"}] == []


def test_every_page_of_results_is_linked_from_the_index():
    linked = LINK.findall(prose((DOCS / "index.md").read_text(encoding="utf-8")))
    assert {f"results/{path.name}" for path in (DOCS / "results").glob("*.md")} <= set(linked)


def test_every_example_is_in_the_docs():
    text = "\n".join(path.read_text(encoding="utf-8") for path in GUIDES)
    scripts = [path for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert scripts
    assert [path.name for path in scripts if path.name not in text] == []


def test_pictures_are_small():
    pictures = list((ROOT / "docs" / "images").iterdir())
    assert [path.name for path in pictures if path.stat().st_size > 200_000] == []


def test_the_checks_find_what_is_broken(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b` (c)\n\n[x](#a-b-c) [y](#no) ![z](no.png) [w](https://example.org)\n")
    assert broken_links(page) == ["#no", "no.png"]
    found = snippets("```python\n1\n```\n\n```text\nout\n```\n\nwords\n\n```text\nother\n```\n")
    assert found == [Snippet(2, "1\n", "out\n")]
    assert snippets("```{toctree}\n:hidden:\n```\n\n```python\n2\n```\n") == [Snippet(6, "2\n", None)]
