"""Each pair of calls on the migration page runs as it is written there, and gives the same numbers.

In a section of the page a ``py`` block is the other library's call and the ``python`` block after it is ours; they
leave ``theirs`` and ``ours`` behind. All run in one namespace and an empty folder, in the page's order.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch

PAGE = Path(__file__).resolve().parents[2] / "docs" / "migration.md"
SECTION = re.compile(r"^## (.+)\n((?:(?!^## ).*\n)*)", re.MULTILINE)
FENCE = re.compile(r"^```(py|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PACKAGES = {"captum": "captum", "TRAK": "trak"}


def sections():
    """Return the blocks of each section: ``{heading: [(language, code), ...]}``."""
    return {heading: FENCE.findall(body) for heading, body in SECTION.findall(PAGE.read_text(encoding="utf-8"))}


PAIRS = [heading for heading, blocks in sections().items() if any(language == "py" for language, _ in blocks)]


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory):
    """Run the page once for a package, and return what each pair of calls left behind.

    Sections on what needs other packages are left out.
    """

    @functools.cache
    def run(package):
        namespace: dict[str, object] = {"__name__": "__main__"}
        found = {}
        with contextlib.chdir(tmp_path_factory.mktemp(package)), torch.random.fork_rng():
            for heading, blocks in sections().items():
                if heading in PAIRS and heading.partition(":")[0] != package:
                    continue
                for _, code in blocks:
                    with contextlib.redirect_stderr(io.StringIO()):  # their progress bars
                        exec(compile(code, f"{PAGE.name}: {heading}", "exec"), namespace)
                found[heading] = dict(namespace)
        return found

    return run


@pytest.fixture
def pair(request, left_behind):
    package = request.param.partition(":")[0]
    if importlib.util.find_spec(PACKAGES[package]) is None:
        pytest.skip(f"{PACKAGES[package]} is not installed, which {request.param!r} compares with")
    return left_behind(package)[request.param]


def of(*headings):
    return pytest.mark.parametrize("pair", headings, indirect=True)


def relative_error(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    return np.abs(found - expected).max() / np.abs(expected).max()


@of("captum: TracInCP", "captum: self-influence", "captum: TracInCPFast")
def test_scores_are_equal_to_rounding(pair):
    assert relative_error(pair["ours"], pair["theirs"]) < 1e-5


@of("captum: the k most influential")
def test_top_rows_are_the_same(pair):
    for kind in ("", "_opponents"):
        ours, theirs = pair[f"ours{kind}"], pair[f"theirs{kind}"]
        np.testing.assert_array_equal(ours.indices, theirs.indices.numpy())
        assert relative_error(ours.scores, theirs.influence_scores) < 1e-5


@of("captum: TracInCPFastRandProj")
def test_projected_scores_agree_up_to_the_sketch(pair):
    ours, theirs = pair["ours"], pair["theirs"]
    assert relative_error(ours.scores, theirs.influence_scores) < 3 / np.sqrt(4096)
    shared = [len(set(mine) & set(others)) for mine, others in zip(ours.indices, theirs.indices.tolist(), strict=True)]
    assert np.mean(shared) > 4  # of 5


@of("TRAK: TRAKer")
def test_trak_scores_are_equal_up_to_a_constant(pair):
    ours, theirs = np.asarray(pair["ours"]), np.asarray(pair["theirs"])
    constant = (ours * theirs).sum() / np.square(ours).sum()
    assert constant > 0
    assert relative_error(constant * ours, theirs) < 1e-3


def test_every_pair_of_the_page_is_compared():
    compared = {
        heading
        for test in list(globals().values())
        for mark in getattr(test, "pytestmark", [])
        for heading in mark.args[1]
    }
    assert compared == set(PAIRS)
    assert len(PAIRS) == 6
