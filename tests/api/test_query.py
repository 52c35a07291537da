"""Queries: the answer of score and top for fresh targets, with nothing stored and nothing disturbed."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import Run
from store_cases import stored_features
from tracer_cases import build, featurize, score

import tracer


def stored(run, path, **options):
    tracing = build(run, path, **{"projector": "sketch", "proj_dim": 64, **options})
    featurize(tracing, run)
    return tracing


def files(tracing):
    """All files, without those of kernels, which are facts of the training examples."""
    paths = (path.relative_to(tracing.store.path) for path in tracing.store.path.rglob("*"))
    return sorted(str(path) for path in paths if path.parts[0] != "kernels")


@pytest.mark.parametrize("estimator", ["tracin", "cosine", "trak", "influence", "source"])
@pytest.mark.parametrize("storage", ["float32", "float16", "int8"])
def test_a_query_is_score_and_top(run, tmp_path, storage, estimator):
    tracing = stored(run, tmp_path / "store", storage=storage, shared_projection=estimator == "source")
    before = files(tracing)
    found = {
        kind: tracing.query(run.targets, 4, kind=kind, estimator=estimator) for kind in ("proponents", "opponents")
    }
    assert files(tracing) == before
    score(tracing, run)
    for kind, answer in found.items():
        expected = tracing.top("test", 4, kind, estimator)
        np.testing.assert_array_equal(answer.indices, expected.indices)
        np.testing.assert_allclose(answer.scores, expected.scores, rtol=1e-4, atol=1e-5 * np.abs(expected.scores).max())


def test_rows_and_checkpoints_can_be_chosen(run, tmp_path):
    tracing = stored(run, tmp_path / "store")
    answer = tracing.query(run.targets, 2, model_ids=[1], rows=[3, 8, 20])
    score(tracing, run)
    np.testing.assert_array_equal(answer.indices, tracing.top("test", 2, model_ids=[1], rows=[3, 8, 20]).indices)
    assert set(answer.indices.ravel()) <= {3, 8, 20}
    for options in ({"k": 24}, {"k": 4, "rows": range(3)}):
        with pytest.raises(tracer.InputError, match="is more than"):
            tracing.query(run.targets, **options)
    with pytest.raises(tracer.InputError, match="did you mean 'proponents'"):
        tracing.query(run.targets, 2, kind="proponent")


def test_a_query_of_one_row(run, tmp_path):
    tracing = stored(run, tmp_path / "store")
    whole = tracing.query(run.targets, 3)
    one = tracing.query((run.target_x[:1], run.target_y[:1]), 3)
    np.testing.assert_array_equal(one.indices, whole.indices[:1])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_another_process_reads_weights_from_remembered_paths(run, tmp_path, suffix, monkeypatch):
    from safetensors.torch import save_file

    paths = [tmp_path / f"{number}{suffix}" for number in range(3)]
    for path, (state, _) in zip(paths, run.checkpoints, strict=True):
        (torch.save if suffix == ".pt" else save_file)(state, path)
    monkeypatch.chdir(tmp_path)
    run_of_paths = Run()
    run_of_paths.checkpoints = [(path.name, rate) for path, (_, rate) in zip(paths, run.checkpoints, strict=True)]
    first = stored(run_of_paths, tmp_path / "store")
    expected = first.query(run.targets, 4)
    first.close()
    assert first.store.checkpoint(1).attributes["source"] == str(paths[1])
    monkeypatch.chdir("/")
    other = build(run, tmp_path / "store", projector="sketch", proj_dim=64)
    np.testing.assert_array_equal(other.query(run.targets, 4).indices, expected.indices)
    paths[1].unlink()
    with pytest.raises(tracer.CallOrderError, match=f"checkpoint 1 were in {paths[1]}, which is not there any more"):
        other.query(run.targets, 4)


def test_paths_of_a_store_are_followed_only_below_allowed_folders(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "away").mkdir()
    torch.save(run.checkpoints[0][0], tmp_path / "away" / "0.pt")
    (tmp_path / "mine" / "link.pt").symlink_to(tmp_path / "away" / "0.pt")
    stored(run, tmp_path / "mine" / "store").close()
    other = build(run, tmp_path / "mine" / "store", projector="sketch", proj_dim=64)
    for source in ("/etc/passwd", "//host/share/x.pt", "http://127.0.0.1:9/x.pt", "0.pt", str(tmp_path / "away/0.pt"),
                   str(tmp_path / "mine/../away/0.pt"), str(tmp_path / "mine/link.pt")):  # fmt: skip
        other.store.checkpoint(0).set_attributes(source=source)
        with pytest.raises(tracer.CallOrderError, match="is in none of"):
            other.query(run.targets, 4, model_ids=[0])
    dirs = [tmp_path / "away"]
    other.store.checkpoint(0).set_attributes(source=str(tmp_path / "away" / "0.pt"))
    assert other.query(run.targets, 4, model_ids=[0], checkpoint_dirs=dirs).indices.shape == (5, 4)


def test_without_known_weights_it_says_what_to_call(run, tmp_path):
    stored(run, tmp_path / "store").close()
    other = build(run, tmp_path / "store", projector="sketch", proj_dim=64)
    with pytest.raises(tracer.CallOrderError, match=r"checkpoint 0 are not known .* Call tracer\.load_checkpoint"):
        other.query(run.targets, 4)
    for model_id, (state, _) in enumerate(run.checkpoints):
        other.load_checkpoint(state, model_id)
    assert other.query(run.targets, 4).indices.shape == (5, 4)


def test_changed_weights_are_refused(run, tmp_path):
    path = tmp_path / "0.pt"
    torch.save(run.checkpoints[0][0], path)
    run.checkpoints[0] = (path, 0.3)
    tracing = stored(run, tmp_path / "store")
    torch.save(run.checkpoints[1][0], path)
    with pytest.raises(tracer.MismatchError, match="other weights under model_id=0"):
        tracing.query(run.targets, 4)
    next(iter(run.checkpoints[2][0].values())).add_(1.0)
    with pytest.raises(tracer.MismatchError, match="other weights under model_id=2"):
        tracing.query(run.targets, 4, model_ids=[2])


def test_a_query_disturbs_nothing(run, tmp_path):
    tracing, plain = (stored(run, tmp_path / name) for name in ("asked", "plain"))
    weights = copy.deepcopy(run.model.state_dict())
    torch.manual_seed(3)
    state = torch.get_rng_state()
    for each in (tracing, plain):
        each.start_scoring_checkpoint(run.checkpoints[1][0], 1, 5, "test")
        for start in (0, 2, 4):
            each.score(
                (run.target_x[start : start + 2], run.target_y[start : start + 2]), num_samples=min(2, 5 - start)
            )
            if each is tracing:
                tracing.query(run.targets, 3, model_ids=[0, 2])
    tables = [each.store.targets("test", 1) for each in (tracing, plain)]
    assert not len(tracing.remaining(1, "test"))
    plain.flush()
    np.testing.assert_array_equal(stored_features(tables[0], 0, 5), stored_features(tables[1], 0, 5))
    assert all(torch.equal(value, weights[name]) for name, value in run.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_unfinished_stores_and_targets_that_do_not_fit_are_refused(run, tmp_path):
    tracing = build(run, tmp_path / "store")
    tracing.load_checkpoint(run.checkpoints[0][0], 0, 0.1)
    with pytest.raises(tracer.CallOrderError, match="Checkpoint 0 is not finalized"):
        tracing.query(run.targets, 1)
    tracing.featurize(run.train, num_samples=23)
    tracing.finalize_features()
    with pytest.raises(tracer.BatchError):
        tracing.query((run.target_x, run.target_y[:3]), 1)
    with pytest.raises(tracer.InputError, match="the number of examples in the batch is 0"):
        tracing.query((run.target_x[:0], run.target_y[:0]), 1)
    with pytest.raises(tracer.NonFiniteError, match=r"examples \[1\] of the batch"):
        tracing.query((run.target_x.index_fill(0, torch.tensor([1]), torch.nan), run.target_y), 1)


def test_without_stored_features_it_names_score_exactly(run, tmp_path):
    tracing = build(run, tmp_path / "store", storage="none")
    with pytest.raises(tracer.CallOrderError, match="score_exactly"):
        tracing.query(run.targets, 1)


def test_labels_are_those_of_a_checkpoint_that_has_all_rows(run, tmp_path):
    tracing = build(run, tmp_path / "store", projector="sketch", proj_dim=64)
    for model_id, count in ((1, len(run.x)), (0, 2)):
        tracing.load_checkpoint(run.checkpoints[model_id][0], model_id, 0.1)
        tracing.featurize((run.x[:count], run.y[:count]), inds=range(count))
    tracing.finalize_features([1])
    for label in run.y[2:].unique().tolist():
        found = tracing.query(run.targets, 1, model_ids=[1], labels=label)
        assert (run.y[found.indices.ravel()] == label).all()
    with pytest.raises(tracer.CallOrderError, match="not finalized"):
        tracing.query(run.targets, 1, labels=label)


@pytest.mark.parametrize("estimator", ["tracin", "cosine"])
def test_candidates_of_the_index_are_ranked_by_their_stored_scores(run, tmp_path, estimator):
    tracing = stored(run, tmp_path / "store", storage="int8")
    with pytest.raises(tracer.CallOrderError, match="no index of its training examples"):
        tracing.query(run.targets, 3, estimator=estimator, candidates=10)
    tracing.build_index(estimator)
    for kind in ("proponents", "opponents"):
        whole = tracing.query(run.targets, 3, kind=kind, estimator=estimator)
        some = tracing.query(run.targets, 3, kind=kind, estimator=estimator, candidates=10)
        np.testing.assert_array_equal(some.indices, whole.indices)
        np.testing.assert_allclose(some.scores, whole.scores, rtol=1e-5)


def test_candidates_that_cannot_be_searched_for_are_refused(run, tmp_path):
    tracing = stored(run, tmp_path / "store")
    for options, message in [
        ({"candidates": 2}, "candidates=2 is less than k=3"),
        ({"candidates": 9, "rows": range(9)}, "leave out rows= and labels="),
        ({"candidates": 9, "estimator": "influence"}, "expected tracin or cosine"),
    ]:
        with pytest.raises(tracer.InputError, match=message):
            tracing.query(run.targets, 3, **options)
