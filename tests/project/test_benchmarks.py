"""The pieces of the fidelity benchmark measure what they say, in seconds and on made-up data."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from benchmark_scripts import BENCHMARKS, script


@pytest.fixture(scope="module")
def fidelity():
    with script("fidelity") as module:
        yield module


@pytest.fixture(scope="module")
def settings(fidelity):
    return fidelity.Settings((1, 60, 1), 48, 16, (60, 250), (0, 1))


@pytest.fixture(scope="module")
def case(fidelity, settings):
    """An MLP trained to tell four noisy patterns apart."""
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(0, 4, (256,), generator=generator)
    x = torch.randn(4, 60, generator=generator)[y] + torch.randn(256, 60, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fidelity.mlp(60, 32, 32, 4)
    return fidelity.image_case("patterns", model, ((x[:192], y[:192]), (x[192:], y[192:])), settings, 60)


@pytest.fixture(scope="module")
def rows(fidelity, case, settings):
    return fidelity.measure_all(case, settings, fidelity.SERIES)


@pytest.fixture
def folder(fidelity, tmp_path, monkeypatch):
    """A data folder with random images and text, as TRACER_DATA names it."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 80), ("test", 20)):
        arrays[f"x_{part}"] = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{part}"] = generator.integers(0, 10, count)
    np.savez(tmp_path / fidelity.IMAGES, **arrays)
    (tmp_path / fidelity.TEXT).write_text("".join(generator.choice(list("to be or not"), 2000)), encoding="utf-8")
    monkeypatch.setenv("TRACER_DATA", str(tmp_path))
    return tmp_path


def found(rows, projector, storage="float32"):
    by_dim = {row["proj_dim"]: row for row in rows if (row["projector"], row["storage"]) == (projector, storage)}
    assert list(by_dim) == [60, 250]
    return by_dim


def test_every_series_and_proj_dim_has_a_row_and_rows_are_sorted_by_bytes(fidelity, rows):
    assert len(rows) == 2 * len(fidelity.SERIES)
    assert [row["bytes"] for row in rows] == sorted(row["bytes"] for row in rows)


@pytest.mark.parametrize("projector", ["sketch", "rademacher"])
def test_errors_have_the_rate_of_johnson_and_lindenstrauss(rows, projector):
    for proj_dim, row in found(rows, projector).items():
        assert 0.5 < row["error"] * proj_dim**0.5 < 1.6
        assert row["error_times_sqrt"] == pytest.approx(row["error"] * proj_dim**0.5)


def test_more_values_rank_better(rows):
    sketch = found(rows, "sketch")
    assert 0.3 < sketch[60]["spearman"] < sketch[250]["spearman"] < 1


def test_float16_halves_the_bytes_and_hardly_adds_to_the_error(rows):
    half, single = found(rows, "sketch", "float16"), found(rows, "sketch", "float32")
    for proj_dim in half:
        assert half[proj_dim]["bytes"] == 2 * proj_dim + 4
        assert single[proj_dim]["bytes"] == 4 * proj_dim + 4
        assert half[proj_dim]["error"] == pytest.approx(single[proj_dim]["error"], rel=0.1)
        assert half[proj_dim]["error"] != single[proj_dim]["error"]


def test_int8_quarters_the_bytes_and_adds_less_than_a_tenth_to_the_error(fidelity, case, rows):
    quarter, single = found(rows, "sketch", "int8"), found(rows, "sketch", "float32")
    for proj_dim in quarter:
        assert quarter[proj_dim]["bytes"] == proj_dim + 4
        options = {"projector": "sketch", "proj_dim": proj_dim, "seed": 0}
        scored = [fidelity.run_tracer(case, storage=storage, **options) for storage in ("float32", "int8")]
        added = fidelity.squared_error(*scored) ** 0.5
        assert 0 < added < 0.1 * single[proj_dim]["error"]


def test_bytes_of_factored_are_those_that_it_stores(rows):
    for proj_dim, row in found(rows, "factored").items():
        assert row["values"] < proj_dim
        assert row["bytes"] == 4 * row["values"] + 4


def test_exact_scores_are_inner_products_of_gradients(fidelity, case):
    exact = fidelity.run_tracer(case, projector="none", storage="float32")
    gradients = []
    for x, y in (case.train, case.targets):
        flat = []
        for sample in zip(x, y, strict=True):
            loss = torch.nn.functional.cross_entropy(case.model(sample[0]), sample[1])
            flat.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, case.model.parameters())]))
        gradients.append(torch.stack(flat).numpy())
    scale = np.outer(*(np.linalg.norm(part, axis=1) for part in gradients))
    np.testing.assert_allclose(exact.scale, scale, rtol=1e-4)
    np.testing.assert_array_less(np.abs(exact.scores - gradients[0] @ gradients[1].T), 1e-5 * scale + 1e-12)
    assert exact.values == case.num_parameters
    assert fidelity.squared_error(exact, exact) == 0


def test_error_is_relative_to_norms_and_leaves_out_pairs_without(fidelity):
    scale = np.array([[2.0, 4.0], [0.0, 8.0]])
    exact = fidelity.Scored(np.zeros((2, 2)), scale, 1, 4)
    estimate = fidelity.Scored(np.array([[2.0, 8.0], [5.0, 0.0]]), scale, 1, 4)
    assert fidelity.squared_error(exact, estimate) == pytest.approx((1 + 4 + 0) / 3)


def test_rank_correlation_sees_order_only(fidelity):
    scores = np.random.default_rng(0).normal(size=(20, 3))
    assert fidelity.rank_correlation(scores, np.exp(scores)) == pytest.approx(1)
    assert fidelity.rank_correlation(scores, -scores) == pytest.approx(-1)


def test_windows_predict_the_next_character(fidelity):
    codes = torch.arange(1000)
    inputs, labels = fidelity.windows(codes, fidelity.spread(codes, 5))
    assert inputs.shape == (5, fidelity.WINDOW)
    assert torch.equal(labels, inputs + 1)


@pytest.mark.usefixtures("folder")
def test_the_command_prints_tables_and_writes_results(fidelity, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(fidelity, "QUICK", fidelity.Settings((1, 1, 1), 6, 3, (32,), (0,)))
    monkeypatch.setattr(fidelity, "SERIES", fidelity.SERIES[:1])
    with torch.random.fork_rng():
        fidelity.main(["--quick", "--output-dir", str(tmp_path / "results")])
    printed = capsys.readouterr().out
    assert printed.count("| projector ") == 3
    assert "error x sqrt(values): the same times" in printed
    rows = json.loads((tmp_path / "results" / "fidelity_quick.json").read_text())["rows"]
    assert len(rows) == 3
    assert (tmp_path / "results" / "fidelity_quick.png").read_bytes().startswith(b"\x89PNG")


def test_missing_data_stops_it_with_what_is_needed(fidelity, folder, monkeypatch):
    assert fidelity.data_folder() == folder
    (folder / fidelity.TEXT).unlink()
    with pytest.raises(SystemExit, match=f"lacks {fidelity.TEXT}: set it to a folder with"):
        fidelity.main([])
    monkeypatch.delenv("TRACER_DATA")
    with pytest.raises(SystemExit, match="TRACER_DATA is not set: set it to a folder with"):
        fidelity.main([])


def test_scoring_is_measured_beside_a_bare_product_and_the_disk(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    with script("scoring") as scoring:
        scoring.main(["--quick", "--output-dir", str(tmp_path / "results"), "--folder", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| work " in printed
    rows = json.loads((tmp_path / "results" / "scoring_quick.json").read_text())["rows"]
    found = {row["work"]: row for row in rows}
    assert found["bare"]["ratio"] == 1
    for storage in ("float32", "float16", "int8"):
        assert {f"{storage}, {work}" for work in ("scores", "top", "query")} <= set(found)
    assert found["int8, query"]["peak_mb"] < 100
    cold = {row["work"]: row["mb_s"] for row in rows if row["mb_s"]}
    assert not cold or len(cold) == 6
    assert (tmp_path / "results" / "scoring_quick.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["results"]  # the stores are gone


def test_rows_of_the_scoring_benchmark_differ():
    with script("scoring") as scoring:
        parts = list(scoring.features_of(scoring.made_up(8), 5000))
    assert [start for start, _ in parts] == [0, 2048, 4096]
    rows = np.concatenate([part for _, part in parts])
    assert rows.shape == (5000, 8) and len(np.unique(rows, axis=0)) == 5000


def test_distributed_gives_the_times_of_every_phase(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "distributed.py"), "--quick", "--processes", "1,2"]
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output-dir", str(tmp_path)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "distributed_quick.json").read_text())["rows"]
    assert [(row["processes"], row["phase"]) for row in rows] == [
        (count, phase) for count in (1, 2) for phase in ("featurize", "targets", "scores", "top")
    ]
    assert all(row["seconds"] > 0 and row["speedup"] > 0 for row in rows)


def test_the_search_benchmark_measures_every_way_and_finds_the_strongest(tmp_path, monkeypatch):
    words = np.random.default_rng(0).choice(list("to be or not"), 130_000)
    (tmp_path / "tinyshakespeare.txt").write_text("".join(words), encoding="utf-8")
    monkeypatch.setenv("TRACER_DATA", str(tmp_path))
    with script("search") as search:
        search.build(tmp_path / "store", 1500, 256, 5)
        rows = search.measured(search.Store.open_existing(tmp_path / "store"), "cosine", [1500], 1)
    by_way = {row["way"]: row for row in rows}
    assert by_way["exact"]["recall"] == by_way["candidates 1500"]["recall"] == 1
    assert 0.9 < by_way["index alone"]["recall"] <= 1
    assert by_way["read"]["over_read"] == by_way["exact"]["over_exact"] == 1


def test_the_tracing_benchmark_knows_the_sources_of_its_documents():
    with script("tracing") as tracing:
        facts, toxicity, selection = (make(np.random.default_rng(0)) for make in tracing.CASES.values())
        best = tracing.source_metrics(facts.truth.astype(float), facts.truth)
        worst = tracing.source_metrics(-facts.truth.astype(float), facts.truth)
        batch = facts.targets[torch.arange(2)]
    assert (facts.truth.sum(0) == 3).all()
    for row, target in np.argwhere(facts.truth):  # the source has the relation and the object of the question
        assert set(facts.targets.words[target][2:]) <= set(facts.train.words[row])
    assert best == {"recall at 10": 1.0, "reciprocal rank": 1.0}
    assert worst["recall at 10"] == 0 and worst["reciprocal rank"] < 0.01
    assert (batch["labels"] != -100).sum(1).tolist() == [1, 1]
    assert toxicity.truth.sum() == 32 and toxicity.truth.shape == (800,)
    assert 0.05 < selection.truth.mean() < 0.12


@pytest.fixture(scope="module")
def pareto():
    with script("pareto") as module:
        yield module


def test_exact_gradients_of_the_pareto_benchmark_are_those_of_every_method_that_drops_nothing(pareto, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 6, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = pareto.mlp(6, 4, 3).eval()
    case = pareto.Case(
        "small", model, "image_classification", rows, 4, 12, ("0.weight", "2.weight"), pareto.image_losses
    )
    products, scale = case.exact()
    for run in (
        pareto.TracerRun(case, 12, tmp_path / "a", 0, storage="float32"),
        pareto.run_factgrass(case, 12, tmp_path / "b", 0, 36),
    ):
        run.write(rows)
        features = run.features()
        np.testing.assert_allclose(features[:8] @ features[8:].T / scale, products / scale, atol=1e-5)
        assert run.bytes == 4 * features.shape[1]


def test_a_setting_is_beaten_by_less_time_and_less_error_in_no_more_bytes(pareto):
    def row(library, ratio, error, size, case="a"):
        return {"case": case, "library": library, "setting": "s", "ratio": ratio, "error": error, "bytes": size}

    mine = row("tracer", 1.0, 0.1, 100)
    assert pareto.beaten([mine, row("peer", 0.9, 0.09, 100)]) == [("a", "tracer, s", "peer, s")]
    others = [row("peer", 1.1, 0.01, 1), row("peer", 0.5, 0.2, 1), row("peer", 0.5, 0.01, 101)]
    assert not pareto.beaten([mine, *others, row("peer", 0.5, 0.01, 1, "b"), row("peer", 0.5, None, 1)])
