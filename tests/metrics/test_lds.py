"""The linear datamodeling score and rank correlations against loops over scipy."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import stats

import tracer
from tracer import metrics
from tracer.metrics import datamodels, ranks


def loop_spearman(x, y):
    """Spearman's correlation of each column by scipy, NaN where one is constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant columns
        return np.array([stats.spearmanr(x[:, m], y[:, m]).statistic for m in range(x.shape[1])])


def loop_lds(scores, masks, outputs):
    """Predicted outputs added up row by row; 0 for constant predictions, NaN for constant outputs."""
    predicted = np.zeros(outputs.shape)
    for subset, mask in enumerate(masks):
        for row in np.flatnonzero(mask):
            predicted[subset] += scores[row]
    found = loop_spearman(predicted, outputs)
    for target in range(outputs.shape[1]):
        if len(np.unique(predicted[:, target])) == 1:
            found[target] = 0
        if len(np.unique(outputs[:, target])) == 1:
            found[target] = np.nan
    return found


def data(seed=0, num_rows=13, num_targets=5, num_subsets=17, whole=False):
    """Scores, masks and outputs; whole numbers have many ties."""
    generator = np.random.default_rng(seed)
    scores = generator.normal(size=(num_rows, num_targets))
    masks = generator.random((num_subsets, num_rows)) < 0.5
    outputs = masks @ scores + generator.normal(size=(num_subsets, num_targets))
    return (np.round(scores), masks, np.round(outputs)) if whole else (scores, masks, outputs)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16])
def test_spearman_is_that_of_scipy(whole, dtype):
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(2, 23, 6)) * (2 if whole else 1000)
    x, y = x.astype(dtype), (x + y).astype(dtype)
    found = metrics.spearman(x, y)
    np.testing.assert_allclose(found, loop_spearman(x, y), atol=1e-12)


def test_spearman_in_blocks_of_columns(monkeypatch):
    x, y = np.random.default_rng(2).normal(size=(2, 9, 7))
    monkeypatch.setattr(ranks, "_BLOCK", 20)
    np.testing.assert_allclose(metrics.spearman(x, y), loop_spearman(x, y), atol=1e-12)


def test_spearman_of_a_constant_column_is_nan():
    found = metrics.spearman([[1.0, 1.0], [2.0, 1.0]], [[3.0, 1.0], [4.0, 2.0]])
    np.testing.assert_array_equal(found, [1.0, np.nan])


def test_spearman_needs_equal_shapes_and_two_rows():
    with pytest.raises(tracer.InputError, match=r"x and y must be \[S, M\] alike .* got \[2, 1\] and \[3, 1\]"):
        metrics.spearman(np.ones((2, 1)), np.ones((3, 1)))
    with pytest.raises(tracer.InputError, match="S of at least 2"):
        metrics.spearman(np.ones((1, 4)), np.ones((1, 4)))


def test_pearson_is_that_of_numpy_at_any_scale():
    x, y = np.random.default_rng(3).normal(size=(2, 11, 3))
    expected = [np.corrcoef(x[:, m], y[:, m])[0, 1] for m in range(3)]
    for scale in (1.0, 1e-200, 1e200):
        np.testing.assert_allclose(ranks.pearson(x * scale + scale, y * scale), expected, rtol=1e-12)


def test_average_ranks_are_those_of_scipy():
    values = np.random.default_rng(4).integers(0, 5, size=(30, 4))
    np.testing.assert_array_equal(ranks.average_ranks(values), stats.rankdata(values, axis=0))


@pytest.mark.parametrize("whole", [False, True])
def test_lds_is_the_mean_correlation_of_summed_scores(whole):
    arrays = data(whole=whole)
    found = metrics.lds(*arrays, num_resamples=0)
    expected = loop_lds(*arrays)
    np.testing.assert_allclose(found.per_target, expected, atol=1e-12)
    assert found.mean == pytest.approx(expected.mean(), abs=1e-12)


def test_lds_of_scores_that_predict_perfectly_is_one():
    scores, masks, _ = data()
    found = metrics.lds(scores, masks, 3 * (masks @ scores) - 100)
    assert found.mean == pytest.approx(1)
    assert found.interval == pytest.approx((1, 1))
    assert metrics.lds(-scores, masks, masks @ scores).mean == pytest.approx(-1)


def test_sums_over_blocks_of_rows(monkeypatch):
    arrays = data(num_rows=50)
    monkeypatch.setattr(ranks, "_BLOCK", 60)  # 3 rows at once
    np.testing.assert_allclose(metrics.lds(*arrays, num_resamples=0).per_target, loop_lds(*arrays), atol=1e-12)


def test_constant_predictions_count_as_zero():
    scores, masks, outputs = data()
    scores[:, 1] = 0
    found = metrics.lds(scores, masks, outputs)
    assert found.per_target[1] == 0
    assert found.mean == pytest.approx(loop_lds(scores, masks, outputs).mean())


def test_predictions_that_differ_by_rounding_alone_count_as_zero():
    generator = np.random.default_rng(5)
    masks = np.array([generator.permutation(301) < 150 for _ in range(40)])
    scores = np.full((301, 2), 0.1) * [1.0, 1e9]  # sums of 150 equal numbers, added up in different orders
    found = metrics.lds(scores, masks, generator.normal(size=(40, 2)), num_resamples=10)
    np.testing.assert_array_equal(found.per_target, [0, 0])
    np.testing.assert_array_equal(found.resampled, np.zeros(10))


def test_small_predictions_are_not_taken_for_rounding():
    scores, masks, outputs = data()
    scores = scores * 1e-12
    scores[:, 0] += 1  # subsets differ in size, so these predictions differ as well
    assert np.abs(metrics.lds(scores, masks, outputs).per_target).min() > 0


def test_targets_with_constant_outputs_are_left_out():
    scores, masks, outputs = data()
    outputs[:, 2] = 7
    scores[:, 2] = 0  # constant predictions do not make it a 0
    found = metrics.lds(scores, masks, outputs, num_resamples=20)
    others = [0, 1, 3, 4]
    assert np.isnan(found.per_target[2])
    alone = metrics.lds(scores[:, others], masks, outputs[:, others], num_resamples=20)
    assert found.mean == pytest.approx(alone.mean)
    np.testing.assert_allclose(found.resampled, alone.resampled)


def test_an_error_when_all_outputs_are_constant():
    scores, masks, outputs = data()
    with pytest.raises(tracer.InputError, match="LDS is defined for none of 5 targets: outputs are the same"):
        metrics.lds(scores, masks, np.ones_like(outputs))


def loop_resampled(arrays, num_resamples, seed):
    """The whole score computed anew on each resample of the subsets."""
    scores, masks, outputs = arrays
    draws = np.random.default_rng(seed).integers(len(masks), size=(num_resamples, len(masks)))
    return [np.nanmean(loop_lds(scores, masks[rows], outputs[rows])) for rows in draws]


@pytest.mark.parametrize("whole", [False, True])
def test_resampled_means_are_the_score_of_resampled_subsets(whole):
    arrays = data(whole=whole)
    found = metrics.lds(*arrays, num_resamples=25, seed=3)
    np.testing.assert_allclose(found.resampled, loop_resampled(arrays, 25, seed=3), atol=1e-12)


def test_resamples_of_few_subsets_may_be_constant():
    arrays = data(num_subsets=3, num_targets=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns of the mean of NaN alone
        expected = loop_resampled(arrays, 40, seed=0)
    assert 0 < np.isnan(expected).sum() < 40
    found = metrics.lds(*arrays, num_resamples=40)
    np.testing.assert_allclose(found.resampled, expected, atol=1e-12)
    assert found.interval == pytest.approx(np.clip(2 * found.mean - np.nanquantile(expected, [0.975, 0.025]), -1, 1))


def test_resamples_in_blocks(monkeypatch):
    arrays = data()
    whole = metrics.lds(*arrays, num_resamples=25).resampled
    monkeypatch.setattr(datamodels, "_BLOCK", 60)  # 3 resamples at once
    np.testing.assert_array_equal(metrics.lds(*arrays, num_resamples=25).resampled, whole)


def test_resamples_are_the_same_for_other_scores():
    scores, masks, outputs = data()
    one, other = metrics.lds(scores, masks, outputs), metrics.lds(scores[:, :2], masks, outputs[:, :2])
    alone = metrics.lds(scores[:, 2:], masks, outputs[:, 2:])
    np.testing.assert_allclose(one.resampled, (2 * other.resampled + 3 * alone.resampled) / 5, atol=1e-12)


def test_the_interval_takes_quantiles_of_deviations_off_the_mean():
    found = metrics.lds(*data(), confidence=0.8)
    assert found.resampled.shape == (1000,)
    deviations = np.sort(found.resampled - found.mean)
    assert found.interval == pytest.approx((found.mean - deviations[899], found.mean - deviations[100]), abs=2e-3)


def test_intervals_stay_within_what_correlations_can_be():
    scores, masks, outputs = data()
    found = metrics.lds(scores, masks, masks @ scores + 0.1 * outputs, confidence=0.999)
    assert found.mean < found.interval[1] == 1


def test_the_interval_of_a_high_score_holds_the_value_of_many_subsets():
    generator = np.random.default_rng(0)
    effects = generator.normal(size=(60, 10))
    scores = effects + 0.2 * generator.normal(size=effects.shape)

    def subsets(number):
        masks = np.argsort(generator.random((number, 60)), axis=1) < 30
        return masks, masks @ effects + 0.5 * generator.normal(size=(number, 10))

    true = metrics.lds(scores, *subsets(10_000), num_resamples=0).mean
    found = [metrics.lds(scores, *subsets(40), num_resamples=200) for _ in range(40)]
    assert sum(one.interval[0] <= true <= one.interval[1] for one in found) >= 36
    assert np.mean([one.interval[1] - one.interval[0] for one in found]) < 0.04


def test_the_interval_of_a_difference():
    scores, masks, outputs = data(num_subsets=60)
    noisy = scores + np.random.default_rng(1).normal(size=scores.shape)
    one, other = metrics.lds(scores, masks, outputs), metrics.lds(noisy, masks, outputs)
    low, high = one.difference(other, confidence=0.9)
    deviations = one.resampled - other.resampled - (one.mean - other.mean)
    expected = one.mean - other.mean - np.quantile(deviations, [0.95, 0.05])
    assert (low, high) == pytest.approx(tuple(expected))
    assert other.difference(one, confidence=0.9) == pytest.approx((-high, -low))


def test_a_difference_needs_resamples():
    one, other, none = (metrics.lds(*data(), num_resamples=number) for number in (20, 30, 0))
    for first, second in ((one, other), (none, none)):
        with pytest.raises(tracer.InputError, match="needs equally many resamples of both, of the same seed; got"):
            first.difference(second)


def test_the_seed_decides_the_interval_and_the_global_generator_is_left_alone():
    state = np.random.get_state()[1].copy()
    one, again, other = (metrics.lds(*data(), seed=seed).interval for seed in (1, 1, 2))
    assert one == again != other
    np.testing.assert_array_equal(np.random.get_state()[1], state)


def test_without_resamples_the_interval_is_nan():
    found = metrics.lds(*data(), num_resamples=0)
    assert np.isnan(found.interval).all() and len(found.resampled) == 0


def test_tensors_lists_and_numbers_for_masks():
    arrays = data(whole=True)
    expected = metrics.lds(*arrays).per_target
    scores, masks, outputs = arrays
    for same in (
        (torch.tensor(scores, requires_grad=True), torch.tensor(masks), torch.tensor(outputs)),
        (torch.tensor(scores, dtype=torch.bfloat16), torch.tensor(masks, dtype=torch.float16), torch.tensor(outputs)),
        (scores.tolist(), masks.astype(int).tolist(), outputs.tolist()),
    ):
        np.testing.assert_array_equal(metrics.lds(*same).per_target, expected)


def test_arrays_are_left_as_they_were():
    arrays = data()
    copies = [array.copy() for array in arrays]
    metrics.lds(*arrays)
    for array, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": np.ones((12, 5))}, r"scores \[N, M\] and masks \[S, N\] must agree in N, got 12 and 13"),
        ({"scores": np.ones((13, 4))}, r"scores \[N, M\] and outputs \[S, M\] must agree in M, got 4 and 5"),
        ({"outputs": np.ones((16, 5))}, r"masks \[S, N\] and outputs \[S, M\] must agree in S, got 17 and 16"),
        ({"masks": np.full((17, 13), 2)}, r"masks \[S, N\] must be True/False or 0/1, got 2 at \[0, 0\]"),
        ({"masks": np.full((17, 13), np.nan)}, "must be True/False or 0/1, got nan"),
        ({"scores": np.full((13, 5), np.inf)}, r"scores \[N, M\] has 65 NaN or infinite values of 65"),
        ({"outputs": np.full((17, 5), np.nan)}, r"outputs \[S, M\] has 85 NaN or infinite values"),
        ({"scores": np.full((13, 5), 1e308)}, "so large that sums of them overflow float64"),
        ({"masks": np.ones((1, 13)), "outputs": np.ones((1, 5))}, "at least 2 subsets"),
        ({"confidence": 1.0}, "confidence must be between 0 and 1, got 1.0"),
        ({"num_resamples": -1}, "num_resamples is -1; expected 0 or more"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
    ],
)
def test_errors_say_what_is_wrong(change, message):
    arguments = dict(zip(("scores", "masks", "outputs"), data(), strict=True)) | change
    with np.errstate(over="ignore"), pytest.raises(tracer.InputError, match=message):
        metrics.lds(**arguments)
