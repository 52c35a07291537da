"""The callbacks for Hugging Face and Lightning, in real trainers, up to scores."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import os
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tracer
from tracer import attribute, load_checkpoints, open_recording
from tracer.training.recording import Even

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(2))

needs_transformers = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("transformers", "accelerate"))), reason="transformers is not installed"
)
needs_lightning = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("lightning", "pytorch_lightning"))), reason="lightning is not installed"
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Tokens(torch.utils.data.Dataset):
    def __init__(self, count):
        self.tokens = torch.randint(1, 30, (count, 6), generator=torch.Generator().manual_seed(count))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, row):
        return {"input_ids": self.tokens[row], "labels": torch.tensor(row % 2)}


def bert():
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=8, num_labels=2, **sizes)
    return transformers.BertForSequenceClassification(config)


def hf_trainer(folder, callback=None, **options):
    import transformers

    settings = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 4,
        "max_steps": 7,
        "learning_rate": 0.01,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "warmup_steps": 2,
        **options,
    }
    return transformers.Trainer(
        model=bert(),
        args=transformers.TrainingArguments(**settings),
        train_dataset=Tokens(12),
        eval_dataset=Tokens(4),
        callbacks=[callback] if callback else [],
    )


def logged_rates(trainer):
    return {line["step"]: line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line}


@needs_transformers
def test_a_hugging_face_training_is_recorded_up_to_scores(tmp_path):
    from tracer.training.integrations.huggingface import HuggingFaceRecorderCallback

    trainer = hf_trainer(tmp_path, HuggingFaceRecorderCallback(tmp_path / "run", every=3))
    trainer.train()
    rates = logged_rates(trainer)
    recording = open_recording(tmp_path / "run")
    assert [one.step for one in recording.checkpoints] == [3, 6, 7]
    for one, steps in zip(recording.checkpoints, [(1, 2, 3), (4, 5, 6), (7,)], strict=True):
        assert one.learning_rate_sums[0] == pytest.approx(sum(rates[step] for step in steps))
    assert len(recording.groups) == 2  # with weight decay and without, of one rate
    last = load_file(recording.checkpoints[-1].path)
    assert all(torch.equal(value, last[name]) for name, value in trainer.model.state_dict().items())
    found = attribute(
        trainer.model, "text_classification", Tokens(12), Tokens(4), load_checkpoints(tmp_path / "run"),
        save_dir=tmp_path / "store", proj_dim=64,
    )  # fmt: skip
    assert found.scores.shape == (12, 4) and np.abs(found.scores).max() > 0


@needs_transformers
def test_a_hugging_face_training_is_what_it_is_without_the_callback(tmp_path):
    from tracer.training.integrations.huggingface import HuggingFaceRecorderCallback

    weights = []
    for callback in (HuggingFaceRecorderCallback(tmp_path / "run", every=1, second_moments=True), None):
        trainer = hf_trainer(tmp_path, callback)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@needs_transformers
@pytest.mark.parametrize("restore", [False, True])
def test_a_hugging_face_training_that_is_resumed_continues_its_recording(tmp_path, restore):
    from tracer.training.integrations.huggingface import HuggingFaceRecorderCallback

    whole = hf_trainer(tmp_path, HuggingFaceRecorderCallback(tmp_path / "whole", every=Even(2)), max_steps=9)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 9}
    first = hf_trainer(tmp_path, HuggingFaceRecorderCallback(tmp_path / "run", every=Even(2)), **saving)
    first.train()
    again = hf_trainer(
        tmp_path,
        HuggingFaceRecorderCallback(tmp_path / "run", every=Even(2)),
        restore_callback_states_from_checkpoint=restore,
        **saving,
    )
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    expected, found = (open_recording(tmp_path / name).checkpoints for name in ("whole", "run"))
    assert [one.step for one in found] == [one.step for one in expected] == [2, 4, 6, 8, 9]
    assert [one.model_id for one in found] == [0, 1, 5, 6, 7]  # those after the checkpoint were recorded anew
    for one, other in zip(found, expected, strict=True):
        assert one.learning_rate_sums == pytest.approx(other.learning_rate_sums)


@needs_transformers
def test_the_last_state_is_saved_before_the_best_one_is_loaded(tmp_path):
    from tracer.training.integrations.huggingface import HuggingFaceRecorderCallback

    seen = {}

    class Watch(HuggingFaceRecorderCallback):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            seen[state.global_step] = copy.deepcopy(kwargs["model"].state_dict())

    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = hf_trainer(tmp_path, Watch(tmp_path / "run", every=5), **options, **best)
    trainer.train()
    recording = open_recording(tmp_path / "run")
    assert [one.step for one in recording.checkpoints] == [5, 7]
    last = load_file(recording.checkpoints[-1].path)
    assert all(torch.equal(value, last[name]) for name, value in seen[7].items())
    assert not all(torch.equal(value, last[name]) for name, value in trainer.model.state_dict().items())


@needs_transformers
def test_early_stopping_keeps_the_last_state(tmp_path, caplog):
    import transformers

    from tracer.training.integrations.huggingface import HuggingFaceRecorderCallback

    class Stop(transformers.TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= 4

    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = hf_trainer(tmp_path, HuggingFaceRecorderCallback(tmp_path / "run", every=100), **options, **best)
    trainer.add_callback(Stop())
    trainer.train()
    assert [one.step for one in open_recording(tmp_path / "run").checkpoints] == [4]
    assert "the last state is not saved" not in caplog.text


@needs_transformers
def test_logged_losses_decide_in_a_hugging_face_training(tmp_path):
    from tracer.training.integrations.huggingface import HuggingFaceRecorderCallback
    from tracer.training.recording import LossDecrease

    callback = HuggingFaceRecorderCallback(tmp_path / "run", every=LossDecrease(fraction=0.001, beta=0.0))
    trainer = hf_trainer(tmp_path, callback, max_steps=12, logging_steps=2)
    trainer.train()
    losses = {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}
    due = open_recording(tmp_path / "run").checkpoints[:-1]
    assert due
    for one in due:
        assert one.loss == losses[one.step - 1]  # the mean that was logged just before


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def lightning_module(num_optimizers=1):
    from tracer.training.integrations import lightning as integration

    package = sys.modules[integration._Callback.__module__.partition(".")[0]]
    pl = package.pytorch if package.__name__ == "lightning" else package

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net().net
            self.losses = []
            self.automatic_optimization = num_optimizers == 1

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
            if num_optimizers > 1:
                return [torch.optim.SGD(self.parameters(), lr=0.5) for _ in range(num_optimizers)]
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    return pl, Module()


def fit(folder, callback, module=None, ckpt_path=None, callbacks=(), **options):
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl, fresh = lightning_module()
    module = module or fresh
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        default_root_dir=folder, enable_model_summary=False, callbacks=[callback, *callbacks], **{**settings, **options}
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=6)
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module


@needs_lightning
def test_a_lightning_training_is_recorded_up_to_scores(tmp_path):
    from tracer.training.integrations.lightning import LightningRecorderCallback

    module = fit(tmp_path, LightningRecorderCallback(tmp_path / "run", every=2, submodule="net"), max_steps=5)
    recording = open_recording(tmp_path / "run")
    assert [(one.step, one.epoch) for one in recording.checkpoints] == [(2, 0), (4, 0), (5, 1)]
    found = load_checkpoints(tmp_path / "run")
    assert [rate for _, rate in found] == [0.5 + 0.25, 0.125 + 0.0625, 0.03125]
    assert [one.loss for one in recording.checkpoints] == pytest.approx([module.losses[at] for at in (1, 3, 4)])
    last = load_file(found[-1][0])
    assert all(torch.equal(value, last[name]) for name, value in module.net.state_dict().items())
    scores = attribute(
        module.net, "image_classification", (X, Y), (X[:4], Y[:4]), found, save_dir=tmp_path / "s"
    ).scores
    assert scores.shape == (24, 4) and np.abs(scores).max() > 0


@needs_lightning
def test_a_lightning_training_is_what_it_is_without_the_callback(tmp_path):
    from tracer.training.integrations.lightning import LightningRecorderCallback

    callback = LightningRecorderCallback(tmp_path / "run", every=1)
    recorded = fit(tmp_path, callback, max_steps=5)
    pl, _ = lightning_module()
    plain = fit(tmp_path, pl.Callback(), max_steps=5)
    assert recorded.losses == plain.losses
    assert all(torch.equal(one, two) for one, two in zip(recorded.parameters(), plain.parameters(), strict=True))


@needs_lightning
def test_accumulated_batches_of_lightning_are_one_step(tmp_path):
    from tracer.training.integrations.lightning import LightningRecorderCallback

    callback = LightningRecorderCallback(tmp_path / "run", every=1)
    module = fit(tmp_path, callback, max_steps=4, accumulate_grad_batches=2)
    recording = open_recording(tmp_path / "run")
    assert [one.step for one in recording.checkpoints] == [1, 2, 3, 4]
    assert [one.loss for one in recording.checkpoints] == pytest.approx([module.losses[at] for at in (1, 3, 5, 7)])
    assert all(name.startswith("net.") for name in recording.shapes)


@needs_lightning
def test_a_lightning_training_that_is_resumed_continues_its_recording(tmp_path):
    from tracer.training.integrations.lightning import LightningRecorderCallback

    pl, _ = lightning_module()
    keep = pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    options = {"max_steps": 7, "enable_checkpointing": True}
    fit(tmp_path, LightningRecorderCallback(tmp_path / "run", every=2), callbacks=[keep], **options)
    expected = load_checkpoints(tmp_path / "run")
    again = LightningRecorderCallback(tmp_path / "run", every=2)
    fit(tmp_path, again, ckpt_path=tmp_path / "ckpt" / "step=3.ckpt", **options)
    recording = open_recording(tmp_path / "run")
    assert [one.step for one in recording.checkpoints] == [2, 4, 6, 7]
    assert [one.model_id for one in recording.checkpoints] == [0, 4, 5, 6]
    assert load_checkpoints(tmp_path / "run") == [(path, pytest.approx(rate)) for path, rate in expected]


@needs_lightning
def test_an_error_in_a_lightning_training_stops_the_recording(tmp_path):
    from tracer.training.integrations.lightning import LightningRecorderCallback

    _, module = lightning_module()
    whole, callback = module.training_step, LightningRecorderCallback(tmp_path / "run", every=2)

    def fail(batch, batch_idx):
        return whole(batch, batch_idx) if batch_idx < 3 else 1 / 0

    module.training_step = fail
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, callback, module, max_steps=5)
    assert callback.recorder.closed
    assert [one.step for one in open_recording(tmp_path / "run").checkpoints] == [2]


@needs_lightning
def test_what_lightning_cannot_record_says_what_to_do(tmp_path):
    from tracer.training.integrations.lightning import LightningRecorderCallback

    with pytest.raises(tracer.InputError, match="submodule='head' is not in the LightningModule .*named_modules"):
        fit(tmp_path, LightningRecorderCallback(tmp_path / "run", submodule="head"), max_steps=1)
    _, module = lightning_module(num_optimizers=2)
    with pytest.raises(tracer.InputError, match="2 optimizers came with optimizer=None; choose one by its number"):
        fit(tmp_path, LightningRecorderCallback(tmp_path / "run"), module, max_steps=1)


@pytest.mark.parametrize(
    ("module", "callback", "packages", "extra"),
    [
        ("huggingface", "HuggingFaceRecorderCallback", ["transformers"], "hf"),
        ("lightning", "LightningRecorderCallback", ["lightning", "pytorch_lightning"], "lightning"),
    ],
)
def test_a_package_that_is_missing_is_named_with_how_to_install_it(monkeypatch, module, callback, packages, extra):
    find, name = importlib.util.find_spec, f"tracer.training.integrations.{module}"
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *more: None if one in packages else find(one, *more))
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, name, None)  # so that it is put back, also where it was not there
    del sys.modules[name]
    without = importlib.import_module(name)
    with pytest.raises(tracer.MissingDependencyError, match=rf"needs {packages[0]}: pip install 'tracin\[{extra}\]'"):
        getattr(without, callback)("run")
