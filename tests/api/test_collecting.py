"""Gradients that are collected in training, against a loop over rows in float64."""

from __future__ import annotations

import copy
import logging
import weakref

import numpy as np
import pytest
import torch
from collecting_cases import (
    EXACT,
    N,
    X,
    Y,
    batches,
    collected,
    features,
    flat,
    looped,
    mean_loss,
    mlp,
    row_part,
    sgd,
    train,
)
from torch import nn

from tracer import GradientCollector, Tracer, attribute, collected_checkpoints, verify
from tracer.errors import CallOrderError, GradientError, InputError, InputTypeError, MismatchError
from tracer.store import Store


def close(found, expected):
    torch.testing.assert_close(found.sum(0), expected, rtol=1e-5, atol=1e-6)


def test_sums_over_steps_are_those_of_a_loop_over_rows(tmp_path):
    def schedule(number):
        return 0.2 / (1 + number)

    model, steps = mlp(), batches(14)
    collector = collected(tmp_path, model, sgd(model), steps, schedule=schedule)
    other = mlp()
    found = features(collector)
    assert len(found) == 3
    close(found, looped(other, sgd(other), steps, row_part, schedule))


def test_training_is_bit_for_bit_what_it_is_without_the_collector(tmp_path):
    model, other, steps = mlp(0.3), mlp(0.3), batches(9)
    torch.manual_seed(5)
    collected(tmp_path, model, sgd(model), steps)
    torch.manual_seed(5)
    optimizer = sgd(other)
    for rows in steps:
        optimizer.zero_grad()
        mean_loss(other, rows).backward()
        optimizer.step()
    assert torch.equal(flat(model), flat(other))


def test_momentum_counts_as_in_the_recorder(tmp_path):
    model, other, steps = mlp(), mlp(), batches(6)
    collector = collected(tmp_path, model, sgd(model, momentum=0.5), steps)
    close(features(collector), 2 * looped(other, sgd(other, momentum=0.5), steps, row_part))


def test_parameter_groups_have_rates_of_their_own(tmp_path):
    def grouped(model):
        return torch.optim.SGD([{"params": model[0].parameters(), "lr": 0.01}, {"params": model[3].parameters()}], 0.2)

    model, other, steps = mlp(), mlp(), batches(7)
    collector = collected(tmp_path, model, grouped(model), steps)
    close(features(collector), looped(other, grouped(other), steps, row_part))
    assert [rate for _, rate in collector.checkpoints] == pytest.approx([0.2 * 6, 0.2])


def test_clipping_counts(tmp_path):
    def clip(model):
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)

    model, other, steps = mlp(), mlp(), batches(6)
    optimizer, used = sgd(model), []
    with GradientCollector(model, optimizer, tmp_path, "classification", N, every=3, **EXACT) as collector:
        for rows in steps:
            optimizer.zero_grad()
            with collector.batch((X[rows], Y[rows]), rows):
                mean_loss(model, rows).backward()
            used.append(0.05 / (float(nn.utils.clip_grad_norm_(model.parameters(), 0.05)) + 1e-6))
            optimizer.step()
            collector.step()
    assert max(used) < 1
    scales = iter(used)
    expected = torch.zeros(N, flat(other).numel(), dtype=torch.float64)
    optimizer = sgd(other)
    for rows in steps:
        scale = next(scales)
        expected += scale * looped(other, optimizer, [rows], row_part, after=clip)
    close(features(collector), expected)


def test_gradients_accumulate_over_batches(tmp_path):
    model, other, steps = mlp(), mlp(), batches(6, size=8)
    optimizer = sgd(model)
    with GradientCollector(model, optimizer, tmp_path, "classification", N, every=3, **EXACT) as collector:
        for rows in steps:
            optimizer.zero_grad()
            for part in rows.split(3):
                with collector.batch((X[part], Y[part]), part):
                    (mean_loss(model, part) * len(part) / len(rows)).backward()
                collector.step()
            optimizer.step()
            collector.step()
    close(features(collector), looped(other, sgd(other), steps, row_part))


def test_a_loss_that_weighs_examples_gives_their_shares(tmp_path):
    weights = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)

    def loss(model, rows):
        return nn.functional.cross_entropy(model(X[rows]), Y[rows], weights)

    def part(model, row, rows):
        return weights[Y[row]] * len(rows) * row_part(model, row, rows) / weights[Y[rows]].sum()

    model, other, steps = mlp(), mlp(), batches(5)
    collector = collected(tmp_path, model, sgd(model), steps, loss)
    close(features(collector), looped(other, sgd(other), steps, part))


def test_steps_that_a_scaler_leaves_out_do_not_count(tmp_path):
    model, other, steps = mlp(), mlp(), batches(6)
    optimizer, factor = sgd(model), 1024.0
    with GradientCollector(model, optimizer, tmp_path, "classification", N, every=3, **EXACT) as collector:
        for number, rows in enumerate(steps):
            optimizer.zero_grad(set_to_none=False)
            overflows = number in (1, 2)
            with collector.batch((X[rows], Y[rows]), rows):
                (mean_loss(model, rows) * (torch.inf if overflows else factor)).backward()
            if not overflows:
                for value in model.parameters():
                    value.grad /= factor
                optimizer.step()
            collector.step()
    kept = [rows for number, rows in enumerate(steps) if number not in (1, 2)]
    close(features(collector), looped(other, sgd(other), kept, row_part))


@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam_counts_with_its_second_moments_before_each_step(tmp_path, amsgrad):
    def make(model):
        return torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=amsgrad)

    moments = {}

    def scale(optimizer, value):
        """Of before the step; of the first step after it."""
        entry = optimizer.state[value]
        key = "max_exp_avg_sq" if amsgrad else "exp_avg_sq"
        now = entry[key].clone(), float(entry["step"])
        if id(value) not in moments or moments[id(value)][-1][1] != now[1]:
            moments.setdefault(id(value), []).append(now)
        values, step = moments[id(value)][max(len(moments[id(value)]) - 2, 0)]
        return 1 / ((values / (1 - 0.999**step)).sqrt() + 1e-8).sqrt()

    model, other, steps = mlp(), mlp(), batches(7)
    collector = collected(tmp_path, model, make(model), steps, preconditioner="adam")
    expected = looped(other, make(other), steps, row_part, scale=scale)
    torch.testing.assert_close(features(collector).sum(0), expected, rtol=1e-4, atol=1e-5)


def test_dropout_counts_as_it_was_in_training(tmp_path):
    masks = []

    class Masked(nn.Module):
        def forward(self, x):
            if not self.training:
                return x
            masks.append((torch.rand(x.shape) < 0.5).double() * 2)
            return x * masks[-1]

    def make():
        model = mlp()
        model[2] = Masked()
        return model

    model, other, steps = make(), make(), batches(6)
    collector = collected(tmp_path, model, sgd(model), steps)
    assert len(masks) == 6
    step = {"number": -1, "place": 0, "rows": None}

    def part(model, row, rows):
        if step["rows"] is not rows:
            step.update(number=step["number"] + 1, place=-1, rows=rows)
        step["place"] += 1
        hidden = model[1](model[0](X[row][None])) * masks[step["number"]][step["place"]]
        return nn.functional.cross_entropy(model[3](hidden), Y[row][None]) / len(rows)

    close(features(collector), looped(other, sgd(other), steps, part))
    assert Store.open_existing(collector.store).audited().audited == 0


def test_batch_norm_is_collected_in_eval_mode_by_a_second_pass(tmp_path, caplog):
    def make():
        model = mlp()
        model[2] = nn.BatchNorm1d(8).double()
        return model

    model, other, steps = make(), make(), batches(5)
    with caplog.at_level(logging.WARNING):
        collector = collected(tmp_path, model, sgd(model), steps)
    assert "second pass" in caplog.text
    optimizer, expected = sgd(other), 0
    for rows in steps:
        optimizer.zero_grad()
        mean_loss(other, rows).backward()
        frozen = make()
        frozen.load_state_dict(other.state_dict())
        frozen.eval()
        expected = expected + looped(frozen, sgd(frozen), [rows], row_part)
        optimizer.step()
    close(features(collector), expected)
    assert torch.equal(flat(model), flat(other))
    assert all(torch.equal(one, two) for one, two in zip(model.buffers(), other.buffers(), strict=True))


def test_parameters_without_a_layer_are_collected_by_a_second_pass(tmp_path, caplog):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 8, dtype=torch.float64))

        def forward(self, x):
            return torch.tanh(x) * self.scale

    def make():
        model = mlp()
        model[1] = Scaled()
        return model

    model, other, steps = make(), make(), batches(5)
    collector = collected(tmp_path, model, sgd(model), steps)
    assert "second pass" in caplog.text
    close(features(collector), looped(other, sgd(other), steps, row_part))


def test_torch_s_attention_is_collected_by_a_second_pass(tmp_path, caplog):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Linear(1, 8), nn.Linear(8, 3)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

        def forward(self, x):
            return self.head(self.layer(self.embed(x[..., None])).mean(1))

    model, other, steps = Encoder().double(), Encoder().double(), batches(4)
    collector = collected(tmp_path, model, sgd(model), steps)
    assert "MultiheadAttention is captured by a module that replaces it" in caplog.text
    close(features(collector), looped(other, sgd(other), steps, row_part))


def test_scores_are_the_sum_of_first_order_terms_with_targets_at_the_middle_of_segments(tmp_path):
    model, steps = mlp(), batches(8)
    collector = collected(tmp_path, model, sgd(model), steps, every=2)
    targets = X[:5] + 0.1, Y[:5]
    other = mlp()
    optimizer = sgd(other)
    expected = np.zeros((N, 5))
    for begin in (0, 4):
        terms = looped(other, optimizer, steps[begin : begin + 2], row_part)
        middle = mlp()
        middle.load_state_dict(other.state_dict())
        terms += looped(other, optimizer, steps[begin + 2 : begin + 4], row_part)
        losses = [nn.functional.cross_entropy(middle(x[None]), y[None]) for x, y in zip(*targets, strict=True)]
        grads = [torch.autograd.grad(loss, list(middle.parameters())) for loss in losses]
        gradients = torch.stack([torch.cat([each.reshape(-1) for each in own]) for own in grads])
        expected += (terms @ gradients.T).numpy()
    found = attribute(
        model, "classification", (X, Y), targets, collector.checkpoints, save_dir=collector.store, **EXACT
    )
    np.testing.assert_allclose(found.scores, expected, rtol=1e-4, atol=1e-5)
    tracer = Tracer(model, "classification", N, collector.store, **EXACT)
    top = tracer.query(targets, 3)
    assert (top.indices == np.argsort(-expected.T, axis=1)[:, :3]).all()


def test_the_checkpoint_of_a_segment_is_in_its_middle(tmp_path):
    model = mlp()
    collector = collected(tmp_path, model, sgd(model), batches(11), every=2)
    assert [path.stem for path, _ in collector.checkpoints] == ["step_00000002", "step_00000006", "step_00000010"]
    assert [rate for _, rate in collector.checkpoints] == pytest.approx([0.4, 0.4, 0.3])
    assert collected_checkpoints(tmp_path) == collector.checkpoints


def test_a_store_has_the_labels_losses_and_audits_of_training(tmp_path):
    model = mlp()
    steps = batches(6, size=20)
    collector = collected(tmp_path, model, sgd(model), steps)
    store = Store.open_existing(collector.store)
    table = store.checkpoint(0)
    seen = np.unique(torch.cat(steps))
    assert (table.column("label")[seen] == Y[seen].numpy()).all()
    assert (table.column("loss")[seen] > 0).all()
    assert 1 <= store.audited().audited <= 6


def test_an_example_that_training_sees_with_another_gradient_is_an_error(tmp_path):
    def wrong(model, rows):
        return nn.functional.cross_entropy(model(X[rows.flip(0)]), Y[rows.flip(0)])

    model, rows = mlp(), torch.arange(6)
    with pytest.raises(GradientError, match="has another gradient than the task's loss"):
        collected(tmp_path, model, sgd(model), [rows], wrong)


def test_a_backward_outside_of_a_batch_is_an_error(tmp_path):
    model, rows = mlp(), torch.arange(6)
    optimizer = sgd(model)
    collector = GradientCollector(model, optimizer, tmp_path, "classification", N, **EXACT)
    mean_loss(model, rows).backward()
    with collector.batch((X[rows], Y[rows]), rows):
        mean_loss(model, rows + 6).backward()
    with pytest.raises(GradientError, match="is not the sum"):
        optimizer.step()


def test_a_penalty_in_the_loss_is_an_error_with_advice(tmp_path):
    def loss(model, rows):
        return mean_loss(model, rows) + 0.1 * flat_squares(model)

    def flat_squares(model):
        return sum(value.square().sum() for value in model.parameters())

    model = mlp()
    with pytest.raises(GradientError, match="second_pass=True"):
        collected(tmp_path, model, sgd(model), batches(2), loss)


def test_two_backwards_of_one_graph_are_an_error(tmp_path):
    model, rows = mlp(), torch.arange(6)
    collector = GradientCollector(model, sgd(model), tmp_path, "classification", N, **EXACT)
    with pytest.raises(GradientError, match="passed twice"), collector.batch((X[rows], Y[rows]), rows):
        loss = mean_loss(model, rows)
        loss.backward(retain_graph=True)
        loss.backward()


def test_activations_are_freed_by_the_backward(tmp_path):
    kept = []

    class Watched(nn.Tanh):
        def forward(self, x):
            found = super().forward(x)
            kept.append(weakref.ref(found.untyped_storage()))
            return found

    model, rows = mlp(), torch.arange(6)
    model[1] = Watched()
    collector = GradientCollector(model, sgd(model), tmp_path, "classification", N, **EXACT)
    with collector.batch((X[rows], Y[rows]), rows):
        loss = mean_loss(model, rows)
        assert kept[-1]() is not None
        loss.backward()
    assert kept[-1]() is None and loss.grad_fn is not None


def test_a_step_without_a_batch_is_an_error(tmp_path):
    model = mlp()
    optimizer = sgd(model)
    GradientCollector(model, optimizer, tmp_path, "classification", N, **EXACT)
    mean_loss(model, torch.arange(3)).backward()
    with pytest.raises(GradientError, match="made step 1 without a batch"):
        optimizer.step()


def test_batches_do_not_overlap(tmp_path):
    model, rows = mlp(), torch.arange(3)
    collector = GradientCollector(model, sgd(model), tmp_path, "classification", N, **EXACT)
    with collector.batch((X[rows], Y[rows]), rows):
        with pytest.raises(CallOrderError, match="before another batch had ended"):
            collector.batch((X[rows], Y[rows]), rows).__enter__()


@pytest.mark.parametrize(
    "options", [{"storage": "none"}, {"preconditioner": "kfac"}, {"preconditioner": "adam"}, {"process": (0, 2)}]
)
def test_settings_that_cannot_be_collected_are_refused(tmp_path, options):
    model = mlp()
    with pytest.raises((InputError, InputTypeError), match=r"GradientCollector(\(\))? got"):
        GradientCollector(model, sgd(model), tmp_path, "classification", N, **{**EXACT, **options})


def killed_after(tmp_path, steps, saved_at):
    """Train, keep what a training checkpoint would hold after a step, and die some steps later."""
    model = mlp()
    optimizer = sgd(model, momentum=0.5)
    collector = GradientCollector(model, optimizer, tmp_path, "classification", N, every=3, **EXACT)
    train(collector, model, optimizer, steps[:saved_at])
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), collector.state_dict()))
    train(collector, model, optimizer, steps[saved_at:-2])
    collector.close(save=False)
    return saved


@pytest.mark.parametrize("saved_at", [2, 6, 8])
def test_a_training_that_is_killed_continues_with_every_step_once(tmp_path, saved_at):
    steps = batches(14)
    state, moments, saved = killed_after(tmp_path, steps, saved_at)
    model = mlp()
    model.load_state_dict(state)
    optimizer = sgd(model, momentum=0.5)
    optimizer.load_state_dict(moments)
    options = {"every": 3, "resume": saved, **EXACT}
    with GradientCollector(model, optimizer, tmp_path, "classification", N, **options) as collector:
        train(collector, model, optimizer, steps[saved_at:])
    other = mlp()
    close(features(collector), 2 * looped(other, sgd(other, momentum=0.5), steps, row_part))


def test_resume_continues_after_the_last_segment(tmp_path):
    steps, model = batches(12), mlp()
    optimizer = sgd(model)
    collector = GradientCollector(model, optimizer, tmp_path, "classification", N, every=3, **EXACT)
    train(collector, model, optimizer, steps[:6])
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train(collector, model, optimizer, steps[6:10])
    collector.close(save=False)
    model.load_state_dict(state)
    optimizer = sgd(model)
    with GradientCollector(model, optimizer, tmp_path, "classification", N, every=3, resume=True, **EXACT) as collector:
        train(collector, model, optimizer, steps[6:])
    other = mlp()
    close(features(collector), looped(other, sgd(other), steps, row_part))


def test_other_weights_cannot_continue(tmp_path):
    model = mlp()
    collected(tmp_path, model, sgd(model), batches(6))
    with pytest.raises(MismatchError, match="does not have the weights of then"):
        other = mlp()
        GradientCollector(other, sgd(other), tmp_path, "classification", N, every=3, resume=True, **EXACT)


def test_what_needs_gradients_at_checkpoints_is_refused(tmp_path):
    model = mlp()
    collector = collected(tmp_path, model, sgd(model), batches(12))
    data, checkpoints = (model, "classification", (X, Y), (X[:5], Y[:5])), collector.checkpoints
    options = {"save_dir": collector.store, **EXACT}
    found = attribute(*data, checkpoints, estimator="auto", **options)
    scores = np.array(found.scores)
    assert found.estimators.scores == "tracin"
    tracer = found.tracer
    tracer.load_checkpoint(*checkpoints[0][:1], model_id=0, learning_rate=checkpoints[0][1])
    for refused in (
        lambda: attribute(*data, checkpoints, estimator="influence", **options).scores,
        lambda: attribute(*data, checkpoints, estimator="trackstar", **options).scores,
        lambda: attribute(*data, [(path, 1.5) for path, _ in checkpoints], **options),
        lambda: tracer.query((X[:2], Y[:2]), 3, estimator="trak"),
        lambda: tracer.self_influence(estimator="influence"),
        lambda: tracer.fit_kernel((X, Y)),
        lambda: tracer.featurize((X[:3], Y[:3]), inds=range(3)),
        lambda: tracer.replace(range(3)),
        lambda: tracer.load_checkpoint(mlp(0.1).state_dict(), model_id=9, learning_rate=0.1),
        lambda: Tracer.open(collector.store).grow(N + 1),
    ):
        with pytest.raises(CallOrderError, match="GradientCollector collected.*another save_dir"):
            refused()
    np.testing.assert_array_equal(attribute(*data, checkpoints, **options).scores, scores)


def test_damaged_sums_are_marked_and_no_advice_is_to_compute_them_again(tmp_path):
    model = mlp()
    collector = collected(tmp_path, model, sgd(model), batches(12))
    first, *others = collector.checkpoints
    assert others
    (file,) = [each for each in (collector.store / "checkpoints/0/features").rglob("c/**/*") if each.is_file()]
    data = bytearray(file.read_bytes())
    data[3] ^= 64
    file.write_bytes(bytes(data))
    found = verify(collector.store, progress=False)
    assert "row" in str(found) and "collected in a training and cannot be computed again" in str(found)
    reader = Tracer.open(collector.store)
    with pytest.raises(CallOrderError, match="model_ids="):
        reader.self_influence()
    assert np.isfinite(reader.self_influence(model_ids=list(range(1, len(others) + 1)))).all()


def test_sums_that_do_not_fit_into_memory_are_in_a_file(tmp_path):
    model, other, steps = mlp(), mlp(), batches(6)
    optimizer = sgd(model)
    with GradientCollector(
        model, optimizer, tmp_path, "classification", N, every=3, memory_bytes=100, **EXACT
    ) as collector:
        assert (tmp_path / "sums_0.bin").exists()
        train(collector, model, optimizer, steps)
    assert not (tmp_path / "sums_0.bin").exists()
    close(features(collector), looped(other, sgd(other), steps, row_part))


def test_projected_sums_are_those_of_a_store_s_projector(tmp_path):
    model, other, steps = mlp(), mlp(), batches(6)
    options = {"projector": "sketch", "proj_dim": 16, "storage": "float32"}
    collector = collected(tmp_path, model, sgd(model), steps, **options)
    tracer = Tracer(other, "classification", N, collector.store, **options)
    total = looped(other, sgd(other), steps, row_part)
    from tracer.gradients.per_sample import DenseGradient

    start, gradients = 0, {}
    for name, value in other.named_parameters():
        part = total[:, start : start + value.numel()]
        gradients[name] = DenseGradient(part.reshape(N, *value.shape))
        start += value.numel()
    expected = tracer._factory.projector(0).project(gradients).features
    torch.testing.assert_close(features(collector)[0], expected, rtol=1e-5, atol=1e-6)
