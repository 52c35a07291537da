"""Checkpoints of Trainer and of torch.distributed.checkpoint; the model in memory and sums by hand are the oracles."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from tied_model import Tied
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

from tracer import CheckpointError
from tracer.training.adam import read_training_checkpoint
from tracer.training.checkpoint_paths import checkpoints_at
from tracer.training.load_state import check_headers, load_state

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def write_state(folder, step, log):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": log}))


def test_rates_are_sums_over_the_steps_since_the_checkpoint_before(tmp_path):
    log = [{"step": step, "learning_rate": 1.0 - step / 100} for step in (10, 20, 30)] + [{"step": 30, "eval_loss": 1}]
    for step in (10, 30):
        write_state(tmp_path / f"checkpoint-{step}", step, [entry for entry in log if entry["step"] <= step])
    found = checkpoints_at(tmp_path)
    by_hand = [1 - max(step, 10) / 100 for step in range(1, 31)]  # constant before the first logged step
    np.testing.assert_allclose([rate for _, rate in found], [sum(by_hand[:10]), sum(by_hand[10:])])
    assert [path.name for path, _ in found] == ["checkpoint-10", "checkpoint-30"]
    (only,) = checkpoints_at(tmp_path / "checkpoint-30")
    np.testing.assert_allclose(only[1], sum(by_hand))


def test_without_logged_rates_none_is_known(tmp_path):
    write_state(tmp_path / "checkpoint-10", 10, [{"step": 10, "loss": 1.0}])
    assert [rate for _, rate in checkpoints_at(tmp_path)] == [None]
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"trainer_state\.json is no state of a trainer"):
        checkpoints_at(tmp_path)


def train(folder):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12
    )
    model = transformers.LlamaForCausalLM(config)
    rows = [{"input_ids": torch.arange(row, row + 5), "labels": torch.arange(row, row + 5)} for row in range(8)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=4, save_steps=2, logging_steps=1, report_to=[], use_cpu=True, learning_rate=0.01,
        per_device_train_batch_size=4, weight_decay=0.1, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    return model, trainer.optimizer


def test_a_trainers_checkpoints_have_its_weights_rates_and_moments(tmp_path):
    model, optimizer = train(tmp_path)
    (_, first), (last, second) = checkpoints_at(tmp_path)
    assert last.name == "checkpoint-4" and 0.01 < first < 0.0201 and 0 < second < 0.0101  # two steps each, decaying
    names = [name for name, _ in model.named_parameters()]
    found = read_training_checkpoint(last, model, names)
    for name, parameter in model.named_parameters():
        assert torch.equal(found.state[name], parameter)
        assert torch.equal(found.moments[name].values, optimizer.state[parameter]["exp_avg_sq"])
        assert found.moments[name].step == 4


def test_an_optimizer_with_other_groups_than_the_trainers_is_refused(tmp_path):
    model, _ = train(tmp_path)
    path = tmp_path / "checkpoint-4" / "optimizer.pt"
    state = torch.load(path)
    decayed, others = (group["params"] for group in state["param_groups"])
    decayed[-1], others[-1] = others[-1], decayed[-1]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match="which is which cannot be told"):
        read_training_checkpoint(path.parent, model, ["lm_head.weight"])


# -- Distributed checkpoints -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [".", "pytorch_model_fsdp_0"])
def test_a_distributed_checkpoint_is_read_without_its_processes(tmp_path, folder):
    model = Tied(1)
    dcp.save({"model": model.state_dict()}, checkpoint_id=tmp_path / "checkpoint-5" / folder, no_dist=True)
    (found,) = checkpoints_at(tmp_path)
    state = load_state(Tied(0), found[0])
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


class Command:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def save_nested(folder, weights, optimizer):
    dcp.save({"model": weights, "optimizer": optimizer, "step": 7}, checkpoint_id=folder, no_dist=True)


def save_beside_weights(folder, weights, optimizer):
    dcp.save({**weights, "optimizer": optimizer, "loader": Command()}, checkpoint_id=folder, no_dist=True)


def save_as_accelerate(folder, weights, optimizer):
    dcp.save({"model": weights}, checkpoint_id=folder / "pytorch_model_fsdp_0", no_dist=True)
    dcp.save({"optimizer": optimizer}, checkpoint_id=folder / "optimizer_0", no_dist=True)


def save_whole(folder, weights, optimizer):
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    torch.save(optimizer, folder / "optimizer.bin")


@pytest.mark.parametrize("save", [save_nested, save_beside_weights, save_as_accelerate, save_whole])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_second_moments_of_a_distributed_checkpoint_are_the_optimizers(tmp_path, monkeypatch, save, flat, amsgrad):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Tied(1)
    others = [value for name, value in model.named_parameters() if "bias" not in name]
    biases = [value for name, value in model.named_parameters() if "bias" in name]
    groups = [{"params": biases, "betas": (0.9, 0.98)}, {"params": others, "eps": 1e-6}]
    optimizer = torch.optim.AdamW(groups, 1e-2, amsgrad=amsgrad)
    for step in range(3):
        optimizer.zero_grad()
        sum(((step + 1) * value).sin().sum() for value in model.parameters()).backward()
        optimizer.step()
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    save(tmp_path / "checkpoint-3", *get_state_dict(model, optimizer, options=options))
    names = [name for name, _ in model.named_parameters()]
    ((path, _),) = checkpoints_at(tmp_path)
    found = read_training_checkpoint(path, Tied(0), names)
    for name, parameter in model.named_parameters():
        entry, moment = optimizer.state[parameter], found.moments[name]
        assert torch.equal(found.state[name], parameter)
        assert torch.equal(moment.values, entry["max_exp_avg_sq" if amsgrad else "exp_avg_sq"])
        assert moment.step == 3 and moment.beta2 == (0.98 if "bias" in name else 0.999)
        assert moment.eps == (1e-8 if "bias" in name else 1e-6)
    assert load_state(Tied(0), path).keys() == model.state_dict().keys()
    check_headers(Tied(0), path)
    assert not (tmp_path / "executed").exists()


_SHARDS = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp, torch.multiprocessing as mp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

def save(rank, folder, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    whole = {"weight": torch.arange(15.0).reshape(5, 3), "bias": torch.arange(5.0)}
    dcp.save({name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in whole.items()}, checkpoint_id=folder)
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(save, (sys.argv[1], sys.argv[2]), nprocs=2)
"""


def test_shards_of_two_processes_are_put_together(tmp_path):
    (tmp_path / "save.py").write_text(_SHARDS)
    folder = tmp_path / "shards"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, tmp_path / "save.py", folder, tmp_path / "store"]
    subprocess.run(command, check=True, timeout=240, env=environment)
    assert len(list(folder.glob("*.distcp"))) == 2
    state = load_state(nn.Linear(3, 5), folder)
    assert torch.equal(state["weight"], torch.arange(15.0).reshape(5, 3))
    assert torch.equal(state["bias"], torch.arange(5.0))
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="lacks shards"):
        load_state(nn.Linear(3, 5), folder)


def test_metadata_that_ask_for_a_call_are_refused_and_nothing_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Command()))
    with pytest.raises(CheckpointError, match="never executed here"):
        load_state(nn.Linear(3, 5), tmp_path)
    assert not (tmp_path / "executed").exists()
