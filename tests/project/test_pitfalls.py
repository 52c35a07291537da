"""The runs behind the pitfalls of the documentation show what it says of them, also when they are small."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from benchmark_scripts import script
from torch import nn

from tracer.retraining import Recipe


@pytest.fixture(scope="module")
def pitfalls():
    with script("pitfalls") as module:
        yield module


@pytest.fixture(scope="module")
def runs(pitfalls):
    with script("pitfalls_runs") as module:
        yield module


@pytest.fixture(scope="module")
def training(pitfalls):
    with script("pitfalls_training") as module:
        yield module


@pytest.fixture(scope="module")
def of_rows(pitfalls):
    with script("pitfalls_rows") as module:
        yield module


@pytest.fixture(scope="module")
def small(runs):
    return runs.Settings(num_train=90, num_targets=20, num_subsets=12, seeds=(0,))


@pytest.fixture(scope="module")
def smallest(runs):
    return runs.Settings(num_train=60, num_targets=16, num_subsets=8, seeds=(0,))


@pytest.fixture(scope="module")
def data(training):
    return training.digits(90, 20)


def gradient(model, loss):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])


def test_a_fitted_network_leaves_the_scores_to_few_rows(training, smallest):
    recipe = Recipe(learning_rate=0.2, momentum=0.9, batch_size=20, epochs=60)
    first, _, last, every, _ = training.late_checkpoints(smallest, {"fast": recipe}, (1, 3, 60))
    assert first["loss"] > 1 and last["loss"] < 0.01
    assert last["half"] < first["half"] / 3
    assert every["half"] > 2 * last["half"]
    assert first["lost_slopes"] == 0 and last["slope"] < first["slope"] / 100
    assert {"tracin", "cosine", "influence", "ridge"} <= set(every) and "loss" not in every


def test_rows_of_half_counts_the_largest(training):
    assert training.rows_of_half(np.ones((10, 2))) == 5
    assert training.rows_of_half(np.array([[1.0, -1.0], [-20.0, 9.0], [2.0, 0.0]])) == 1


def test_slopes_are_lost_where_one_minus_p_is_below_float32s_resolution(training):
    model = nn.Linear(2, 2, bias=False)
    weights = {"weight": torch.tensor([[30.0, 1.0], [0.0, 0.0]])}
    found = training.fitted_state(model, weights, (torch.eye(2), torch.tensor([0, 0])))
    assert found["lost_slopes"] == found["lost_gradients"] == 0.5  # exp(-30) is lost, sigmoid(-1) is not
    assert found["slope"] == pytest.approx(np.exp(-30.0), rel=1e-6)  # of two values the smaller
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-1.0)) / 2)


@pytest.fixture(scope="module")
def recorded(runs, training, data):
    rate = Recipe(learning_rate=0.02, schedule="linear").rate_at
    return runs.recorded_run(data.train, data.targets, training.plain_sgd, rate, 4, (0, 1, 3, 4))


def test_a_recorded_run_accounts_for_all_that_the_losses_fell_by(runs, data, recorded):
    model, losses = runs.network(), []
    for epoch in (0, 4):
        model.load_state_dict(recorded.states[epoch])
        losses.append(F.cross_entropy(model(data.targets[0]), data.targets[1], reduction="none").detach().numpy())
    np.testing.assert_allclose(recorded.ideal.sum(0), losses[0] - losses[1], atol=1e-5)
    assert recorded.rates.shape == (4, 90) and recorded.rates[0, 0] == 0.02
    assert recorded.rate_after[4] == 0 and recorded.rate_after[1] == pytest.approx(0.015)


def test_weights_share_out_the_rates_of_the_run(training, recorded):
    mean = recorded.rates.mean(1)
    found = training.checkpoint_weights(recorded, (1, 3))
    np.testing.assert_allclose(found["equal"], 1)
    np.testing.assert_allclose(found["rate in force"], [0.015, 0.005])
    np.testing.assert_allclose(found["sum since the last"], [mean[0], mean[1] + mean[2]])
    around = found["half of the sums before and after"]
    np.testing.assert_allclose(around[1], (mean[1] + mean[2]) / 2 + mean[3])
    assert around.sum() == pytest.approx(mean.sum())


def test_sums_of_rates_put_scores_in_units_of_the_loss_and_nearer_to_the_ideal(training, small):
    rows = training.schedules(small, 10, [(2, 5, 10)])
    for first in (0, 4):
        equal, force, since, around = rows[first : first + 4]
        assert 0.7 < since["total"] < 1.3 and 0.7 < around["total"] < 1.3
        assert equal["total"] > 10 and force["total"] < 0.7
        assert around["spearman"] > max(equal["spearman"], force["spearman"])
        assert around["pearson"] > equal["pearson"]


def test_momentum_scales_scores_and_leaves_their_order_but_blurs_the_ideal(training, smallest):
    plain, heavy = training.momentum(smallest, (0.0, 0.9), (2, 4, 8))
    assert plain["ratio"] == pytest.approx(1) and heavy["ratio"] == pytest.approx(0.1, rel=0.1)
    assert heavy["same"] > 0.98
    assert plain["total"] == pytest.approx(1, rel=0.2) and heavy["total"] == pytest.approx(0.1, rel=0.2)
    assert heavy["spearman"] < plain["spearman"] - 0.2


def test_second_moments_suit_adams_steps_and_a_larger_eps_keeps_rare_entries_down(training, smallest):
    plain, aware, damped, cosine, _ = training.adam(smallest, (2, 5, 10), (1, 4, 8))
    assert aware["spearman_0.0"] > plain["spearman_0.0"]
    assert plain["total_0.0"] < 0.3 and 0.7 < aware["total_0.0"] < 2
    assert damped["pearson_0.9"] > aware["pearson_0.9"] + 0.1
    assert plain["gain"] == "-" and " to " in damped["gain"]
    assert damped["spearman_0.9"] < damped["spearman_0.0"] - 0.2
    assert "total_0.0" not in cosine


def test_another_eps_leaves_the_optimizer_state_as_it_was(training):
    state = {"state": {}, "param_groups": [{"eps": 1e-8, "lr": 1.0}]}
    assert training.with_eps(state, 0.1)["param_groups"] == [{"eps": 0.1, "lr": 1.0}]
    assert state["param_groups"][0]["eps"] == 1e-8


def test_gradients_in_training_mode_sum_up_to_that_of_a_step_and_those_in_eval_mode_are_a_rows_own(runs, of_rows, data):
    model = of_rows.norm_conv_net()
    batch = data.train[0][:6], data.train[1][:6]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    used, scored = runs.row_gradients(model.train(), batch), runs.row_gradients(model.eval(), batch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    alone = torch.stack(
        [gradient(model, F.cross_entropy(model(x[None]), y[None])) for x, y in zip(*batch, strict=True)]
    )
    torch.testing.assert_close(scored, alone, rtol=1e-4, atol=1e-6)
    step = gradient(model, F.cross_entropy(model.train()(batch[0]), batch[1], reduction="sum"))
    torch.testing.assert_close(used.sum(0), step, rtol=1e-3, atol=1e-5)
    with runs.scores_of(model, batch, batch, [(before, 1.0)]) as stored:
        np.testing.assert_allclose(stored.scores(), (scored @ scored.T).numpy(), rtol=1e-3, atol=1e-5)


def test_settled_statistics_are_those_of_the_rows(of_rows, data):
    model = of_rows.norm_mlp()
    state = of_rows.settle(model, model.state_dict(), data.train[0])
    batches = [model[0](rows) for rows in data.train[0].split(of_rows.BATCH)]
    torch.testing.assert_close(state["1.running_mean"], torch.stack([rows.mean(0) for rows in batches]).mean(0))
    torch.testing.assert_close(state["1.running_var"], torch.stack([rows.var(0) for rows in batches]).mean(0))


def test_settled_statistics_bring_early_gradients_nearer_to_those_of_training(of_rows, smallest):
    rows = of_rows.batch_norm(smallest, (0, 2, 20))
    assert [(row["network"], row["step"]) for row in rows[3:]] == [("MLP", 0), ("MLP", 2), ("MLP", 20), ("MLP", "all")]
    for row in rows[:2]:
        assert row["cosine"] < row["cosine_settled"] < 1
        assert row["ratio"] < 0.5 and 0.8 < row["ratio_settled"] < 1.3
        assert row["step_cosine"] < row["step_cosine_settled"]
    assert all({"lds", "lds_settled"} <= set(row) for row in rows[3:])


def test_images_are_shifted_in_training_mode_alone(of_rows):
    image = torch.arange(1.0, 65.0).reshape(1, 8, 8)
    down = of_rows.shifted(image.flatten(1), torch.tensor([[0, 1]])).reshape(8, 8)
    assert torch.equal(down[1:], image[0, :-1]) and not down[0].any()
    assert torch.equal(of_rows.shifted(image.flatten(1), torch.tensor([[1, 1]])), image.flatten(1))
    model, rows = of_rows.Shifted(nn.Identity()), image.flatten(1).repeat(20, 1)
    assert torch.equal(model.eval()(rows), rows)
    assert len(model.train()(rows).unique(dim=0)) > 3


def test_means_over_more_views_are_nearer_to_the_mean_over_others(of_rows, smallest):
    rows = of_rows.augmentation(smallest, 8, (2, 10))
    for first in (0, 4):
        plain, one, four, eight = rows[first : first + 4]
        assert one["same"] < four["same"] < eight["same"]
        assert plain["same"] < eight["same"]
    assert [row["rows"] for row in rows[:4]] == ["as they are", "one view", "mean of 4 views", "mean of 8 views"]


def test_copies_have_equal_tracin_scores_and_curvature_divides_them_up(of_rows, small):
    one, _, one_of_four, all_of_four = of_rows.duplicates(small, (1, 4), num_rows=4)
    assert all_of_four["tracin"] == pytest.approx(4 * one_of_four["tracin"], rel=1e-3)
    assert one["true"] == one["tracin"] == one["influence"] == 1
    assert one_of_four["tracin"] > 1.4 * one_of_four["true"]
    assert all_of_four["tracin"] == pytest.approx(all_of_four["true"], rel=0.3)
    assert one_of_four["trak"] == pytest.approx(one_of_four["true"], rel=0.3)
    assert one_of_four["influence"] < 0.8 * one_of_four["tracin"]
    assert all_of_four["trak"] < all_of_four["influence"] < all_of_four["true"]


def test_true_changes_are_those_of_training_without_the_rows(of_rows, data):
    train = data.train[0][:30], data.train[1][:30]
    recipe = Recipe(learning_rate=0.5, batch_size=30, epochs=200, weight_decay=0.1)  # strongly convex: it has one end
    found = of_rows.removal_changes(train, data.targets, {"one": [[3]], "more": [[0, 1], [5, 7]]}, recipe)

    def margins(left_out):
        kept = [row for row in range(30) if row not in left_out]
        model = nn.Linear(64, 10).double()
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=500, tolerance_grad=1e-10)

        def closure():
            optimizer.zero_grad()
            decay = sum(parameter.square().sum() for parameter in model.parameters())
            loss = F.cross_entropy(model(train[0][kept].double()), train[1][kept]) + 0.05 * decay
            loss.backward()
            return loss

        optimizer.step(closure)
        logits = model(data.targets[0].double()).detach()
        chosen = logits.gather(1, data.targets[1][:, None])[:, 0]
        return chosen - logits.scatter(1, data.targets[1][:, None], -torch.inf).logsumexp(1)

    expected = torch.stack([margins([]) - margins(left_out) for left_out in ([3], [0, 1], [5, 7])]).numpy()
    np.testing.assert_allclose(found["one"], expected[:1], atol=1e-3)
    np.testing.assert_allclose(found["more"], expected[1:], atol=1e-3)


def test_the_command_prints_tables_and_keeps_results_of_others(pitfalls, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pitfalls, "QUICK", runs.Settings(60, 10, 6, (0,)))
    for name in ("duplicates", "batch_norm"):
        monkeypatch.setitem(pitfalls.PITFALLS, name, made_up(pitfalls, name))
    for only in ("duplicates", "batch_norm", "batch_norm"):
        pitfalls.main(["--quick", "--only", only, "--output-dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count("## Batch norm") == 2 and printed.count("| network ") == 2 and printed.count("| copies ") == 1
    rows = json.loads((tmp_path / "pitfalls_quick.json").read_text())["rows"]
    assert rows == [{"pitfall": "batch_norm", "rows": 60}, {"pitfall": "duplicates", "rows": 60}]


def made_up(pitfalls, name):
    known = pitfalls.PITFALLS[name]
    return pitfalls.Pitfall(known.title, lambda settings: [{"rows": settings.num_train}], known.columns, known.meaning)


def test_an_unknown_name_stops_the_command(pitfalls):
    with pytest.raises(SystemExit, match="--only moment is not known; expected names of late, schedules, momentum"):
        pitfalls.main(["--only", "moment"])
