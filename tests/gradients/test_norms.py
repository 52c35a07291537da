"""Exact norms and inner products meet the built gradients in float64, whatever the form."""

import numpy as np
import pytest
import torch
from projection_cases import OnlyDense, all_forms, embedding, normal, oracle_rows, outer

from tracer.gradients import norms, per_sample
from tracer.gradients.combined import SumGradient, add_gradients
from tracer.gradients.layers import conv_weight_gradient
from tracer.gradients.per_sample import DenseGradient, OuterGradient, flat
from tracer.gradients.rows import RowsGradient
from tracer.gradients.selfcheck import norm

FORMS = all_forms((11, 6))


@pytest.mark.parametrize("form", FORMS)
def test_squared_norms_are_exact(form):
    expected = oracle_rows(FORMS[form]).square().sum(1)
    torch.testing.assert_close(FORMS[form].squared_norm(), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("one", FORMS)
@pytest.mark.parametrize("other", ["dense", "vector input", "sequence", "embedding", "only dense"])
def test_inner_products_are_exact(one, other):
    expected = (oracle_rows(FORMS[one]) * oracle_rows(FORMS[other])).sum(1)
    torch.testing.assert_close(FORMS[one].inner(FORMS[other]), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("first", "last"), [(0, 66), (3, 5), (4, 20), (12, 18), (60, 66)])
@pytest.mark.parametrize("form", FORMS)
def test_any_range_of_entries_can_be_built(form, first, last):
    built = FORMS[form].entries(1, 4, first, last)
    torch.testing.assert_close(built, oracle_rows(FORMS[form])[1:4, first:last])


@pytest.mark.parametrize("form", ["dense", "sequence", "embedding", "tied", "only dense"])
@pytest.mark.parametrize("block_bytes", [1, 5000])
def test_blocks_of_samples_change_nothing(form, block_bytes, monkeypatch):
    whole = FORMS[form].squared_norm()
    rows = per_sample.row_blocks
    monkeypatch.setattr(per_sample, "row_blocks", lambda batch, row_bytes: rows(batch, row_bytes, block_bytes))
    torch.testing.assert_close(FORMS[form].squared_norm(), whole, rtol=1e-12, atol=0)


def test_repeated_rows_add_before_they_are_squared():
    gradient = RowsGradient(torch.tensor([[2, 0, 2, 2]]), torch.tensor([[[1.0], [5.0], [1.0], [1.0]]]), (3, 1))
    assert gradient.squared_norm().tolist() == pytest.approx([34.0])


def test_long_embedding_batches_cost_what_they_touch():
    # Built, these gradients would take 100 GB.
    gradient = embedding((2_000_000, 16), batch_size=800, positions=33, dtype=torch.float32)
    expected = torch.stack([_one_by_one(gradient, sample) for sample in range(3)])
    torch.testing.assert_close(gradient.squared_norm()[:3], expected, rtol=1e-5, atol=0)


def _one_by_one(gradient, sample):
    rows = {}
    for row, value in zip(gradient.index[sample].tolist(), gradient.values[sample].double(), strict=True):
        rows[row] = rows.get(row, 0) + value
    return sum(value.square().sum() for value in rows.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", all_forms((3, 2)))
def test_half_precision_factors_are_widened_before_products(form, dtype):
    gradient = all_forms((11, 6), dtype=dtype)[form]
    expected = oracle_rows(gradient).square().sum(1)
    torch.testing.assert_close(gradient.squared_norm(), expected, rtol=1e-6, atol=0)


def test_gram_products_survive_cancellation():
    # The two positions differ by 1e-4 of themselves: float32 Gram products would lose the norm.
    left, right = normal(1, 1, 40), normal(1, 1, 40, seed=1)
    left = torch.cat([left, -left * (1 + 1e-4)], 1)
    gradient = OuterGradient(left.float(), right.expand(1, 2, 40).float(), (40, 40))
    torch.testing.assert_close(
        norms.gram_squares(gradient.left, gradient.right), oracle_rows(gradient).square().sum(1), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("positions", [2, 64, 65, 300])
@pytest.mark.parametrize("share", [10.0, 1.0, 0.1, 0.01])
def test_gram_products_of_float32_keep_six_digits_however_much_cancels(positions, share):
    left, right = normal(3, positions, 40), normal(3, positions, 30, seed=1) * share + normal(3, 1, 30, seed=2)
    left = (left - left.mean(1, keepdim=True)).float()  # what positions have in common of the right factors cancels
    gradient = OuterGradient(left, right.float(), (40, 30))
    expected = oracle_rows(gradient).square().sum(1)
    torch.testing.assert_close(norms.gram_squares(gradient.left, gradient.right), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("left_scale", "right_scale"), [(1e-25, 1e25), (1e25, 1e-25), (1e-18, 1e-18), (1e15, 1e15)])
def test_gram_products_neither_overflow_nor_vanish(left_scale, right_scale):
    left, right = normal(2, 5, 40).float() * left_scale, normal(2, 5, 30, seed=1).float() * right_scale
    expected = oracle_rows(OuterGradient(left.double(), right.double(), (40, 30))).square().sum(1)
    torch.testing.assert_close(norms.gram_squares(left, right), expected, rtol=1e-6, atol=0)


def test_gram_products_ignore_lower_precisions_of_training():
    before = torch.get_float32_matmul_precision()
    gradient = OuterGradient(normal(2, 9, 40).float(), normal(2, 9, 30, seed=1).float(), (40, 30))
    torch.set_float32_matmul_precision("medium")
    try:
        found = norms.gram_squares(gradient.left, gradient.right)
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(found, oracle_rows(gradient).square().sum(1), rtol=1e-10, atol=0)


def test_sums_that_cancel_have_a_norm_near_zero():
    gradient = outer((8, 5), dtype=torch.float64)
    opposite = DenseGradient(-oracle_rows(gradient).reshape(-1, 8, 5))
    total = SumGradient([gradient, opposite]).squared_norm()
    assert (total.abs() <= 1e-12 * gradient.squared_norm()).all()


def test_long_float32_rows_keep_six_digits():
    rows = normal(2, 300_001, dtype=torch.float32).abs() + 1
    torch.testing.assert_close(norms.row_squares(rows), rows.double().square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_parameters_without_entries_have_norm_zero(shape):
    assert DenseGradient(torch.zeros(2, *shape)).squared_norm().tolist() == [0.0, 0.0]
    assert OnlyDense(torch.zeros(2, *shape)).squared_norm().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("form", FORMS)
def test_weighted_sums_are_those_of_built_gradients(form):
    rows, weights = oracle_rows(FORMS[form]), normal(5, seed=4)
    total, norms = FORMS[form].weighted_sum(weights)
    torch.testing.assert_close(total, weights @ rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(norms, (weights.abs() * rows.norm(dim=1)).sum().reshape(1), rtol=1e-10, atol=0)


def test_the_weighted_sum_of_a_large_table_builds_none_of_its_gradients(monkeypatch):
    gradient = RowsGradient(torch.randint(0, 1 << 20, (64, 5)), torch.randn(64, 5, 8), (1 << 20, 8))
    monkeypatch.setattr(RowsGradient, "dense", lambda *rows: pytest.fail("built a gradient"))
    total, norms = gradient.weighted_sum(torch.ones(64))
    assert total.is_sparse and total.shape == (1 << 20, 8) and norms > 0
    twice, _ = SumGradient([gradient, gradient]).weighted_sum(torch.ones(64))
    assert twice.is_sparse
    torch.testing.assert_close(flat(twice), 2 * flat(total))
    expected = torch.zeros(1 << 20, 8).index_add_(0, gradient.index[3], gradient.values[3])
    torch.testing.assert_close(flat(gradient.sample(3)), expected.flatten())


def test_a_single_gradient_is_not_copied_and_empty_parameters_have_norm_zero():
    gradient = outer((8, 5), 6)
    assert add_gradients([gradient]) is gradient
    assert outer((0, 5), 6).fold(2).squared_norm().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_divided_gradient_of_a_grouped_convolution_keeps_one_dtype(dtype):
    module = torch.nn.Conv2d(2, 4, 3, groups=2)
    gradient = conv_weight_gradient(module, normal(3, 2, 5, 5, dtype=dtype), normal(3, 4, 3, 3, seed=1, dtype=dtype))
    divided = gradient.divided(torch.tensor([1.0, 2.0, 4.0])).dense(0, 3)
    expected = gradient.dense(0, 3).float() / torch.tensor([[1.0], [2.0], [4.0]])
    torch.testing.assert_close(divided, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("size", [1, 1023, 2048, 5000, (1 << 20) + 7])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("share", [0.0, 0.001, 1.0])
def test_the_norm_of_few_or_many_values_is_that_of_a_sum_in_float64(size, scale, share):
    generator = torch.Generator().manual_seed(size)
    values = torch.randn(size, generator=generator) * scale * (torch.rand(size, generator=generator) < share)
    expected = np.linalg.norm(values.double().numpy())
    assert norm(values) == pytest.approx(expected, rel=1e-12, abs=0)
    assert norm(values.reshape(1, -1).T) == norm(values)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_norm_of_values_that_are_not_finite_is_not_finite(bad):
    values = torch.zeros(5000)
    values[777] = bad
    assert not np.isfinite(norm(values))
