"""The notebook runs as it is committed, and its output is what the docs show."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

NOTEBOOK = Path(__file__).parents[2] / "examples" / "notebook.ipynb"


def outputs(notebook):
    """The outputs of each cell, without numbers: their last digits depend on the processor."""
    found = []
    for cell in notebook.cells:
        texts = [each.get("text") or each["data"]["text/plain"] for each in cell.get("outputs", ())]
        kinds = [sorted(each.get("data", ())) for each in cell.get("outputs", ())]
        found.append((kinds, [re.sub(r"[-+]?\d[\d.,e+-]*|[ -]+", " ", text) for text in texts]))
    return found


def test_the_notebook_gives_the_output_that_is_committed(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = outputs(notebook)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert outputs(notebook) == committed
    (shown,) = (cell for cell in notebook.cells if cell.source.startswith("found.show"))
    (page,) = (each["data"]["text/html"] for each in shown.outputs)
    assert page.count("<img") >= 7
    assert "digits/" in page
    assert (tmp_path / "runs" / "notebook" / "zarr.json").exists()
