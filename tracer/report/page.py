"""The page: HTML from templates/ with autoescape, which embeds the style sheet, the scripts and their data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tracer.report.text import number

SCRIPTS = ("data.js", "inputs.js", "suspects.js", "targets.js", "main.js")
"""The page's scripts, in the order in which they depend on each other."""


@dataclass(frozen=True)
class Section:
    """A section of the page, whose body is ``templates/<anchor>.html``."""

    anchor: str
    heading: str
    view: dict[str, Any]  # shown by its template besides the content of the report


@cache
def asset(name: str) -> str:
    """Return a style sheet or a script of this package."""
    return files("tracer.report").joinpath("assets", name).read_text(encoding="utf-8")


def render_page(title: str, lead: str, sections: Sequence[Section], report: Any, data: Any) -> str:
    """Return an HTML document that loads nothing, of a `ReportContent` and of JSON values for the scripts."""
    return _environment().get_template("page.html").render(
        title=title,
        lead=lead,
        sections=sections,
        report=report,
        data=data,
        style=Markup(asset("report.css")),
        script=Markup("\n".join(asset(name) for name in SCRIPTS)),
    )  # fmt: skip


@cache
def _environment() -> Environment:
    """Return the templates: every value is escaped, and a missing one raises."""
    environment = Environment(
        loader=PackageLoader("tracer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["count"] = lambda value: f"{value:,}"
    environment.filters["percent"] = lambda value, digits=1: f"{value:.{digits}%}"
    # NaN is no JSON; the scripts would fail to parse it in the reader's browser
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    return environment
