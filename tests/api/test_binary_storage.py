"""Stored signs of features: unbiased inner products, errors that theory gives, and everything that a store does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import tracer
from tracer import Tracer, attribute
from tracer.errors import CallOrderError, InputError
from tracer.store import Store
from tracer.store.quantization import binary_scale, relative_rows, rotated, signs


def test_a_rotation_keeps_inner_products():
    features = torch.randn(5, 256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = rotated(features)
    torch.testing.assert_close(found @ found.T, features @ features.T, rtol=1e-10, atol=1e-10)


def test_signs_of_vectors_with_few_entries_tell_as_much_as_those_of_dense_ones():
    rng, dim = np.random.default_rng(2), 8192
    features = np.zeros((40, dim), np.float32)
    features[:, :20] = rng.standard_normal((40, 20))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    found = rotated(torch.from_numpy(features)).numpy()
    products = binary_scale(found, np.abs(found).max(1))[:, None] * np.where(found >= 0, 1, -1) @ found.T
    errors = (products - features @ features.T)[~np.eye(40, dtype=bool)]
    assert np.sqrt(np.square(errors).mean()) < 1.5 * ((np.pi / 2 - 1) / dim) ** 0.5


def test_signs_are_packed_and_unpacked():
    features = np.random.default_rng(0).standard_normal((7, 64)).astype(np.float32)
    packed = relative_rows(features, np.ones(7, np.float32), np.arange(7), "binary", "train")
    assert packed.shape == (7, 8) and packed.dtype == np.uint8
    np.testing.assert_array_equal(signs(packed), np.where(features >= 0, 1, -1))


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_products_with_signs_are_unbiased_with_the_error_of_fewer_features(size):
    """Over random rotations the mean is the inner product, and the variance is that of 2 k / π Gaussian features."""
    rng, dim, trials = np.random.default_rng(1), 256, 3000
    one, other = rng.standard_normal((2, dim))
    one, other = one / np.linalg.norm(one), other / np.linalg.norm(other)
    exact, found = one @ other, []
    for _ in range(trials):
        basis = np.linalg.qr(rng.standard_normal((dim, 2)))[0]  # where a rotation takes the plane of both
        plane = np.linalg.qr(np.stack([one, other], 1))[0]
        left, right = (basis @ (plane.T @ each) for each in (one, other))
        row = (left * size).astype(np.float32)[None]
        scale = binary_scale(row, np.abs(row).max(1))
        found.append(float(scale[0]) / size * np.where(row[0] >= 0, 1, -1) @ right)
    error = np.array(found) - exact
    assert abs(error.mean()) < 5 * error.std() / trials**0.5
    assert error.std() == pytest.approx(((np.pi / 2 - 1) / dim) ** 0.5, rel=0.1)


def test_a_row_of_zeros_has_scores_of_zero():
    assert binary_scale(np.zeros((2, 64), np.float32), np.zeros(2, np.float32)).tolist() == [0, 0]


def case(count=80):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    data = [(torch.randn(n, 8), torch.randint(0, 3, (n,))) for n in (count, 6)]
    return model, *data, [(model.state_dict(), 0.1)]


def run(tmp_path, name, **options):
    model, train, targets, checkpoints = case()
    return attribute(model, "image_classification", train, targets, checkpoints, save_dir=tmp_path / name, **options)


@pytest.mark.parametrize("estimator", ["tracin", "cosine"])
def test_scores_are_those_of_exact_gradients_within_the_error(tmp_path, estimator):
    exact = run(tmp_path, "exact", projector="none", estimator=estimator)
    binary = run(tmp_path, "binary", storage="binary", proj_dim=1 << 15, estimator=estimator)
    own, others = (exact.tracer.store.checkpoint(0), exact.tracer.store.targets("targets", 0))
    sizes = np.outer(*(t.column("gradient_norm") * np.abs(t.column("loss_grad")) for t in (own, others))) * 0.1
    unit = sizes if estimator == "tracin" else 1.0
    errors = (binary.scores - exact.scores) / unit
    assert np.sqrt(np.square(errors).mean()) < 3 * (1 / (1 << 15)) ** 0.5
    np.testing.assert_allclose(
        binary.self_influence(), exact.self_influence(), rtol=1e-4
    ) if estimator == "tracin" else 0


def test_a_training_example_takes_an_eighth_of_a_byte_a_feature(tmp_path):
    store = run(tmp_path, "binary", storage="binary", proj_dim=4096).tracer.store
    assert store.checkpoint(0).dim == 4096 and store.checkpoint(0).storage == "binary"
    assert store.targets("targets", 0).storage == "float16"
    assert sum(path.stat().st_size for path in (tmp_path / "binary/checkpoints/0/features/c").rglob("*/*")) == 80 * 512


def test_top_query_groups_and_a_reader_agree(tmp_path):
    found = run(tmp_path, "binary", storage="binary", proj_dim=8192)
    _, _, targets, _ = case()
    with Tracer.open(tmp_path / "binary") as reader:
        top = reader.top("targets", 5)
    expected = np.argsort(-found.scores, axis=0, kind="stable")[:5].T
    np.testing.assert_array_equal(top.indices, expected)
    answer = found.tracer.query(targets, 5)
    np.testing.assert_array_equal(answer.indices, expected)
    groups = found.tracer.finalize_scores("targets", groups=[0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(groups[:, 0], found.scores[:, :3].sum(1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("estimator", ["influence", "trak"])
def test_estimators_with_a_kernel_are_refused(tmp_path, estimator):
    found = run(tmp_path, "binary", storage="binary", proj_dim=1024)
    with pytest.raises(CallOrderError, match="storage='binary'"):
        found.tracer.finalize_scores("targets", estimator)


@pytest.mark.parametrize("options", [{"projector": "none"}, {"proj_dim": 3000}, {"proj_dim": 32}])
def test_a_projection_that_cannot_be_rotated_is_refused(tmp_path, options):
    with pytest.raises(InputError, match="power of two"):
        run(tmp_path, "binary", storage="binary", **options)


def test_rows_are_stored_the_same_in_any_batches_and_are_verified(tmp_path):
    for name, size in (("a", 80), ("b", 7)):
        run(tmp_path, name, storage="binary", proj_dim=1024, batch_size=size)
    rows = [
        np.concatenate([view for _, view in Store.open_existing(tmp_path / name).checkpoint(0).raw_features(0, 80)])
        for name in "ab"
    ]
    assert (rows[0] != rows[1]).mean() < 1e-3  # features next to zero may round to either side
    assert tracer.verify(tmp_path / "a").ok
    path = next(path for path in (tmp_path / "a/checkpoints/0/features/c").rglob("*") if path.is_file())
    values = bytearray(path.read_bytes())
    values[130] ^= 1
    path.write_bytes(bytes(values))
    assert [damage.rows.tolist() for damage in tracer.verify(tmp_path / "a").damage] == [[1]]


def test_a_binary_store_grows_and_rows_are_replaced(tmp_path):
    model, train, targets, checkpoints = case()
    run(tmp_path, "binary", storage="binary", proj_dim=1024)
    with Tracer.open(tmp_path / "binary") as reader:
        reader.grow(90)
    more = tuple(torch.cat([column, column[:10]]) for column in train)
    found = attribute(
        model,
        "image_classification",
        more,
        targets,
        checkpoints,
        save_dir=tmp_path / "binary",
        storage="binary",
        proj_dim=1024,
    )
    np.testing.assert_allclose(found.scores[80:], found.scores[:10], rtol=0.2, atol=0.02 * np.abs(found.scores).max())
