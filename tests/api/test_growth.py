"""Rows that come in, rows that are replaced: nothing else is computed again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Run

from tracer import BatchError, CallOrderError, InputError, MismatchError, Tracer, attribute
from tracer.api.featurizer import Featurizer


def trace(run: Run, num_rows: int, save_dir, **options):
    return attribute(
        run.model,
        "image_classification",
        (run.x[:num_rows], run.y[:num_rows]),
        run.targets,
        run.checkpoints,
        save_dir=save_dir,
        batch_size=5,
        **options,
    )


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The sizes of all batches that went through the model, without stored examples that are compared."""
    sizes: list[int] = []
    whole = Featurizer.run

    def counted(self, batch, num_rows, sink):
        sizes.append(num_rows)
        return whole(self, batch, num_rows, sink)

    monkeypatch.setattr(Featurizer, "run", counted)
    monkeypatch.setattr("tracer.api.featurizer._COMPARED", 0)
    return sizes


@pytest.mark.parametrize("options", [{"proj_dim": 64, "storage": "float32"}, {"projector": "none"}])
def test_a_store_grows_and_old_rows_are_not_computed_again(run, tmp_path, computed, options):
    whole = trace(run, 23, tmp_path / "whole", **options)
    expected = np.array(whole.scores)
    first = trace(run, 17, tmp_path / "grown", **options)
    np.testing.assert_allclose(np.array(first.scores), expected[:17], rtol=1e-5, atol=1e-7)
    with pytest.raises(MismatchError, match=r"grow\(23\)"):
        trace(run, 23, tmp_path / "grown", **options)
    first.tracer.grow(23)
    assert first.tracer.train_set_size == 23 and first.tracer.remaining(0).tolist() == list(range(17, 23))
    computed.clear()
    again = trace(run, 23, tmp_path / "grown", **options)
    new_rows = [size for size in computed if size != 5 or options != {"projector": "none"}]
    if options != {"projector": "none"}:
        assert sum(new_rows) == 3 * 6
    np.testing.assert_allclose(np.array(again.scores), expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(again.self_influence(), whole.self_influence(), rtol=1e-6)


def test_a_store_does_not_shrink_and_growing_by_nothing_changes_nothing(run, tmp_path):
    found = trace(run, 17, tmp_path, proj_dim=16)
    found.tracer.grow(17)
    with pytest.raises(InputError, match="expected at least the 17 training rows that the store has, got 16"):
        found.tracer.grow(16)
    with pytest.raises(InputError, match="expected at most .* examples in tables with 17 in a file"):
        found.tracer.grow(10**9)  # more files than can be read again
    assert found.tracer.remaining(0).size == 0 and Tracer.open(tmp_path).train_set_size == 17


def test_growth_that_was_interrupted_goes_on(run, tmp_path):
    trace(run, 17, tmp_path, proj_dim=16)
    reader = Tracer.open(tmp_path)
    reader.store.grow(23)  # the manifest only; tables follow when they are opened
    node = tmp_path / "checkpoints" / "0" / "floats" / "zarr.json"
    node.write_bytes(node.read_bytes().replace(b"17", b"23", 1))
    assert Tracer.open(tmp_path).remaining(0).tolist() == list(range(17, 23))


@pytest.mark.parametrize("options", [{"proj_dim": 64, "storage": "float32"}, {"projector": "none"}])
def test_replaced_rows_are_computed_anew_and_no_others(run, tmp_path, computed, options):
    found = trace(run, 23, tmp_path, **options)
    before = np.array(found.scores)
    changed = [3, 20]
    with pytest.raises(MismatchError, match="rows hold other data"):
        found.tracer.load_checkpoint(run.checkpoints[0][0], 0)
        found.tracer.featurize((run.x[changed] + 1, run.y[changed]), inds=changed)
    found.tracer.replace(changed)
    assert found.tracer.remaining(1).tolist() == changed
    with pytest.raises(CallOrderError, match="not finalized"):
        found.tracer.finalize_scores("targets")
    run.x = run.x.clone()
    run.x[changed] += 1
    computed.clear()
    again = trace(run, 23, tmp_path, **options)
    if "proj_dim" in options:
        assert sum(computed) == 3 * len(changed)
    after = np.array(again.scores)
    others = np.setdiff1d(np.arange(23), changed)
    np.testing.assert_allclose(after[others], before[others], rtol=1e-5, atol=1e-7)
    assert (after[changed] != before[changed]).any(1).all()
    fresh = trace(run, 23, tmp_path / "fresh", **options)
    np.testing.assert_allclose(after, np.array(fresh.scores), rtol=1e-5, atol=1e-7)


def test_replaced_targets_take_all_their_scores_with_them(run, tmp_path):
    found = trace(run, 23, tmp_path, proj_dim=64)
    before = np.array(found.scores)
    found.tracer.replace(torch.tensor([1]), exp_name="targets")
    run.target_x = run.target_x.clone()
    run.target_x[1] += 1
    after = np.array(trace(run, 23, tmp_path, proj_dim=64).scores)
    np.testing.assert_array_equal(np.delete(after, 1, 1), np.delete(before, 1, 1))
    assert (after[:, 1] != before[:, 1]).all()


def test_rows_that_cannot_be_replaced_are_refused(run, tmp_path):
    with Tracer(run.model, "image_classification", 23, tmp_path, proj_dim=16) as tracing:
        with pytest.raises(CallOrderError, match="no rows to replace"):
            tracing.replace([1])
        tracing.load_checkpoint(run.checkpoints[0][0], 0)
        with pytest.raises(BatchError, match="outside 0...22"):
            tracing.replace([23])
        with pytest.raises(InputError, match="'nowhere' is not in the store"):
            tracing.replace([1], exp_name="nowhere")
