"""Lower precision by `autocast`: near full precision, equal to autograd under autocast, recorded, only on demand."""

from __future__ import annotations

import copy
import functools
import types

import numpy as np
import pytest
import torch
from store_cases import stored_features
from torch import nn
from tracer_cases import build, featurize, score

from tracer import GradientError, InputError, MismatchError, Tracer


class Block(nn.Module):
    """A small transformer for classes, with a convolution before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 8, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.gain = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        h = self.norm(self.conv(x).flatten(2).transpose(1, 2))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.head((h * self.gain).mean(1))


@pytest.mark.parametrize("kind", ["conv net", "transformer"])
@pytest.mark.parametrize("autocast", ["bfloat16", torch.float16])
def test_scores_are_near_those_of_full_precision(run, tmp_path, kind, autocast):
    if kind == "transformer":
        torch.manual_seed(3)
        run.model = Block()
        run.checkpoints = [(run.model.state_dict(), 0.1)]
    scores = []
    for name, dtype in (("full", None), ("half", autocast)):
        tracing = build(run, tmp_path / name, autocast=dtype)
        featurize(tracing, run)
        score(tracing, run)
        scores.append(np.array(tracing.finalize_scores("test")))
    difference = np.abs(scores[1] - scores[0]).max() / np.abs(scores[0]).max()
    assert 1e-6 < difference < 0.1
    assert not tracing._factory.engine.fallback


def test_gradients_are_those_of_autograd_under_autocast(run, tmp_path):
    tracing = build(run, tmp_path / "store", autocast="bfloat16")
    state, rate = run.checkpoints[-1]
    tracing.load_checkpoint(state, 0, rate)
    tracing.featurize(run.train, num_samples=len(run.x))
    tracing.flush()
    run.model.load_state_dict(state)
    run.model.eval()
    expected = []
    for x, y in zip(run.x, run.y, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            logits = run.model(x[None]).float()[0]
        margin = logits[y] - logits[torch.arange(3) != y].logsumexp(0)
        grads = torch.autograd.grad(margin, list(run.model.parameters()))
        expected.append(torch.cat([grad.flatten() for grad in grads]))
    found = torch.from_numpy(stored_features(tracing.store.checkpoint(0), 0, len(run.x)))
    error = (found - torch.stack(expected)).norm(dim=1) / found.norm(dim=1)
    assert float(error.max()) < 1e-2


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
def test_surrounding_autocast_does_not_count(run, tmp_path, autocast):
    """Nor do the casts of weights that it keeps, of the model's own or of another checkpoint's."""
    tracing = build(run, tmp_path / "alone", autocast=autocast)
    featurize(tracing, run)
    expected = [stored_features(tracing.store.checkpoint(number), 0, len(run.x)) for number in range(3)]
    run.model.eval()
    for enabled in (False, True):
        tracing = build(run, tmp_path / str(enabled), autocast=autocast)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            before = run.model(run.x)
            featurize(tracing, run)
            assert torch.equal(run.model(run.x), before)
        for number in range(3):
            np.testing.assert_array_equal(
                stored_features(tracing.store.checkpoint(number), 0, len(run.x)), expected[number]
            )


def test_precision_is_recorded_and_checked(run, tmp_path):
    build(run, tmp_path / "store", autocast="bfloat16")
    with pytest.raises(MismatchError, match="autocast"):
        build(run, tmp_path / "store")
    with pytest.raises(InputError, match="expected 'bfloat16', 'float16' or None"):
        Tracer(run.model, "image_classification", 3, tmp_path / "other", autocast="int8")


class Inside(nn.Module):
    """A model that chooses its precision itself."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.head(torch.tanh(self.hidden(x.flatten(1)[:, :4])))


def featurized(run, model, folder, **options):
    run.model, run.checkpoints = model, [(model.state_dict(), 0.1)]
    tracing = build(run, folder, **options)
    featurize(tracing, run)
    return tracing


def test_autocast_inside_a_forward_is_asked_for(run, tmp_path):
    torch.manual_seed(0)
    with pytest.raises(GradientError, match="torch.autocast in bfloat16.*Pass autocast='bfloat16'"):
        featurized(run, Inside(), tmp_path / "hidden")
    tracing = featurized(run, Inside(), tmp_path / "told", autocast="bfloat16")
    assert tracing.store.manifest.settings["task"]["autocast"] == "bfloat16"


def test_a_forward_wrapped_in_autocast_is_recorded(run, tmp_path):
    """As accelerate and Trainer leave a model: its forward in autocast, in a function that converts outputs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 3))
    model(run.x[:2])
    inner = torch.autocast("cpu", torch.bfloat16)(model.forward.__func__)

    @functools.wraps(inner)
    def converted(*args, **kwargs):
        return inner(*args, **kwargs).float()

    plain = featurized(run, copy.deepcopy(model), tmp_path / "plain", autocast="bfloat16")
    model.forward = types.MethodType(converted, model)
    wrapped = featurized(run, model, tmp_path / "wrapped")
    assert wrapped.store.manifest.settings["task"]["autocast"] == "bfloat16"
    tables = [each.store.checkpoint(0) for each in (wrapped, plain)]
    found, expected = [stored_features(table, 0, table.num_rows) for table in tables]
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=0.05 * np.abs(expected).max())
