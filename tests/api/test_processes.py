"""Several processes on one store: parts that share no file, results that are those of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Forked, fork, ranks
from scoring_cases import scorer
from store_cases import stored_features

from tracer import IncompleteError, InputError, InputTypeError, Tracer, attribute
from tracer._core.processes import Process, this_process
from tracer.scoring.estimators import Estimate
from tracer.store import Store

WORKER = Path(__file__).parents[1] / "process_worker.py"


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MAX": "7"}, (3, 8)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "12",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_MAX": "16",
                "SLURM_ARRAY_TASK_STEP": "2",
            },
            (1, 4),
        ),
    ],
)
def test_a_job_array_says_which_process_this_is(environment, expected):
    found = this_process("slurm", environment)
    assert (found.rank, found.count, found.together) == (*expected, False)
    alone = this_process(None, environment)  # jobs of an array may be different runs
    assert (alone.rank, alone.count) == (0, 1)


@pytest.mark.parametrize(
    ("process", "error"),
    [
        ((4, 4), InputError),
        ((-1, 4), InputError),
        ((0, 0), InputError),
        (3, InputTypeError),
        ((0, 1.0), InputTypeError),
        ("torchrun", InputError),
        ("slurm", InputError),
    ],
)
def test_a_process_that_cannot_be_is_refused(process, error):
    with pytest.raises(error, match="process"):
        this_process(process, {})


def test_an_array_with_gaps_is_refused():
    names = {"ID": "12", "MIN": "7", "MAX": "12", "STEP": "1", "COUNT": "2"}  # --array=7,12
    with pytest.raises(InputError, match="gaps"):
        this_process("slurm", {f"SLURM_ARRAY_TASK_{name}": value for name, value in names.items()})


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize(("num_rows", "chunk_rows"), [(100, 9), (1, 1), (5, 3), (64, 64), (1000, 10)])
def test_parts_cover_all_rows_once_and_share_no_chunk(count, num_rows, chunk_rows):
    parts = [Process(rank, count).rows(num_rows, chunk_rows) for rank in range(count)]
    assert [row for part in parts for row in part] == list(range(num_rows))
    chunks = [{row // chunk_rows for row in part} for part in parts]
    assert sum(map(len, chunks)) == len(set().union(*chunks))


def test_a_shard_is_a_subset_of_global_rows(run, tmp_path):
    parts = []
    for rank in range(3):
        tracing = Tracer(run.model, "image_classification", 23, tmp_path, process=(rank, 3), proj_dim=16)
        part = tracing.shard(torch.utils.data.TensorDataset(*run.train))
        assert torch.equal(part[0][0], run.x[part.indices[0]]) and len(part) == len(part.indices)
        parts.append(list(part.indices))
        assert len(tracing.shard(range(5)).indices) in (1, 2)  # targets
    assert sum(parts, []) == list(range(23)) and {len(part) for part in parts} <= {7, 8}


def pipeline(run, save_dir, batch_size=4, **options):
    return attribute(
        run.model,
        "image_classification",
        run.train,
        run.targets,
        run.checkpoints,
        save_dir=save_dir,
        batch_size=batch_size,
        **options,
    )


def files(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if "/c/" in str(file) and file.is_file()}


def torchrun(count: int, tmp_path: Path, *arguments: str) -> None:
    paths = [str(WORKER.parent), str(WORKER.parents[1])]
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "RANK", "WORLD_"))}
    env = {**keep, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", str(WORKER)]
    done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def together(count: int, tmp_path: Path, *arguments: str) -> None:
    running = ranks(count, WORKER, *arguments, cwd=tmp_path)
    failed = [each.output for each in running if each.wait()]
    assert not failed, failed[0][-3000:]


@pytest.mark.parametrize("shape", [(60, 5, 12), (12, 5, 60)])
def test_kernels_are_added_up_over_processes(tmp_path, shape):
    settings = {"shared_projection": True}
    alone = scorer(tmp_path / "alone", *shape, settings=settings)
    expected = {name: np.array(alone.scores("test", Estimate(name), None)) for name in ("trak", "influence", "source")}
    scorer(tmp_path / "shared", *shape, processes=2, settings=settings)
    together(2, tmp_path, "kernels", str(tmp_path / "shared"))
    for rank in range(2):
        with np.load(tmp_path / f"scores-{rank}.npz") as found:
            assert found["value"] == pytest.approx(alone.regularization(None, Estimate("influence")).value, rel=1e-9)
            for name, scores in expected.items():
                np.testing.assert_allclose(found[name], scores, rtol=1e-5, atol=1e-6 * np.abs(scores).max())
    assert len(list((tmp_path / "shared" / "kernels").glob("*/*/zarr.json"))) == (5 if shape[0] > shape[2] else 1)


# no batch crosses a block of either
@pytest.mark.parametrize(("start", "count", "batch_size"), [(torchrun, 2, 3), (together, 4, 2)])
def test_torchrun_gives_the_results_of_one_process(run, tmp_path, start, count, batch_size):
    pytest.importorskip("torch.distributed")
    options = {"projector": "none", "storage": "float32"}
    alone = pipeline(run, tmp_path / "alone", batch_size, **options)
    start(count, tmp_path, "together", str(tmp_path / "many"), str(batch_size))
    store = Store.open_existing(tmp_path / "many")
    assert store.manifest.layout["processes"] == count
    for model_id in store.catalog.checkpoint_ids():
        ours, theirs = store.checkpoint(model_id), alone.tracer.store.checkpoint(model_id)
        assert ours.chunk_rows < 23
        for name in ("loss", "loss_grad", "gradient_norm", "fingerprint", "label"):
            np.testing.assert_array_equal(ours.column(name), theirs.column(name))
        np.testing.assert_array_equal(stored_features(ours, 0, 23), stored_features(theirs, 0, 23))  # bit for bit
    for rank in range(count):
        np.testing.assert_array_equal(np.load(tmp_path / f"scores-{rank}.npy"), alone.scores)
        np.testing.assert_array_equal(np.load(tmp_path / f"top-{rank}.npy"), alone.top(3).indices)
    again = Tracer.open(tmp_path / "many").finalize_scores("targets")
    np.testing.assert_array_equal(np.asarray(again), alone.scores)


def test_an_error_of_the_first_process_reaches_all(run, tmp_path):
    together(2, tmp_path, "missing", str(tmp_path / "many"))
    texts = [(tmp_path / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert texts[0] == texts[1] and "IncompleteError" in texts[0] and "lacks" in texts[0]


def job(number: int, count: int, what: str, tmp_path: Path) -> Forked:
    variables = {"ID": str(number), "MIN": "0", "MAX": str(count - 1)}
    environment = {f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()}
    return fork(WORKER, what, str(tmp_path / "array"), cwd=tmp_path, **environment)


def test_a_job_array_shares_nothing_but_the_file_system(run, tmp_path):
    alone = pipeline(run, tmp_path / "alone", projector="none", storage="float32")
    jobs = [job(number, 3, "featurize", tmp_path) for number in (0, 2)]  # at once: they race for the store and tables
    assert [running.wait() for running in jobs] == [0, 0]
    store = Store.open_existing(tmp_path / "array")
    written = store.checkpoint(0).done
    assert 0 < written.sum() < 23
    with pytest.raises(IncompleteError, match="lacks"):
        Tracer.open(tmp_path / "array").finalize_features()
    before = {path: (tmp_path / "array" / path).stat().st_mtime_ns for path in files(tmp_path / "array")}
    assert job(1, 3, "featurize", tmp_path).wait() == 0  # the job that had died
    after = {path: (tmp_path / "array" / path).stat().st_mtime_ns for path in files(tmp_path / "array")}
    assert before.items() <= after.items()  # nobody else's file was touched
    assert job(0, 1, "score", tmp_path).wait() == 0  # any one process finalizes
    for number in (1, 2, 0):
        done = job(number, 3, "finalize", tmp_path)
        assert done.wait() == 0, done.output[-2000:]
    reader = Tracer.open(tmp_path / "array")
    np.testing.assert_array_equal(np.asarray(reader.finalize_scores("targets")), alone.scores)
    np.testing.assert_array_equal(reader.top("targets", 3).indices, alone.by("scores").top(3).indices)


def test_a_job_is_refused_scores_that_another_has_not_made_also_in_one_file(run, tmp_path):
    made = pipeline(run, tmp_path / "store")
    for number in (0, 1):  # the store was made by one process, so its scores are one file, the last job's
        found = Tracer.open(tmp_path / "store", process=(number, 2)).finalize_scores("targets")
        if number == 0:
            with pytest.raises(IncompleteError):
                np.asarray(found)
    np.testing.assert_array_equal(np.asarray(found), made.scores)


def test_shards_of_as_many_targets_as_train_rows_are_blocks_of_targets(run, tmp_path):
    tracing = Tracer(run.model, "image_classification", 17, tmp_path, process=(0, 2), proj_dim=16)
    tracing.grow(23)  # train rows keep their blocks of 9
    tracing.load_checkpoint(run.checkpoints[0][0], 0, 0.1)
    assert tracing.shard(run.x).indices == range(9)
    tracing.featurize(run.train, inds=range(23))
    tracing.process = Process()
    tracing.finalize_features()
    tracing.process = Process(0, 2)
    tracing.start_scoring_checkpoint(run.checkpoints[0][0], 0, 23, "itself")
    assert tracing.shard(run.x).indices == range(tracing.store.targets("itself", 0).chunk_rows) == range(12)
