"""Dense random projections: one linear map for every form, block and cache; unbiased; pinned."""

import pytest
import torch
from projection_cases import all_forms, assert_is_linear_map, assert_unbiased, matrix_of, oracle_rows, outer

from tracer.gradients.per_sample import DenseGradient
from tracer.projection import dense
from tracer.projection.dense import GaussianProjector, RademacherProjector

BOTH = pytest.mark.parametrize("kind", [RademacherProjector, GaussianProjector])


@BOTH
@pytest.mark.parametrize("form", all_forms((3, 2)))
@pytest.mark.parametrize("block_numbers", [1 << 22, 300])
def test_every_form_is_the_same_linear_map(kind, form, block_numbers, monkeypatch):
    monkeypatch.setattr(dense, "BLOCK_NUMBERS", block_numbers)  # 300 numbers are blocks of 25 entries
    assert_is_linear_map(kind({"weight": (13, 7)}, 12, 0), "weight", all_forms((13, 7))[form])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precisions_give_float32_features(kind, dtype):
    projector = kind({"weight": (13, 7)}, 12, 0)
    for gradient in all_forms((13, 7), dtype=dtype).values():
        assert projector.project({"weight": gradient}).features.dtype == torch.float32
        assert_is_linear_map(projector, "weight", gradient, rtol=1e-5)


@BOTH
def test_blocks_of_samples_change_nothing(kind, monkeypatch):
    gradient = all_forms((13, 7))["sequence"]
    whole = kind({"weight": (13, 7)}, 12, 0).project({"weight": gradient})
    rows = dense.row_blocks
    monkeypatch.setattr(dense, "row_blocks", lambda batch_size, *_: rows(batch_size, 1, 2))
    parts = kind({"weight": (13, 7)}, 12, 0).project({"weight": gradient})
    torch.testing.assert_close(parts.features, whole.features)
    torch.testing.assert_close(parts.squared_norm, whole.squared_norm)


@BOTH
def test_caching_changes_no_number_and_keeps_to_its_budget(kind, monkeypatch):
    def matrix(cache_bytes):
        monkeypatch.setattr(dense, "CACHE_BYTES", cache_bytes)
        projector = kind({"weight": (13, 7)}, 12, 0)
        return matrix_of(projector, "weight"), matrix_of(projector, "weight"), projector

    size = 4 * 13 * 7 * 12
    first, again, kept = matrix(size)
    assert len(kept._cache) == 1
    for cache_bytes in (size - 1, -(-size // 32), 0):
        *matrices, projector = matrix(cache_bytes)
        assert not projector._cache
        assert len(getattr(projector, "_packed", [])) == (kind is RademacherProjector and cache_bytes > 0)
        assert all(torch.equal(one, first) for one in (again, *matrices))


def test_entries_have_mean_zero_and_variance_one_over_k():
    signs = matrix_of(RademacherProjector({"weight": (50, 40)}, 64, 0), "weight")
    assert set(signs.abs().flatten().tolist()) == {0.125}
    assert abs(signs.mean()) < 5 * 0.125 / signs.numel() ** 0.5
    normal = matrix_of(GaussianProjector({"weight": (50, 40)}, 64, 0), "weight") * 8
    assert abs(normal.mean()) < 5 / normal.numel() ** 0.5
    assert abs(normal.var() - 1) < 5 * (2 / normal.numel()) ** 0.5


@BOTH
def test_parameters_are_keyed_by_name(kind):
    one = kind({"a": (9, 8), "b": (9, 8)}, 16, 3)
    other = kind({"b": (9, 8), "c": (4,), "a": (9, 8)}, 16, 3)
    assert torch.equal(matrix_of(one, "a"), matrix_of(other, "a"))
    assert not torch.equal(matrix_of(one, "a"), matrix_of(one, "b"))


@BOTH
def test_inner_products_are_unbiased_over_seeds(kind):
    gradient = outer((12, 15), batch_size=4)
    rows = oracle_rows(gradient)
    assert_unbiased(lambda seed: kind({"weight": (12, 15)}, 16, seed).project({"weight": gradient}).features, rows)


@BOTH
def test_an_empty_batch_has_empty_features(kind):
    for gradient in all_forms((13, 7), batch_size=0).values():
        assert kind({"weight": (13, 7)}, 12, 0).project({"weight": gradient}).features.shape == (0, 12)


PINNED = {
    RademacherProjector: [-4.0, 27.0, -29.0, -13.0],
    GaussianProjector: [25.228853, 15.890440, 33.313313, 6.605710],
}


@BOTH
def test_projected_values_are_pinned(kind):
    ramp = torch.arange(20, dtype=torch.float32).reshape(1, 4, 5)
    features = kind({"weight": (4, 5)}, 4, 11).project({"weight": DenseGradient(ramp)}).features
    torch.testing.assert_close(features, torch.tensor([PINNED[kind]]), rtol=0, atol=1e-5)
