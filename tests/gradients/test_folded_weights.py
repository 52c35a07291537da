"""Modules that fold or keep weights in eval mode: gradients are those of the loaded weights, or are refused."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from store_cases import stored_features
from torch import nn

import tracer
from tracer import Tracer

N = 8


class Folding(nn.Module):
    """Multiplies a weight by a scale; subclasses keep the product."""

    def __init__(self):
        super().__init__()
        self.h, self.o, self.scale = nn.Linear(3, 4), nn.Linear(4, 3), nn.Parameter(torch.ones(4, 1))
        self.folded = None

    def weight(self):
        return self.h.weight * self.scale

    def run(self, x, weight):
        return self.o(torch.tanh(F.linear(x, weight, self.h.bias)))

    def forward(self, x):
        return self.run(x, self.weight() if self.folded is None else self.folded)


class DroppedByTrain(Folding):
    def train(self, mode=True):
        self.folded = None if mode else self.weight().detach()
        return super().train(mode)


class NeverDropped(Folding):
    def train(self, mode=True):
        self.folded = self.folded if mode else self.weight().detach()
        return super().train(mode)

    def forward(self, x):
        folded = self.weight() if self.training or self.folded is None else self.folded
        return self.run(x, self.weight()) + self.run(x, folded)


class NeededInEval(DroppedByTrain):
    def forward(self, x):
        return self.run(x, self.weight() if self.training else self.folded)


class InBuffer(Folding):
    def __init__(self):
        super().__init__()
        self.register_buffer("product", torch.zeros(4, 3))

    def train(self, mode=True):
        if not mode:
            self.product.copy_(self.weight().detach())
        return super().train(mode)

    def forward(self, x):
        return self.run(x, self.weight()) + self.run(x, self.weight() if self.training else self.product)


class Merging(Folding):
    """Adds an adapter to its weight in eval mode, in place, as LoRA layers do."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.merged = nn.Parameter(torch.randn(4, 1)), nn.Parameter(torch.randn(1, 3)), False

    def train(self, mode=True):
        if mode == self.merged:
            self.h.weight.data += (1 - 2 * mode) * self.a.data @ self.b.data
            self.merged = not mode
        return super().train(mode)

    def weight(self):
        return (self.h.weight if self.merged else self.h.weight + self.a @ self.b) * self.scale


class KeptByForward(Folding):
    def forward(self, x):
        if self.training:
            self.folded = None
            return self.run(x, self.weight())
        if self.folded is None:
            self.folded = self.weight()
        return self.run(x, self.folded)


class KeptWithoutSavedValues(KeptByForward):
    """Autograd passes this graph twice, as it needs no values of the first pass."""

    def weight(self):
        return 2 * self.h.weight + self.scale


class KeptInBuffer(Folding):
    """Keeps the weight in a buffer that no state dict has, for one of two uses."""

    def __init__(self):
        super().__init__()
        self.register_buffer("product", None, persistent=False)

    def forward(self, x):
        if self.training:
            return self.run(x, self.weight()) + self.run(x, self.weight())
        if self.product is None:
            self.product = self.weight()
        return self.run(x, self.weight()) + self.run(x, self.product)


class Workspace:
    """What some models keep between calls."""

    def __init__(self):
        self.weights, self.calls = {}, 0


class KeptInObject(Folding):
    def __init__(self):
        super().__init__()
        self.workspace = Workspace()

    def kept(self):
        return self.workspace.weights

    def forward(self, x):
        if self.training:
            return self.run(x, self.weight()) + self.run(x, self.weight())
        if "product" not in self.kept():
            self.kept()["product"] = self.weight()
        return self.run(x, self.weight()) + self.run(x, self.kept()["product"])


class KeptInNestedDict(KeptInObject):
    def __init__(self):
        super().__init__()
        self.workspace = {"eval": {}}

    def kept(self):
        return self.workspace["eval"]


class KeptInBufferByFlag(Folding):
    """A forward copies the weight into a buffer once, and says so by a flag."""

    def __init__(self):
        super().__init__()
        self.register_buffer("product", torch.zeros(4, 3), persistent=False)
        self.ready = False

    def forward(self, x):
        if not self.training and not self.ready:
            self.product.copy_(self.weight().detach())
            self.ready = True
        return self.run(x, self.weight() if self.training else self.product)


class KeptInObjectByFlag(KeptInBufferByFlag):
    def __init__(self):
        super().__init__()
        del self.product
        self.workspace = Workspace()

    def forward(self, x):
        if not self.training and not self.ready:
            self.workspace.product = self.weight().detach()
            self.ready = True
        return self.run(x, self.weight() if self.training else self.workspace.product)


class KeptBesideItsUse(KeptInBufferByFlag):
    """Uses the weight itself, too, so that f depends on each parameter."""

    def forward(self, x):
        return super().forward(x) + self.run(x, self.weight())


class KeptInObjectBesideItsUse(KeptInObjectByFlag):
    def forward(self, x):
        return super().forward(x) + self.run(x, self.weight())


class KeptDetached(KeptByForward):
    """Has no flag: what it keeps says so itself."""

    def forward(self, x):
        if self.folded is None and not self.training:
            self.folded = self.weight().detach()
        return super().forward(x) + self.run(x, self.weight())


class KeepsForShow(Folding):
    """Keeps what f does not depend on: the last activations, and their mean."""

    def __init__(self):
        super().__init__()
        self.last, self.ready = None, False
        self.register_buffer("mean", torch.zeros(3), persistent=False)

    def forward(self, x):
        found = super().forward(x)
        self.last, self.ready = found.detach(), True
        self.mean.copy_(found.detach().mean(0))
        return found


class TableByFlag(Folding):
    """Builds a table once, which depends on no weight."""

    def __init__(self):
        super().__init__()
        self.ready = False

    def forward(self, x):
        if not self.ready:
            self.table, self.ready = torch.linspace(1, 2, 12, dtype=x.dtype).view(4, 3), True
        return self.run(x, self.weight() * self.table)


class AssertsItsTable(Folding):
    """A forward needs a tensor that no state dict has, and asserts that it is there, as timm's rotary embeddings do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.linspace(1, 2, 12).view(4, 3), persistent=False)

    def forward(self, x):
        assert self.table is not None
        return self.run(x, self.weight() * self.table)


def checkpoint(kind):
    torch.manual_seed(1)
    other = kind().double()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    return {name: value.clone() for name, value in other.state_dict().items()}


def featurized(kind, evaluated, folder, dtype=torch.float64):
    torch.manual_seed(0)
    model, x, y = kind().to(dtype), torch.randn(N, 3, dtype=dtype), torch.arange(N) % 3
    if evaluated:  # with its own weights, as users do
        model.eval()
        model(x)
    traced = Tracer(model, "image_classification", N, folder, projector="none", storage="float32")
    traced.load_checkpoint(checkpoint(kind), model_id=0)
    for rows in torch.arange(N).split(3):
        traced.featurize((x[rows], y[rows]), inds=rows)
    traced.flush()
    return traced.store.checkpoint(0), x, y


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        DroppedByTrain,
        Merging,
        KeptByForward,
        KeptWithoutSavedValues,
        KeptInBuffer,
        KeptInObject,
        KeptInNestedDict,
        AssertsItsTable,
        KeepsForShow,
        TableByFlag,
    ],
)
def test_what_was_folded_from_other_weights_is_computed_again(tmp_path, kind, evaluated):
    table, x, y = featurized(kind, evaluated, tmp_path / "store")
    plain = kind().double()
    plain.load_state_dict(checkpoint(kind))
    plain.train()  # there is no dropout, and nothing is folded
    found = stored_features(table, 0, N) * np.array(table.column("loss_grad"))[:, None]
    for row in range(N):
        loss = F.cross_entropy(plain(x[row : row + 1]), y[row : row + 1])
        expected = torch.cat([each.reshape(-1) for each in torch.autograd.grad(loss, list(plain.parameters()))])
        np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [NeverDropped, NeededInEval, InBuffer])
def test_values_that_only_eval_folds_are_refused(tmp_path, kind):
    with pytest.raises(tracer.GradientError, match="The train method of the model derives values from weights"):
        featurized(kind, True, tmp_path / "store")


@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("kind", [KeptInBufferByFlag, KeptInObjectByFlag])
def test_values_that_a_forward_copies_once_are_refused(tmp_path, kind, evaluated):
    with pytest.raises(tracer.GradientError, match="in eval mode.*product"):
        featurized(kind, evaluated, tmp_path / "store")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("evaluated", [False, True])
@pytest.mark.parametrize("kind", [KeptBesideItsUse, KeptInObjectBesideItsUse, KeptDetached])
def test_gradients_that_do_not_pass_through_what_is_kept_are_refused(tmp_path, kind, evaluated, dtype):
    with pytest.raises(tracer.GradientError, match="by way of values that the forward keeps in eval mode"):
        featurized(kind, evaluated, tmp_path / "store", dtype)
