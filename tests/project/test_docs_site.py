"""The site builds without a warning, leads nowhere that is not there, and has an entry for every public name.

The pages are built once and looked at as a browser would get them.
"""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
import types
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from filelock import FileLock
from forks import fork

from tracer.retraining import Retrained

sphinx = pytest.importorskip("sphinx", reason="sphinx is not installed; the extra docs brings it")
for package in ("furo", "myst_parser", "sphinx_copybutton"):
    pytest.importorskip(package, reason=f"{package} is not installed; the extra docs brings it")

DOCS = Path(__file__).resolve().parents[2] / "docs"
PUBLIC_MODULES = ("tracer", "tracer.metrics", "tracer.retraining", "tracer.report")


def build(source: Path, output: Path) -> tuple[int, str]:
    """Build a site; return the exit status and what was printed."""
    options = ["-W", "--keep-going", "-q", "-E", "-b", "html", "-d", str(output.with_suffix(".doctrees"))]
    building = fork(
        Path(sphinx.__file__).with_name("__main__.py"), *options, str(source), str(output), cwd=output.parent
    )
    return building.wait(600), building.output


class Page(HTMLParser):
    """What a page offers (ids), what it refers to, and its heads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.images_without_text: list[str] = []
        self.num_heads = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.ids.update({value for key, value in named.items() if key == "id" and value})
        self.num_heads += tag == "h1"
        if tag == "a" and named.get("href"):
            self.links.append(named["href"])
        for key in ("src", "href"):
            if tag in ("img", "script", "link", "source", "iframe") and named.get(key):
                self.loaded.append(named[key])
        if tag == "img" and not named.get("alt"):
            self.images_without_text.append(named.get("src"))


@pytest.fixture(scope="session")
def site(tmp_path_factory, worker_id):
    """The folder of the built site; processes of one test run share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "site"
    with FileLock(f"{folder}.lock"):
        log = folder.with_suffix(".log")
        if not log.exists():
            status, printed = build(DOCS, folder)
            log.write_text(f"status {status}: {printed}" if status or printed else "")
    return folder


@pytest.fixture(scope="session")
def pages(site):
    found = {path: Page(path) for path in site.rglob("*.html")}
    assert site / "index.html" in found
    return found


def methods(public: type) -> set[str]:
    """The public methods and properties that a class has from the library."""
    owners = [owner for owner in public.__mro__ if owner.__module__.split(".")[0] == "tracer"]
    members = {name: value for owner in owners for name, value in vars(owner).items() if not name.startswith("_")}
    kinds = (property, classmethod, staticmethod, types.FunctionType)
    return {name for name, value in members.items() if isinstance(value, kinds)}


def public_entries() -> list[str]:
    """The public names, and the methods and properties of the classes among them."""
    entries = []
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            public = getattr(module, name)
            entries.append(f"{module_name}.{name}")
            if isinstance(public, type):
                entries.extend(f"{module_name}.{name}.{method}" for method in sorted(methods(public)))
    return entries


def inventory(site: Path) -> set[str]:
    """The Python names that have an entry."""
    from sphinx.util.inventory import InventoryFile

    found = InventoryFile.loads((site / "objects.inv").read_bytes(), uri="")
    return {name for kind, items in found.data.items() if kind.startswith("py:") for name in items}


def test_it_builds_without_a_warning(site):
    assert site.with_suffix(".log").read_text() == ""
    assert (site / "index.html").exists()


def test_a_broken_link_fails_the_build(tmp_path):
    source = tmp_path / "docs"
    source.mkdir()
    shutil.copy(DOCS / "conf.py", source)
    shutil.copytree(DOCS / "_static", source / "_static")
    (source / "index.md").write_text("# Page\n\n[x](nothing.md) [y](#nowhere)\n")
    status, printed = build(source, tmp_path / "html")
    assert status > 0
    assert "nothing.md" in printed
    assert "nowhere" in printed


def test_every_public_name_has_an_entry(site):
    entries = inventory(site)
    assert [name for name in public_entries() if name not in entries] == []


def test_the_callbacks_have_entries(site):
    names = ("huggingface.HuggingFaceRecorderCallback", "lightning.LightningRecorderCallback")
    assert {f"tracer.training.integrations.{name}" for name in names} <= inventory(site)


def test_every_page_has_one_title(pages, site):
    written = [site / path.relative_to(DOCS).with_suffix(".html") for path in DOCS.rglob("*.md")]
    assert {path.name: pages[path].num_heads for path in written if pages[path].num_heads != 1} == {}


def test_links_and_anchors_within_the_site_exist(pages):
    broken = []
    for path, page in pages.items():
        for link in page.links:
            name, _, anchor = unquote(link).partition("#")
            if "://" in name or name.startswith("mailto:"):
                continue
            target = (path.parent / name).resolve() if name else path
            known = pages[target].ids if target in pages else None
            if not target.exists() or (anchor and known is not None and anchor not in known):
                broken.append(f"{path.name}: {link}")
    assert broken == []


def test_nothing_is_loaded_from_elsewhere(pages):
    loaded = {(path, each) for path, page in pages.items() for each in page.loaded if not each.startswith("data:")}
    assert [source for _, source in loaded if "//" in source] == []
    files = [path.parent / unquote(source.split("?")[0]) for path, source in loaded if not source.startswith("#")]
    assert [file for file in files if not file.exists()] == []


def test_pictures_have_words(pages):
    assert {path.name: page.images_without_text for path, page in pages.items() if page.images_without_text} == {}


def test_names_in_the_pages_lead_to_their_entries(pages, site):
    links = pages[site / "quickstart.html"].links
    assert "api/attribute.html#tracer.attribute" in links
    assert "api/attribute.html#tracer.Attribution.report" in links
    assert "api/tracer.html#tracer.Tracer" in links


def test_properties_keep_the_words_of_their_docstrings(site):
    text = re.sub(r"<[^>]*>", "", (site / "api" / "retraining.html").read_text(encoding="utf-8"))
    words = inspect.getdoc(Retrained.outputs).replace("``", "").replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")
    assert ":" in words  # what stands before it would be taken for a type
    assert words in text
