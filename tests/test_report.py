"""Reports: the files that are written, what stands in them, and what is refused."""

from __future__ import annotations

import csv
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import tracer
from tracer import attribute
from tracer.report import write_report
from tracer.report.montage import row_heading
from tracer.report.recovery import ranking, recovery_curve
from tracer.report.samples import Samples
from tracer.types import TopK

pytest.importorskip("matplotlib")

N, M, K = 40, 7, 3
RNG = np.random.default_rng(0)
SCORES = RNG.random(N)
TOP = TopK(RNG.integers(0, N, (M, K)), np.sort(RNG.random((M, K)).astype(np.float32))[:, ::-1])
FLIPPED = np.arange(N) % 8 == 0
INPUTS = {
    "gray images": RNG.random((N, 8, 8)),
    "channels first": torch.rand(N, 3, 8, 8),
    "channels last": RNG.integers(0, 255, (N, 8, 8, 3), dtype=np.uint8),
    "vectors": RNG.normal(size=(N, 12)),
    "texts": [f"row <b>{row}</b> & more" for row in range(N)],
    "absent": None,
}


def report(directory, **options):
    settings = {"self_influence": SCORES, "proponents": TOP, "opponents": TOP, **options}
    return write_report(directory, **settings)


class Page(HTMLParser):
    """Collects what a browser would have to load, alternative texts and headings, and checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.alternatives, self.headings, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag in ("img", "script", "link", "source") and (source := attributes.get("src") or attributes.get("srcset")):
            self.loaded.append(source)
        if tag == "img":
            self.alternatives.append(attributes.get("alt"))
        if tag not in ("img", "meta", "source", "br", "link", "hr", "col"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(text)


@pytest.mark.parametrize("kind", INPUTS)
def test_page_shows_every_kind_of_input_without_a_network(tmp_path, kind):
    inputs = INPUTS[kind]
    targets = None if inputs is None else inputs[:M]
    labels = np.arange(N) % 3
    index = report(
        tmp_path / "report",
        train_inputs=inputs,
        target_inputs=targets,
        train_labels=labels,
        target_labels=labels[:M],
        train_predictions=labels[::-1],
        class_names=["ant", "bee", "cat"],
        known_mislabelled=FLIPPED,
        rankings={"loss": RNG.random(N)},
        settings={"checkpoints": 3},
    )
    text = index.read_text()
    page = Page(text)
    assert page.open == []
    assert all(source.startswith("data:") for source in page.loaded)
    assert "http://" not in text
    assert "https://" not in text
    assert page.loaded
    assert all(page.alternatives)
    assert "Finding mislabelled rows" in page.headings
    assert "prefers-color-scheme" in text
    assert {"index.html", "self_influence.csv", "self_influence.png", "recovery.png"} <= {
        path.name for path in index.parent.iterdir()
    }
    if kind == "texts":
        assert "<b>" not in text
        assert "&lt;b&gt;" in text
    if "images" in kind or "channels" in kind:
        assert (index.parent / "influence.png").read_bytes().startswith(b"\x89PNG")


def test_least_report(tmp_path):
    index = report(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.html",
        "self_influence.csv",
        "self_influence.png",
    ]
    assert "Finding mislabelled rows" not in index.read_text()


def test_csv_ranks_all_rows(tmp_path):
    report(tmp_path, train_labels=np.arange(N) % 2, known_mislabelled=FLIPPED)
    with (tmp_path / "self_influence.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["rank"]) for row in rows] == list(range(1, N + 1))
    assert [int(row["row"]) for row in rows] == np.argsort(-SCORES).tolist()
    np.testing.assert_array_equal([float(row["self_influence"]) for row in rows], np.sort(SCORES)[::-1])
    assert sum(int(row["known_mislabelled"]) for row in rows) == FLIPPED.sum()


def test_equal_zero_and_constant_scores_can_be_drawn(tmp_path):
    report(tmp_path, self_influence=np.zeros(N), known_mislabelled=FLIPPED)
    report(tmp_path, self_influence=np.full(N, 1e-30))


def test_recovery_counts_found_rows():
    mislabelled = np.array([False, True, False, True])
    scores = np.array([0.1, 0.9, 0.5, 0.3])
    assert ranking(scores).tolist() == [1, 2, 3, 0]
    assert recovery_curve(scores, mislabelled).tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("mislabelled", [np.arange(N) == 3, np.ones(N, dtype=bool)], ids=["one row", "all rows"])
def test_recovery_is_drawn_for_the_least_and_the_most_mislabelled_rows(tmp_path, mislabelled):
    report(tmp_path, known_mislabelled=mislabelled)
    assert (tmp_path / "recovery.png").exists()


def test_a_montage_shows_five_of_many_proponents_and_the_tables_all(tmp_path):
    images = INPUTS["gray images"]
    widths = []
    for k in (5, 20):
        top = TopK(np.tile(np.arange(k), (M, 1)), np.ones((M, k), dtype=np.float32))
        options = {"train_inputs": images, "target_inputs": images[:M], "shown_targets": [0]}
        index = report(tmp_path / str(k), proponents=top, opponents=top, **options)
        widths.append(int.from_bytes((index.parent / "influence.png").read_bytes()[16:20], "big"))
    assert widths[0] == widths[1]
    assert index.read_text().count('<td class="number">+1</td>') == 2 * 20


def test_an_image_is_headed_by_its_prediction_only_where_it_differs():
    samples = Samples("target", 2, labels=[0, 1], predictions=[0, 0], class_names=["ant", "bee"])
    assert [row_heading(samples, row) for row in range(2)] == ["ant", "bee → ant"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_influence": np.full(N, np.nan)}, "self_influence"),
        ({"self_influence": np.ones((N, 2))}, "one number a row"),
        ({"train_inputs": np.zeros((N - 1, 8, 8))}, "train_inputs has 39 rows; expected 40"),
        ({"train_labels": np.zeros(3)}, "train_labels has 3 rows; expected 40"),
        ({"rankings": {"loss": np.ones(3)}}, "loss"),
        ({"known_mislabelled": np.ones(3, dtype=bool)}, "mislabelled"),
        ({"proponents": TopK(np.full((M, K), N), TOP.scores)}, "names train row 40"),
        ({"shown_targets": [M]}, "7"),
        ({"train_labels": np.full(N, 5), "class_names": ["a", "b"]}, "class_names"),
        ({"train_inputs": [np.zeros(3), *[np.zeros(4)] * (N - 1)]}, "one shape"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, message):
    with pytest.raises(tracer.InputError, match=re.escape(message)):
        report(tmp_path / "report", **options)
    assert not (tmp_path / "report").exists()


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(tracer.MissingDependencyError, match=r"tracin\[report\]"):
        report(tmp_path)


def test_attribution_writes_a_report(run, tmp_path):
    found = attribute(
        run.model,
        "image_classification",
        run.train,
        run.targets,
        run.checkpoints,
        save_dir=tmp_path / "store",
        proj_dim=64,
    )
    index = found.report(tmp_path / "report", inputs=run.x[:, :1], labels=run.y, target_inputs=run.target_x[:, :1])
    assert index == tmp_path / "report" / "index.html"
    assert (tmp_path / "report" / "influence.png").exists()
