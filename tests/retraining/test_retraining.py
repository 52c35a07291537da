"""Models trained at once are what a plain loop with torch.optim trains, each on its own rows."""

from __future__ import annotations

import logging
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from tracer.errors import BatchError, InputError, InputTypeError, NonFiniteError
from tracer.retraining import Recipe, random_subsets, retrain, train_models
from tracer.retraining.subsets import make_runs
from tracer.retraining.training import Trainer

N = 23
TASK = "image_classification"


def data(num_rows: int = N, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 1, 5, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (num_rows,), generator=generator)


def batchnorm_net() -> nn.Module:
    conv = nn.Conv2d(1, 3, 3, bias=False)  # whose gradient would be zero but for rounding, which AdamW scales up
    return nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(27, 3)).double()


def small_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 6), nn.ReLU(), nn.Linear(6, 3)).double()


def dropout_net() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(25, 6), nn.Dropout(0.5), nn.Linear(6, 3)).double()


class Recurrent(nn.Module):
    """An LSTM over five positions, which vmap has no rule for."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 4, batch_first=True), nn.Linear(4, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x.flatten(1, 2))[0][:, -1])


class Replacing(nn.Module):
    """Replaces its buffer instead of changing it, which is lost in a stack."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(25, 3)
        self.register_buffer("seen", torch.zeros(25))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1)
        if self.training:
            self.seen = self.seen + x.detach().mean(0)
        return self.head(x + self.seen)


class Tied(nn.Module):
    """A layer used under two names, a frozen one, and a parameter without use."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(25, 25)
        self.b = self.a
        self.frozen = nn.Linear(25, 3).requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.b(torch.tanh(self.a(x.flatten(1)))))


def plain_training(make_model, initial, run, train, optimizer, recipe: Recipe) -> nn.Module:
    """Ordinary training, slow and obvious: cross-entropy, autograd, torch.optim and torch's schedulers."""
    model = make_model().train()
    model.load_state_dict(initial)
    optimizer = optimizer(model)
    orders = run.orders()
    num_steps = recipe.epochs * math.ceil(run.num_rows / recipe.batch_size)
    schedulers = {
        "constant": lambda: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0),
        "linear": lambda: torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=num_steps),
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_steps),
    }
    scheduler = schedulers[recipe.schedule]()
    for _ in range(recipe.epochs):
        for rows in next(orders).split(recipe.batch_size):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
            scheduler.step()
    model.optimizer = optimizer
    return model


def assert_same(found, expected, rtol: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=rtol, atol=1e-12, msg=lambda text, key=key: f"{key}: {text}")


OPTIMIZERS = {
    "sgd": (Recipe(batch_size=4, epochs=3), lambda model: torch.optim.SGD(model.parameters(), lr=0.1)),
    "momentum": (
        Recipe(momentum=0.9, weight_decay=0.01, batch_size=4, epochs=3, schedule="linear"),
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    ),
    "adamw": (
        Recipe("adamw", 0.01, weight_decay=0.1, batch_size=4, epochs=3, schedule="cosine"),
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
    ),
}


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_models_are_those_of_a_plain_loop(name, stacked):
    recipe, optimizer = OPTIMIZERS[name]
    train, masks = data(), random_subsets(3, N)
    found = train_models(
        batchnorm_net, TASK, train, recipe, masks, seeds=[0, 7], checkpoint_epochs=[0], stacked=stacked
    )
    runs = make_runs(masks, N, [0, 7], paired=False)
    assert [(model.subset, model.seed) for model in found] == [run.key for run in runs]
    for model, run in zip(found, runs, strict=True):
        expected = plain_training(batchnorm_net, model.checkpoints[0].state, run, train, optimizer, recipe)
        assert_same(model.state, expected.state_dict())


def test_subsets_of_different_sizes_are_those_of_a_plain_loop():
    recipe, optimizer = OPTIMIZERS["momentum"]
    train, masks = data(), np.arange(N) < np.array([[6], [9], [6], [N]])
    found = train_models(batchnorm_net, TASK, train, recipe, masks, checkpoint_epochs=[0], stacked=True)
    for model, run in zip(found, make_runs(masks, N, [0], paired=False), strict=True):
        expected = plain_training(batchnorm_net, model.checkpoints[0].state, run, train, optimizer, recipe)
        assert_same(model.state, expected.state_dict())


@pytest.mark.parametrize("stacked", [True, False])
def test_tied_frozen_and_unused_parameters(stacked):
    recipe, optimizer = OPTIMIZERS["momentum"]
    train = data()
    found = train_models(Tied, TASK, train, recipe, seeds=[0, 1], checkpoint_epochs=[0], stacked=stacked)
    for model, run in zip(found, make_runs(None, N, [0, 1], paired=False), strict=True):
        initial = model.checkpoints[0].state
        assert_same(model.state, plain_training(Tied, initial, run, train, optimizer, recipe).state_dict())
        assert torch.equal(model.state["frozen.weight"], initial["frozen.weight"])
        assert torch.equal(model.state["unused"], initial["unused"])


class TokenModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
        self.double()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.tokens(tokens)))


def token_loss(model: nn.Module, batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch["tokens"]).flatten(1), batch["label"], reduction="none")


TOKENS = torch.randint(0, 7, (N, 5), generator=torch.Generator().manual_seed(3))
X, Y = data()


@pytest.mark.parametrize(
    ("task", "make_model", "batch"),
    [
        ("language_modeling", TokenModel, (TOKENS,)),
        ("language_modeling", TokenModel, {"input_ids": TOKENS, "attention_mask": TOKENS.ge(0)}),
        ("regression", lambda: nn.Sequential(nn.Flatten(), nn.Linear(25, 1)).double(), (X, X.mean((1, 2, 3)))),
        ("binary_classification", lambda: nn.Sequential(nn.Flatten(), nn.Linear(25, 1)).double(), (X, Y.double() / 2)),
        (token_loss, TokenModel, {"tokens": TOKENS, "label": TOKENS.sum(1) % 7, "shared": torch.zeros(())}),
    ],
    ids=["tokens", "mapping", "regression", "binary", "function"],
)
def test_every_task_is_stacked_as_in_a_loop(task, make_model, batch):
    if isinstance(batch, dict) and "input_ids" in batch:
        make_model = lambda: Masked(TokenModel())  # noqa: E731
    masks, recipe = random_subsets(3, N), Recipe(batch_size=4, epochs=2)
    pair = [retrain(make_model, task, batch, batch, masks, recipe, stacked=stacked) for stacked in (True, False)]
    np.testing.assert_allclose(pair[0].outputs, pair[1].outputs, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(pair[0].losses, pair[1].losses, rtol=1e-9, atol=1e-12)
    assert np.ptp(pair[0].outputs, axis=0).min() > 0  # models differ, or nothing was trained


class Masked(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids) * attention_mask.unsqueeze(-1)


@pytest.mark.parametrize("stacked", [True, False])
def test_rows_left_out_change_nothing_and_others_do(stacked):
    masks, recipe = random_subsets(4, N), Recipe(batch_size=4, epochs=2)
    x, y = data()
    changed = x.clone()
    changed[5] += 1.0
    before, after = (
        retrain(small_mlp, TASK, (rows, y), data(4, 1), masks, recipe, stacked=stacked).outputs for rows in (x, changed)
    )
    has_row = masks[:, 5]
    assert has_row.any() and not has_row.all()
    assert np.array_equal((before != after).any(axis=1), has_row)


def test_outputs_are_margins_and_losses_in_eval_mode_as_means_over_seeds():
    train, targets, masks, recipe = data(), data(6, 1), random_subsets(2, N), Recipe(batch_size=4, epochs=2)
    truth = retrain(batchnorm_net, TASK, train, targets, masks, recipe, seeds=(3, 1), stacked=True)
    margins, losses = np.zeros((2, 6)), np.zeros((2, 6))
    for model in train_models(batchnorm_net, TASK, train, recipe, masks, seeds=(3, 1)):
        net = batchnorm_net().eval()
        net.load_state_dict(model.state)
        logits = net(targets[0]).detach()
        for target, label in enumerate(targets[1].tolist()):
            others = torch.cat([logits[target, :label], logits[target, label + 1 :]])
            margins[model.subset, target] += float(logits[target, label] - others.logsumexp(0)) / 2
            losses[model.subset, target] += float(nn.functional.cross_entropy(logits[target], targets[1][target])) / 2
    np.testing.assert_allclose(truth.outputs, margins, rtol=1e-9)
    np.testing.assert_allclose(truth.losses, losses, rtol=1e-9)
    assert truth.outputs_by_seed.shape == (2, 2, 6) and truth.seeds == (3, 1)
    assert np.array_equal(truth.masks, masks)


def test_results_do_not_depend_on_what_else_is_trained():
    train, targets, masks, recipe = data(), data(6, 1), random_subsets(5, N), Recipe(batch_size=4, epochs=2)
    found = [
        retrain(small_mlp, TASK, train, targets, masks[:count], recipe, seeds=seeds, models_at_once=most, stacked=True)
        for count, seeds, most in ((5, (0, 1), 3), (2, (0, 1), None), (5, (1,), 4))
    ]
    np.testing.assert_allclose(found[0].outputs_by_seed[:2], found[1].outputs_by_seed, rtol=1e-9)
    np.testing.assert_allclose(found[0].outputs_by_seed[:, 1:], found[2].outputs_by_seed, rtol=1e-9)


def test_each_epoch_passes_each_row_of_the_subset_once_in_a_new_order():
    (run,) = make_runs(random_subsets(1, N), N, [0], paired=False)
    orders = run.orders()
    first, second = next(orders).tolist(), next(orders).tolist()
    assert sorted(first) == sorted(second) == np.flatnonzero(run.mask).tolist()
    assert first != second


def initial_states(masks, **options):
    return train_models(
        small_mlp, TASK, data(), Recipe(epochs=1), masks, checkpoint_epochs=[0], seeds=[0, 1], **options
    )


def test_every_model_begins_with_weights_of_its_own():
    weights = [model.checkpoints[0].state["1.weight"] for model in initial_states(random_subsets(2, N))]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


def test_paired_models_of_a_seed_begin_with_the_same_weights():
    a0, a1, b0, b1 = (
        model.checkpoints[0].state["1.weight"] for model in initial_states(random_subsets(2, N), paired=True)
    )
    assert torch.equal(a0, b0) and torch.equal(a1, b1) and not torch.equal(a0, a1)


def test_paired_models_of_a_seed_pass_their_common_rows_in_the_same_order():
    masks = np.ones((2, N), dtype=bool)
    masks[1, 4] = False
    for paired in (True, False):
        whole, without = (next(run.orders()).tolist() for run in make_runs(masks, N, [0], paired=paired))
        assert ([row for row in whole if row != 4] == without) == paired


def test_the_random_state_of_the_caller_is_left_as_it_was():
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    retrain(dropout_net, TASK, data(), data(4, 1), random_subsets(3, N), Recipe(epochs=1), stacked=True)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_grad_mode_of_the_caller_does_not_matter(mode):
    with mode():
        x, y = data()
        found = train_models(small_mlp, TASK, (x, y), Recipe(epochs=1), seeds=[0])
    (expected,) = train_models(small_mlp, TASK, data(), Recipe(epochs=1), seeds=[0])
    assert_same(found[0].state, expected.state)


def test_dropout_drops_other_units_in_each_model_and_the_same_ones_again():
    masks, recipe = np.ones((2, N), dtype=bool), Recipe(batch_size=N, epochs=1)
    # Paired models of all rows differ in nothing else.
    first, again = (
        train_models(dropout_net, TASK, data(), recipe, masks, stacked=True, paired=True, models_at_once=2)
        for _ in range(2)
    )
    assert not torch.allclose(first[0].state["1.weight"], first[1].state["1.weight"])
    assert_same(first[0].state, again[0].state, rtol=0)


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [(Recurrent, "RuntimeError: Batching rule not implemented for aten::lstm"), (Replacing, "the buffer seen differs")],
    ids=["no rule", "wrong in a stack"],
)
def test_models_that_cannot_be_stacked_are_trained_one_after_another_with_a_reason(make_model, reason, caplog):
    train, masks, recipe = data(), random_subsets(8, N), Recipe(batch_size=4, epochs=1)
    with caplog.at_level(logging.INFO, "tracer"):
        found = train_models(make_model, TASK, train, recipe, masks, checkpoint_epochs=[0])
    assert "models are trained one after another, since they cannot be stacked" in caplog.text
    assert reason in caplog.text
    runs = make_runs(masks, N, [0], paired=False)
    for model, run in zip(found, runs, strict=True):
        initial, optimizer = model.checkpoints[0].state, OPTIMIZERS["sgd"][1]
        assert_same(model.state, plain_training(make_model, initial, run, train, optimizer, recipe).state_dict())
    with pytest.raises(InputError, match=f"stacked=True, but the models cannot be stacked: {reason}"):
        train_models(make_model, TASK, train, recipe, masks, stacked=True)


def test_batches_with_lists_are_trained_one_after_another():
    def loss(model: nn.Module, batch) -> torch.Tensor:
        weights = torch.tensor([2.0 if name == "a" else 1.0 for name in batch["name"]])
        return weights * nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")

    x, y = data()
    batch = {"x": x, "y": y, "name": ["a", "b"] * 11 + ["a"]}
    recipe = Recipe(batch_size=4, epochs=1)
    assert len(train_models(small_mlp, loss, batch, recipe, random_subsets(8, N))) == 8
    with pytest.raises(InputError, match="the training examples hold lists, which vmap cannot split"):
        train_models(small_mlp, loss, batch, recipe, random_subsets(8, N), stacked=True)


@pytest.mark.parametrize(
    ("make_model", "num_subsets", "said"),
    [
        (small_mlp, 8, ""),
        (small_mlp, 7, "7 at once would save little"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(25, 9000), nn.Linear(9000, 3)).double(), 8, "above 1e\\+07"),
    ],
    ids=["small", "few", "large"],
)
def test_small_models_are_stacked_unless_they_are_few(make_model, num_subsets, said, caplog):
    with caplog.at_level(logging.INFO, "tracer"):
        train_models(make_model, TASK, data(), Recipe(epochs=1), random_subsets(num_subsets, N, 0.9))
    assert ("one after another" in caplog.text) == bool(said)
    assert re.search(said, caplog.text)


def test_checkpoints_are_what_the_epochs_left():
    recipe = Recipe(batch_size=4, epochs=4)
    (whole,) = train_models(small_mlp, TASK, data(), recipe, checkpoint_epochs=[0, 2, 4])
    (half,) = train_models(small_mlp, TASK, data(), Recipe(batch_size=4, epochs=2))
    assert_same(whole.checkpoints[1].state, half.state)
    assert_same(whole.checkpoints[2].state, whole.state)
    assert not torch.equal(whole.checkpoints[0].state["1.weight"], half.state["1.weight"])


def test_the_rate_of_a_checkpoint_is_the_mean_since_the_one_before():
    recipe = Recipe(learning_rate=0.8, momentum=0.5, batch_size=12, epochs=4, schedule="linear")  # 0.8, 0.7, ... 0.1
    (found,) = train_models(small_mlp, TASK, data(), recipe, checkpoint_epochs=[0, 1, 4])
    assert [checkpoint.learning_rate for checkpoint in found.checkpoints] == pytest.approx([0.8, 0.75, 0.35])
    assert [checkpoint.learning_rate_sum for checkpoint in found.checkpoints] == pytest.approx([0.0, 3.0, 4.2])


@pytest.mark.parametrize("stacked", [True, False])
def test_the_optimizer_state_of_a_checkpoint_is_that_of_torch_for_one_model(stacked):
    recipe, optimizer = OPTIMIZERS["adamw"]
    train = data()
    found = train_models(small_mlp, TASK, train, recipe, seeds=[0, 1], checkpoint_epochs=[0, 3], stacked=stacked)
    for model, run in zip(found, make_runs(None, N, [0, 1], paired=False), strict=True):
        expected = plain_training(small_mlp, model.checkpoints[0].state, run, train, optimizer, recipe).optimizer
        state = model.checkpoints[1].optimizer_state
        assert state["param_groups"][0]["param_names"] == [name for name, _ in small_mlp().named_parameters()]
        for number, values in expected.state_dict()["state"].items():
            assert_same(state["state"][number], values)
        optimizer(small_mlp()).load_state_dict(state)  # torch takes it


@pytest.mark.parametrize("stacked", [True, False])
def test_a_model_that_diverges_is_named(stacked):
    def infinite_for_one_row(model: nn.Module, batch) -> torch.Tensor:
        x, y = batch
        return nn.functional.cross_entropy(model(x), y, reduction="none") / (x[:, 0, 0, 0] != 100)

    x, y = data()
    x[4, 0, 0, 0] = 100.0
    masks = np.ones((3, N), dtype=bool)
    masks[[0, 1, 2], [4, 3, 4]] = False  # the second has the row
    message = rf"1 of {3 if stacked else 1} models diverged in epoch 1: \(subset 1, seed 5\); .* Lower the recipe's"
    with pytest.raises(NonFiniteError, match=message):
        options = {"seeds": [5], "stacked": stacked}
        retrain(small_mlp, infinite_for_one_row, (x, y), data(2), masks, Recipe(epochs=2), **options)


def test_targets_without_finite_outputs_are_named():
    x, y = data(4, 1)
    x[2] = torch.inf
    with pytest.raises(NonFiniteError, match=r"\(subset 0, seed 0\) gives NaN .* 1 targets, indices \[2\]"):
        retrain(small_mlp, TASK, data(), (x, y), random_subsets(2, N), Recipe(epochs=1))


def test_a_model_that_diverges_in_its_last_step_is_named():
    x, y = data()
    recipe = Recipe(learning_rate=1e306, batch_size=N, epochs=1)
    with pytest.raises(NonFiniteError, match=r"diverged in epoch 1: \(subset 0, seed 0\)"):
        train_models(small_mlp, TASK, (1e4 * x, y), recipe)


@pytest.mark.parametrize("wrong", ["train", "targets"])
def test_all_labels_are_checked_before_training_though_vmap_hides_them(wrong, monkeypatch):
    monkeypatch.setattr(Trainer, "train", None)
    batches = {"train": data(), "targets": data(seed=1)}
    batches[wrong][1][11] = 3
    with pytest.raises(BatchError, match="label 3 .* is outside 0...2"):
        retrain(small_mlp, TASK, **batches, masks=random_subsets(8, N), recipe=Recipe(batch_size=2), stacked=True)


def test_subsets_have_the_asked_size_and_differ():
    masks = random_subsets(50, 101, fraction=0.3, seed=4)
    assert masks.dtype == bool and masks.shape == (50, 101)
    assert (masks.sum(axis=1) == 30).all()
    assert len({mask.tobytes() for mask in masks}) == 50
    # Each row is in 30 of 101 draws: 50 * 30 / 101 = 14.9 subsets, standard deviation 3.2.
    assert 2 <= masks.sum(axis=0).min() and masks.sum(axis=0).max() <= 28


def test_subsets_do_not_depend_on_how_many_are_drawn_and_follow_the_seed():
    assert np.array_equal(random_subsets(5, N)[:2], random_subsets(2, N))
    assert not np.array_equal(random_subsets(5, N, seed=1), random_subsets(5, N))


def test_subsets_are_the_same_on_every_machine():
    assert np.flatnonzero(random_subsets(1, 16, seed=3)[0]).tolist() == [0, 4, 6, 8, 9, 11, 13, 15]


class NoModel:
    pass


SHARED = small_mlp()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Recipe("sdg"), InputError, "optimizer='sdg' is not known; did you mean 'sgd'"),
        (lambda: Recipe(schedule="step"), InputError, "schedule='step' is not known; .*Known: 'constant'"),
        (lambda: Recipe(learning_rate=-1), InputError, "learning_rate is -1.0; expected 0 or more"),
        (lambda: Recipe(momentum=1), InputError, "momentum is 1.0; expected 0 or more, below 1"),
        (lambda: Recipe(weight_decay="much"), InputTypeError, "weight_decay is 'much'; expected a number"),
        (lambda: Recipe("adamw", momentum=0.9), InputError, "momentum=0.9 came with optimizer='adamw'"),
        (lambda: Recipe(epochs=0), InputError, "epochs is 0; expected 1 or more"),
        (lambda: random_subsets(2, 4, fraction=0.1), InputError, "fraction=0.1 of 4 rows: expected more than 0"),
        (lambda: random_subsets(2, 4, fraction=1.5), InputError, "fraction=1.5 of 4 rows"),
        (lambda: random_subsets(2, 4, seed=-1), InputError, "seed is -1; expected 0 to"),
        (lambda: trained(masks=np.ones((2, N))), InputTypeError, "masks is of dtype float64; expected bool"),
        (lambda: trained(masks=np.ones((2, 3), bool)), InputError, r"shape \(2, 3\); expected \[subsets, 23\]"),
        (lambda: trained(masks=np.zeros((2, N), bool)), InputError, r"no examples in subsets \[0, 1\]"),
        (lambda: trained(seeds=[]), InputError, r"seeds is \[\]; expected at least one"),
        (lambda: trained(seeds=[1, 1]), InputError, r"seeds is \[1, 1\]; expected at least one seed, each once"),
        (lambda: trained(checkpoint_epochs=[2, 1]), InputError, r"checkpoint_epochs is \[2, 1\]; expected rising ints"),
        (lambda: trained(checkpoint_epochs=[9]), InputError, r"checkpoint_epochs is \[9\]; .* from 0 to 2"),
        (lambda: trained(recipe={}), InputTypeError, "recipe is a dict; expected a Recipe"),
        (lambda: trained(make_model=small_mlp()), InputTypeError, "make_model is a Sequential; expected a function"),
        (lambda: trained(make_model=NoModel), InputTypeError, "model must be a torch.nn.Module; got NoModel"),
        (lambda: trained(make_model=lambda: SHARED), InputError, "has parameters or buffers of the last one"),
        (lambda: trained(make_model=nn.Flatten), InputError, "without parameters that require a gradient"),
        (lambda: trained(models_at_once=0), InputError, "models_at_once is 0; expected 1 or more"),
        (lambda: trained(train=(X, Y[:5])), BatchError, r"train\[1\] has 5 examples .*, the first tensor has 23"),
        (lambda: trained(train=(X[:0], Y[:0])), BatchError, "train holds no examples"),
        (
            lambda: trained(make_model=growing(), stacked=True),
            InputError,
            "expected the same architecture at each call",
        ),
    ],
)
def test_what_cannot_be_used_is_said(call, error, message):
    with pytest.raises(error, match=message):
        call()


def trained(make_model=small_mlp, train=(X, Y), recipe=Recipe(epochs=2), **options):  # noqa: B008
    return train_models(make_model, TASK, train, recipe, **options)


def growing():
    widths = iter(range(6, 99))

    def make_model() -> nn.Module:
        width = next(widths)
        return nn.Sequential(nn.Flatten(), nn.Linear(25, width), nn.Linear(width, 3)).double()

    return make_model
