"""`tracer build`: a store from names, from flags or a file. The oracle is `build_store`."""

from __future__ import annotations

import json
import sys
import tomllib

import numpy as np
import pytest
import torch
from cli_cases import enter, refused, run_tracer
from text_cases import datasets, make_tokenizer, offline, texts, transformers  # noqa: F401

from tracer import MissingDependencyError, build_store
from tracer.cli.settings import BUILD_BY_NAME, read_settings
from tracer.data.text.reading import import_datasets
from tracer.training.language_models import load_language_model

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ["--model", "model", "--data", "train.jsonl", "--out", "store", "--proj-dim", "32"]


def printed(*arguments):
    """Run the program with ``--json``, which must succeed, and return the object; progress goes elsewhere."""
    result = run_tracer(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def project(tmp_path, monkeypatch):
    enter(tmp_path, monkeypatch)
    for name, seed in (("model", 0), ("run/checkpoint-5", 1), ("run/checkpoint-10", 2)):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, **sizes))
        model.save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
        log = [{"step": step, "learning_rate": 0.1} for step in (5, 10)]
        if seed:
            state = {"global_step": 5 * seed, "log_history": log}
            (tmp_path / name / "trainer_state.json").write_text(json.dumps(state))
    rows = [{"text": text, "source": "ab"[row % 2]} for row, text in enumerate(texts(12, 23))]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "targets.txt").write_text("\n".join(texts()[3:5]))
    return tmp_path


def test_one_command_builds_what_other_commands_answer_from(project):
    found = printed("build", *NAMES, "--checkpoints", "run", "--targets", "targets.txt")
    assert (found["train_rows"], found["targets"], found["checkpoints"], found["complete"]) == (12, 2, 2, True)
    expected = build_store(
        "model", "train.jsonl", "run", save_dir=project / "expected", targets="targets.txt", proj_dim=32
    )
    top = printed("top", "store", "-k", "3")
    assert [each["proponents"]["rows"] for each in top["targets"]] == expected.top(3).indices.tolist()
    info = printed("info", "store")
    assert [each["learning_rate"] for each in info["checkpoints"]] == pytest.approx([0.5, 0.5])
    assert run_tracer("verify", "store").exit_code == 0
    result = run_tracer("report", "store", "--output-dir", "report", "--no-figures")
    assert result.exit_code == 0 and (project / "report" / "index.html").exists()


def test_a_report_shows_the_texts_or_says_why_not(project, monkeypatch, caplog):
    texts_of = [" ".join(json.loads(line)["text"].split()) for line in (project / "train.jsonl").open()]
    asked = (project / "targets.txt").read_text().splitlines()
    options = ["--targets", "targets.txt", "--packing", "bfd", "--max-length", "64"]
    assert run_tracer("build", *NAMES, *options).exit_code == 0

    def shown(*more):
        result = run_tracer("report", "store", "--output-dir", "report", "--no-figures", *more)
        assert result.exit_code == 0, result.output
        page = (project / "report" / "index.html").read_text()
        return [f"{text} \\u003ceos\\u003e" in page for text in (*texts_of, *asked)]

    assert all(shown())
    (project / "elsewhere").mkdir()
    (project / "elsewhere" / "store").symlink_to(project / "store")
    monkeypatch.chdir(project / "elsewhere")
    assert not any(shown("--output-dir", str(project / "report")))
    assert "texts are not shown" in caplog.text and "--trust" in caplog.text
    options = ["--output-dir", str(project / "report"), "--trust", str(project)]
    assert all(shown(*options))
    lines = (project / "train.jsonl").read_text()
    (project / "train.jsonl").write_text(lines.replace("w3 w4", "w4 w3", 1))
    assert not any(shown(*options)) and "hold other data" in caplog.text


def test_rankings_have_the_beginnings_of_texts_of_the_rows_that_they_name(project, caplog):
    built = run_tracer("build", *NAMES, "--targets", "targets.txt")
    assert "tracer top store -k 5 --texts" in built.output
    texts_of = [" ".join(json.loads(line)["text"].split()) for line in (project / "train.jsonl").open()]
    asked = (project / "targets.txt").read_text().splitlines()

    def begins(text):
        return f"{text} <eos>" if len(text) < 70 else text[:70]

    lines = run_tracer("top", "store", "-k", "12", "--texts").output.splitlines()
    assert [begins(text) in lines for text in asked] == [True, True]
    rows = [line.split(maxsplit=3) for line in lines if line.split()[:1] and line.split()[0].isdecimal()]
    assert len(rows) == 24 and all(text.startswith(begins(texts_of[int(row)])) for _, row, _, text in rows)
    lines = run_tracer("self-influence", "store", "-k", "3", "--texts").output.splitlines()[1:]
    assert all(line.split(maxsplit=3)[3].startswith(begins(texts_of[int(line.split()[1])])) for line in lines)
    assert "text" not in run_tracer("top", "store", "-k", "1").output
    (project / "others.txt").write_text("\n".join(texts()[5:7]))
    result = run_tracer("build", *NAMES, "--targets", "others.txt", "--exp-name", "others")
    assert result.exit_code == 0, result.output
    lines = run_tracer("top", "store", "-k", "1", "--texts", "--exp-name", "targets").output.splitlines()
    assert not any(begins(text) in lines for text in asked) and begins(texts_of[int(lines[2].split()[1])]) in lines[2]
    (project / "train.jsonl").unlink()
    result = run_tracer("top", "store", "-k", "1", "--texts", "--exp-name", "others")
    assert result.exit_code == 0 and "texts are not shown" in caplog.text


def test_groups_of_split_documents_are_ranked(project):
    options = ["--packing", "bfd_split", "--max-length", "8", "--group-column", "source", "--targets", "targets.txt"]
    assert run_tracer("build", *NAMES, *options).exit_code == 0
    found = build_store(
        "model", "train.jsonl", save_dir=project / "expected", targets="targets.txt", proj_dim=32,
        packing="bfd_split", max_length=8, group_column="source",
    )  # fmt: skip
    for kind in ("document", "group"):
        top = printed("top", "store", "-k", "2", "--train-groups", kind)
        expected = found.tracer.top("targets", 2, train_groups=kind)
        assert [each["proponents"]["rows"] for each in top["targets"]] == expected.indices.tolist()
    shown = run_tracer("top", "store", "-k", "2", "--train-groups", "group").output
    assert "group" in shown and {" a", " b"} <= {line[-2:] for line in shown.splitlines()}


def test_a_file_holds_the_same_settings(project):
    (project / "build.toml").write_text(
        'model = "model"\ndata = "train.jsonl"\ntargets = "targets.txt"\nout = "store"\nproj_dim = 32\nmax_length = 6\n'
    )
    result = run_tracer("build", "build.toml")
    assert result.exit_code == 0 and "tracer top build.toml -k 5" in result.output
    assert "\n  tracer ask build.toml 'a prompt'\n" in result.output
    found = build_store(
        "model", "train.jsonl", save_dir=project / "expected", targets="targets.txt", proj_dim=32, max_length=6
    )
    top = printed("top", "build.toml", "-k", "3")
    assert [each["proponents"]["rows"] for each in top["targets"]] == found.top(3).indices.tolist()
    assert run_tracer("report", "build.toml", "--output-dir", "report", "--no-figures").exit_code == 0


def test_a_plan_is_shown_without_a_store(project):
    plan = printed("build", *NAMES, "--checkpoints", "run", "--dry-run")
    assert (plan["train_rows"], plan["num_targets"], len(plan["checkpoints"])) == (12, 0, 2)
    assert not (project / "store").exists()


def test_without_targets_self_influence_is_answered(project):
    assert run_tracer("build", *NAMES).exit_code == 0
    assert "tracer top" not in run_tracer("build", *NAMES).output
    found = printed("self-influence", "store")
    assert found["train_rows"] == 12
    assert "has no targets" in refused("top", "store")


def test_the_template_is_read_back(project):
    assert run_tracer("init", "--build", "build.toml").exit_code == 0
    text = (project / "build.toml").read_text()
    required = {name for name, setting in BUILD_BY_NAME.items() if setting.required}
    assert tomllib.loads(text).keys() == required == {"model", "data", "out"}
    lines = [line.removeprefix("# ") for line in text.splitlines() if " = " in line and not line.startswith("# S")]
    shown = {line.partition(" = ")[0]: line for line in lines}
    (project / "all.toml").write_text("\n".join(shown[name] for name in BUILD_BY_NAME))
    assert read_settings("all.toml", {}, BUILD_BY_NAME).keys() == BUILD_BY_NAME.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "store"], "lacks model, data"),
        ([*NAMES, "--model", "missing/model"], "model='missing/model' cannot be loaded"),
        ([*NAMES, "--data", "missing.csv"], "no file 'missing.csv'"),
        ([*NAMES, "--text-column", "body"], "text_column="),
        ([*NAMES, "--checkpoints", "nowhere"], "finds no file"),
        ([*NAMES, "--packing", "bfd", "--streaming"], "another order"),
    ],
)
def test_what_is_missing_is_said(project, options, message):
    assert message in refused("build", *options)


def test_packages_that_are_missing_are_named_with_their_extra(monkeypatch):
    for package, call in (("datasets", import_datasets), ("transformers", lambda: load_language_model("model"))):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingDependencyError, match=rf"{package}: pip install 'tracin\[hf\]'"):
            call()


def test_scores_of_every_group_add_up_to_those_of_all(project):
    run_tracer("build", *NAMES, "--targets", "targets.txt", "--group-column", "source")
    from tracer import Tracer

    reader = Tracer.open("store")
    summed = reader.finalize_scores("targets", train_groups="group")
    np.testing.assert_allclose(summed.sum(0), np.asarray(reader.finalize_scores("targets"), np.float64).sum(0))
