"""Damage is noticed when rows, scores and cosines are read, without a separate verification."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scoring_cases import expected, scorer

from tracer import verify
from tracer.errors import StoreError
from tracer.scoring import read_checks
from tracer.scoring.estimators import Estimate
from tracer.scoring.read_checks import ReadCheck
from tracer.scoring.scorer import Scorer
from tracer.store import RowTable

N, M, DIM = 60, 5, 12


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


ASK = {
    "scores": lambda found: found.scores("test", Estimate(), None),
    "top": lambda found: found.top("test", 3, "proponents", Estimate(), None),
    "trak": lambda found: found.scores("test", Estimate("trak", regularization=1.0), None),
    "self-influence": lambda found: found.self_influence(None, Estimate()),
    "influence": lambda found: found.self_influence(None, Estimate("influence")),
}


@pytest.mark.parametrize("what", ASK)
@pytest.mark.parametrize("table", ["checkpoints/1", "targets/test/0"])
@pytest.mark.parametrize(
    ("array", "offset"), [("features", 12 * DIM), ("floats", 3 * 28), ("floats", 3 * 28 + 8), ("floats", 3 * 28 + 16)]
)
def test_a_flipped_bit_is_noticed(tmp_path, what, table, array, offset):
    found = scorer(tmp_path, N, M, DIM)
    if table != "checkpoints/1" and what in ("self-influence", "influence"):
        return  # they read no targets
    flip(tmp_path / table / array / "c" / "0" / "0", offset + 1)
    with pytest.raises(StoreError, match=r"rows 3 of .* do not match the checksum .* run tracer.verify"):
        ASK[what](Scorer(found.store, torch.device("cpu"), False))
    assert [each.rows.tolist() for each in verify(tmp_path, progress=False).damage] == [[3]]


@pytest.mark.parametrize("processes", [1, 3])
def test_flipped_scores_are_computed_again(tmp_path, processes):
    found = scorer(tmp_path, N, M, DIM, processes=processes)
    scores = np.array(found.scores("test", Estimate(), None))
    (chunk,) = tmp_path.glob("scores/test/tracin/*/scores/c/0/0")
    flip(chunk, 9)
    again = Scorer(found.store, torch.device("cpu"), False).scores("test", Estimate(), None)
    np.testing.assert_array_equal(np.asarray(again), scores)
    np.testing.assert_allclose(again, expected(found), rtol=1e-4, atol=1e-4)
    assert verify(tmp_path, progress=False).ok


@pytest.mark.parametrize("products", [20, 4096, 20000])
def test_of_many_rows_a_share_that_follows_from_the_work_is_checked(tmp_path, monkeypatch, products):
    found = scorer(tmp_path, 4000, M, DIM)
    table, seen = found.store.checkpoint(0), []
    monkeypatch.setattr(read_checks, "WHOLE_BYTES", 50 * table.row_bytes)
    monkeypatch.setattr(read_checks, "OF_LARGER_TABLES", 1.0)
    monkeypatch.setattr(table, "check_content", lambda rows: seen.extend(rows.tolist()))
    check = ReadCheck(table, products)
    for start in range(0, 4000, 100):
        check.check(np.arange(start, start + 100))
    assert len(set(seen)) == len(seen) and set(seen) & set(range(100))
    assert abs(len(seen) - max(50, 4000 * min(1, products / 16384))) <= 82


def test_large_tables_are_checked_in_a_fourth_of_the_passes_and_small_ones_in_all(tmp_path, monkeypatch):
    found = scorer(tmp_path, 4000, M, DIM)
    train, targets = found.store.checkpoint(0), found.store.targets("test", 0)
    monkeypatch.setattr(read_checks, "WHOLE_BYTES", 50 * train.row_bytes)
    seen = []
    monkeypatch.setattr(RowTable, "check_content", lambda table, rows: seen.append(table))
    for _ in range(200):
        ReadCheck(train, 1).check(np.arange(100))
        ReadCheck(targets, 1).check(np.arange(M))
    assert abs(seen.count(train) - 50) <= 6 * (200 / 4 * 3 / 4) ** 0.5 and seen.count(targets) == 200
