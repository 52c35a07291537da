"""Gradients that are collected in the trainers of Hugging Face and Lightning, against a loop over rows."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from collecting_cases import EXACT, N, X, Y, features, mlp
from torch import nn
from trainer_cases import TOKENS, Texts, bert, hf_trainer, needs_transformers

from tracer import GradientCollector, IndexedDataset, attribute
from tracer.errors import GradientError, InputError

needs_lightning = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("lightning", "pytorch_lightning"))), reason="lightning is not installed"
)


def gpt2():
    import transformers

    torch.manual_seed(0)
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = transformers.GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=2, n_head=2, **rates)
    return transformers.GPT2LMHeadModel(config).double()


def completeness(collector, models):
    """Return the change of weights that the collected sums explain, and the change itself, both flat."""
    sums = features(collector).sum((0, 1)) / len(TOKENS)
    before, after = (torch.cat([value.detach().reshape(-1) for value in model.parameters()]) for model in models)
    return sums, before - after


@needs_transformers
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_steps_of_a_hugging_face_training_are_the_sums_of_what_was_collected(tmp_path, accumulated):
    from tracer.api.collecting.huggingface import HuggingFaceCollectorCallback

    callback = HuggingFaceCollectorCallback(tmp_path / "run", "text_classification", 12, every=3, **EXACT)
    model = bert()
    options = {"weight_decay": 0.0, "gradient_accumulation_steps": accumulated}
    hf_trainer(tmp_path, model, callback, **options).train()
    sums, change = completeness(callback.recorder, (bert(), model))
    torch.testing.assert_close(sums, change, rtol=1e-5, atol=1e-7)
    assert (features(callback.recorder).abs().sum((0, 2)) > 0).sum() == 12


@needs_transformers
def test_a_hugging_face_training_with_dropout_is_what_it_is_without_the_callback(tmp_path):
    from tracer.api.collecting.huggingface import HuggingFaceCollectorCallback

    callback = HuggingFaceCollectorCallback(tmp_path / "run", "text_classification", 12, every=3, **EXACT)
    found = []
    for each in (callback, None):
        model = bert(0.1)
        hf_trainer(tmp_path, model, each).train()
        found.append(model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


@needs_transformers
def test_trl_s_trainer_collects_by_a_second_pass(tmp_path):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    from text_cases import make_tokenizer

    from tracer import LanguageModeling
    from tracer.api.collecting.huggingface import HuggingFaceCollectorCallback

    # One example a step, and no label of a first token, which the trainer counts without predicting it: so its loss is
    # the mean that the pass takes.
    settings = {
        "per_device_train_batch_size": 1,
        "max_steps": 12,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
    }
    settings |= {"optim": "sgd", "use_cpu": True, "bf16": False, "report_to": [], "save_strategy": "no", "seed": 0}
    columns = {"input_ids": TOKENS.tolist(), "labels": [[-100, *row[1:]] for row in TOKENS.tolist()]}
    rows = datasets.Dataset.from_dict({**columns, "example_index": list(range(12))})
    task = LanguageModeling("mean")
    callback = HuggingFaceCollectorCallback(tmp_path / "run", task, 12, every=3, second_pass=True, **EXACT)
    arguments = trl.SFTConfig(
        str(tmp_path / "out"), remove_unused_columns=False, max_grad_norm=0, gradient_checkpointing=False, **settings
    )
    model = gpt2()
    trainer = trl.SFTTrainer(
        model, arguments, train_dataset=rows, processing_class=make_tokenizer(), callbacks=[callback]
    )
    trainer.data_collator = IndexedDataset.collator(trainer.data_collator)
    trainer.train()
    sums, change = completeness(callback.recorder, (gpt2(), model))
    torch.testing.assert_close(sums, change, rtol=1e-4, atol=1e-6)


@needs_transformers
def test_a_hugging_face_training_that_is_resumed_continues_to_collect(tmp_path):
    from tracer.api.collecting.huggingface import HuggingFaceCollectorCallback

    def callback(name):
        return HuggingFaceCollectorCallback(tmp_path / name, "text_classification", 12, every=2, **EXACT)

    whole = callback("whole")
    hf_trainer(tmp_path, bert(), whole, max_steps=9).train()
    saving = {"save_strategy": "steps", "save_steps": 5, "max_steps": 9}
    hf_trainer(tmp_path, bert(), callback("run"), **saving).train()
    again = callback("run")
    model = bert()
    hf_trainer(tmp_path, model, again, **saving).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-5"))
    found, expected = features(again.recorder).sum(0), features(whole.recorder).sum(0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    scores = attribute(
        model,
        "text_classification",
        Texts(),
        Texts(),
        again.recorder.checkpoints,
        save_dir=again.recorder.store,
        **EXACT,
    ).scores
    assert scores.shape == (12, 12) and np.abs(scores).max() > 0


@needs_transformers
def test_a_trainer_that_removes_indices_is_an_error(tmp_path):
    from tracer.api.collecting.huggingface import HuggingFaceCollectorCallback

    callback = HuggingFaceCollectorCallback(tmp_path / "run", "text_classification", 12, **EXACT)
    with pytest.raises(InputError, match="remove_unused_columns=False"):
        hf_trainer(tmp_path, bert(), callback, remove_unused_columns=True).train()


@needs_transformers
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_shares_of_a_language_model_are_those_of_its_rows(tmp_path, checkpointing):
    model = gpt2().train()  # tied embeddings, one position embedding for all rows, a mean over all tokens
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads() if hasattr(model, "enable_input_require_grads") else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.tensor([3, 7, 1])
    labels = TOKENS[rows].clone()
    labels[0, :3] = -100
    count = int((labels[:, 1:] != -100).sum())
    expected = torch.zeros(12, sum(value.numel() for value in model.parameters()), dtype=torch.float64)
    for place, row in enumerate(rows.tolist()):
        single = gpt2()
        logits = single(TOKENS[row][None]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, labels[place, 1:], reduction="sum", ignore_index=-100) / count
        grads = torch.autograd.grad(loss, list(single.parameters()))
        expected[row] = 12 * 0.1 * torch.cat([each.reshape(-1) for each in grads])
    batch = {"input_ids": TOKENS[rows], "labels": labels}
    with GradientCollector(model, optimizer, tmp_path, "language_modeling", 12, every=3, **EXACT) as collector:
        with collector.batch(batch, rows):
            model(**batch).loss.backward()
        optimizer.step()
        collector.step()
    torch.testing.assert_close(features(collector)[0], expected, rtol=1e-5, atol=1e-6)


@needs_transformers
def test_compiled_models_need_a_second_pass(tmp_path):
    model = mlp()
    compiled = torch.compile(model, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows = torch.arange(6)
    nn.functional.cross_entropy(compiled(X[rows]), Y[rows]).backward()  # compiled without hooks
    optimizer.zero_grad()
    collector = GradientCollector(compiled, optimizer, tmp_path, "classification", N, **EXACT)
    with pytest.raises(GradientError, match="second_pass=True"):
        with collector.batch((X[rows], Y[rows]), rows):
            nn.functional.cross_entropy(compiled(X[rows]), Y[rows]).backward()
        optimizer.step()


def lightning_module():
    lightning = importlib.import_module("lightning.pytorch")

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def training_step(self, batch, index):
            x, y, _ = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return lightning, Classifier()


@needs_lightning
@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_steps_of_a_lightning_training_are_the_sums_of_what_was_collected(tmp_path, accumulated):
    from tracer.api.collecting.lightning import LightningCollectorCallback

    lightning, module = lightning_module()
    callback = LightningCollectorCallback(tmp_path / "run", "classification", N, every=3, submodule="net", **EXACT)
    rows = IndexedDataset(torch.utils.data.TensorDataset(X, Y))
    loader = torch.utils.data.DataLoader(rows, batch_size=5, shuffle=True)
    lightning.Trainer(
        accelerator="cpu",
        max_steps=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        accumulate_grad_batches=accumulated,
        gradient_clip_val=0.2,
    ).fit(module, loader)
    sums = features(callback.recorder).sum((0, 1)) / N
    change = torch.cat([value.detach().reshape(-1) for value in mlp().parameters()])
    change -= torch.cat([value.detach().reshape(-1) for value in module.net.parameters()])
    torch.testing.assert_close(sums, change, rtol=1e-5, atol=1e-7)
    assert callback.recorder.checkpoints
