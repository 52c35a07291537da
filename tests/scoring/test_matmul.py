"""Products of stored features: exact integers, float32 otherwise, for every storage and shape."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from tracer.scoring import matmul
from tracer.scoring.matmul import MemoryPlan, Multiplier, int8_products_are_exact

CPU = torch.device("cpu")
SHAPES = [(1, 1, 1), (1, 7, 1), (5, 1, 3), (33, 40, 17), (64, 16, 8), (3, 300, 70), (40, 300, 2)]


@pytest.fixture(autouse=True)
def unchecked():
    """Each test patches what the processor can do, so the cached check is cleared."""
    int8_products_are_exact.cache_clear()
    yield
    int8_products_are_exact.cache_clear()


@pytest.fixture
def int8_units(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: True)


def rows(count, dim, storage, seed=0):
    values = np.random.default_rng(seed).standard_normal((count, dim)) * 40
    return values.clip(-127, 127).astype(storage)


@pytest.mark.parametrize("memory_bytes", [1, 1 << 16, 1 << 30])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("storage", ["float32", "float16", "int8", "int8 as it is"])
def test_products_of_any_shape(storage, shape, memory_bytes, monkeypatch):
    monkeypatch.setattr("torch.cpu._is_vnni_supported", lambda: storage == "int8 as it is")
    monkeypatch.setattr(matmul, "_INT8_COLUMNS", 128)  # so that columns are split
    num_rows, dim, num_targets = shape
    plan = MemoryPlan.of(memory_bytes, dim, num_targets)
    multiplier = Multiplier(plan, CPU, storage.partition(" ")[0])
    assert multiplier.integer == (storage == "int8 as it is")
    train, target = rows(num_rows, dim, multiplier.storage), rows(num_targets, dim, multiplier.storage, 1)
    expected = train.astype(np.float64) @ target.astype(np.float64).T
    assert plan.rows >= num_rows
    for first in range(0, num_targets, plan.targets):
        part = target[first : first + plan.targets]
        for given in (part, multiplier.convert(part)):
            found = multiplier.multiply(train, given).numpy()
            np.testing.assert_allclose(found, expected[:, first : first + plan.targets], rtol=1e-5, atol=1e-2)


@pytest.mark.usefixtures("int8_units")
def test_sums_beyond_int32_do_not_overflow():
    dim = matmul._INT8_COLUMNS + 5_000
    assert 127 * 127 * matmul._INT8_COLUMNS < 2**31 < 127 * 127 * dim
    multiplier = Multiplier(MemoryPlan.of(1 << 30, dim, 2), CPU, "int8")
    train, target = np.full((2, dim), 127, np.int8), np.full((2, dim), 127, np.int8)
    train[1] = -127
    np.testing.assert_allclose(multiplier.multiply(train, target), 127.0 * 127.0 * dim * np.array([[1, 1], [-1, -1]]))


@pytest.mark.usefixtures("int8_units")
def test_integer_products_that_saturate_are_not_used(monkeypatch, caplog):
    right = torch._int_mm
    monkeypatch.setattr("torch._int_mm", lambda a, b: right(a, b).clamp(-(2**20), 2**20))
    with caplog.at_level(logging.INFO, "tracer"):
        multiplier = Multiplier(MemoryPlan.of(1 << 30, 40, 8), CPU, "int8")
    assert not multiplier.integer
    assert "are not exact" in caplog.text
    train = np.full((3, 40), 127, np.int8)
    assert (multiplier.multiply(train, train).numpy() == 127 * 127 * 40).all()


@pytest.mark.usefixtures("int8_units")
def test_integer_products_with_one_vector_that_saturate_are_not_used(monkeypatch):
    right = torch._int_mm
    monkeypatch.setattr("torch._int_mm", lambda a, b: right(a, b).clamp(-(2**20), 2**20 if b.shape[1] == 1 else None))
    assert not Multiplier(MemoryPlan.of(1 << 30, 40, 1), CPU, "int8").integer


@pytest.mark.usefixtures("int8_units")
def test_integer_products_that_fail_are_not_used(monkeypatch, caplog):
    def fails(left, right):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("torch._int_mm", fails)
    with caplog.at_level(logging.INFO, "tracer"):
        assert not Multiplier(MemoryPlan.of(1 << 30, 40, 8), CPU, "int8").integer
    assert "no kernel" in caplog.text


def test_memory_is_used_again():
    multiplier = Multiplier(MemoryPlan.of(1 << 30, 64, 8), CPU, "float16")
    train, target = rows(16, 64, "float16"), multiplier.convert(rows(8, 64, "float16"))
    first = multiplier.multiply(train, target).data_ptr()
    assert multiplier.multiply(train, target).data_ptr() == first


@pytest.mark.parametrize("dim", [1, 64, 4096, 1 << 20])
@pytest.mark.parametrize("num_targets", [1, 1000, 10**7])
@pytest.mark.parametrize("memory_bytes", [1 << 20, 1 << 24, 1 << 30])
def test_a_plan_keeps_within_its_memory(dim, num_targets, memory_bytes):
    plan = MemoryPlan.of(memory_bytes, dim, num_targets)
    blocks = 4 * (plan.rows * plan.columns + plan.targets * plan.columns + plan.rows * plan.targets)
    assert plan.resident_bytes + 2 * plan.tile_bytes + blocks <= memory_bytes
