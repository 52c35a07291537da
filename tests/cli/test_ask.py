"""`tracer ask`: documents behind an answer. The oracle is `Attribution.explain`."""

from __future__ import annotations

import dataclasses
import json

import pytest
from cli_cases import enter, refused, run_tracer
from text_cases import datasets, offline, run, transformers  # noqa: F401

from tracer import build_store, load_store

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def project(run, monkeypatch):  # noqa: F811
    enter(run, monkeypatch)
    build_store("model", "train.jsonl", "run", save_dir="store", proj_dim=64, group_column="source")
    (run / "build.toml").write_text('model = "model"\ndata = "train.jsonl"\nout = "store"\nestimator = "cosine"\n')
    return run


def test_the_answer_is_that_of_explain(project, monkeypatch):
    options = ["--completion", " w5", "--rather-than", " w6", "--top", "3", "--estimator", "cosine", "--exact", "6"]
    result = run_tracer("ask", "store", "w3 w4", *options, "--json")
    assert result.exit_code == 0, result.output
    found = dataclasses.replace(load_store("store", folders=[project]), estimator="cosine")
    expected = found.explain("w3 w4", " w5", rather_than=" w6", k=3, exact=6)
    assert json.loads(result.stdout) == json.loads(json.dumps(expected.to_dict()))
    of_file = run_tracer("ask", "build.toml", "w3 w4", *options)
    assert of_file.exit_code == 0 and of_file.output.strip().endswith(str(expected))
    assert "2. score" in of_file.output and "tokens: " in of_file.output
    several = run_tracer("ask", "store", "w3", "w4", "--max-new-tokens", "2", "--no-tokens", "-k", "1", "--json")
    assert several.exit_code == 0 and len(json.loads(several.stdout)["completions"]) == 2
    (project / "elsewhere").mkdir()
    monkeypatch.chdir(project / "elsewhere")
    (project / "elsewhere" / "store").symlink_to(project / "store")
    moved = ["ask", "store", "w3 w4", "--completion", " w5"]
    assert "--trust" in refused(*moved)
    assert run_tracer(*moved, "--trust", str(project)).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["w3", "w4", "--completion", "w5"], "--completion came 1 times for 2 prompts"),
        (["w3", "--completion", "w5"], "Begin the completion with a space"),
        (["w3", "--model", "nowhere"], "model='nowhere' cannot be loaded"),
        (["w3", "--estimator", "influence", "--exact", "2"], "exact= expects estimator"),
        (["w3", "--regularization", "high"], "no number"),
    ],
)
def test_what_is_wrong_is_said(project, options, message):
    assert message in refused("ask", "store", *options)


def test_documents_and_targets_are_known_by_their_ids(project):
    lines = [json.loads(line) for line in (project / "train.jsonl").read_text().splitlines()]
    named = "".join(json.dumps({**each, "name": f"doc-{row}"}) + "\n" for row, each in enumerate(lines))
    (project / "named.jsonl").write_text(named)
    (project / "asked.jsonl").write_text("".join(named.splitlines(keepends=True)[:2]))
    names = ["--model", "model", "--data", "named.jsonl", "--targets", "asked.jsonl", "--id-column", "name"]
    built = run_tracer("build", *names, "--out", "named", "--proj-dim", "32")
    assert built.exit_code == 0, built.output
    answer = json.loads(run_tracer("ask", "named", "w3 w4", "--completion", " w5", "--json").stdout)
    assert [each["id"] for each in answer["documents"]] == [f"doc-{each['document']}" for each in answer["documents"]]
    shown = run_tracer("ask", "named", "w3 w4", "--completion", " w5").output
    assert f"document doc-{answer['documents'][0]['document']}" in shown
    top = run_tracer("top", "named", "-k", "2").output
    assert "doc-0" in top and top.count("doc-") == 6


def test_an_index_is_built_and_searched(project):
    question = ["ask", "store", "w3 w4", "--completion", " w5", "--top", "3", "--no-tokens", "--json"]
    assert "no index of its training examples" in refused(*question, "--candidates", "8")
    built = run_tracer("index", "store")
    assert built.exit_code == 0 and "index of 12 training examples for estimator cosine" in built.output
    whole, some = run_tracer(*question), run_tracer(*question, "--candidates", "8")
    documents = [json.loads(each.stdout)["documents"] for each in (whole, some)]
    assert [each["document"] for each in documents[0]] == [each["document"] for each in documents[1]]
    assert "expected tracin or cosine" in refused("index", "store", "--estimator", "influence")
