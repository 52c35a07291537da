"""Answers of `Attribution`: each follows the attribution's estimator, and a report says which estimator it shows."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest

from tracer import attribute
from tracer.errors import InputError


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
    weights = np.mean([table.column("loss_hess") for table in tables], axis=0, dtype=np.float64)
    total, loss_grad = np.zeros(len(weights)), np.mean([table.column("loss_grad") for table in tables], axis=0)
    for table in tables:
        raw = np.concatenate([part for _, part in table.raw_features(0, len(weights))]).astype(np.float64)
        features = raw * table.column("scale")[:, None]
        kernel = features.T @ (features * weights[:, None] if weighted else features)
        inverse = np.linalg.inv(kernel + regularization * np.eye(len(kernel)))
        for index, feature in enumerate(features):
            total[index] += feature @ inverse @ feature / len(tables)
    return total * loss_grad**2


@pytest.mark.parametrize(("estimator", "weighted"), [("influence", True), ("trak", False)])
def test_self_influence_is_that_of_the_estimator_and_its_regularization(attributed, estimator, weighted):
    found = attributed(estimator=estimator, regularization=0.3)
    np.testing.assert_allclose(found.self_influence(), newton_self_influence(found, 0.3, weighted), rtol=1e-3)


def test_a_gradient_s_cosine_with_itself_is_refused_as_self_influence(attributed):
    with pytest.raises(InputError, match="cosine with itself is 1"):
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
    assert ("Newton step on its loss" in text) == (own in ("influence", "trak"))
    lines = (tmp_path / "report" / "influence_summary.csv").read_text().splitlines()
    values = {int(line.split(",")[1]): float(line.split(",")[2]) for line in lines[1:]}
    expected = found.tracer.self_influence(None, own)
    np.testing.assert_allclose([values[index] for index in range(len(values))], expected, rtol=1e-6)
