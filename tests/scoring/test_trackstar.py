"""TrackStar: made-up features against its formula in plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scoring_cases import RATES, scorer
from store_cases import stored_features
from torch.nn.functional import cross_entropy

from tracer import Tracer, attribute
from tracer.errors import InputError
from tracer.scoring.estimators import Estimate
from tracer.scoring.feature_tables import InMemoryTable
from tracer.scoring.scorer import Scorer
from tracer.scoring.trackstar import mixing_share

SHAPES = [(60, 5, 12), (12, 5, 60), (33, 1, 33), (20, 30, 40), (40, 90, 8), (1, 2, 3)]
TRACKSTAR = Estimate("trackstar")


def gradients(table) -> np.ndarray:
    """Features of each example's loss gradient, in float64."""
    features = stored_features(table, 0, table.num_rows).astype(np.float64)
    return features * table.column("loss_grad").astype(np.float64)[:, None]


def of_trackstar(train, targets, damping=0.1, mixing=None):
    """Cosines after whitening, from the symmetric square root of the mixed second moments."""
    r_train, r_eval = (side.T @ side / len(side) for side in (train, targets))
    curves = [np.linalg.eigvalsh(each)[::-1] for each in (r_train, r_eval)]
    place = max(1, round(1000 / 65536 * min(np.linalg.matrix_rank(each) for each in (r_train, r_eval)))) - 1
    if mixing is None:
        mixing = curves[0][place] / (curves[0][place] + curves[1][place])
    r = mixing * r_eval + (1 - mixing) * r_train
    dim = min(r.shape[0], len(train) + (len(targets) if mixing else 0))  # of the space that examples span
    r += damping * np.trace(r) / dim * np.eye(len(r))
    values, vectors = np.linalg.eigh(r)
    whitened = [side @ vectors / np.sqrt(values) @ vectors.T for side in (train, targets)]
    unit = [side / np.linalg.norm(side, axis=1, keepdims=True) for side in whitened]
    return unit[0] @ unit[1].T


def reference(found: Scorer, damping=0.1):
    sides = [(found.store.checkpoint(each), found.store.targets("test", each)) for each in range(len(RATES))]
    return np.mean([of_trackstar(gradients(train), gradients(targets), damping) for train, targets in sides], axis=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_cosines_of_whitened_gradients_averaged_over_checkpoints(tmp_path, shape):
    found = scorer(tmp_path, *shape)
    expected = reference(found)
    np.testing.assert_allclose(found.scores("test", TRACKSTAR, None), expected, atol=2e-6)
    indices, scores = found.top("test", 1, "proponents", TRACKSTAR, None)
    np.testing.assert_array_equal(indices[:, 0], expected.argmax(0))
    np.testing.assert_allclose(scores[:, 0], expected.max(0), atol=2e-6)


def test_a_given_damping_is_in_units_of_the_mean_eigenvalue(tmp_path):
    found = scorer(tmp_path, 60, 5, 12)
    scores = found.scores("test", Estimate("trackstar", regularization=0.5), None)
    np.testing.assert_allclose(scores, reference(found, 0.5), atol=2e-6)


@pytest.mark.parametrize("magnitude", [1e-12, 1e12])
def test_scores_do_not_depend_on_the_size_of_gradients(tmp_path, magnitude):
    found = scorer(tmp_path, 60, 5, 12, "int8", magnitude)
    np.testing.assert_allclose(found.scores("test", TRACKSTAR, None), reference(found), atol=1e-5)


def test_a_group_has_the_sum_of_its_targets_scores(tmp_path):
    found = scorer(tmp_path, 60, 5, 12)
    alone, groups = np.array(found.scores("test", TRACKSTAR, None)), np.array([0, 1, -1, 1, 0])
    together = found.scores("test", Estimate("trackstar", groups=groups), None)
    np.testing.assert_allclose(together, np.stack([alone[:, groups == each].sum(1) for each in (0, 1)], 1), atol=2e-6)


COLUMNS = ("loss", "loss_grad", "loss_hess", "gradient_norm", "output_change", "label", "fingerprint")


def replace(found: Scorer, exp_name: str | None, row: int, change) -> Scorer:
    """Replace a row at each checkpoint by what ``change`` makes of its features and loss_grad; return a new scorer."""

    def tables():
        return [
            found.store.checkpoint(each) if exp_name is None else found.store.targets(exp_name, each)
            for each in range(len(RATES))
        ]

    kept = [
        (stored_features(each, row, row + 1), {name: each.column(name, row, row + 1) for name in COLUMNS})
        for each in tables()
    ]
    found.store.replace_rows(np.array([row]), exp_name)
    for table, (features, columns) in zip(tables(), kept, strict=True):
        features, loss_grad = change(features, columns["loss_grad"])
        with table:
            table.write(np.array([row]), features, **{**columns, "loss_grad": loss_grad})
            table.set_attributes(finalized=True)
    return Scorer(found.store, torch.device("cpu"), False)


def test_a_training_example_without_a_gradient_has_scores_of_zero(tmp_path):
    found = replace(scorer(tmp_path, 60, 5, 12), None, 7, lambda features, loss_grad: (features, 0 * loss_grad))
    scores = np.array(found.scores("test", TRACKSTAR, None))
    assert not scores[7].any() and np.isfinite(scores).all()


def questions(found: Scorer, rows: slice):
    tables = []
    for model_id in range(len(RATES)):
        table = found.store.targets("test", model_id)
        columns = (table.column(name)[rows] for name in ("loss_grad", "gradient_norm"))
        tables.append(InMemoryTable(stored_features(table, 0, table.num_rows)[rows], *columns, "float32"))
    return tables


def test_a_question_has_the_same_answer_whatever_else_is_asked_with_it(tmp_path):
    found = scorer(tmp_path, 60, 5, 12)
    sides = [(found.store.checkpoint(each), found.store.targets("test", each)) for each in range(len(RATES))]
    expected = np.mean([of_trackstar(gradients(train), gradients(test), mixing=0) for train, test in sides], axis=0)
    together = found.query_scores(questions(found, slice(0, 5)), [0, 1], TRACKSTAR)
    np.testing.assert_allclose(together, expected, atol=2e-6)
    alone = found.query_scores(questions(found, slice(3, 4)), [0, 1], TRACKSTAR)
    np.testing.assert_allclose(alone[:, 0], together[:, 3], atol=1e-6)


@pytest.mark.parametrize("memory_bytes", [1 << 16, 1 << 30])
def test_scores_do_not_depend_on_the_memory(tmp_path, memory_bytes):
    found = scorer(tmp_path, 200, 30, 12, memory_bytes=memory_bytes)
    np.testing.assert_allclose(found.scores("test", TRACKSTAR, None), reference(found), atol=2e-6)


def test_scores_are_computed_again_if_a_target_is_replaced(tmp_path):
    found = scorer(tmp_path, 60, 5, 12)
    before = np.array(found.scores("test", TRACKSTAR, None))
    found = replace(found, "test", 0, lambda features, loss_grad: (-3 * features[:, ::-1], loss_grad))
    after = np.array(found.scores("test", TRACKSTAR, None))
    np.testing.assert_allclose(after, reference(found), atol=2e-6)
    assert np.abs(after[:, 1:] - before[:, 1:]).max() > 1e-4  # second moments are those of all targets


def test_equal_targets_do_not_take_the_place_of_the_training_examples():
    train, one = torch.linspace(0.1, 1, 200).double(), torch.zeros(200).double()
    one[-1] = 4.0
    assert mixing_share(train, one) == pytest.approx(1.0 / 5.0)
    assert mixing_share(train, 0 * one) == 0.0


def test_cosines_of_examples_with_themselves_are_refused(tmp_path):
    scorer(tmp_path, 6, 2, 3)
    with Tracer.open(tmp_path) as reader, pytest.raises(InputError, match="'trackstar' gives cosines"):
        reader.self_influence(estimator="trackstar")
    with Tracer.open(tmp_path) as reader, pytest.raises(InputError, match="has no kernel to regularize"):
        reader.regularization("trackstar")


def test_attribute_takes_it_and_an_exact_store_has_the_scores_of_autograd(tmp_path):
    model, loss = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)), cross_entropy
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(n, 4, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in (40, 6)]
    sides = []
    for inputs, labels in data:
        rows = []
        for x, y in zip(inputs, labels, strict=True):
            found = torch.autograd.grad(loss(model(x[None]), y[None]), list(model.parameters()))
            rows.append(torch.cat([each.flatten() for each in found]).double())
        sides.append(torch.stack(rows).numpy())
    options = {"save_dir": tmp_path, "estimator": "trackstar", "projector": "none"}
    found = attribute(model, "image_classification", *data, [model.state_dict()], **options)
    np.testing.assert_allclose(found.scores, of_trackstar(*sides), atol=2e-4)
    assert found.by("self_influence").self_influence().shape == (40,)
