"""Commands on a store: info, verify, top, self-influence, export, report, compare. The oracle is the library."""

from __future__ import annotations

import csv
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from cli_cases import MODULE, NUM_TARGETS, NUM_TRAIN, enter, make_project, printed_json, refused, run_tracer

from tracer import Attribution, Tracer, verify
from tracer.cli import compare, export
from tracer.metrics import spearman
from tracer.store.arrays.local_path import LocalPath
from tracer.store.arrays.metadata import read_document, write_document


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose run is done, and another store of other rows; tests that change anything take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        make_project(folder)
        for options in ([], ["--train", f"{MODULE}:other_set", "--save-dir", "other"]):
            assert run_tracer("run", "tracer.toml", *options).exit_code == 0
    return folder


@pytest.fixture
def project(finished, monkeypatch):
    enter(finished, monkeypatch)
    return finished


@pytest.fixture
def own(finished, tmp_path, monkeypatch):
    """A copy of the project, which a test may change."""
    folder = tmp_path / "own"
    shutil.copytree(finished, folder)
    enter(folder, monkeypatch)
    return folder


def library(estimator: str | None = None, save_dir: str = "store") -> Attribution:
    return Attribution(Tracer.open(save_dir), "targets", estimator)


def rows_of(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_info_says_what_the_store_holds(project):
    found = printed_json("info", "store")
    assert (found["train_rows"], found["feature_dim"], found["storage"]) == (NUM_TRAIN, 64, "float16")
    assert [(each["learning_rate"], each["train_rows_done"], each["finalized"]) for each in found["checkpoints"]] == [
        (0.1, NUM_TRAIN, True),
        (0.2, NUM_TRAIN, True),
    ]
    assert found["targets"]["targets"]["done"] == {"0": NUM_TARGETS, "1": NUM_TARGETS}
    files = [path for path in (project / "store").rglob("*") if path.is_file()]
    assert found["bytes"]["total"] == sum(path.stat().st_size for path in files)
    text = run_tracer("info", "tracer.toml").output
    assert "64 values an example (sketch), stored as float16" in text
    assert "epoch_10.pt" in text


def test_what_a_store_says_cannot_control_the_terminal(own):
    path = own / "store" / "zarr.json"
    document = read_document(LocalPath(path))
    document["attributes"]["info"]["model"] = "Net\x1b[2J\u202e\nstore  fine\x9b"
    write_document(LocalPath(path), document)
    shown = run_tracer("info", "store").output
    assert "Net\\x1b[2J\\u202e\\nstore  fine\\x9b" in shown and "\x1b" not in shown
    (own / "store" / "targets" / "a\x1b[2Jb").mkdir()
    shown = run_tracer("top", "store", "--exp-name", "\x1b[2J").output
    assert "\x1b" not in shown


def test_verify_of_a_whole_store_is_0(project):
    assert run_tracer("verify", "store").exit_code == 0
    assert printed_json("verify", "store")["ok"] is True


@pytest.mark.parametrize("repair", [[], ["--repair"]])
@pytest.mark.parametrize(
    "content", ["{", '{"zarr_format": 3, "attributes": {"format": "tracer", "format_version": 0.5}}']
)
def test_a_damaged_root_is_damage(own, content, repair):
    (own / "store/zarr.json").write_text(content)
    result = run_tracer("verify", "tracer.toml", "--json", *repair)
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert [(each["path"], each["repaired"]) for each in found["damage"]] == [(str(own / "store/zarr.json"), False)]
    assert (own / "store/zarr.json").read_text() == content


@pytest.mark.parametrize("attributes", [{}, {"format": "tracer", "format_version": 99}])
def test_what_is_no_store_of_this_version_is_not_called_damaged(own, attributes):
    (own / "store/zarr.json").write_text(json.dumps({"zarr_format": 3, "attributes": attributes}))
    assert refused("verify", "store").startswith("Error: ")


def test_verify_of_a_damaged_store_is_1_and_changes_nothing_until_it_is_to_repair(own):
    chunk = next(path for path in (own / "store/checkpoints/1/features/c").rglob("*") if path.is_file())
    content = bytearray(chunk.read_bytes())
    content[3 * 128] ^= 1  # of row 3
    chunk.write_bytes(content)
    looked = run_tracer("verify", "store")
    assert looked.exit_code == 1
    assert "rows do not match the checksum that they were written with; 1 rows" in looked.output
    assert "tracer verify --repair" in looked.output
    assert not verify("store", repair=False).ok
    assert len(Tracer.open("store").remaining(1)) == 0
    assert run_tracer("verify", "store", "--repair").exit_code == 1
    assert Tracer.open("store").remaining(1).tolist() == [3]
    assert run_tracer("run", "tracer.toml").exit_code == 0
    assert run_tracer("verify", "store").exit_code == 0


@pytest.mark.parametrize("kind", ["proponents", "opponents"])
@pytest.mark.parametrize("estimator", ["tracin", "influence"])
def test_top_is_that_of_the_library(project, kind, estimator):
    options = ["--targets", "4,0-1", "-k", "3", "--kind", kind, "--estimator", estimator]
    found = printed_json("top", "store", *options)
    wanted = library(estimator).top(3, kind)
    assert [each["target"] for each in found["targets"]] == [4, 0, 1]
    for each in found["targets"]:
        assert each[kind]["rows"] == wanted.indices[each["target"]].tolist()
        assert np.array_equal(np.float32(each[kind]["scores"]), wanted.scores[each["target"]])


def test_top_for_people_shows_classes_and_both_kinds(project):
    labels = __import__(MODULE).test_set()[1]
    output = run_tracer("top", "tracer.toml", "--targets", "2", "--kind", "both", "-k", "4").output
    assert f"target 2 (class {labels[2]}): proponents" in output
    assert f"target 2 (class {labels[2]}): opponents" in output
    first = library().top(1)
    train_label = __import__(MODULE).train_set()[1][first.indices[2, 0]]
    assert f" {first.indices[2, 0]}  {first.scores[2, 0]:.4g}" in " ".join(output.split("\n")[2].split()).replace(
        " ", "  "
    )
    assert output.split("\n")[2].split()[-1] == str(train_label.item())


def test_top_of_many_targets_shows_some(project, monkeypatch):
    from tracer.cli import top

    monkeypatch.setattr(top, "SHOWN_TARGETS", 2)
    output = run_tracer("top", "store", "-k", "1").output
    assert output.count("proponents") == 2
    assert "3 more targets: choose by --targets" in output


def test_the_file_of_the_run_chooses_estimator_and_targets_and_flags_win(own):
    text = (own / "tracer.toml").read_text() + '\nestimator = "cosine"\n'
    (own / "cosine.toml").write_text(text)
    assert printed_json("top", "cosine.toml", "-k", "1")["estimator"] == "cosine"
    assert printed_json("top", "cosine.toml", "-k", "1", "--estimator", "trak")["estimator"] == "trak"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--targets", "7"], "--targets names [7]; the store has targets 0 to 4"),
        (["--targets", "one"], "'one'; expected numbers and ranges such as 0,5,10-12"),
        (["--targets", "4,3-1"], "'4,3-1' has the range 3-1; expected the lower number first"),
        (["--targets", "3,1-2,3"], "'3,1-2,3' names [3] more than once; name each once"),
        (["--exp-name", "target"], "exp_name='target' was never scored; did you mean 'targets'"),
        (["--model-ids", "0,9"], "[9] is not in the store"),
    ],
)
def test_what_is_not_there_is_explained(project, arguments, message):
    assert message in refused("top", "store", *arguments)


def test_one_of_several_sets_of_targets_has_to_be_named(own):
    assert run_tracer("run", "tracer.toml", "--exp-name", "again").exit_code == 0
    assert "several sets of targets: choose one of ['again', 'targets'] by --exp-name" in refused("top", "store")
    assert printed_json("top", "store", "--exp-name", "again", "-k", "1")["exp_name"] == "again"


def test_a_store_without_targets_says_so(own):
    shutil.rmtree(own / "store" / "targets")
    assert "has no targets; score some first" in refused("top", "store")
    assert run_tracer("self-influence", "store").exit_code == 0


def test_a_file_without_a_store_says_so(own):
    (own / "bare.toml").write_text("seed = 1")
    assert "bare.toml has no save_dir; name the store itself" in refused("info", "bare.toml")


@pytest.mark.parametrize("estimator", ["tracin", "influence"])
def test_self_influence_is_that_of_the_library(project, estimator):
    wanted = Tracer.open("store").self_influence(estimator=estimator)
    found = printed_json("self-influence", "store", "-k", "5", "--estimator", estimator)
    assert found["rows"] == np.argsort(-wanted, kind="stable")[:5].tolist()
    assert np.array_equal(found["self_influence"], wanted[found["rows"]])
    lowest = printed_json("self-influence", "store", "-k", "2", "--lowest", "--estimator", estimator)
    assert lowest["rows"] == np.argsort(wanted, kind="stable")[:2].tolist()


@pytest.mark.parametrize("block", [1, 12, 1 << 20])
def test_exported_scores_are_those_of_the_library_in_blocks_of_any_size(project, tmp_path, monkeypatch, block):
    monkeypatch.setattr(export, "_BLOCK_SCORES", block)
    wanted = library().scores
    for name in ("scores.csv", "scores.npy"):
        assert run_tracer("export", "store", str(tmp_path / name)).exit_code == 0
    rows = rows_of(tmp_path / "scores.csv")
    assert [(int(row["train_row"]), int(row["target"])) for row in rows] == list(np.ndindex(wanted.shape))
    assert np.array_equal(np.float32([row["score"] for row in rows]), np.ravel(wanted))
    assert np.array_equal(np.load(tmp_path / "scores.npy"), wanted)


def test_a_block_of_scores_is_no_larger_than_it_should_be(monkeypatch):
    monkeypatch.setattr(export, "_BLOCK_SCORES", 10)
    blocks = list(export.score_blocks(np.zeros((7, 5), np.float32), [0, 1, 2, 3, 4]))
    assert [len(block["score"]) for block in blocks] == [10, 10, 10, 5]


def test_scores_are_exported_as_parquet(project, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run_tracer("export", "store", str(tmp_path / "some.parquet"), "--targets", "3,1").exit_code == 0
    found = parquet.read_table(tmp_path / "some.parquet").to_pydict()
    assert found["target"] == [3, 1] * NUM_TRAIN
    assert np.array_equal(np.float32(found["score"]), library().scores[:, [3, 1]].ravel())


def test_parquet_says_what_to_install(project, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    output = refused("export", "store", str(tmp_path / "some.parquet"))
    assert "pip install 'tracin[parquet]', or write .csv" in output
    assert list(tmp_path.iterdir()) == []


def test_top_rows_are_exported_in_long_form(project, tmp_path):
    found = printed_json("export", "store", str(tmp_path / "top.csv"), "--what", "top", "-k", "2")
    assert found["rows"] == 2 * NUM_TARGETS * 2
    rows = rows_of(tmp_path / "top.csv")
    for kind in ("proponents", "opponents"):
        mine = [row for row in rows if row["kind"] == kind]
        wanted = library().top(2, kind)
        assert [int(row["train_row"]) for row in mine] == wanted.indices.ravel().tolist()
        assert [int(row["rank"]) for row in mine] == [1, 2] * NUM_TARGETS


def test_summaries_are_means_of_scores(project, tmp_path):
    wanted, labels = np.asarray(library().scores, np.float64), __import__(MODULE).train_set()[1]
    for what in ("rows", "targets"):
        assert run_tracer("export", "store", str(tmp_path / f"{what}.csv"), "--what", what).exit_code == 0
    rows, targets = rows_of(tmp_path / "rows.csv"), rows_of(tmp_path / "targets.csv")
    np.testing.assert_allclose([float(row["mean_score"]) for row in rows], wanted.mean(1))
    np.testing.assert_allclose([float(row["mean_absolute_score"]) for row in rows], abs(wanted).mean(1))
    assert [float(row["self_influence"]) for row in rows] == library().self_influence().tolist()
    assert [int(row["class"]) for row in rows] == labels.tolist()
    np.testing.assert_allclose([float(row["mean_score"]) for row in targets], wanted.mean(0))


def test_self_influence_beside_cosines_is_named_as_what_it_is(project, tmp_path):
    assert (
        run_tracer("export", "store", str(tmp_path / "rows.csv"), "--what", "rows", "--estimator", "cosine").exit_code
        == 0
    )
    rows = rows_of(tmp_path / "rows.csv")
    assert "self_influence" not in rows[0]
    assert [float(row["self_influence_tracin"]) for row in rows] == library("tracin").self_influence().tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out.txt"], "out.txt ends with '.txt'; expected one of .csv, .parquet, .npy"),
        (["nodir/out.csv"], "nodir/out.csv cannot be written: there is no directory nodir; create it first"),
        (["out.npy", "--what", "top"], "A .npy file is the matrix of all scores"),
        (["out.csv", "--what", "rows", "--targets", "1"], "got --targets with --what rows"),
    ],
)
def test_exports_that_cannot_be_are_explained(project, arguments, message):
    assert message in refused("export", "store", *arguments)


def test_a_report_is_written_from_the_file_of_the_run(project, tmp_path):
    pytest.importorskip("matplotlib")
    result = run_tracer("report", "tracer.toml", "--output-dir", str(tmp_path / "page"), "--title", "Of the test")
    assert result.exit_code == 0, result.output
    assert "Of the test" in (tmp_path / "page" / "index.html").read_text(encoding="utf-8")


def test_a_report_does_without_matplotlib_when_asked(project, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "pip install" in refused("report", "store", "--output-dir", str(tmp_path / "page"))
    options = ["--no-figures", "--no-all-scores"]
    assert run_tracer("report", "store", "--output-dir", str(tmp_path / "page"), *options).exit_code == 0
    assert (tmp_path / "page" / "index.html").exists()


def test_a_report_shows_texts_that_are_named(project, tmp_path):
    pytest.importorskip("matplotlib")
    options = ["--inputs", f"{MODULE}:texts", "--class-names", "low,middle,high"]
    result = run_tracer("report", "store", "--output-dir", str(tmp_path / "page"), *options)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "row 17" in page
    assert "middle" in page


def test_a_report_refuses_rows_of_another_number(project, tmp_path):
    output = refused("report", "store", "--output-dir", str(tmp_path), "--train", f"{MODULE}:test_set")
    assert f"{MODULE}:test_set has 5 examples; the store has 24 training examples" in output
    output = refused("report", "store", "--output-dir", str(tmp_path), "--inputs", f"{MODULE}:pictures")
    assert f"inputs is '{MODULE}:pictures', and {MODULE} has no 'pictures'" in output


def test_what_a_report_shows_of_batches():
    from tracer.data.datasets import as_data_source
    from tracer.data.displayable import displayable

    images, labels = torch.rand(4, 1, 2, 2), torch.arange(4)
    inputs, known = displayable(as_data_source((images, labels), "train", 3))
    assert np.array_equal(inputs, images.numpy())
    assert known.tolist() == [0, 1, 2, 3]
    tokens = {"input_ids": torch.ones(2, 5, dtype=torch.long), "labels": torch.tensor([1, 0])}
    inputs, known = displayable(as_data_source([tokens], "train", 1))
    assert inputs is None
    assert known.tolist() == [1, 0]
    inputs, known = displayable(as_data_source([{"text": ["a", "b"], "x": torch.rand(2, 3)}], "train", 1))
    assert (inputs, known) == (["a", "b"], None)


def test_a_store_is_like_itself(project):
    found = printed_json("compare", "store", "store")
    np.testing.assert_allclose(found["spearman"], 1)
    assert found["overlap_proponents"] == found["overlap_opponents"] == [1.0] * NUM_TARGETS
    assert found["self_influence_spearman"] == pytest.approx(1)


@pytest.mark.parametrize("block", [1, 1 << 22])
def test_estimators_are_compared_target_by_target(project, monkeypatch, block):
    monkeypatch.setattr(compare, "_BLOCK_SCORES", block)
    found = printed_json("compare", "store", "store", "--estimator", "tracin", "--estimator-b", "influence", "-k", "2")
    one, other = library("tracin"), library("influence")
    np.testing.assert_allclose(found["spearman"], spearman(one.scores, other.scores))
    tops = [each.top(2).indices for each in (one, other)]
    shared = [len(set(a) & set(b)) / 2 for a, b in zip(*tops, strict=True)]
    assert found["overlap_proponents"] == pytest.approx(shared)
    assert 0 < np.mean(shared) < 1
    own = [Tracer.open("store").self_influence(estimator=name)[:, None] for name in ("tracin", "influence")]
    assert found["self_influence_spearman"] == pytest.approx(spearman(*own)[0])


def test_checkpoints_of_one_store_are_compared(project):
    found = printed_json("compare", "store", "store", "--model-ids", "0", "--model-ids-b", "1")
    reader = Tracer.open("store")
    wanted = spearman(
        reader.finalize_scores("targets", model_ids=[0]), reader.finalize_scores("targets", model_ids=[1])
    )
    np.testing.assert_allclose(found["spearman"], wanted)


def test_compare_for_people_has_means_and_extremes(project):
    found = printed_json("compare", "store", "store", "--estimator-b", "trak")
    output = run_tracer("compare", "store", "store", "--estimator-b", "trak").output
    line = next(line for line in output.splitlines() if line.startswith("rank correlation of scores"))
    values = found["spearman"]
    assert line.split()[-3:] == [f"{value:.3f}" for value in (np.mean(values), np.median(values), np.min(values))]


def test_compare_refuses_other_rows_and_other_numbers_of_rows(own):
    assert "24 of 24 training examples have other inputs in B than in A" in refused("compare", "store", "other")
    changed = ["--train", f"{MODULE}:test_set", "--save-dir", "few"]
    assert run_tracer("run", "tracer.toml", *changed).exit_code == 0
    assert "A has 24 training examples and B has 5" in refused("compare", "store", "few")


@pytest.fixture(scope="module")
def with_ids(tmp_path_factory):
    """A project whose store has ids: those of training examples from a function, those of targets from an attribute."""
    folder = tmp_path_factory.mktemp("named")
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        make_project(folder)
        source = folder / f"{MODULE}.py"
        text = (
            "\n\nclass NamedSet(torch.utils.data.TensorDataset):\n    paths = [Path(f'{row}.png') for row in range(5)]"
        )
        source.write_text(source.read_text() + text + "\n\n\ndef named_set():\n    return NamedSet(*test_set())\n")
        sys.modules.pop(MODULE, None)
        options = ["--ids", f"{MODULE}:names", "--target-ids", "paths", "--targets", f"{MODULE}:named_set"]
        found = run_tracer("run", "tracer.toml", *options)
        assert found.exit_code == 0, found.output
    return folder


def test_ids_are_shown_and_exported(with_ids, monkeypatch, tmp_path):
    enter(with_ids, monkeypatch)
    names = [f"lines.csv:{row}" for row in range(NUM_TRAIN)]
    found = printed_json("top", "store", "-k", "3")["targets"][1]
    assert found["id"] == "1.png"
    assert found["proponents"]["ids"] == [names[row] for row in found["proponents"]["rows"]]
    text = run_tracer("top", "store", "-k", "1", "--targets", "1").output
    assert "target 1 1.png" in text
    assert found["proponents"]["ids"][0] in text
    own = printed_json("self-influence", "store", "-k", "2")
    assert own["ids"] == [names[row] for row in own["rows"]]
    for what in ("scores", "top", "rows", "targets"):
        assert run_tracer("export", "store", str(tmp_path / "out.csv"), "--what", what).exit_code == 0
        written = rows_of(tmp_path / "out.csv")
        assert what == "targets" or all(line["train_id"] == names[int(line["train_row"])] for line in written)
        assert what == "rows" or all(line["target_id"] == f"{line['target']}.png" for line in written)
    parquet = pytest.importorskip("pyarrow.parquet")
    assert run_tracer("export", "store", str(tmp_path / "out.parquet")).exit_code == 0
    table = parquet.read_table(tmp_path / "out.parquet").to_pydict()
    assert table["train_id"] == [names[row] for row in table["train_row"]]


def test_a_missing_column_of_ids_is_explained(with_ids, monkeypatch):
    enter(with_ids, monkeypatch)
    message = refused("run", "tracer.toml", "--ids", "file_names")
    assert "ids='file_names' is neither a column nor an attribute of the data" in message
