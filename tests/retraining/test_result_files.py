"""A retraining that was stopped goes on where it was, and results of other settings are never mixed."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

from tracer.errors import InputError, StoreError
from tracer.retraining import Recipe, random_subsets, retrain
from tracer.retraining.training import Trainer

N, M = 20, 4
X = torch.randn(N, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = (X[:, 0] > 0).long()
TARGETS = (X[:M] + 0.1, Y[:M])
RECIPE = Recipe(batch_size=4, epochs=2)
MASKS = random_subsets(6, N)


def make_model(activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), activation(), nn.Linear(4, 2)).double()


def run(save_dir, masks=MASKS, recipe=RECIPE, train=(X, Y), targets=TARGETS, make=make_model, **options):
    options = {"seeds": (0, 1), "models_at_once": 4, "stacked": True, **options}
    return retrain(
        make, options.pop("task", "image_classification"), train, targets, masks, recipe, save_dir=save_dir, **options
    )


@pytest.fixture
def trained(monkeypatch) -> list[tuple[int, int]]:
    """The runs that are trained, as they come."""
    keys: list[tuple[int, int]] = []
    original = Trainer.train

    def train(self, group, bar, *rest):
        keys.extend(run.key for run in group)
        return original(self, group, bar, *rest)

    monkeypatch.setattr(Trainer, "train", train)
    return keys


@pytest.mark.parametrize("stacked", [True, False])
def test_a_second_call_reads_what_the_first_wrote(tmp_path, trained, stacked):
    first = run(tmp_path, stacked=stacked)
    assert len(trained) == 12
    second = run(tmp_path, stacked=stacked)
    assert len(trained) == 12
    assert np.array_equal(first.outputs_by_seed, second.outputs_by_seed)
    assert np.array_equal(first.losses_by_seed, second.losses_by_seed)
    assert np.array_equal(first.outputs, run(None, stacked=stacked).outputs)


def test_a_killed_retraining_goes_on_with_the_models_that_are_missing(tmp_path, trained, monkeypatch):
    original, calls = Trainer._epoch, []

    def killed(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2 * RECIPE.epochs + 2:  # in the last epoch of the third of three groups
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    trained.clear()
    resumed = run(tmp_path)
    assert trained == [(4, 0), (4, 1), (5, 0), (5, 1)]
    assert np.array_equal(resumed.outputs_by_seed, run(None).outputs_by_seed)


def test_a_retraining_killed_while_it_writes_leaves_no_half_results(tmp_path, trained, monkeypatch):
    def killed(self, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        run(tmp_path, masks=MASKS[:1])
        patched.setattr("pathlib.Path.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert len(list(folder.iterdir())) == 2  # settings, and the results of the first call
    trained.clear()
    run(tmp_path)
    assert len(trained) == 10


def test_more_subsets_and_seeds_train_only_what_is_new(tmp_path, trained):
    run(tmp_path, masks=MASKS[:4])
    trained.clear()
    more = run(tmp_path, seeds=(0, 1, 2))
    new = [(subset, seed) for subset in range(6) for seed in (0, 1, 2) if subset > 3 or seed == 2]
    assert sorted(trained) == new
    np.testing.assert_allclose(more.outputs, run(None, seeds=(0, 1, 2)).outputs, rtol=1e-9)


def test_another_mask_in_its_place_is_trained(tmp_path, trained):
    run(tmp_path)
    trained.clear()
    masks = MASKS.copy()
    masks[2] = ~masks[2]
    changed = run(tmp_path, masks=masks)
    assert trained == [(2, 0), (2, 1)]
    np.testing.assert_allclose(changed.outputs, run(None, masks=masks).outputs, rtol=1e-9)


def doubled(model: nn.Module, batch, factor: float) -> torch.Tensor:
    return factor * nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": Recipe(batch_size=4, epochs=2, learning_rate=0.2)},
        {"train": (X + 1e-9, Y)},
        {"train": (X, 1 - Y)},
        {"targets": (TARGETS[0] + 1e-9, TARGETS[1])},
        {"make": lambda: make_model(nn.Tanh)},
        {"make": lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double()},
        {"task": functools.partial(doubled, factor=1.0)},
        {"paired": True},
    ],
    ids=["recipe", "inputs", "labels", "targets", "activation", "width", "task", "paired"],
)
def test_results_of_other_settings_are_kept_apart(tmp_path, trained, other):
    first = run(tmp_path)
    trained.clear()
    second = run(tmp_path, **other)
    assert len(trained) == 12
    assert np.array_equal(second.outputs, run(None, **other).outputs)
    trained.clear()
    assert np.array_equal(first.outputs, run(tmp_path).outputs) and np.array_equal(
        second.outputs, run(tmp_path, **other).outputs
    )
    assert trained == []


def test_tasks_that_differ_in_a_bound_argument_are_kept_apart(tmp_path, trained):
    for factor in (1.0, 2.0):
        run(tmp_path, task=functools.partial(doubled, factor=factor))
    assert len(trained) == 24


def test_the_settings_are_there_to_read(tmp_path):
    run(tmp_path)
    (folder,) = tmp_path.iterdir()
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["recipe"]["batch_size"] == 4 and settings["task"] == {"name": "image_classification"}


def test_a_damaged_file_is_named(tmp_path):
    run(tmp_path)
    path = sorted(tmp_path.glob("*/*.npz"))[0]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=f"{path.name} cannot be read .* remove it, and its models are trained again"):
        run(tmp_path)
    path.unlink()
    assert np.array_equal(run(tmp_path).outputs, run(None).outputs)


def test_remote_folders_are_refused():
    with pytest.raises(InputError, match="save_dir='memory://here' is remote; expected a folder on this machine"):
        run("memory://here")


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="writing or reading .*file.* failed"):
        run(tmp_path / "file")
