"""Whitened gradients: scores of slow loops in float64, and curvatures that are stored, shared and resumed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from adam_cases import MODELS
from torch import nn
from whitening_cases import DAMPING, damped_products, drawn_label, whitened_products

import tracer
from tracer import Tracer, attribute
from tracer.api import curvature as curvature_module
from tracer.api import shared_sums
from tracer.data.datasets import exact_batches
from tracer.errors import CallOrderError, InputError, InputTypeError, MismatchError, NonFiniteError
from tracer.store import Store


class Net(nn.Module):
    """Layers of vectors, whose gradients are single outer products, so that a slow loop over examples is short."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def case(count=60, seed=0):
    torch.manual_seed(seed)
    model = Net().double()
    data = [(torch.randn(n, 4).double(), torch.randint(0, 3, (n,))) for n in (count, 5)]
    states = [{name: value + 0.1 * torch.randn_like(value) for name, value in model.state_dict().items()} for _ in "ab"]
    return model, *data, [(state, rate) for state, rate in zip(states, (0.3, 0.1), strict=True)]


def factors(model, x, label):
    """Return, of each layer, the left and right factor of the gradient of one example's loss."""
    first = model.first(x)
    hidden = torch.tanh(first)
    second = model.second(hidden)
    loss = nn.functional.cross_entropy(second[None], label[None])
    g1, g2 = torch.autograd.grad(loss, (first, second))
    found = {"first": (g1, torch.cat([x, torch.ones(1, dtype=x.dtype)])), "second": (g2, hidden)}
    return {name: [(left.detach(), right.detach())] for name, (left, right) in found.items()}


def oracle(model, train, targets, checkpoints, kind, rows, samples=1, other_rows=None):
    """Return Σ η ∇L(z)ᵀ (F + λ)⁻¹ ∇L(z') from loops over examples."""
    total = torch.zeros(len(train[0]), len(targets[0]), dtype=torch.float64)
    for number, (state, rate) in enumerate(checkpoints):
        model.load_state_dict(state)
        drawn, others = (
            [
                factors(model, train[0][row], drawn_label(model, train[0][row], number, row, start + sample))
                for row in chosen
                for sample in range(samples)
            ]
            for start, chosen in ((0, rows), (samples, other_rows or rows))
        )
        products = damped_products(drawn, others, kind)
        own, others = ([factors(model, *one) for one in zip(*data, strict=True)] for data in (train, targets))
        total += rate * whitened_products(own, others, products)
    return total.numpy()


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("storage", ["none", "float32"])
def test_scores_are_those_of_a_slow_loop(tmp_path, kind, storage):
    model, train, targets, checkpoints = case()
    found = attribute(
        model,
        "image_classification",
        train,
        targets,
        checkpoints,
        save_dir=tmp_path,
        batch_size=7,
        projector="none",
        storage=storage,
        preconditioner=kind,
        damping=DAMPING,
    )
    expected = oracle(model, train, targets, checkpoints, kind, range(60))
    np.testing.assert_allclose(found.scores, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())
    squares = found.self_influence()
    selves = oracle(model, train, train, checkpoints, kind, range(60)).diagonal()
    np.testing.assert_allclose(squares, selves, rtol=1e-4)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_fewer_examples_and_more_samples(tmp_path, kind):
    model, train, targets, checkpoints = case()
    options = {"curvature_examples": 20, "curvature_samples": 3, "damping": DAMPING}
    found = attribute(
        model,
        "image_classification",
        train,
        targets,
        checkpoints,
        save_dir=tmp_path,
        projector="none",
        **options,
        preconditioner=kind,
    )
    rows = range(0, 60, 3)
    expected = oracle(model, train, targets, checkpoints, kind, rows, 3, other_rows=range(1, 60, 3))
    np.testing.assert_allclose(found.scores, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


def test_whitening_a_linear_regression_gives_its_influence_function(tmp_path):
    """With one output the curvature of squared errors is 2 xxᵀ exactly, and its Kronecker factors are too."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 4, dtype=torch.float64, generator=generator)
    y = x @ torch.tensor([1.0, -1.0, 0.5, 2.0]).double() + torch.randn(50, dtype=torch.float64, generator=generator)
    model = nn.Linear(4, 1, bias=False).double()
    found = attribute(
        model,
        "regression",
        (x, y),
        (x[:5], y[:5]),
        [model.state_dict()],
        save_dir=tmp_path,
        projector="none",
        preconditioner="ekfac",
        damping=1e-10,
        curvature_samples=400,
    )
    residual = (model(x)[:, 0] - y).detach()
    gradient = 2 * residual[:, None] * x
    expected = (gradient @ torch.linalg.solve(2 * x.T @ x / 50, gradient[:5].T)).numpy()
    scale = (found.scores * expected).sum() / np.square(expected).sum()
    assert scale == pytest.approx(1, abs=0.05)  # 20,000 draws
    np.testing.assert_allclose(found.scores, scale * expected, rtol=0.1, atol=0.02 * np.abs(expected).max())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_odd_models_are_whitened_by_one_linear_map_in_any_batches(tmp_path, name, kind):
    model, train, targets, loss = MODELS[name]()
    model = model.double()
    train, targets = (tuple(e.double() if e.is_floating_point() else e for e in d) for d in (train, targets))
    options = {"projector": "none", "preconditioner": kind, "storage": "float32"}
    checkpoints = [model.state_dict()]
    one, other = (
        attribute(model, loss, train, targets, checkpoints, save_dir=tmp_path / str(size), batch_size=size, **options)
        for size in (9, 2)
    )
    np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4, atol=1e-5 * np.abs(one.scores).max())
    exact = attribute(
        model, loss, train, targets, checkpoints, save_dir=tmp_path / "exact", projector="none", preconditioner=kind
    )
    np.testing.assert_allclose(exact.scores, one.scores, rtol=1e-4, atol=1e-5 * np.abs(one.scores).max())
    plain = attribute(model, loss, train, targets, checkpoints, save_dir=tmp_path / "plain", projector="none")
    assert np.abs(np.corrcoef(plain.scores.ravel(), one.scores.ravel())[0, 1]) < 0.999


OPTIONS = {"preconditioner": "kfac", "proj_dim": 32}


def tracing(directory, model, **options):
    return Tracer(model, "image_classification", 60, directory, **{**OPTIONS, **options})


def test_featurizing_without_a_curvature_says_what_to_call(tmp_path):
    model, train, _, checkpoints = case()
    tracer_ = tracing(tmp_path, model)
    with pytest.raises(CallOrderError, match="load_checkpoint"):
        tracer_.fit_curvature(train)
    tracer_.load_checkpoint(checkpoints[0][0], 0)
    with pytest.raises(CallOrderError, match="call tracer.fit_curvature"):
        tracer_.featurize(train, num_samples=60)
    tracer_.fit_curvature(train)
    tracer_.featurize(train, num_samples=60)
    tracer_.finalize_features()


def test_fit_curvature_needs_a_whitening_preconditioner_and_all_examples(tmp_path):
    model, train, targets, checkpoints = case()
    plain = tracing(tmp_path / "plain", model, preconditioner=None)
    plain.load_checkpoint(checkpoints[0][0], 0)
    with pytest.raises(CallOrderError, match="preconditioner='kfac'"):
        plain.fit_curvature(train)
    other = tracing(tmp_path / "other", model)
    other.load_checkpoint(checkpoints[0][0], 0)
    with pytest.raises(InputError, match="train_set_size=60"):
        other.fit_curvature(targets)


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"damping": 0.0}, InputError),
        ({"damping": "x"}, InputTypeError),
        ({"damping": float("nan")}, InputError),
        ({"curvature_samples": 0}, InputError),
        ({"curvature_examples": 0}, InputError),
        ({"preconditioner": "kfca"}, InputError),
    ],
)
def test_bad_settings(tmp_path, option, error):
    with pytest.raises(error, match=next(iter(option))):
        tracing(tmp_path, case()[0], **option)


@pytest.mark.parametrize(("kind", "expected"), [("kfac", 0.03), ("ekfac", 0.1)])
def test_each_kind_has_a_damping_of_its_own(tmp_path, kind, expected):
    tracer_ = tracing(tmp_path, case()[0], preconditioner=kind)
    assert tracer_.store.manifest.settings["damping"] == expected


def test_another_damping_is_another_store(tmp_path):
    model, _, _, _ = case()
    tracing(tmp_path, model)
    with pytest.raises(MismatchError, match="damping"):
        tracing(tmp_path, model, damping=0.5)


def test_a_curvature_that_is_stored_is_not_computed_again(tmp_path, monkeypatch):
    model, train, targets, checkpoints = case()
    found = attribute(model, "image_classification", train, targets, checkpoints, save_dir=tmp_path, **OPTIONS)
    monkeypatch.setattr(curvature_module.CurvatureFit, "_batch", None)
    again = attribute(model, "image_classification", train, targets, checkpoints, save_dir=tmp_path, **OPTIONS)
    np.testing.assert_array_equal(again.scores, found.scores)
    assert len(list((tmp_path / "curvature" / "0").glob("*/zarr.json"))) == 1  # parts are gone


class Stop(Exception):
    pass


def interrupted_source(monkeypatch, after):
    """Make the pass stop after some batches."""
    left = [after]

    def batches(source, rows):
        for batch in exact_batches(source, rows):
            if not left[0]:
                raise Stop
            left[0] -= 1
            yield batch

    monkeypatch.setattr(shared_sums, "exact_batches", batches)


def test_an_interrupted_pass_resumes(tmp_path, monkeypatch):
    model, train, targets, checkpoints = case()
    whole = attribute(
        model, "image_classification", train, targets, checkpoints, save_dir=tmp_path / "a", batch_size=8, **OPTIONS
    )
    monkeypatch.setattr(shared_sums, "_SAVE_SECONDS", 0.0)
    with monkeypatch.context() as patch:
        interrupted_source(patch, 5)
        with pytest.raises(Stop):
            attribute(
                model,
                "image_classification",
                train,
                targets,
                checkpoints,
                save_dir=tmp_path / "b",
                batch_size=8,
                **OPTIONS,
            )
    seen = []
    batch = curvature_module.CurvatureFit._batch

    def counted(self, kind, preconditioner, part, inds):
        seen.append((self._model_id, len(inds)))
        return batch(self, kind, preconditioner, part, inds)

    monkeypatch.setattr(curvature_module.CurvatureFit, "_batch", counted)
    found = attribute(
        model, "image_classification", train, targets, checkpoints, save_dir=tmp_path / "b", batch_size=8, **OPTIONS
    )
    assert sum(count for number, count in seen if number == 0) == 60 - 5 * 8
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-3, atol=1e-5 * np.abs(whole.scores).max())


def test_a_pass_over_rows_in_another_order_resumes(tmp_path, monkeypatch):
    model, train, targets, checkpoints = case()
    given = {"batch_size": 8, **OPTIONS}
    whole = attribute(model, "image_classification", train, targets, checkpoints, save_dir=tmp_path / "a", **given)
    left = [5]

    def swapped(source, rows):
        batches = list(exact_batches(source, rows))
        for place in range(len(batches)):
            if not left[0]:
                raise Stop
            left[0] -= 1
            yield batches[min(place ^ 1, len(batches) - 1)]

    monkeypatch.setattr(shared_sums, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(shared_sums, "exact_batches", swapped)
    with pytest.raises(Stop):
        attribute(model, "image_classification", train, targets, checkpoints, save_dir=tmp_path / "b", **given)
    left[0] = -1
    found = attribute(model, "image_classification", train, targets, checkpoints, save_dir=tmp_path / "b", **given)
    np.testing.assert_allclose(found.scores, whole.scores, rtol=1e-3, atol=1e-5 * np.abs(whole.scores).max())


def test_processes_share_the_pass_and_get_one_curvature(tmp_path):
    model, train, _, checkpoints = case()
    alone = tracing(tmp_path / "alone", model)
    alone.load_checkpoint(checkpoints[0][0], 0)
    alone.fit_curvature(train)
    both = [tracing(tmp_path / "both", model, process=(rank, 2)) for rank in range(2)]
    for each in both:
        each.load_checkpoint(checkpoints[0][0], 0)
        each.fit_curvature(train)
    for each in (alone, *both):
        each.featurize(tuple(column[:30] for column in train), inds=range(30))
        each.close()
    one, other = (Store.open_existing(tmp_path / name).checkpoint(0) for name in ("alone", "both"))
    first, second = (next(iter(table.raw_features(0, 30)))[1].astype(np.float64) for table in (one, other))
    np.testing.assert_allclose(first, second, rtol=0, atol=2e-3)


def test_a_part_that_another_process_began_is_finished(tmp_path, monkeypatch):
    model, train, _, checkpoints = case()
    monkeypatch.setattr(shared_sums, "_SAVE_SECONDS", 0.0)
    first, second = (tracing(tmp_path, model, process=(rank, 2)) for rank in range(2))
    for each in (first, second):
        each.load_checkpoint(checkpoints[0][0], 0)
    with monkeypatch.context() as patch:
        interrupted_source(patch, 2)
        with pytest.raises(Stop):
            first.fit_curvature(train, batch_size=10)
    second.fit_curvature(train, batch_size=10)
    first.fit_curvature(train)  # finds it
    for each in (first, second):
        each.featurize(train, num_samples=60)


def test_a_damaged_curvature_is_found_and_its_rows_are_computed_again(tmp_path):
    model, train, targets, checkpoints = case()
    found = attribute(model, "image_classification", train, targets, checkpoints, save_dir=tmp_path, **OPTIONS)
    known = found.scores.copy()
    (path,) = (tmp_path / "curvature" / "1").glob("*/values/c/0/0")
    values = bytearray(path.read_bytes())
    values[40] ^= 64
    path.write_bytes(bytes(values))
    checked = tracer.verify(tmp_path)
    assert not checked.ok and "curvature" in str(checked)
    again = attribute(model, "image_classification", train, targets, checkpoints, save_dir=tmp_path, **OPTIONS)
    np.testing.assert_allclose(again.scores, known, rtol=1e-2, atol=1e-3 * np.abs(known).max())
    assert tracer.verify(tmp_path).ok


def test_rows_of_a_lost_curvature_do_not_stay(tmp_path):
    model, train, targets, checkpoints = case()
    attribute(model, "image_classification", train, targets, checkpoints[:1], save_dir=tmp_path, **OPTIONS)
    for path in (tmp_path / "curvature" / "0").glob("*/zarr.json"):
        path.unlink()
    again = tracing(tmp_path, model)
    again.load_checkpoint(checkpoints[0][0], 0)
    assert len(again.remaining(0)) == 0
    again.fit_curvature(train)
    assert len(again.remaining(0)) == 60 and len(again.remaining(0, "targets")) == 5


def test_gradients_that_are_not_finite_are_refused(tmp_path):
    model, train, targets, checkpoints = case()
    train[0][13, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="curvature"):
        attribute(
            model, "image_classification", train, targets, checkpoints, save_dir=tmp_path, batch_size=10, **OPTIONS
        )


def test_a_task_without_drawn_labels_takes_the_given_ones_and_says_so(tmp_path, caplog):
    model, train, targets, checkpoints = case()

    def loss(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    found = attribute(
        model,
        loss,
        train,
        targets,
        checkpoints[:1],
        save_dir=tmp_path,
        projector="none",
        preconditioner="kfac",
        damping=DAMPING,
    )
    assert "given labels" in caplog.text
    model.load_state_dict(checkpoints[0][0])
    own = [factors(model, *one) for one in zip(*train, strict=True)]
    products, others = damped_products(own, own, "kfac"), [factors(model, *one) for one in zip(*targets, strict=True)]
    expected = 0.3 * whitened_products(own, others, products)
    np.testing.assert_allclose(found.scores, expected.numpy(), rtol=2e-4, atol=2e-5 * float(expected.abs().max()))


def test_a_query_is_whitened_too(tmp_path):
    model, train, targets, checkpoints = case()
    found = attribute(model, "image_classification", train, targets, checkpoints, save_dir=tmp_path, **OPTIONS)
    top, answer = found.by("scores").top(3), found.tracer.query(targets, 3)
    np.testing.assert_array_equal(answer.indices, top.indices)
    np.testing.assert_allclose(answer.scores, top.scores, rtol=1e-3, atol=1e-6)
