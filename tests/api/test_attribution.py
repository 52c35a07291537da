"""Answers of `Attribution`: each follows the attribution's estimator, and a report says which estimator it shows."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest
import torch
from torch import nn

from tracer import Attribution, attribute
from tracer.cli.demo_digits.digits import read_digits
from tracer.errors import InputError
from tracer.store.hidden_rows import load_hidden


@pytest.fixture
def attributed(run, tmp_path):
    def with_options(**options):
        return attribute(
            run.model, "image_classification", run.train, run.targets, run.checkpoints, save_dir=tmp_path / "store",
            proj_dim=64, **options,
        )  # fmt: skip

    return with_options


def newton_self_influence(found, regularization, weighted):
    """Loop over examples: the squared mean derivative times the mean of φᵀ (K + λI)⁻¹ φ over checkpoints."""
    store = found.tracer.store
    tables = [store.checkpoint(model_id) for model_id in store.catalog.checkpoint_ids()]
    total, loss_grad = (
        np.zeros(store.manifest.train_set_size),
        np.mean([table.column("loss_grad") for table in tables], axis=0),
    )
    grad = np.mean([np.abs(table.column("loss_grad").astype(np.float64)) for table in tables], axis=0)
    given = np.mean([table.column("loss_hess") * np.abs(table.column("loss_grad")) for table in tables], axis=0)
    for number, table in enumerate(tables):
        raw = np.concatenate([part for _, part in table.raw_features(0, len(total))]).astype(np.float64)
        features = raw * table.column("scale")[:, None]
        kernel = features.T @ features
        if weighted:  # the curvature of f, and that of other labels
            hidden = load_hidden(store, number)
            kernel = features.T @ (features * given[:, None])
            kernel = kernel + hidden.features.T @ (hidden.features * grad[hidden.examples, None])
        inverse = np.linalg.inv(kernel + regularization * np.eye(len(kernel)))
        for index, feature in enumerate(features):
            total[index] += feature @ inverse @ feature / len(tables)
    return total * loss_grad**2


@pytest.mark.parametrize(("estimator", "weighted"), [("influence", True), ("trak", False)])
def test_self_influence_is_that_of_the_estimator_and_its_regularization(attributed, estimator, weighted):
    found = attributed(estimator=estimator, regularization=0.3)
    np.testing.assert_allclose(found.self_influence(), newton_self_influence(found, 0.3, weighted), rtol=1e-3)


def test_a_gradient_s_cosine_with_itself_is_refused_as_self_influence(attributed):
    with pytest.raises(InputError, match="that of a gradient with itself is 1"):
        attributed(estimator="cosine").self_influence()


@pytest.mark.parametrize(
    ("estimator", "own"), [("tracin", "tracin"), ("influence", "influence"), ("trak", "trak"), ("cosine", "tracin")]
)
def test_a_report_shows_self_influence_of_its_estimator_or_says_of_which(attributed, tmp_path, estimator, own):
    found = attributed(estimator=estimator)
    page = found.report(tmp_path / "report", figures=False)
    text = " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page.read_text())).split())
    assert f"self-influence {own}" in text
    assert ("here that of tracin since" in text) == (estimator == "cosine")
    assert ("by the estimator" in text) == (own != "tracin")
    lines = (tmp_path / "report" / "influence_summary.csv").read_text().splitlines()
    values = {int(line.split(",")[1]): float(line.split(",")[2]) for line in lines[1:]}
    expected = found.tracer.self_influence(None, own)
    np.testing.assert_allclose([values[index] for index in range(len(values))], expected, rtol=1e-6)


def test_a_report_does_not_compute_the_estimate_and_warnings_that_it_was_given(attributed, tmp_path, monkeypatch):
    found = attributed(estimator="tracin")
    for name in ("label_health", "warnings"):
        monkeypatch.delattr(Attribution, name)
    given = {"health": "Asked somewhere else.", "warnings": ["Sand in it."]}
    page = found.report(tmp_path / "report", figures=False, **given).read_text()
    assert "Asked somewhere else." in page
    assert "Sand in it." in page


def trained_on_digits(tmp_path, labels, size=700, epochs=15, **options):
    """Attribute held-out digits of a small network that was trained on some labels."""
    pixels, digits = read_digits()
    order = np.random.default_rng(0).permutation(len(digits))[: size + 200]
    x = torch.as_tensor(pixels[order] / 16, dtype=torch.float32).flatten(1)
    y = torch.as_tensor(digits[order])
    given = labels(y[:size])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer, checkpoints = torch.optim.SGD(model.parameters(), lr=0.1), []
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(size).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), given[rows]).backward()
            optimizer.step()
        if epoch in (3, 6, epochs):
            checkpoints.append(({name: value.clone() for name, value in model.state_dict().items()}, 0.1))
    checkpoints = checkpoints or [(model.state_dict(), 0.1)]
    found = attribute(
        model, "image_classification", (x[:size], given), (x[size:], y[size:]), checkpoints,
        save_dir=tmp_path / "store", proj_dim=256, **options,
    )  # fmt: skip
    return found, y[:size].numpy(), given.numpy()


def flipped(rate):
    def flip(labels):
        generator = torch.Generator().manual_seed(1)
        wrong = torch.randperm(len(labels), generator=generator)[: round(rate * len(labels))]
        shifts = torch.zeros_like(labels)
        shifts[wrong] = torch.randint(1, 10, (len(wrong),), generator=generator)
        return (labels + shifts) % 10

    return flip


@pytest.mark.parametrize("rate", [0.0, 0.15])
def test_label_health_holds_the_share_of_flips_and_suggests_the_right_label(tmp_path, rate):
    found, right, given = trained_on_digits(tmp_path, flipped(rate))
    health = found.label_health()
    assert health.low <= rate <= health.high
    assert abs(health.share - rate) < 0.03
    assert found.warnings() == []
    if rate:
        wrong = given != right
        assert wrong[health.suspects].mean() > 0.6
        assert (health.suggested == right)[health.suspects & wrong].mean() > 0.9


@pytest.mark.parametrize(
    ("labels", "epochs", "warning"),
    [
        (lambda labels: labels, 0, "has not fitted the labels"),
        (lambda labels: torch.randint(0, 10, labels.shape), 15, "no better than chance on targets"),
    ],
    ids=["untrained", "random labels"],
)
def test_a_useless_model_is_said_and_gives_no_estimate(tmp_path, caplog, labels, epochs, warning):
    found, _, _ = trained_on_digits(tmp_path, labels, epochs=epochs)
    assert warning in " ".join(found.warnings())
    assert warning in caplog.text
    assert "do not tell classes apart" in found.label_health()
    page = found.report(tmp_path / "report", figures=False).read_text()
    assert page.index(warning) < page.index("Label health")
    assert "likely wrong" not in page


def test_targets_that_are_training_examples_are_no_evidence(run, tmp_path):
    found = attribute(
        run.model, "image_classification", run.train, run.train, run.checkpoints, save_dir=tmp_path / "store",
        proj_dim=64,
    )  # fmt: skip
    assert "20 targets or more that are no training examples, and there are 0" in found.label_health()


def test_losses_that_do_not_change_are_said(run, tmp_path):
    weights = {name: value.clone() for name, value in run.model.state_dict().items()}
    again = {name: value + (1e-7 if value.is_floating_point() else 0) for name, value in weights.items()}
    found = attribute(
        run.model, "image_classification", run.train, run.targets, [(weights, 0.1), (again, 0.1)],
        save_dir=tmp_path / "store", proj_dim=64,
    )  # fmt: skip
    assert "at all 2 checkpoints: training has changed nothing" in found.warnings()[0]


def test_losses_of_examples_that_change_while_their_mean_does_not_are_no_warning(tmp_path):
    model = torch.nn.Linear(3, 2)
    x, y = torch.randn(40, 3), torch.arange(40) % 2
    pairs = [({"weight": torch.zeros(2, 3), "bias": torch.tensor(bias)}, 0.1) for bias in ([2.0, 0.0], [0.0, 2.0])]
    options = {"save_dir": tmp_path / "store", "proj_dim": 8}
    found = attribute(model, "image_classification", (x, y), (x[:2], y[:2]), pairs, **options)
    assert not [each for each in found.warnings() if "changed nothing" in each]


def test_the_change_without_an_example_is_that_of_its_newton_step(attributed):
    found = attributed(estimator="influence")
    store, value = found.tracer.store, found.tracer.regularization().value
    tables = [store.checkpoint(model_id) for model_id in store.catalog.checkpoint_ids()]
    weights = np.mean([table.column("loss_hess") for table in tables], axis=0, dtype=np.float64)
    for table, change in zip(tables, found.tracer.changes_without(), strict=True):
        raw = np.concatenate([part for _, part in table.raw_features(0, len(weights))]).astype(np.float64)
        features = raw * table.column("scale")[:, None]
        kernel = features.T @ (features * weights[:, None]) + value * np.eye(features.shape[1])
        for index in (0, 7, len(weights) - 1):
            phi = features[index]
            without = kernel - weights[index] * np.outer(phi, phi)
            step = phi @ np.linalg.solve(without, phi) * table.column("loss_grad")[index]
            np.testing.assert_allclose(change[index], step, rtol=2e-3)


def test_labels_that_were_learned_by_heart_give_no_estimate(tmp_path):
    def noisy(labels):
        return torch.where(torch.rand(labels.shape) < 0.15, torch.randint(0, 10, labels.shape), labels)

    found, _, _ = trained_on_digits(tmp_path, noisy, size=150, epochs=300)
    last = Attribution(found.tracer, "targets", model_ids=[2])
    assert "learned training labels by heart" in last.label_health()
