"""The check of large tables: autograd's gradient has the rows that a batch touches, and no others are built."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tracer import GradientError, Tracer
from tracer.data.named_tasks import make_task
from tracer.gradients import rows, selfcheck
from tracer.gradients.per_sample import flat

V, N = 40_000, 12


class Bags(nn.Module):
    """The mean of embeddings, and a head."""

    def __init__(self, **options):
        super().__init__()
        self.table, self.o = nn.Embedding(V, 8, **options), nn.Linear(8, 3)

    def look_up(self, x):
        return self.table(x)

    def forward(self, x):
        return self.o(self.look_up(x).mean(1))


class Scaled(Bags):
    class Table(nn.Embedding):
        def forward(self, x):
            return super().forward(x) * 3

    def __init__(self):
        super().__init__()
        self.table = self.Table(V, 8)


class Tied(Bags):
    def forward(self, x):
        return self.o(self.look_up(x).mean(1)) + F.linear(self.look_up(x).mean(1), self.table.weight)[:, :3]


class Functional(Bags):
    def look_up(self, x):
        return F.embedding(x, self.table.weight)


class Normed(Bags):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.table)


def frequencies():
    return Bags(scale_grad_by_freq=True)


def padded():
    return Bags(padding_idx=0)


def example():
    torch.manual_seed(0)
    x = torch.randint(V, (N, 5))
    x[:, 0], x[:2, 1], x[1:4, 2] = 7, 7, 0  # rows that repeat in an example and between examples, and padding
    return x, torch.arange(N) % 3


@pytest.mark.parametrize("kind", [Bags, Scaled, padded, Tied, Functional, Normed, frequencies])
def test_the_reference_is_the_same_with_sparse_tables(kind, monkeypatch):
    torch.manual_seed(0)
    model, batch = kind(), example()
    weights = selfcheck.check_weights(N, 0)
    names = [name for name, _ in model.named_parameters()]

    def reference():
        found = selfcheck.Arrivals({}, names)
        return selfcheck.reference_pass(model, make_task("image_classification"), batch, weights, names, found)

    sparse = reference()
    assert any(each.is_sparse for each in sparse.gradients.values()) == (kind in (Bags, Scaled, padded))
    monkeypatch.setattr(selfcheck, "LARGE_TABLE", 1 << 40)
    dense = reference()
    assert not any(each.is_sparse for each in dense.gradients.values())
    for name in names:
        torch.testing.assert_close(flat(sparse.gradients[name]), flat(dense.gradients[name]))
        assert selfcheck.distance(sparse.gradients[name], dense.gradients[name]) < 1e-6
        assert selfcheck.norm(sparse.gradients[name]) == pytest.approx(selfcheck.norm(dense.gradients[name]), rel=1e-6)
    assert sparse.reached == dense.reached and sparse.above_noise() == dense.above_noise()
    assert nn.Embedding.forward.__module__ == "torch.nn.modules.sparse"


@pytest.mark.parametrize("rows_at_once", [True, False], ids=["first batch", "one example"])
def test_a_wrong_gradient_of_a_large_table_is_found(tmp_path, monkeypatch, rows_at_once, caplog):
    right = rows.RowsGradient._added

    def wrong(self, index, values):
        built = right(self, index, values)
        at_fault = (index.ndim == 2) == rows_at_once
        return built * 1.1 if at_fault else built

    monkeypatch.setattr(rows.RowsGradient, "_added", wrong)
    x, y = example()
    model = Bags()
    caplog.set_level("INFO", "tracer")
    with Tracer(model, "image_classification", N, tmp_path / "store", proj_dim=64) as traced:
        traced.load_checkpoint(model.state_dict(), model_id=0)
        if rows_at_once:
            traced.featurize((x, y), num_samples=N)
            assert "table.weight" in caplog.text
        else:
            with pytest.raises(GradientError, match="gradient of 'table.weight'"):
                traced.featurize((x, y), num_samples=N)
