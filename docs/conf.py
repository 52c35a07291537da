"""How Sphinx builds the site: `make docs`, or `sphinx-build -W --keep-going -b html docs build/docs`.

The pages are plain Markdown, which reads well where it lies too; the API reference comes from docstrings. Nothing is
fetched from the network.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx import addnodes
from sphinx.ext.napoleon import GoogleDocstring
from sphinx.transforms import SphinxTransform
from sphinx.util.docstrings import prepare_docstring
from sphinx.util.docutils import SphinxDirective

import tracer

if TYPE_CHECKING:
    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

project = "tracer"
author = "the tracer authors"
copyright = f"{author}, MIT licence"
version = release = tracer.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]

# Markdown: anchors are those that GitHub gives headings, so that a link works in both places.
myst_heading_anchors = 4

# Docstrings: Google style. A name in single backticks is linked where it has an entry, and is code where it has none.
default_role = "py:obj"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"

autodoc_type_aliases = {"Array": "ArrayLike"}
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"tracer {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#0b63c4", "color-brand-content": "#0b63c4"},
    "dark_css_variables": {"color-brand-primary": "#69b1ff", "color-brand-content": "#69b1ff"},
}
pygments_dark_style = "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

PUBLIC_MODULES = ("tracer", "tracer.metrics", "tracer.retraining", "tracer.report")
"""Whose ``__all__`` has entries in the API reference; a name is looked up in this order."""

CODE_NAME = re.compile(r"(?:tracer\.)?(\w+(?:\.\w+)*)(?:\(.*\))?", re.DOTALL)


class LinkedNames(SphinxTransform):
    """Link code such as ``Tracer.top(5)`` in the pages to its entry in the API reference."""

    default_priority = 400  # before references are resolved

    def apply(self, **kwargs: Any) -> None:
        """Wrap the code spans of this page that begin with a public name."""
        if self.env.docname.startswith("api/"):
            return
        public = {name for module in PUBLIC_MODULES for name in importlib.import_module(module).__all__}
        for span in list(self.document.findall(nodes.literal)):
            found = CODE_NAME.fullmatch(span.astext())
            if not found or found[1].split(".")[0] not in public or not _is_prose(span):
                continue
            link = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=found[1], refexplicit=True)
            span.replace_self(link)
            link += span


def _is_prose(node: nodes.Node) -> bool:
    """Return whether a node is in no heading and no link."""
    while node.parent is not None:
        node = node.parent
        if isinstance(node, nodes.title | nodes.reference | addnodes.pending_xref):
            return False
    return True


class NotebookPage(SphinxDirective):
    """Show a notebook with its outputs: ``{notebook} ../examples/notebook.ipynb``, relative to the docs."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the notebook's cells, apart from its title, as nodes."""
        path = Path(self.env.srcdir) / self.arguments[0]
        self.env.note_dependency(str(path))
        found: list[nodes.Node] = []
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                text = re.sub("^# .*\n+", "", text)
                found += self.parse_text_to_nodes(text)
                continue
            found.append(nodes.literal_block(text, text, language="python"))
            for output in cell["outputs"]:
                found.append(_output(output))
        return found


def _output(output: dict[str, Any]) -> nodes.Node:
    """Return an output of a cell: its table or picture, else its text."""
    page = "".join(output.get("data", {}).get("text/html", ""))
    if page:
        return nodes.raw("", f'<div class="notebook-output">{page}</div>', format="html")
    text = "".join(output.get("text", "") or output["data"]["text/plain"])
    return nodes.literal_block(text, text, language="text")


def find_public(
    app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, content: nodes.Element
) -> nodes.Element | None:
    """Resolve a Python name that is not found as it is written: look for it in every public module.

    Args:
        app: Sphinx.
        env: What it knows.
        node: The reference.
        content: What is shown.

    Returns:
        A link, or None where the name has no entry.
    """
    if node.get("refdomain") != "py":
        return None
    objects = env.domains.python_domain.objects
    for module in PUBLIC_MODULES:
        name = f"{module}.{node['reftarget']}"
        if name in objects:
            here = node.get("refdoc", env.docname)
            return env.domains.python_domain.resolve_xref(env, here, app.builder, "obj", name, node, content)
    return None


def read_properties(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Read a property's docstring as a method's: napoleon takes what comes before its first colon for a type.

    Args:
        app: Sphinx.
        what: The kind of the object.
        name: Its full name.
        obj: The object.
        options: Of the directive.
        lines: What napoleon has made of the docstring, changed in place.
    """
    if what == "property" and (text := inspect.getdoc(obj)):
        written = prepare_docstring(text)
        lines[:] = GoogleDocstring(written, app.config, app, "method", name, obj, options).lines()


def setup(app: Sphinx) -> None:
    """Register what is above."""
    app.connect("autodoc-process-docstring", read_properties, priority=600)  # after napoleon, which has 500
    app.add_transform(LinkedNames)
    app.add_directive("notebook", NotebookPage)
    app.connect("missing-reference", find_public)
