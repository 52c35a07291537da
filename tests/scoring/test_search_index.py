"""The index finds what an exact scan finds, and is of the examples that are stored now."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scoring_cases import RATES, scorer, strongest
from store_cases import stored_features

from tracer import verify
from tracer.errors import CallOrderError, InputError
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import InMemoryTable
from tracer.scoring.search_index import SearchIndex
from tracer.store.manifest import Manifest
from tracer.store.store import Store

CPU = torch.device("cpu")
N, M, DIM, K = 4000, 3, 64, 20
ESTIMATORS = ("tracin", "cosine")


def made_up(rng, count, basis):
    """Features with a spectrum that falls as that of gradients does."""
    return (rng.standard_normal((count, DIM)) / np.arange(1, DIM + 1) @ basis).astype(np.float32)


@pytest.fixture
def found(tmp_path):
    rng = np.random.default_rng(0)
    bases = [np.linalg.qr(rng.standard_normal((DIM, DIM)))[0] for _ in RATES]
    found = scorer(tmp_path / "empty", 2, 1, DIM)
    settings = found.store.manifest.settings | {"train_set_size": N, "storage": "int8"}
    store = Store.open(tmp_path / "store", Manifest(settings))
    for model_id, (rate, basis) in enumerate(zip(RATES, bases, strict=True)):
        for count, opened in (
            (N, lambda model_id=model_id, rate=rate: store.create_checkpoint(model_id, "a", rate)),
            (M, lambda model_id=model_id: store.create_targets("test", model_id, M)),
        ):
            features = made_up(rng, count, basis)
            columns = {name: rng.uniform(0.1, 1, count).astype(np.float32) for name in ("loss", "loss_grad")}
            columns["loss_grad"] *= rng.choice([-1, 1], count).astype(np.float32)
            columns["loss_hess"] = np.full(count, 0.2, np.float32)
            norm = np.linalg.norm(features, axis=1)
            with opened() as table:
                fingerprint = np.zeros(count, np.uint64)
                table.write(np.arange(count), features, gradient_norm=norm, fingerprint=fingerprint, **columns)
                table.set_attributes(finalized=True)
    found.store = store
    return found


def questions(found):
    tables = []
    for model_id in range(len(RATES)):
        table = found.store.targets("test", model_id)
        columns = (np.array(table.column(name)) for name in ("loss_grad", "gradient_norm"))
        tables.append(InMemoryTable(stored_features(table, 0, M), *columns, "int8"))
    return tables


def ask(found, estimate, candidates=0, kind="proponents", model_ids=(0, 1)):
    return found.query(questions(found), list(model_ids), range(N), K, kind, estimate, candidates)


@pytest.mark.parametrize("kind", ["proponents", "opponents"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_candidates_hold_the_strongest_examples_with_their_exact_scores(found, estimator, kind):
    estimate = Estimate(estimator)
    found.build_index(estimate, None, 32)
    exact, approximate = (ask(found, estimate, count, kind) for count in (0, 200))
    shared = [np.intersect1d(*rows) for rows in zip(exact.indices, approximate.indices, strict=True)]
    assert np.mean([len(rows) for rows in shared]) >= 0.95 * K
    for rows, (all_of, some_of) in zip(shared, zip(*map(by_index, (exact, approximate)), strict=True), strict=True):
        for row in rows.tolist():
            assert some_of[row] == pytest.approx(all_of[row], rel=1e-5)


def by_index(top):
    return [dict(zip(*each, strict=True)) for each in zip(top.indices.tolist(), top.scores.tolist(), strict=True)]


def test_with_all_components_few_candidates_suffice(found):
    found.build_index(Estimate("tracin"), None, 2 * DIM)
    exact, approximate = (ask(found, Estimate("tracin"), count) for count in (0, 2 * K))
    np.testing.assert_array_equal(exact.indices, approximate.indices)


def test_the_order_of_checkpoints_does_not_matter(found):
    found.build_index(Estimate("tracin"), [1, 0], 2 * DIM)
    tables = questions(found)
    estimate = Estimate("tracin")
    answers = [
        found.query([tables[number] for number in order], order, range(N), K, "proponents", estimate, 2 * K)
        for order in ([0, 1], [1, 0])
    ]
    np.testing.assert_array_equal(answers[0].indices, answers[1].indices)


def test_candidates_of_a_weighted_sum_are_those_of_the_sum(found):
    found.build_index(Estimate("tracin"), None, 2 * DIM)
    weights = np.array([1.0, -2.0, 0.5])
    rows = found.query_candidates(questions(found), [0, 1], Estimate("tracin"), weights, 2 * K, "proponents")
    scores = found.query_scores(questions(found), [0, 1], Estimate("tracin")) @ weights
    assert len(rows) == 2 * K
    assert set(strongest(scores[:, None], K, "proponents")[0]) <= set(rows)


@pytest.mark.parametrize("change", ["replaced", "grown"])
def test_an_index_of_other_examples_is_never_used(found, change):
    found.build_index(Estimate("tracin"), None, 16)
    ask(found, Estimate("tracin"), 100)
    finalized = [found.store.checkpoint(each) for each in range(len(RATES))]
    if change == "replaced":
        kept = [(stored_features(table, 5, 6), columns_of(table)) for table in finalized]
        found.store.replace_rows(np.array([5]), None)
        for number, (features, columns) in enumerate(kept):
            with found.store.checkpoint(number) as table:
                table.write(np.array([5]), 2 * features, **columns)
                table.set_attributes(finalized=True)
    else:
        kept = [(stored_features(table, 5, 6), columns_of(table)) for table in finalized]
        found.store.grow(N + 1)
        found.store = Store.open_existing(found.store.path)
        for number, (features, columns) in enumerate(kept):
            with found.store.checkpoint(number) as table:
                table.write(np.array([N]), features, **columns)
                table.set_attributes(finalized=True)
    with pytest.raises(CallOrderError, match="no index of its training examples, as they are now.*`tracer index"):
        ask(found, Estimate("tracin"), 100)
    found.build_index(Estimate("tracin"), None, 16)
    ask(found, Estimate("tracin"), 100)
    assert len([*(found.store.path / "kernels" / "1" / "search_tracin").iterdir()]) == 2  # with its own document


def columns_of(table):
    names = ("loss", "loss_grad", "loss_hess", "gradient_norm", "fingerprint", "label")
    return {name: np.array(table.column(name, 5, 6)) for name in names}


def test_a_damaged_index_is_refused_and_found_by_verify(found):
    found.build_index(Estimate("cosine"), None, 16)
    path = next((found.store.path / "kernels" / "1" / "search_cosine").glob("*/codes/c/0/0"))
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(CallOrderError, match="index in the store is damaged"):
        ask(found, Estimate("cosine"), 100)
    assert "search_cosine" in str(verify(found.store.path))


@pytest.mark.parametrize("estimator", ["influence", "trak", "source", "trackstar"])
def test_estimators_with_a_kernel_have_no_index(found, estimator):
    with pytest.raises(InputError, match="expected tracin or cosine"):
        found.build_index(Estimate(estimator), None, 16)


def test_memory_does_not_change_candidates():
    rng = np.random.default_rng(0)
    codes, scale = rng.integers(-127, 128, (5000, 16)).astype(np.int8), rng.uniform(0.1, 1, (5000, 1))
    index = SearchIndex(np.eye(16, dtype=np.float32), codes, scale.astype(np.float32))
    targets = rng.integers(-127, 128, (2, 16)).astype(np.float32)
    targets[:, 0] = 127  # so that coordinates are rounded to themselves
    expected = np.unique(np.argsort(-(codes * scale) @ targets.T, 0)[:50])
    for memory in (1 << 12, 1 << 30):
        np.testing.assert_array_equal(index.candidates(targets, 50, True, CPU, memory), expected)
