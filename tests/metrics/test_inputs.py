"""What metrics take for arrays, and how they show their values."""

from __future__ import annotations

import numpy as np
import pytest

import tracer
from tracer.metrics import inputs, lds, mislabel_detection, values


def test_ragged_lists_are_named():
    with pytest.raises(tracer.InputError, match=r"scores must be an array \[N, M\]; numpy says of it: .*inhomogeneous"):
        inputs.as_array("scores", [[1.0], [1.0, 2.0]], "[N, M]")


@pytest.mark.parametrize("value", [[1.0, 2.0], np.ones((1, 1, 1)), np.ones((0, 3)), 1.0])
def test_other_dimensions_and_empty_arrays_are_named(value):
    with pytest.raises(tracer.InputError, match=r"scores must be \[N, M\] and not empty, got shape \["):
        inputs.as_array("scores", value, "[N, M]")


@pytest.mark.parametrize("value", [["a"], [1j], [None]])
def test_what_is_no_number_is_named(value):
    with pytest.raises(tracer.InputTypeError, match=r"scores \[N\] must hold real numbers, got dtype"):
        inputs.numbers("scores", value, "[N]")
    with pytest.raises(tracer.InputTypeError, match=r"masks \[N\] must be True/False or 0/1, got dtype"):
        inputs.flags("masks", value, "[N]")


def test_the_first_value_that_is_not_finite_is_named():
    value = np.zeros((3, 2))
    value[1, 1] = np.nan
    message = r"scores \[N, M\] has 1 NaN or infinite value of 6, the first at \[1, 1\]. Leave its row or target out"
    with pytest.raises(tracer.InputError, match=message):
        inputs.numbers("scores", value, "[N, M]")


@pytest.mark.parametrize("index", [-1, 3])
def test_row_indices_out_of_range_are_named(index):
    with pytest.raises(tracer.InputError, match=rf"rows \[k\] must be row indices from 0 to 2, got {index} at \[1\]"):
        inputs.checked_indices("rows", [0, index], "[k]", 3)


def test_row_indices_must_be_integers():
    with pytest.raises(tracer.InputTypeError, match=r"rows \[k\] must hold row indices, integers, got dtype float64"):
        inputs.checked_indices("rows", [0.0, 1.0], "[k]", 3)


def test_a_target_names_each_row_once():
    with pytest.raises(tracer.InputError, match=r"proponents \[M, k\] must name each row once .* target 1 does not"):
        inputs.proponent_indices("proponents", [[0, 1], [2, 2]], 3)


def test_whole_numbers():
    found = mislabel_detection([2.0, 1.0, 0.0], [1, 0, 0])
    assert found.precision_at(np.int64(2)) == 0.5
    with pytest.raises(tracer.InputTypeError, match="k is 1.5; expected an integer"):
        found.precision_at(1.5)
    with pytest.raises(tracer.InputError, match="k is 4; expected 1 to 3"):
        found.precision_at(4)


def test_results_are_shown_short():
    generator = np.random.default_rng(0)
    shown = repr(lds(generator.normal(size=(9, 30)), generator.random((8, 9)) < 0.5, generator.normal(size=(8, 30))))
    assert shown.startswith("LDS(mean=") and "per_target=<[30] from -" in shown and len(shown) < 200


def test_short_texts_of_values():
    assert values.shortened(1 / 3) == "0.3333"
    assert values.shortened(12) == "12"
    assert values.shortened(np.array([1.0, np.nan])) == "[1, nan]"
    assert values.shortened(np.full((2, 2), np.nan)) == "<[2, 2] nan>"


def test_results_cannot_be_changed():
    found = lds([[1.0], [2.0]], [[1, 0], [0, 1]], [[1.0], [2.0]], num_resamples=0)
    with pytest.raises(AttributeError):
        found.mean = 0.0
