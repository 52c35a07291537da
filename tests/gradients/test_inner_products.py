"""Inner products of all pairs of rows, in every combination of forms and both ways, against built gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from projection_cases import all_forms, dense, embedding, normal, oracle_rows, outer

from tracer._core.scratch import Scratch
from tracer.gradients import inner_products
from tracer.gradients.combined import SumGradient
from tracer.gradients.inner_products import TargetGradients
from tracer.gradients.layers import conv_weight_gradient
from tracer.gradients.per_sample import FoldedGradient, OuterGradient, PerSampleGradient
from tracer.gradients.window_products import window_products
from tracer.gradients.windows import WindowGradient

SHAPE = (6, 8)
FORMS = sorted(all_forms(SHAPE))


def hold(*batches: PerSampleGradient) -> TargetGradients:
    held = TargetGradients()
    for gradient in batches:
        held.append(torch.ones(gradient.batch_size), [(0, {"weight": gradient})])
    held.join()
    return held


def assert_products(gradient: PerSampleGradient, *targets: PerSampleGradient, rtol: float = 1e-9) -> None:
    held = hold(*targets)
    rows, columns = oracle_rows(gradient), torch.cat([oracle_rows(target) for target in targets])
    for _ in range(2):  # the second time from what was built and kept
        products = torch.zeros(len(rows), len(columns), dtype=torch.float64)
        squares = held.add_products("weight", gradient, products)
        scale = float(rows.norm(dim=1).max() * columns.norm(dim=1).max())
        torch.testing.assert_close(products, rows @ columns.T, rtol=0, atol=rtol * scale)
        torch.testing.assert_close(squares, rows.square().sum(1), rtol=rtol, atol=0)


@pytest.mark.parametrize("way", ["chosen", "gram", "built"])
@pytest.mark.parametrize(("one", "other"), list(itertools.product(FORMS, FORMS)))
def test_products_of_any_two_forms(one, other, way, monkeypatch):
    if way != "chosen":
        pays = lambda a, b, m: way == "gram" and None not in (a.num_terms, b.num_terms)  # noqa: E731
        monkeypatch.setattr(inner_products, "_gram_pays", pays)
    assert_products(all_forms(SHAPE, batch_size=5)[one], all_forms(SHAPE, batch_size=3)[other])


@pytest.mark.parametrize("form", FORMS)
def test_blocks_do_not_change_products(form, monkeypatch):
    for name in ("GRAM_BYTES", "FACTOR_BYTES", "BUILT_BYTES"):
        monkeypatch.setattr(inner_products, name, 600)
    for other in ("sequence", "embedding", "dense"):
        assert_products(all_forms(SHAPE)[form], all_forms(SHAPE, batch_size=4)[other])


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("channels", [4, 48])
def test_products_of_convolutions(groups, channels):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(channels, 6, 3, padding=1, groups=groups).double()

    def gradient(rows: int) -> PerSampleGradient:
        return conv_weight_gradient(
            conv, torch.randn(rows, channels, 5, 5).double(), torch.randn(rows, 6, 5, 5).double()
        )

    one, *others = gradient(4), gradient(3), gradient(2)
    assert isinstance(one, WindowGradient)
    assert_products(one, *others)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (2, 2, 1), (3, 2, 2), (2, 3, 1), (1, 2, 1)])
@pytest.mark.parametrize("padding", [0, 1, 3])
def test_products_of_windows_are_sums_of_products_of_pixels(dims, kernel, stride, dilation, padding):
    """Also of images of different sizes, black ones, and a block of samples."""

    def gradient(rows: int, size: int, seed: int) -> WindowGradient:
        image = normal(rows, 3, *[size] * dims, seed=seed) * (torch.arange(rows) > 0).view(-1, *[1] * (dims + 1))
        padded = torch.nn.functional.pad(image, [padding] * 2 * dims)
        positions = (padded.shape[2] - dilation * (kernel - 1) - 1) // stride + 1
        left = normal(rows, 4, *[positions] * dims, seed=seed + 1)
        shape = (4, 3, *[kernel] * dims)
        return WindowGradient(padded, left, shape, stride=(stride,) * dims, dilation=(dilation,) * dims)

    one, other = gradient(4, 5, 0), gradient(3, 6, 2)
    for ours in (slice(0, 1), slice(1, 4)):
        found = window_products(one, ours, other, slice(0, 3), Scratch())
        torch.testing.assert_close(found, oracle_rows(one)[ours] @ oracle_rows(other).T)


def test_float32_products_are_near_float64_ones():
    for one, other in itertools.product(all_forms(SHAPE, dtype=torch.float32).values(), repeat=2):
        assert_products(one, other, rtol=2e-5)


def test_batches_of_targets_are_joined_where_they_have_one_form():
    held = hold(outer(SHAPE, 3), outer(SHAPE, 1), outer(SHAPE, 2, positions=7), dense(SHAPE, 2), dense(SHAPE, 1))
    assert [(first, part.batch_size) for first, part in held._parts["weight"]] == [(0, 4), (4, 2), (6, 3)]
    folded = [FoldedGradient(outer(SHAPE, 4, seed=seed), 2) for seed in (1, 2)]
    assert_products(outer(SHAPE, 3), *folded)
    assert_products(outer(SHAPE, 3), outer(SHAPE, 3), outer(SHAPE, 1), embedding(SHAPE, 2), dense(SHAPE, 2))


def test_rows_of_a_batch_may_come_in_pieces():
    gradient, rows = dense(SHAPE, 5), oracle_rows(dense(SHAPE, 5))
    held = TargetGradients()
    pieces = [(0, {"weight": dense(SHAPE, 5)}), (0, {"bias": dense((6,), 2)}), (2, {"bias": dense((6,), 3, seed=1)})]
    held.append(torch.ones(5), pieces)
    held.join()
    products = torch.zeros(5, 5, dtype=torch.float64)
    held.add_products("weight", gradient, products)
    torch.testing.assert_close(products, rows @ rows.T)
    bias, products = dense((6,), 4, seed=2), torch.zeros(4, 5, dtype=torch.float64)
    held.add_products("bias", bias, products)
    expected = torch.cat([oracle_rows(dense((6,), 2)), oracle_rows(dense((6,), 3, seed=1))])
    torch.testing.assert_close(products, oracle_rows(bias) @ expected.T)


def test_a_parameter_that_targets_do_not_use_adds_nothing():
    products = torch.zeros(5, 3, dtype=torch.float64)
    squares = hold(dense(SHAPE, 3)).add_products("other", outer(SHAPE, 5), products)
    assert not products.any()
    torch.testing.assert_close(squares, oracle_rows(outer(SHAPE, 5)).square().sum(1))


def test_memory_counts_each_storage_once_and_what_will_be_built():
    few = torch.zeros(2, 1, 64)
    held = hold(OuterGradient(few, few, (64, 64)))
    assert held.num_bytes() == 2 * few.nbytes  # the left factors are copies over their lengths
    many = torch.zeros(2, 500, 64)
    held = hold(OuterGradient(many, many, (64, 64)))
    assert held.num_bytes() == 2 * many.nbytes + 2 * 4 * 64 * 64


def test_targets_are_divided_by_their_lengths():
    lengths = torch.tensor([1e-20, 1.0, 1e20], dtype=torch.float64)
    for form in FORMS:
        gradient, target = all_forms(SHAPE, 4, torch.float32)[form], all_forms(SHAPE, 3, torch.float32)[form]
        held, products = TargetGradients(), torch.zeros(4, 3, dtype=torch.float64)
        held.append(lengths, [(0, {"weight": target})])
        held.join()
        held.add_products("weight", gradient, products)
        expected = oracle_rows(gradient) @ oracle_rows(target).T
        torch.testing.assert_close(products * lengths, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("mean", [10.0, 300.0])
def test_terms_that_cancel_lose_nothing(mean):
    """Left factors that add up to zero over positions, as an attention key's do, and inputs with a common part."""
    left, right = normal(4, 16, 256, dtype=torch.float32), normal(4, 16, 256, seed=1, dtype=torch.float32) + mean
    left -= left.mean(1, keepdim=True)
    gradient = OuterGradient(left, right, (256, 256))
    rows = oracle_rows(gradient)
    products = torch.zeros(4, 4, dtype=torch.float64)
    hold(gradient).add_products("weight", gradient, products)
    lengths = rows.norm(dim=1)
    error = (products - rows @ rows.T).abs() / lengths / lengths[:, None]
    assert float(error.max()) < 2e-5


def test_folded_sums_and_other_forms_of_users():
    inner = SumGradient([outer(SHAPE, 4), outer(SHAPE, 4, positions=1, seed=9)])
    folded = [FoldedGradient(inner, 2), FoldedGradient(SumGradient([dense(SHAPE, 4), outer(SHAPE, 4)]), 2)]
    for gradient in folded:
        held, products = hold(gradient, gradient), torch.zeros(2, 4, dtype=torch.float64)
        held.add_products("weight", gradient, products)
        rows = gradient.dense(0, 2)
        torch.testing.assert_close(products, rows @ torch.cat([rows, rows]).T)


def test_convolutions_of_other_strides_are_not_joined():
    def gradient(stride: int, seed: int) -> WindowGradient:
        padded, left = normal(2, 3, 5, seed=seed), normal(2, 4, 2, seed=seed + 1)
        return WindowGradient(padded, left, (4, 3, 1), stride=(stride,), dilation=(1,))

    assert_products(gradient(3, 0), gradient(3, 2), gradient(4, 4))
