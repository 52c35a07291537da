"""Random numbers are pinned: the same on every machine and every version of numpy and torch."""

import numpy as np
import pytest

from tracer._core.random_streams import Stream, unpack_signs
from tracer._core.validation import check_seed
from tracer.errors import InputError, InputTypeError


def stream(*indices, seed=7, name="layer.weight"):
    return Stream(seed, 1, "test", name, *indices)


def test_raw_words_are_pinned():
    assert stream(0, 1).words(2).tolist() == [6312610076814558192, 4777250630991708526]


def test_derived_tables_are_pinned():
    numbers = stream()
    assert numbers.below(1000) == 67
    assert numbers.permutation(8).tolist() == [5, 6, 2, 0, 3, 7, 4, 1]
    assert numbers.signs(10).tolist() == [-1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0, -1.0]
    np.testing.assert_allclose(numbers.gaussians(3), [-0.25354409, -0.09781347, 2.21272016], rtol=1e-6)


@pytest.mark.parametrize(
    "other",
    [stream(0, 2), stream(1, 1), stream(0), stream(0, 1, seed=8), stream(0, 1, name="layer.bias")],
    ids=["last index", "first index", "fewer indices", "seed", "name"],
)
def test_every_part_of_the_key_matters(other):
    assert not np.intersect1d(stream(0, 1).words(64), other.words(64)).size


def test_seed_words_do_not_run_into_each_other():
    # SeedSequence drops the borders between numbers: 2**32 is the words 0, 1.
    first, second = Stream(1 << 32, 1, "p", "n", 0), Stream(0, 1, "p", "n", 0)
    assert first.words(1) != second.words(1)


def test_signs_and_gaussians_have_the_right_moments():
    signs, normal = stream().signs(200_000), stream().gaussians(200_001)
    assert signs.dtype == normal.dtype == np.float32
    assert set(signs.tolist()) == {1.0, -1.0}
    assert abs(signs.mean()) < 5 / 200_000**0.5
    assert abs(normal.mean()) < 5 / 200_000**0.5
    assert abs(normal.var() - 1) < 5 * (2 / 200_000) ** 0.5
    assert abs((normal**4).mean() - 3) < 5 * (96 / 200_000) ** 0.5


def test_below_is_uniform_and_permutations_are_permutations():
    draws = np.array([stream(i).below(5) for i in range(2000)])
    assert np.abs(np.bincount(draws, minlength=5) - 400).max() < 5 * (2000 * 0.16) ** 0.5
    assert sorted(stream().permutation(100).tolist()) == list(range(100))


def test_packed_signs_unpack_to_signs():
    assert (unpack_signs(stream().packed_signs(70), 70) == stream().signs(70)).all()


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.0, True, "0", None])
def test_seeds_that_cannot_be_used_are_refused(seed):
    error = InputError if type(seed) is int else InputTypeError
    with pytest.raises(error, match=rf"seed is {seed!r}; expected (an integer|0 to {2**64 - 1})"):
        check_seed(seed)


def test_numpy_seeds_are_taken():
    assert type(check_seed(np.int64(3))) is int
