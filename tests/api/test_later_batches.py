"""Models that are right on the first batches and would be wrong on later ones: exact, or refused with the cause."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from function_net import Net, loss
from torch import nn

import tracer
from tracer import attribute

QUIET, ODD = 4, 10  # the batches that look harmless, and those after them


def labels(n=6):
    return torch.randint(0, 4, (n,))


def plain(change):
    """Batches of inputs [6, 3], the later ones changed."""
    inputs = [torch.randn(6, 3) for _ in range(QUIET + ODD)]
    return [(x if i < QUIET else change(x), labels()) for i, x in enumerate(inputs)]


def changed_first(change):
    """Batches of large inputs, the first ones changed."""
    return [(change(x) if i < QUIET else x, y) for i, (x, y) in enumerate(plain(large))]


def padded(quiet, odd):
    """Batches of sequences of some lengths, zeros after them."""
    batches = []
    for i in range(QUIET + ODD):
        lengths = torch.tensor(quiet) if i < QUIET else torch.tensor(odd)[torch.randperm(len(odd))]
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        batches.append((torch.randn(*mask.shape, 3) * mask[..., None], lengths, labels(len(lengths))))
    return batches


def kinds():
    return [
        (torch.randn(6, 3), torch.zeros(6, dtype=torch.int64) if i < QUIET else torch.randint(0, 3, (6,)), labels())
        for i in range(QUIET + ODD)
    ]


def pooled(model, x, lengths):
    mask = (torch.arange(x.shape[1]) < lengths[:, None])[..., None].to(x.dtype)
    return model.o((torch.tanh(model.h(x)) * mask).sum(1))


def sorted_by_length(model, x, lengths):
    order = lengths.argsort(descending=True, stable=True)
    return pooled(model, x[order], lengths[order])[order.argsort()]


def unpadded(model, x, lengths):
    mask = torch.arange(x.shape[1]) < lengths[:, None]
    hidden = torch.tanh(model.h(x[mask]))
    return model.o(hidden.new_zeros(len(x), 5).index_add(0, mask.nonzero()[:, 0], hidden))


def packed(model, x, lengths):
    packs = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    hidden = packs._replace(data=torch.tanh(model.h(packs.data)))
    return model.o(nn.utils.rnn.pad_packed_sequence(hidden, batch_first=True)[0].sum(1))


def grouped(model, x, kind):
    order = kind.argsort(stable=True)
    return model.o(torch.tanh(model.h(x[order])))[order.argsort()]


def experts(model, x, kind):
    hidden = torch.tanh(model.h(x))
    out = hidden.new_zeros(len(x), 4)
    for expert in range(3):
        rows = (kind == expert).nonzero()[:, 0]
        if len(rows):
            out = out.index_copy(0, rows, model.experts[expert](hidden[rows]))
    return model.o(hidden) * 0.1 + out


def deduplicated(model, x):
    unique, inverse = x[:, :1].round().unique(dim=0, return_inverse=True)
    return model.o(torch.tanh(model.h(x + 0 * unique.expand(-1, 3)[inverse])))


def unique_rows(model, x):
    unique, inverse = x.unique(dim=0, return_inverse=True)
    return model.o(torch.tanh(model.h(unique)))[inverse]


def reversed_when_negative(model, x):
    flipped = bool((x[:, 0] < 0).all())
    out = model.o(torch.tanh(model.h(x.flip(0) if flipped else x)))
    return out.flip(0) if flipped else out


def sorted_by_value(model, x):
    order = x[:, 0].argsort() if bool((x > 2).any()) else torch.arange(len(x))
    return model.o(torch.tanh(model.h(x[order])))[order.argsort()]


def rolled(model, x):
    shift = int((x[:, 0] > 2).any())
    return model.o(torch.tanh(model.h(x.roll(shift, 0)))).roll(-shift, 0)


def functional_weight(model, x):
    hidden = model.h(x)
    if (x[:, 0] > 2).any():
        hidden = torch.where(
            x[:, :1] > 2, F.linear(torch.tanh(hidden), model.h.weight @ torch.ones(3, 5).to(x)), hidden
        )
    return model.o(hidden)


def extra_bias(model, x):
    out = model.o(torch.tanh(model.h(x)))
    return out + (x[:, :1] > 2) * model.o.bias.exp() if (x > 2).any() else out


def centred_if_large(model, x):
    return model.o(torch.tanh(model.h(x - x.mean(0) if (x > 2).any() else x)))


def sees_the_one_before(model, x):
    return model.o(torch.tanh(model.h(x + (x > 2).any() * F.pad(x, (0, 0, 1, 0))[:-1])))


def scaled_by_largest(model, x):
    return model.o(torch.tanh(model.h(x / x.abs().amax().clamp(min=4.0))))


def mean_over_longest(model, x, lengths):
    mask = (torch.arange(x.shape[1]) < lengths[:, None])[..., None].to(x.dtype)
    return model.o((torch.tanh(model.h(x)) * mask).mean(1))


def ranked(model, x):
    ranks = x[:, 0].argsort().argsort().to(x.dtype) if (x > 2).any() else torch.zeros(len(x)).to(x)
    return model.o(torch.tanh(model.h(x + 0.3 * ranks[:, None])))


def large(x):
    return x + 2.5 * (torch.rand(len(x), 1) < 0.7)


def positives(model, batch):
    x, y = batch
    positive = (y > 1).double()
    count = positive.sum() if positive.sum() > 5 else torch.tensor(1.0)
    return F.cross_entropy(model(x), y, reduction="none") / count.to(x.dtype)


EXACT = {
    "sorted": (sorted_by_length, lambda: padded([6, 5, 5, 3, 2, 2], [2, 6, 3, 5, 4, 1])),
    "packed": (packed, lambda: padded([4, 4, 4, 4, 4, 4], [2, 6, 3, 5, 4, 1])),
    "unpadded": (unpadded, lambda: padded([4, 4, 4, 4, 4, 4], [2, 6, 3, 5, 6, 2])),
    "grouped": (grouped, kinds),
    "experts": (experts, kinds),
    "unique": (unique_rows, lambda: changed_first(lambda x: x.sort(0).values)),
    "deduplicated": (deduplicated, lambda: plain(large)),
    "reversed": (reversed_when_negative, lambda: plain(lambda x: -x.abs())),
    "by value": (sorted_by_value, lambda: plain(large)),
    "rolled": (rolled, lambda: plain(large)),
    "functional": (functional_weight, lambda: changed_first(lambda x: x.clamp(max=1.9))),
    "extra bias": (extra_bias, lambda: changed_first(lambda x: x.clamp(max=1.9))),
}
REFUSED = {
    "centred": (centred_if_large, lambda: plain(large), "first that differs"),
    "one before": (sees_the_one_before, lambda: plain(large), "influence each other"),
    "largest": (scaled_by_largest, lambda: plain(lambda x: 3 * x), "influence each other"),
    "longest": (
        mean_over_longest,
        lambda: padded([4, 4, 4, 4, 4, 4], [2, 6, 3, 5, 4, 1]),
        "influence|padding of sample",
    ),
    "ranks": (ranked, lambda: plain(large), "influence each other"),
}


def build(name, dtype, cases):
    torch.manual_seed(0)
    forward, batches = cases[name][:2]
    parts = {"experts": nn.ModuleList(nn.Linear(5, 4) for _ in range(3))} if forward is experts else {}
    model = Net(forward, **parts).to(dtype)
    as_dtype = [tuple(leaf.to(dtype) if leaf.is_floating_point() else leaf for leaf in batch) for batch in batches()]
    return model, as_dtype


def expected_gradients(model, batches, task):
    model.eval()
    rows = []
    for batch in batches:
        for i in range(len(batch[-1])):
            found = task(model, tuple(leaf[i : i + 1] for leaf in batch)).sum()
            grads = torch.autograd.grad(found, list(model.parameters()), allow_unused=True, materialize_grads=True)
            rows.append(torch.cat([grad.reshape(-1) for grad in grads]).double().numpy())
    return np.stack(rows)


def stored_gradients(store, model_id=0):
    with store.checkpoint(model_id) as table:
        return np.concatenate([part for _, part in table.raw_features(0, table.num_rows)]).astype(np.float64)


def run(tmp_path, model, batches, task=loss, states=1):
    checkpoints = [(model.state_dict(), 1.0)]
    for i in range(1, states):
        checkpoints.append(({key: value * (1 + 0.01 * i) for key, value in model.state_dict().items()}, 1.0))
    options = {"projector": "none", "storage": "float32", "progress": False}
    return attribute(model, task, batches, batches[:1], checkpoints, save_dir=tmp_path / "store", **options)


DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_gradients_of_later_batches_are_exact(tmp_path, name, dtype):
    model, batches = build(name, dtype, EXACT)
    store = run(tmp_path, model, batches).tracer.store
    expected, found = expected_gradients(model, batches, loss), stored_gradients(store)
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert errors.max() < (0.15 if dtype == torch.bfloat16 else 1e-4)
    assert store.audited().audited >= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REFUSED)
def test_samples_that_influence_each_other_later_are_refused(tmp_path, name, dtype):
    model, batches = build(name, dtype, REFUSED)
    with pytest.raises(tracer.GradientError, match=REFUSED[name][2]):
        run(tmp_path, model, batches)


def test_a_loss_that_couples_is_named_and_not_the_model(tmp_path):
    torch.manual_seed(0)
    model = Net(lambda m, x: m.o(torch.tanh(m.h(x))))
    batches = [
        (torch.randn(6, 3), torch.zeros(6, dtype=torch.int64) if i < QUIET else torch.full((6,), 2)) for i in range(9)
    ]
    with pytest.raises(tracer.GradientError, match="it is the task's loss that depends on the other samples"):
        run(tmp_path, model, batches, positives)


def swapped(model, x):
    is_odd = len(x) > 6 and bool((x > 2).any())
    order = (
        torch.cat([torch.arange(len(x) - 6), torch.arange(len(x) - 6, len(x)).flip(0)])
        if is_odd
        else torch.arange(len(x))
    )
    return model.o(torch.tanh(model.h(x[order])))[order.argsort()]


def test_finished_checkpoints_are_computed_again(tmp_path, caplog, monkeypatch):
    """Six of 32 samples of one batch are wrong, which no audit meets at the first checkpoint."""
    monkeypatch.setattr("tracer.gradients.audit.FIRST_BATCHES", 1000)
    torch.manual_seed(0)
    model = Net(swapped)
    batches = [(torch.randn(32, 3).clamp(max=1.9), torch.randint(0, 4, (32,))) for _ in range(4)]
    batches[3][0][5] += 5
    with caplog.at_level(logging.WARNING, "tracer"):
        store = run(tmp_path, model, batches, states=30).tracer.store
    expected, found = expected_gradients(model, batches, loss), stored_gradients(store)
    assert (np.linalg.norm(found - expected, axis=1) < 1e-4 * np.linalg.norm(expected, axis=1)).all()
    assert "All 128 training examples are forgotten" in caplog.text
    assert "h.weight" in store.manifest.info["fallback"]
    changed = tracer.Tracer(model, loss, 128, tmp_path / "store", projector="none", storage="float32")
    assert "h.weight" in changed._factory.engine.fallback  # another process begins with what was found


def test_a_loop_of_ones_own_has_held_batches_computed_again(tmp_path):
    model, batches = build("rolled", torch.float32, EXACT)
    options = {"projector": "none", "storage": "float32", "check_rows": True}
    own = tracer.Tracer(model, loss, 6 * len(batches), tmp_path / "store", **options)
    own.load_checkpoint(model.state_dict(), model_id=0)
    for batch in batches:
        own.featurize(batch, num_samples=6)
    own.finalize_features()
    expected = expected_gradients(model, batches, loss)
    np.testing.assert_allclose(stored_gradients(own.store), expected, atol=1e-4)


def test_exact_scores_are_computed_again(tmp_path):
    model, batches = build("rolled", torch.float64, EXACT)
    options = {"projector": "none", "progress": False}
    found = attribute(
        model, loss, batches, batches[-2:], [(model.state_dict(), 1.0)], save_dir=tmp_path / "s", **options
    )
    gradients = expected_gradients(model, batches, loss)
    np.testing.assert_allclose(found.scores, gradients @ gradients[-12:].T, rtol=1e-4, atol=1e-4)
