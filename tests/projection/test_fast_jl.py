"""fast_jl, with a stand-in that follows the package's contract: unscaled signs, half precision inside, CUDA alone."""

import sys

import pytest
import torch
from projection_cases import all_forms, matrix_of, normal, oracle_rows, project

from tracer.errors import InputError, MissingDependencyError
from tracer.gradients.per_sample import DenseGradient
from tracer.projection import fast_jl, make_projector
from tracer.projection.fast_jl import FastJLProjector


def build(shapes, proj_dim=512, seed=0):
    return FastJLProjector(shapes, proj_dim, seed, "cpu")


@pytest.mark.parametrize("form", all_forms((3, 2)))
def test_every_form_is_the_same_linear_map_up_to_half_precision(form, stand_in):
    projector, gradient = build({"weight": (13, 7)}), all_forms((13, 7))[form]
    rows, result = oracle_rows(gradient), projector.project({"weight": gradient})
    expected = rows @ matrix_of(projector, "weight")
    assert ((result.features - expected).norm(dim=1) <= 1e-3 * expected.norm(dim=1)).all()
    torch.testing.assert_close(result.squared_norm, rows.square().sum(1))


def test_entries_are_signs_over_the_root_of_k(stand_in):
    assert set(matrix_of(build({"weight": (13, 7)}), "weight").abs().flatten().tolist()) == {512**-0.5}


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1.0, 1e9, 1e30])
def test_no_scale_of_rows_overflows_or_vanishes(scale, stand_in):
    projector, rows = build({"weight": (40,)}), normal(3, 40).float()
    expected = projector.project({"weight": DenseGradient(rows)}).features
    features = projector.project({"weight": DenseGradient(rows * scale)}).features
    torch.testing.assert_close(features / scale, expected, rtol=1e-3, atol=1e-3)


def test_rows_of_zeros_stay_zeros(stand_in):
    assert not build({"weight": (40,)}).project({"weight": DenseGradient(torch.zeros(2, 40))}).features.any()


def test_blocks_of_entries_have_signs_of_their_own_and_are_keyed_by_name(stand_in, monkeypatch):
    monkeypatch.setattr(fast_jl, "BLOCK_ENTRIES", 10)
    one, other = build({"a": (20,), "b": (20,)}), build({"b": (20,), "a": (20,)})
    matrix = matrix_of(one, "a")
    assert torch.equal(matrix, matrix_of(other, "a"))
    assert not torch.equal(matrix, matrix_of(one, "b"))
    assert not torch.equal(matrix[:10], matrix[10:])


def test_settings_record_how_the_kernel_is_called(stand_in):
    settings = make_projector("fast_jl", {"weight": (13, 7)}, 512, 3, "cpu").settings()
    assert (settings["kind"], settings["num_sms"], settings["variant"]) == ("fast_jl", 128, 16)
    assert settings["seed"] == 3


def scaled(rows, k, seed, num_tiles):
    return project(rows, k, seed, num_tiles) * k**-0.5


def silent(rows, k, seed, num_tiles):
    return torch.zeros(len(rows), k)


def not_finite(rows, k, seed, num_tiles):
    return torch.full((len(rows), k), float("nan"))


def depends_on_batch(rows, k, seed, num_tiles):
    return project(rows, k, seed + len(rows), num_tiles)


def not_linear(rows, k, seed, num_tiles):
    return project(rows.abs(), k, seed, num_tiles)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (scaled, "inner products differ by"),
        (silent, "inner products differ by"),
        (not_finite, "inner products differ by nan"),
        (not_linear, "inner products differ by"),
        (depends_on_batch, "rows alone against rows together differ by"),
    ],
)
def test_a_broken_kernel_is_refused(broken, message, stand_in):
    stand_in.project_rademacher_16 = broken
    with pytest.raises(MissingDependencyError, match=f"fails its self-test on cpu: {message}"):
        build({"weight": (13, 7)})


def test_variants_that_disagree_are_refused(stand_in):
    stand_in.project_rademacher_8 = lambda rows, k, seed, num_tiles: project(rows, k, seed + 1, num_tiles)
    with pytest.raises(MissingDependencyError, match="8 rows at once against 16 differ by"):
        build({"weight": (13, 7)})


def test_a_kernel_that_raises_is_named(stand_in):
    def fail(*arguments):
        raise RuntimeError("CUDA error: too many resources requested for launch")

    stand_in.project_rademacher_16 = fail
    with pytest.raises(MissingDependencyError, match="fast_jl is installed but fails on cpu: CUDA error: too many"):
        build({"weight": (13, 7)})


def test_a_missing_package_is_reported_with_an_install_hint(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_jl", None)
    monkeypatch.setattr(fast_jl, "check_device", lambda device: None)
    with pytest.raises(MissingDependencyError, match=r"needs the package fast_jl: .*pip install tracin\[fast\]"):
        build({"weight": (13, 7)})


@pytest.mark.parametrize("device", ["cpu", None])
def test_other_devices_are_refused(device):
    with pytest.raises(MissingDependencyError, match="runs on CUDA devices only, got device="):
        make_projector("fast_jl", {"weight": (13, 7)}, 512, 0, device)


@pytest.mark.parametrize(("proj_dim", "nearest"), [(1000, 512), (100, 512), (4097, 4096)])
def test_a_proj_dim_that_the_kernel_cannot_write_is_refused(proj_dim, nearest, stand_in):
    with pytest.raises(InputError, match=rf"multiple of 512, got {proj_dim}; pass {nearest}"):
        build({"weight": (13, 7)}, proj_dim)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_real_kernel_passes_its_self_test():
    pytest.importorskip("fast_jl")
    projector = FastJLProjector({"weight": (300, 400)}, 1024, 0, "cuda")
    rows = normal(20, 300, 400, dtype=torch.float32).cuda()
    features = projector.project({"weight": DenseGradient(rows)}).features
    lengths = features.square().sum(1) / rows.flatten(1).square().sum(1)
    assert (lengths - 1).abs().max() < 7 * (2 / 1024) ** 0.5
