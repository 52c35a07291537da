"""Reports: the files that are written, their content, and arguments that are refused."""

from __future__ import annotations

import base64
import csv
import html
import importlib.util
import json
import re
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import tracer
from tracer import attribute
from tracer.report import payload as payload_module
from tracer.report import write_report
from tracer.report.charts import heading, influence_montage
from tracer.report.health import descending, recovery_curve
from tracer.report.label_noise import WrongLabels
from tracer.report.samples import Samples
from tracer.report.tables import _csv
from tracer.report.text import number
from tracer.types import TopK

pytest.importorskip("matplotlib")

N, M, K = 40, 7, 3
RNG = np.random.default_rng(0)
SELF = RNG.random(N)
SCORES = RNG.normal(size=(N, M))
LABELS, TARGET_LABELS = np.arange(N) % 3, np.arange(M) % 3
TOP = TopK(RNG.integers(0, N, (M, K)), np.sort(RNG.random((M, K)).astype(np.float32))[:, ::-1])
FLIPPED = np.arange(N) % 8 == 0
NAMES = ["ant", "bee", "cat/dog"]
INPUTS = {
    "gray images": RNG.random((N, 8, 8)),
    "channels first": torch.rand(N, 3, 8, 8),
    "channels last": RNG.integers(0, 255, (N, 8, 8, 3), dtype=np.uint8),
    "transparent": RNG.random((N, 4, 8, 8)),
    "vectors": RNG.normal(size=(N, 12)),
    "long vectors": RNG.normal(size=(N, 100)),
    "numbers": RNG.normal(size=N),
    "texts": [f"row <b>{row}</b> & more" for row in range(N)],
    "records": [{"age": row, "town": "<b>Ulm</b>"} for row in range(N)],
    "absent": None,
}


def report(directory, **options):
    settings = {"self_influence": SELF, "proponents": TOP, "opponents": TOP, "figures": False, **options}
    return write_report(directory, **settings)


def full(directory, **options):
    """A report with scores and labels of both sides."""
    return report(
        directory, scores=SCORES, train_labels=LABELS, target_labels=TARGET_LABELS, class_names=NAMES, **options
    )


def lines(path):
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def embedded(index):
    """The data of the page's scripts."""
    text = index.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="report-data">(.*?)</script>', text)[1])


def words(index):
    """The page's text without its styles, scripts and data."""
    text = re.sub(r"<(script|style).*?</\1>", "", index.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))


class Page(HTMLParser):
    """Collects headings and addresses that a browser would load, and checks that tags close."""

    def __init__(self, text):
        super().__init__()
        self.loaded, self.headings, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        source = attributes.get("src") or attributes.get("srcset") or (tag == "link" and attributes.get("href"))
        if source:
            self.loaded.append(source)
        if tag not in ("img", "meta", "source", "br", "link", "hr", "col", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(text)


@pytest.mark.parametrize("kind", INPUTS)
def test_page_shows_every_kind_of_input_without_a_network(tmp_path, kind):
    inputs = INPUTS[kind]
    targets = None if inputs is None else inputs[:M]
    index = full(
        tmp_path / "report",
        train_inputs=inputs,
        target_inputs=targets,
        train_predictions=LABELS[::-1],
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
    assert [heading for heading in page.headings if heading.strip()] == [
        "Influence report", "Overview", "Distributions", "Finding mislabelled examples", "Suspects",
        "Proponents and opponents", "Classes", "How to read this",
    ]  # fmt: skip
    assert "prefers-color-scheme" in text
    assert "<b>" not in text


def test_the_files_of_a_full_report(tmp_path):
    images = INPUTS["channels last"]
    full(tmp_path, train_inputs=images, target_inputs=images[:M], known_mislabelled=FLIPPED, figures=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "index.html", "influence_scores.csv", "influence_summary.csv", "target_summary.csv", "class_influence.csv",
        "self_influence.png", "recovery.png", "scores.png", "class_influence.png", "top_influences",
        "influence.png", "top_self_influence.png",
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.glob("*.png"))


def test_least_report(tmp_path):
    index = report(tmp_path, figures=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "index.html", "influence_scores.csv", "influence_summary.csv", "self_influence.png",
    ]  # fmt: skip
    headings = Page(index.read_text()).headings
    assert "Finding mislabelled examples" not in headings
    assert "Classes" not in headings
    assert "No estimate of wrong labels" in words(index)


def test_summary_csv_ranks_all_rows(tmp_path):
    full(tmp_path, known_mislabelled=FLIPPED, rankings={"loss": -SELF})
    rows = lines(tmp_path / "influence_summary.csv")
    order = np.argsort(-SELF)
    assert [int(row["rank"]) for row in rows] == list(range(1, N + 1))
    assert [int(row["train_index"]) for row in rows] == order.tolist()
    np.testing.assert_array_equal([float(row["self_influence"]) for row in rows], SELF[order])
    np.testing.assert_allclose([float(row["mean_score"]) for row in rows], SCORES.mean(axis=1)[order])
    np.testing.assert_allclose([float(row["mean_absolute_score"]) for row in rows], np.abs(SCORES).mean(axis=1)[order])
    np.testing.assert_array_equal([float(row["loss"]) for row in rows], -SELF[order])
    assert [row["label"] for row in rows] == [NAMES[LABELS[row]] for row in order]
    assert [bool(int(row["known_mislabelled"])) for row in rows] == FLIPPED[order].tolist()


def test_scores_csv_holds_both_ends_of_every_target(tmp_path):
    low = TopK(TOP.indices[:, :2], -TOP.scores[:, :2])
    report(tmp_path, opponents=low, train_labels=LABELS, target_labels=TARGET_LABELS)
    rows = lines(tmp_path / "influence_scores.csv")
    assert len(rows) == M * (K + 2)
    expected = [
        (target, kind, rank + 1, int(top.indices[target, rank]), float(top.scores[target, rank]))
        for target in range(M)
        for kind, top in (("proponent", TOP), ("opponent", low))
        for rank in range(top.indices.shape[1])
    ]
    found = [(int(r["target"]), r["kind"], int(r["rank"]), int(r["train_index"]), float(r["score"])) for r in rows]
    assert found == expected
    assert all(int(row["label"]) == LABELS[int(row["train_index"])] for row in rows)


def test_csv_cells_that_begin_like_formulas_are_quoted():
    lines = _csv(["=a", "b"], [("@SUM(1)", -1.5), ("-1.5", "+x"), ("cat", "\t=1")]).splitlines()
    assert lines == ["'=a,b", "'@SUM(1),-1.5", "-1.5,'+x", "cat,'\t=1"]


def test_target_and_class_csv(tmp_path):
    full(tmp_path)
    targets = lines(tmp_path / "target_summary.csv")
    np.testing.assert_allclose([float(row["mean_score"]) for row in targets], SCORES.mean(axis=0))
    np.testing.assert_allclose([float(row["rms_score"]) for row in targets], np.sqrt((SCORES**2).mean(axis=0)))
    for a, row in enumerate(lines(tmp_path / "class_influence.csv")):
        assert row["train_class"] == NAMES[a]
        for b, name in enumerate(NAMES):
            assert float(row[name]) == pytest.approx(SCORES[np.ix_(LABELS == a, TARGET_LABELS == b)].mean())


@pytest.mark.parametrize(("kind", "ending"), [("channels last", "png"), ("texts", "txt"), ("vectors", "csv")])
def test_top_rows_of_each_class_are_files(tmp_path, kind, ending):
    full(tmp_path, train_inputs=INPUTS[kind])
    means = SCORES[:, TARGET_LABELS == 2].mean(axis=1)
    for sign, order in (("positive", np.argsort(-means)[:10]), ("negative", np.argsort(means)[:10])):
        expected = [f"{rank:02d}_train{row}_{means[row]:+.3e}.{ending}" for rank, row in enumerate(order, 1)]
        found = sorted((tmp_path / "top_influences" / "cat_dog" / sign).iterdir())
        assert [path.name for path in found] == expected
        content = found[0].read_bytes()
        if kind == "channels last":
            from PIL import Image

            np.testing.assert_array_equal(np.asarray(Image.open(found[0])), INPUTS[kind][order[0]])
        elif kind == "texts":
            assert content.decode() == INPUTS[kind][order[0]]
        else:
            np.testing.assert_array_equal([float(row["value"]) for row in lines(found[0])], INPUTS[kind][order[0]])


def test_top_rows_of_an_earlier_report_are_replaced_and_other_files_stay(tmp_path):
    full(tmp_path / "report", train_inputs=INPUTS["texts"])
    first = {path.name for path in (tmp_path / "report" / "top_influences" / "ant" / "positive").iterdir()}
    report(
        tmp_path / "report", scores=-SCORES, train_labels=LABELS, target_labels=TARGET_LABELS, class_names=NAMES,
        train_inputs=INPUTS["texts"],
    )  # fmt: skip
    second = {path.name for path in (tmp_path / "report" / "top_influences" / "ant" / "positive").iterdir()}
    assert not first & second
    mine = tmp_path / "other" / "top_influences" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    full(tmp_path / "other")
    assert mine.read_text() == "mine"


def test_equal_zero_and_constant_scores_can_be_drawn(tmp_path):
    options = {"scores": np.zeros((N, M)), "train_labels": LABELS, "target_labels": TARGET_LABELS, "figures": True}
    report(tmp_path, self_influence=np.zeros(N), known_mislabelled=FLIPPED, **options)
    report(tmp_path, self_influence=np.full(N, 1e-30), scores=np.full((N, M), -2.0), figures=True)


def test_labels_that_are_numbers_are_no_classes(tmp_path):
    index = report(tmp_path, scores=SCORES, train_labels=SELF, target_labels=SELF[:M], train_predictions=SELF + 1)
    assert "Classes" not in Page(index.read_text()).headings
    assert "does not predict" not in words(index)


def test_names_with_dollars_are_drawn(tmp_path):
    full_names = ["$x", "a_{b$", "\\frac"]
    report(
        tmp_path, scores=SCORES, train_labels=LABELS, target_labels=TARGET_LABELS, class_names=full_names,
        train_inputs=INPUTS["gray images"], known_mislabelled=FLIPPED, rankings={"$": SELF},
        num_top_examples=2, shown_targets=[0], figures=True,
    )  # fmt: skip
    assert (tmp_path / "class_influence.png").exists()


def test_without_figures_matplotlib_is_not_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    full(tmp_path, known_mislabelled=FLIPPED)
    assert not list(tmp_path.glob("*.png"))


def test_recovery_counts_found_rows():
    mislabelled = np.array([False, True, False, True])
    scores = np.array([0.1, 0.9, 0.5, 0.3])
    assert descending(scores).tolist() == [1, 2, 3, 0]
    assert recovery_curve(scores, mislabelled).tolist() == [0, 1, 1, 2, 2]


@pytest.mark.parametrize("mislabelled", [np.arange(N) == 3, np.ones(N, dtype=bool)], ids=["one row", "all rows"])
def test_recovery_is_drawn_for_the_least_and_the_most_mislabelled_rows(tmp_path, mislabelled):
    report(tmp_path, known_mislabelled=mislabelled, figures=True)
    assert (tmp_path / "recovery.png").exists()


def test_a_montage_shows_five_of_many_proponents_and_the_page_all(tmp_path):
    images = INPUTS["gray images"]
    widths = []
    for k in (5, 20):
        top = TopK(np.tile(np.arange(k), (M, 1)), np.ones((M, k), dtype=np.float32))
        options = {
            "train_inputs": images,
            "target_inputs": images[:M],
            "shown_targets": [0],
            "num_top_examples": 1,
            "figures": True,
        }
        index = report(tmp_path / str(k), proponents=top, opponents=top, **options)
        widths.append(int.from_bytes((index.parent / "influence.png").read_bytes()[16:20], "big"))
    assert widths[0] == widths[1]
    assert embedded(index)["targets"]["proponents"]["k"] == 20


def test_a_montage_ends_at_zero():
    images = Samples("train", N, inputs=INPUTS["gray images"])
    top = TopK(np.array([[0, 1, 2]]), np.array([[2.0, 0.0, -1.0]]))
    low = TopK(np.array([[3, 4, 5]]), np.array([[-4.0, 0.0, 1.0]]))
    figure = influence_montage(images, images, top, low, [0], None)
    captions = [mark.text for mark in figure.marks if mark.kind == "text" and mark.color == "muted"]
    assert captions == ["target 0", "+2", "−4"]


def test_an_image_is_headed_by_its_prediction_only_where_it_differs():
    samples = Samples("target", 2, labels=[0, 1], predictions=[0, 0], class_names=["ant", "bee"])
    assert [heading(samples, row) for row in range(2)] == ["ant", "bee → ant"]


def test_a_page_of_many_rows_keeps_to_its_budgets(tmp_path, monkeypatch):
    for name, value in (("MAX_TABLE_EXAMPLES", 10), ("MAX_TARGETS", 4), ("MAX_THUMBNAILS", 6), ("TEXT_BUDGET", 100)):
        monkeypatch.setattr(payload_module, name, value)
    images = embedded(
        report(tmp_path / "images", train_inputs=INPUTS["gray images"], shown_targets=[6], train_labels=LABELS)
    )
    rows = np.frombuffer(base64.b64decode(images["indices"]), "<i4")
    assert rows.tolist() == np.argsort(-SELF)[:10].tolist()
    targets = np.frombuffer(base64.b64decode(images["targets"]["indices"]), "<i4")
    assert targets[0] == 6
    assert len(set(targets.tolist())) == 4
    thumbnails = np.frombuffer(base64.b64decode(images["train"]["indices"]), "<i4")
    assert thumbnails[:3].tolist() == rows[:3].tolist()
    assert len(thumbnails) == 6
    texts = embedded(report(tmp_path / "texts", train_inputs=INPUTS["texts"]))["train"]["texts"]
    assert 0 < sum(map(len, texts)) <= 100


def advice(tmp_path, **options):
    """The recommendations of a page, as text."""
    text = words(report(tmp_path / "report", **options))
    return text[text.index("Recommendations") : text.index("Distributions", text.index("Recommendations"))]


def test_numbers_that_call_for_nothing_give_no_advice(tmp_path):
    assert "None of the numbers" in advice(tmp_path)
    assert "None of the numbers" in advice(tmp_path, self_influence=np.ones(N), train_labels=LABELS)


def wrong_labels(labels, suspects, suggested, low=0.01):
    """An estimate of wrong labels that suspects some examples."""
    confidence = np.where(suspects, 0.9, 0.1)
    return WrongLabels(0.03, low, 0.06, np.asarray(labels), np.full(len(labels), suggested), confidence)


@pytest.mark.parametrize(("low", "advised"), [(0.0, False), (0.01, True)])
def test_labels_are_to_be_checked_only_where_the_interval_lies_above_zero(tmp_path, low, advised):
    options = {"train_labels": LABELS, "health": wrong_labels(LABELS, np.arange(N) < 9, 2, low)}
    assert ("Check the labels of the 9 suspects, highest self-influence" in advice(tmp_path, **options)) == advised


def test_advice_names_the_number_that_it_follows_from(tmp_path):
    num_rows = 600
    own = np.ones(num_rows)
    own[:6] = 100.0
    text = advice(tmp_path, self_influence=own)
    assert "Look at the 6 examples with the highest self-influence" in text
    assert f"{600 / (600 + 594):.0%} of all self-influence" in text
    top = TopK(np.stack([np.full(30, 5), np.arange(30)], axis=1), np.ones((30, 2)))
    text = advice(tmp_path, self_influence=np.ones(num_rows), proponents=top, opponents=top)
    assert "Training example 5 is among the strongest of" in text
    assert "Training example 5" not in advice(
        tmp_path, self_influence=np.ones(num_rows), proponents=top, opponents=top, settings={"estimator": "cosine"}
    )


def test_advice_on_wrong_labels_small_classes_and_harmed_targets(tmp_path):
    num_rows, num_targets = 400, 30
    labels, targets = np.arange(num_rows) % 3, np.arange(num_targets) % 3
    labels[labels == 2] = np.where(np.arange((labels == 2).sum()) < 10, 2, 0)
    scores = np.where(labels[:, None] == targets[None], 1.0, -0.1) * np.random.default_rng(0).uniform(
        0.8, 1.2, (num_rows, num_targets)
    )
    wrong = np.flatnonzero(labels == 0)[:80]
    scores[np.ix_(wrong, np.flatnonzero(targets == 1))] = -1.5
    strongest = TopK(np.zeros((num_targets, 1), dtype=int), np.ones((num_targets, 1)))
    options = {
        "self_influence": np.ones(num_rows), "proponents": strongest, "opponents": strongest,
        "train_labels": labels, "target_labels": targets, "class_names": NAMES,
    }  # fmt: skip
    suspects = np.isin(np.arange(num_rows), wrong)
    text = advice(tmp_path, scores=scores, health=wrong_labels(labels, suspects, 1), **options)
    assert "Check the labels of the 80 suspects" in text
    assert "80 of the 80 suspects are labelled ant and are more probably bee" in text
    assert "Look at how examples of class ant were labelled" in text
    assert "Collect more examples of class cat/dog. It has 10 training examples" in text
    assert "20 of 30 targets (67%) have a negative mean score" in text
    text = advice(tmp_path, scores=scores, health=wrong_labels(labels, suspects, 1, low=0.0), **options)
    assert "more probably bee" not in text  # the interval contains zero, so all of these labels may be correct
    assert "were labelled" not in text
    text = advice(tmp_path, scores=np.abs(scores), **options)
    assert "Check the labels" not in text
    assert "negative mean score" not in text


def test_suspects_have_a_suggested_label_and_a_probability(tmp_path):
    health = wrong_labels(LABELS, np.arange(N) < 9, 2)
    index = report(tmp_path / "report", train_labels=LABELS, class_names=NAMES, health=health)
    text, data = words(index), embedded(index)
    assert "3.0% of the labels are likely wrong; 95 % interval 1.0% to 6.0%" in text
    assert {"suspect"} <= data["flags"].keys()
    rows = {int(row["train_index"]): row for row in lines(tmp_path / "report" / "influence_summary.csv")}
    for index in range(N):
        assert rows[index]["suspect"] == str(int(index < 9))
        assert rows[index]["suggested_label"] == NAMES[2]
        assert float(rows[index]["wrong_probability"]) == (0.9 if index < 9 else 0.1)


def test_a_suggested_label_has_the_name_that_most_examples_of_its_class_have(tmp_path):
    corrected = np.array(NAMES)[LABELS]
    corrected[2] = "other"  # LABELS[2] is 2
    health = wrong_labels(LABELS, np.arange(N) < 9, 2)
    report(tmp_path / "report", train_labels=corrected, health=health)
    assert {row["suggested_label"] for row in lines(tmp_path / "report" / "influence_summary.csv")} == {NAMES[2]}


def test_without_an_estimate_the_page_says_why(tmp_path):
    text = words(report(tmp_path / "report", train_labels=LABELS, health="the scores do not tell classes apart."))
    assert "No estimate of wrong labels: the scores do not tell classes apart." in text
    assert "likely wrong" not in text


def test_scores_and_labels_alone_give_no_estimate(tmp_path):
    rng = np.random.default_rng(0)
    options = {"scores": rng.normal(size=SCORES.shape), "train_labels": LABELS, "target_labels": TARGET_LABELS}
    assert "likely wrong" not in words(report(tmp_path / "report", **options))


@pytest.mark.parametrize("apart", [True, False])
def test_out_of_sample_probabilities_give_an_estimate_if_they_tell_classes_apart(tmp_path, apart):
    rng, size = np.random.default_rng(0), 600
    labels = rng.integers(0, 3, size)
    odds = rng.normal(size=(size, 3)) + (4.0 * np.eye(3)[labels] if apart else 0)
    wrong = np.arange(size) < 60
    given = np.where(wrong, (labels + 1) % 3, labels)
    probabilities = np.exp(odds) / np.exp(odds).sum(1, keepdims=True)
    text = words(report(tmp_path, self_influence=np.ones(size), train_labels=given, train_probabilities=probabilities))
    assert ("of the labels are likely wrong" in text) == apart
    assert ("the probabilities do not tell classes apart" in text) != apart


def test_suspects_come_in_the_order_of_a_ranking(tmp_path):
    loss = np.random.default_rng(1).permutation(N).astype(float)
    index = report(tmp_path / "report", rankings={"mean loss": loss}, order_by="mean loss")
    rows = lines(tmp_path / "report" / "influence_summary.csv")
    assert [int(row["train_index"]) for row in rows] == np.argsort(-loss).tolist()
    assert "Training examples, highest mean loss first" in words(index)
    assert embedded(index)["sort"] == "ranking0"


def test_warnings_come_first(tmp_path):
    text = html.unescape(words(report(tmp_path / "report", warnings=["The model has not fitted <b>the labels</b>."])))
    assert text.index("Warning. The model has not fitted <b>the labels</b>.") < text.index("Label health")


@pytest.mark.parametrize("kind", [np.float32, bool])
def test_labels_of_two_classes_as_floats_or_bools_are_class_indices(tmp_path, kind):
    labels = LABELS % 2
    index = report(
        tmp_path, train_labels=labels.astype(kind), train_predictions=labels, class_names=["neg", "pos"],
    )  # fmt: skip
    assert "does not predict 0.0%" in re.sub(" +", " ", words(index))
    rows = lines(tmp_path / "influence_summary.csv")
    assert [row["label"] for row in rows] == [["neg", "pos"][labels[int(row["train_index"])]] for row in rows]


def test_names_of_classes_may_be_a_mapping_from_indices_but_no_text(tmp_path):
    labels, names = LABELS % 2, {"1": "pos", "0": "neg"}  # as in config.json
    report(tmp_path, train_labels=labels, class_names=names)
    rows = lines(tmp_path / "influence_summary.csv")
    assert [row["label"] for row in rows] == [["neg", "pos"][labels[int(row["train_index"])]] for row in rows]
    with pytest.raises(tracer.InputError, match=r"keys \[1, 2\]; expected the class indices 0, 1"):
        report(tmp_path, train_labels=labels, class_names={1: "neg", 2: "pos"})
    with pytest.raises(tracer.InputTypeError, match="class_names is 'np'; expected a list"):
        report(tmp_path, train_labels=labels, class_names="np")


def test_a_file_in_place_of_the_directory_and_a_number_in_place_of_inputs_are_named(tmp_path):
    (tmp_path / "page").write_text("")
    with pytest.raises(tracer.InputError, match="page', where a file is; expected a directory"):
        report(tmp_path / "page")
    with pytest.raises(tracer.InputError, match="train_inputs must be an array"):
        report(tmp_path, train_inputs=5)


@pytest.mark.parametrize("values", [[0.0, 0.5], [0.0, 2.0], [0.0, np.nan]])
def test_floats_that_are_no_class_indices_stay_numbers(values):
    samples = Samples("train", 2, labels=np.array(values), class_names=["neg", "pos"])
    assert samples.labels == [f"{value:.4g}" for value in values]


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 1, 4, 4), (3, 3, 4, 4), (3, 4, 4, 4)])
def test_one_pixel_that_is_nan_is_marked_and_leaves_the_others_as_they_are(shape):
    whole = RNG.normal(size=shape)
    broken = whole.copy()
    place = (1, 2, 2) if len(shape) == 3 else (1, 0, 2, 2)
    broken[place] = np.nan
    limits = (np.nanmin(broken), np.nanmax(broken))
    whole[place] = limits[0]  # the same least and greatest
    expected, found = Samples("train", 3, inputs=whole), Samples("train", 3, inputs=broken)
    for row in range(3):
        right, image = expected.image(row), found.image(row)
        right = right[..., None].repeat(3, -1) if right.ndim == 2 else right
        marked = np.zeros((4, 4), dtype=bool)
        marked[2, 2] = row == 1
        np.testing.assert_allclose(image[~marked], right[~marked])
        assert (image[marked][:, :3] == [1.0, 0.0, 1.0]).all()


def test_images_without_a_finite_pixel_are_drawn_without_warnings(tmp_path):
    images = np.full((N, 8, 8), np.nan, dtype=np.float32)
    images[0] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report(tmp_path, train_inputs=images, target_inputs=images[:M], figures=True)


def test_a_number_that_is_missing_in_one_vector_leaves_mean_and_deviation_of_the_others(tmp_path):
    vectors = RNG.normal(size=(N, 3))
    vectors[4, 0], vectors[5, 0], vectors[:, 2] = np.nan, np.inf, np.nan
    packed = embedded(report(tmp_path, train_inputs=vectors))["train"]
    kept = np.delete(vectors[:, 0], [4, 5])
    for name, first, second in (
        ("mean", kept.mean(), vectors[:, 1].mean()),
        ("deviation", kept.std(), vectors[:, 1].std()),
    ):
        found = np.frombuffer(base64.b64decode(packed[name]), "<f4")
        np.testing.assert_allclose(found, [first, second, 0.0], rtol=1e-5)


def test_tokens_may_come_as_arrays(tmp_path):
    tokens = np.array([["a", f"b{row}"] for row in range(N)])
    index = report(tmp_path, train_tokens=tokens, target_tokens=tokens[:M], token_scores={(0, 2): [1.0, 2.0]})
    assert embedded(index)["tokens"]["train"] == {"2": ["a", "b2"]}


def test_the_map_as_a_table_shows_the_classes_of_the_map_and_leaves_out_what_is_not_known(tmp_path):
    labels, targets = np.arange(N) % 2, np.array([0, 0, 0, 2, 2, 2, 2])
    text = words(report(tmp_path, scores=SCORES, train_labels=labels, target_labels=targets, class_names=NAMES))
    listed = text[text.index("The map as a table") : text.index("Classes", text.index("The map as a table"))]
    assert "nan" not in listed
    assert listed.count("cat/dog") == 2  # a class without training examples still has its column

    many = [f"c{place}" for place in range(N)] + ["most"]
    codes = np.arange(45) % 41
    codes[-4:] = 40  # the last class has the most examples, so it is among the forty on the map
    scores = RNG.normal(size=(45, M))
    index = report(
        tmp_path / "many", self_influence=np.ones(45), scores=scores, train_labels=codes, target_labels=TARGET_LABELS,
        class_names=many,
    )  # fmt: skip
    text = words(index)
    assert "most" in text[text.index("The map as a table") :].split("c0", 1)[1].split("c0", 1)[0]


def test_half_a_surrogate_pair_is_written_as_its_number(tmp_path):
    names, texts = ["ant\ud800", "bee", "cat"], ["text \udfff"] * N
    index = report(
        tmp_path / "report", scores=SCORES, train_labels=LABELS, target_labels=TARGET_LABELS, class_names=names,
        train_inputs=texts, figures=True,
    )  # fmt: skip
    assert "ant\\ud800" in words(index)
    assert "ant\\ud800" in {row["label"] for row in lines(tmp_path / "report" / "influence_summary.csv")}


def test_nothing_is_written_where_a_table_cannot_be_made(tmp_path, monkeypatch):
    def fail(data):
        raise RuntimeError("no table")

    monkeypatch.setattr("tracer.report.writer.tables.classes_csv", fail)
    with pytest.raises(RuntimeError, match="no table"):
        full(tmp_path / "report")
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    ("options", "shown", "meaning"),
    [
        ({"estimator": "tracin"}, ["target loss"], "lowered the target's loss"),
        ({"estimator": "tracin", "target": "output"}, ["target output"], "moved the model's output"),
        (
            {"estimator": "influence", "regularization": 7.5},
            ["target output", "regularization 7.5, given"],
            "moved the model's output",
        ),
        ({"estimator": "trak"}, ["target output", "regularization {value:.4g}, rule {rule}"], "moved the model's"),
    ],
)
def test_settings_tell_of_what_scores_are_and_the_regularization(run, tmp_path, options, shown, meaning):
    found = attribute(
        run.model, "image_classification", run.train, run.targets, run.checkpoints, save_dir=tmp_path / "store",
        proj_dim=64, **options,
    )  # fmt: skip
    text = html.unescape(words(found.report(tmp_path / "report", figures=False)))
    rule = found.tracer.regularization("trak")
    for each in shown:
        assert each.format(value=rule.value, rule=rule.rule) in text
    assert ("regularization" in text) == ("regularization" in shown[-1])
    assert meaning in text
    assert ("lowered the target's loss" in text) == (shown[0] == "target loss")


def test_numbers_are_written_to_three_digits():
    assert [number(value) for value in (0.0, -1.5, 1234.5, 1e-7, 0.5)] == ["0", "−1.5", "1,234", "1.00e−07", "0.5"]


def test_labels_and_settings_come_from_the_store(run, tmp_path):
    found = attribute(
        run.model, "image_classification", run.train, run.targets, run.checkpoints, save_dir=tmp_path / "store",
        proj_dim=64, estimator="cosine",
    )  # fmt: skip
    index = found.report(tmp_path / "report", settings={"note": "mine"}, figures=False)
    rows = {int(row["train_index"]): row for row in lines(tmp_path / "report" / "influence_summary.csv")}
    assert [int(rows[row]["label"]) for row in range(len(run.y))] == run.y.tolist()
    losses = []
    for checkpoint, _ in run.checkpoints:
        run.model.load_state_dict(checkpoint)
        logits = run.model.eval()(run.x)
        losses.append(torch.nn.functional.cross_entropy(logits, run.y, reduction="none").detach())
    mean = torch.stack(losses).mean(0)
    np.testing.assert_allclose([float(rows[row]["mean loss"]) for row in range(len(run.y))], mean, rtol=1e-4)
    text = words(index)
    assert "learning rates 0.3, 0.2, 0.1" in text
    assert "image_classification" in text
    assert "note mine" in text
    assert "3 checkpoints" in text.replace("checkpoints 3", "3 checkpoints")


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
    index = found.report(
        tmp_path / "report", inputs=run.x[:, :1], labels=run.y, target_inputs=run.target_x[:, :1], num_top_examples=4
    )
    assert index == tmp_path / "report" / "index.html"
    assert (tmp_path / "report" / "influence.png").exists()
    means = np.asarray(found.by("top").scores).mean(axis=0)
    targets = lines(tmp_path / "report" / "target_summary.csv")
    np.testing.assert_allclose([float(row["mean_score"]) for row in targets], means, rtol=1e-5)


def test_without_all_scores_no_matrix_is_computed(run, tmp_path):
    found = attribute(
        run.model, "image_classification", run.train, run.targets, run.checkpoints, save_dir=tmp_path / "store",
        proj_dim=64,
    )  # fmt: skip
    found.report(tmp_path / "report", all_scores=False, labels=[f"name {label}" for label in run.y], figures=False)
    assert not (tmp_path / "report" / "target_summary.csv").exists()
    assert not list((tmp_path / "store").rglob("scores"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"self_influence": np.full(N, np.nan)}, "self_influence"),
        ({"self_influence": np.ones((N, 2))}, "one number per training example"),
        ({"train_inputs": np.zeros((N - 1, 8, 8))}, "train_inputs has 39 examples; expected 40"),
        ({"train_labels": np.zeros(3)}, "train_labels has 3 examples; expected 40"),
        ({"rankings": {"loss": np.ones(3)}}, "loss"),
        ({"rankings": {"label": np.ones(N)}}, "rankings has the name 'label', which is that of a column"),
        ({"rankings": {"self-influence": np.ones(N)}}, "rankings has the name 'self-influence'"),
        ({"known_mislabelled": np.ones(3, dtype=bool)}, "mislabelled"),
        (
            {"proponents": TopK(np.full((M, K), N), TOP.scores)},
            "contains the index 40; expected indices of training examples, 0 to 39",
        ),
        ({"opponents": TopK(TOP.indices[:2], TOP.scores[:2])}, "opponents has indices [2, 3]"),
        ({"shown_targets": [M]}, "7"),
        ({"train_labels": np.full(N, 5), "class_names": ["a", "b"]}, "class_names"),
        ({"train_inputs": [np.zeros(3), *[np.zeros(4)] * (N - 1)]}, "one shape"),
        ({"train_inputs": np.zeros((N, 2, 2, 2, 2))}, "expected images [N, H, W]"),
        (
            {"train_inputs": np.zeros((N, 3)), "feature_names": ["a"]},
            "feature_names has 1 names; expected 3, one for each number of train_inputs",
        ),
        ({"scores": SCORES.T}, "scores have shape [7, 40]; expected [40, 7]"),
        ({"train_tokens": [["a"]]}, "train_tokens has 1 lists; expected 40"),
        ({"token_scores": {(0, 0): [1.0]}}, "token_scores needs train_tokens"),
        ({"train_tokens": [["a"]] * N, "token_scores": {(M, 0): [1.0]}}, "(target 7, training example 0)"),
        ({"train_tokens": [["a"]] * N, "token_scores": {(0, 2): [1.0, 2.0]}}, "expected 1 finite numbers"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, options, message):
    with pytest.raises(tracer.InputError, match=re.escape(message)):
        report(tmp_path / "report", **options)
    assert not (tmp_path / "report").exists()


def test_an_unknown_option_is_refused(tmp_path):
    with pytest.raises(tracer.InputTypeError, match=re.escape("unknown option 'num_top_rows'; expected train_pred")):
        report(tmp_path / "report", num_top_rows=3)


@pytest.mark.parametrize(
    ("module", "options"), [("matplotlib", {"figures": True}), ("PIL", {"train_inputs": INPUTS["gray images"]})]
)
def test_without_an_optional_package(tmp_path, monkeypatch, module, options):
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(tracer.MissingDependencyError, match=r"tracin\[report\]"):
        report(tmp_path / "report", **options)
    assert not (tmp_path / "report").exists()


def test_assets_are_in_the_package():
    folder = importlib.util.find_spec("tracer.report").submodule_search_locations[0]
    from tracer.report.page import SCRIPTS, asset

    assert folder
    assert all(asset(name).strip() for name in ("report.css", *SCRIPTS))
