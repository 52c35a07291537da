"""Models that share, tie, reparametrize or use layers and weights in unusual ways, and odd parameters and batches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from zoo.harness import NUM_EXAMPLES, Entry
from zoo.tables import Net, integers, labels, normal, tokens, vectors


def mlp(*middle: nn.Module, width: int = 4):
    """Return a builder of two layers with others between them."""
    return lambda: nn.Sequential(nn.Linear(3, width), *middle, nn.Tanh(), nn.Linear(width, 3))


def net(function, **makers):
    """Return a builder of a net of layers ``f`` and ``o``, and of others that makers give."""
    return lambda: Net(
        function, **({"f": nn.Linear(4, 4), "o": nn.Linear(4, 3)} | {key: make() for key, make in makers.items()})
    )


def parameter(*shape: int):
    return lambda: torch.randn(shape)


def tied_language_model():
    def forward(m, x):
        h = m.embed(x) + m.position(torch.arange(x.shape[1]))
        return F.linear(m.norm(torch.cumsum(torch.tanh(m.f(h)), 1)), m.embed.weight)

    return Net(forward, embed=nn.Embedding(9, 4), position=nn.Embedding(8, 4), f=nn.Linear(4, 4), norm=nn.LayerNorm(4))


def scripted_part():
    """A layer that TorchScript has compiled, whose parameters are no ordinary dict."""
    return nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.Tanh())), nn.Linear(4, 3))


def tied_layers():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(4, 3))


def shared_dictionary():
    bank = nn.ParameterDict({"own": torch.randn(4, 4)})
    mixed = [Net(lambda m, x: x @ m.bank["own"].tanh() @ m.f.weight, bank=bank, f=nn.Linear(4, 4)) for _ in range(2)]
    return nn.Sequential(*mixed, nn.Linear(4, 3))


def tied_transposed():
    def forward(m, x):
        return m.o(F.linear(torch.tanh(m.f(x)), m.f.weight.T))

    return Net(forward, f=nn.Linear(4, 6), o=nn.Linear(4, 3))


def parametrized(wrap, layer=lambda: nn.Linear(4, 4)):
    return net(lambda m, x: m.o(torch.tanh(m.f(x))), f=lambda: wrap(layer()))


def class_token(m, x):
    h = torch.cat([m.token.expand(len(x), -1, -1), m.f(x)], 1) + m.position
    return m.o(m.attention(h, h, h, need_weights=False)[0][:, 0])


class Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx, gradient):
        return 0.5 * gradient


class ScaledByWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, (gradient * x).flatten(0, -2).sum(0)


def in_place(m, x):
    h = m.f(x)
    h += 1
    h.mul_(0.5).tanh_()
    return m.o(h)


def in_place_on_inputs(m, x):
    x.mul_(2)
    return m.o(torch.tanh(m.f(x)))


def images(channels: int = 2, size: int = 6):
    return lambda: (normal(channels, size, size), labels())


def convolutions(*layers, features: int):
    return lambda: nn.Sequential(*(make() for make in layers), nn.Tanh(), nn.Flatten(), nn.Linear(features, 3))


def bag(mode: str, **options):
    return net(lambda m, x: m.o(m.f(x)), f=lambda: nn.EmbeddingBag(9, 4, mode=mode, **options))


def dictionary(m, pixels, scale):
    return {"logits": m.o(torch.tanh(m.f(pixels)) * scale[:, None])}


class Output:
    def __init__(self, logits) -> None:
        self.logits = logits


def hyper_network(m, x):
    weight = m.f(x).unflatten(1, (2, 2))
    return m.o(torch.cat([torch.einsum("boi,bi->bo", weight, x[:, :2]), x[:, 2:]], 1))


def gradient_inside(m, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = torch.tanh(m.f(x)).square().sum()
        return m.o(torch.autograd.grad(energy, x, create_graph=True)[0])


def padded_embedding(m, x):
    return m.o(m.f(x).sum(1))


def sequence_first(m, x):
    h = x.transpose(0, 1)
    return m.o(m.attention(m.f(h), h, h)[0].mean(0))


def jagged(m, x):
    pieces = [m.f(row[: 2 + number % 3]) for number, row in enumerate(x.unbind(0))]
    return m.o(torch.stack([piece.mean(0) for piece in pieces]))


def list_of_layers(m, x):
    for layer in m.layers:
        x = x + torch.tanh(layer(x))
    return m.o(x)


def fixed_point(m, x):
    h = torch.zeros_like(x)
    for _ in range(5):
        h = torch.tanh(m.f(h) + x)
    return m.o(h)


def siamese(m, x):
    first, second = m.f(torch.cat([x, x.flip(1)])).tanh().chunk(2)
    return m.o(first * second)


def memory(m, x):
    keys = m.f(m.slots)
    return m.o((x @ keys.mT).softmax(1) @ m.slots)


ATTENTION = {"attention": lambda: nn.MultiheadAttention(4, 2, batch_first=True)}

LAYERS_AND_WEIGHTS = [
    Entry("tied embedding and head", tied_language_model, tokens(), "language_modeling"),
    Entry("two layers with one weight", tied_layers, vectors(4)),
    Entry("weight and its transpose", tied_transposed, vectors(4)),
    Entry("a part that TorchScript compiled", scripted_part, vectors(3)),
    Entry("a layer used three times", net(lambda m, x: m.o(m.f(m.f(m.f(x).tanh()).tanh()))), vectors(4)),
    Entry("a layer applied to two views", net(siamese), vectors(4)),
    Entry("fixed point of a layer", net(fixed_point), vectors(4)),
    Entry(
        "layers in a list, one twice",
        lambda: (
            lambda layer: Net(list_of_layers, layers=nn.ModuleList([layer, nn.Linear(4, 4), layer]), o=nn.Linear(4, 3))
        )(nn.Linear(4, 4)),
        vectors(4),
    ),
    Entry("weight used functionally", net(lambda m, x: m.o(F.linear(x, m.f.weight).tanh() @ m.f.weight)), vectors(4)),
    Entry("layer and its weight", net(lambda m, x: m.o(m.f(x).tanh() @ m.f.weight)), vectors(4)),
    Entry(
        "weight used functionally, with a gradient below the rounding of others",
        net(lambda m, x: m.o(m.f(x).tanh()) + 1e-6 * (x @ m.g.weight)[:, :3], g=lambda: nn.Linear(4, 4)),
        vectors(4),
    ),
    Entry("norm of a weight in the output", net(lambda m, x: m.o(m.f(x).tanh() * m.f.weight.norm())), vectors(4)),
    Entry("parameters shared by modules, in a dictionary of theirs", shared_dictionary, vectors(4)),
    Entry("layer applied to raw parameters", net(memory, slots=parameter(5, 4)), vectors(4)),
    Entry("weight norm", parametrized(parametrizations.weight_norm), vectors(4)),
    Entry(
        "weight norm of a convolution",
        lambda: nn.Sequential(
            parametrizations.weight_norm(nn.Conv1d(2, 4, 3), dim=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
        ),
        vectors(2, 6),
    ),
    Entry("spectral norm", parametrized(parametrizations.spectral_norm), vectors(4)),
    Entry("orthogonal weight", parametrized(parametrizations.orthogonal), vectors(4), perturb=False),
    Entry("pruned weight", parametrized(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)), vectors(4)),
    Entry("old weight norm", parametrized(nn.utils.weight_norm), vectors(4)),
    Entry(
        "class token and positions",
        net(class_token, token=parameter(1, 1, 4), position=parameter(1, 4, 4), **ATTENTION),
        vectors(3, 4),
    ),
    Entry("parameter without dimensions", net(lambda m, x: m.o(m.f(x) * m.scale), scale=parameter()), vectors(4)),
    Entry("parameter of one number", net(lambda m, x: m.o(m.f(x) * m.scale), scale=parameter(1)), vectors(4)),
    Entry(
        "parameter with trailing ones",
        net(lambda m, x: m.o((m.f(x)[..., None, None] * m.scale).flatten(1)), scale=parameter(4, 1, 1)),
        vectors(4),
    ),
    Entry(
        "parameter of five dimensions",
        net(lambda m, x: m.o(torch.tanh(m.f(x)) @ m.scale.sum((0, 2, 4))), scale=parameter(1, 4, 2, 4, 1)),
        vectors(4),
    ),
    Entry(
        "parameter [1, P, D] added to positions",
        net(lambda m, x: m.o(torch.tanh(m.f(x) + m.position).mean(1)), position=parameter(1, 5, 4)),
        vectors(5, 4),
    ),
    Entry("parameter that is not used", net(lambda m, x: m.o(m.f(x)), unused=parameter(2, 3)), vectors(4)),
    Entry(
        "frozen layer",
        net(lambda m, x: m.o(m.g(m.f(x).tanh())), g=lambda: nn.Linear(4, 4).requires_grad_(False)),
        vectors(4),
    ),
    Entry("detached branch", net(lambda m, x: m.o(m.f(x) * m.f(x).detach())), vectors(4)),
    Entry("custom function, straight through", net(lambda m, x: m.o(Rounded.apply(m.f(x)))), vectors(4)),
    Entry(
        "custom function of a parameter",
        net(lambda m, x: m.o(ScaledByWeight.apply(m.f(x), m.scale)), scale=parameter(4)),
        vectors(4),
    ),
    Entry("in-place operations", net(in_place), vectors(4)),
    Entry(
        "in-place activation of the layer's output",
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)),
        vectors(4),
    ),
    Entry("changes its inputs in place", net(in_place_on_inputs), vectors(4), refused="in place|state", or_exact=True),
    Entry(
        "activation checkpointing",
        net(lambda m, x: m.o(checkpoint(lambda x: torch.tanh(m.f(x)), x, use_reentrant=False))),
        vectors(4),
    ),
    Entry(
        "reentrant checkpointing",
        net(lambda m, x: m.o(checkpoint(lambda x: torch.tanh(m.f(x)), x.requires_grad_(), use_reentrant=True))),
        vectors(4),
        refused="use_reentrant=False",
        or_exact=True,
    ),
    Entry(
        "loss that is constant",
        net(lambda m, x: m.o(torch.tanh(m.f(x)))),
        vectors(4),
        task=lambda model, batch: model(batch[0]).softmax(1).sum(1),
        refused="rounding errors only",
    ),
    Entry("gradient inside the forward", net(gradient_inside), vectors(4)),
    Entry("weights made by a layer", net(hyper_network), vectors(4)),
    Entry("bilinear layer", net(lambda m, x: m.o(m.f(x, x.flip(1))), f=lambda: nn.Bilinear(4, 4, 4)), vectors(4)),
    Entry("embedding bag, mean", bag("mean"), lambda: (integers(9, 5), labels())),
    Entry("embedding bag, max", bag("max"), lambda: (integers(9, 5), labels())),
    Entry("embedding bag with padding", bag("sum", padding_idx=0), lambda: (integers(9, 5), labels())),
    Entry(
        "embedding with padding",
        net(padded_embedding, f=lambda: nn.Embedding(9, 4, padding_idx=0)),
        lambda: (integers(9, 5), labels()),
    ),
    Entry(
        "embedding with a largest norm",
        net(padded_embedding, f=lambda: nn.Embedding(9, 4, max_norm=1.0)),
        lambda: (integers(9, 5), labels()),
        refused="max_norm|state|in place",
        or_exact=True,
    ),
    Entry(
        "sparse embedding",
        net(padded_embedding, f=lambda: nn.Embedding(9, 4, sparse=True)),
        lambda: (integers(9, 5), labels()),
    ),
    Entry(
        "embedding scaled by frequency",
        net(padded_embedding, f=lambda: nn.Embedding(9, 4, scale_grad_by_freq=True)),
        lambda: (integers(9, 5), labels()),
        refused="scale_grad_by_freq|share a batch",
        or_exact=True,
    ),
    Entry(
        "convolution with groups and stride",
        convolutions(lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2), features=36),
        images(),
    ),
    Entry(
        "circular and dilated convolution",
        convolutions(lambda: nn.Conv2d(2, 2, 3, padding=2, dilation=2, padding_mode="circular"), features=72),
        images(),
    ),
    Entry(
        "transposed convolution",
        convolutions(lambda: nn.ConvTranspose2d(2, 2, 3, stride=2, output_padding=1), features=392),
        images(),
    ),
    Entry(
        "depthwise convolution, 3-d",
        lambda: nn.Sequential(nn.Conv3d(2, 4, 2, groups=2), nn.Tanh(), nn.Flatten(), nn.Linear(32, 3)),
        vectors(2, 3, 3, 3),
    ),
    Entry(
        "batch norm, evaluated",
        convolutions(lambda: nn.Conv2d(2, 3, 3), lambda: nn.BatchNorm2d(3), features=48),
        images(),
    ),
    Entry(
        "group and instance norm",
        convolutions(
            lambda: nn.Conv2d(2, 4, 3),
            lambda: nn.GroupNorm(2, 4),
            lambda: nn.InstanceNorm2d(4, affine=True),
            features=64,
        ),
        images(),
    ),
    Entry(
        "RMS norm and layer norm over two dimensions",
        lambda: nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 4), nn.LayerNorm([3, 4]), nn.Flatten(), nn.Linear(12, 3)),
        vectors(3, 4),
    ),
    Entry(
        "PReLU of each channel",
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.PReLU(4), nn.Flatten(), nn.Linear(64, 3)),
        images(),
    ),
    Entry(
        "attention, sequence first", net(sequence_first, attention=lambda: nn.MultiheadAttention(4, 2)), vectors(5, 4)
    ),
    Entry(
        "attention with bias rows",
        net(
            lambda m, x: m.o(m.attention(x, m.f(x), x)[0].mean(1)),
            attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=True, kdim=4),
        ),
        vectors(5, 4),
    ),
    Entry(
        "transformer encoder",
        net(
            lambda m, x: m.o(m.f(x)[:, 0]),
            f=lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2),
        ),
        vectors(5, 4),
    ),
    Entry(
        "transformer",
        net(lambda m, x: m.o(m.f(x, x.flip(1)).mean(1)), f=lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True)),
        vectors(5, 4),
    ),
    Entry(
        "bidirectional LSTM",
        net(lambda m, x: m.o(m.f(x)[0].sum(1)), f=lambda: nn.LSTM(4, 2, bidirectional=True, batch_first=True)),
        vectors(5, 4),
    ),
    Entry("pieces of another length for each place", net(jagged), vectors(5, 4), refused="alone|share a batch|state"),
    Entry(
        "dictionary in, dictionary out",
        net(dictionary),
        lambda: {"pixels": normal(4), "scale": normal(), "labels": labels()},
    ),
    Entry("object with logits", net(lambda m, x: Output(m.o(torch.tanh(m.f(x))))), vectors(4)),
    Entry(
        "regression to several numbers",
        net(lambda m, x: m.o(torch.tanh(m.f(x)))),
        lambda: (normal(4), normal(3, seed=5)),
        "regression",
    ),
    Entry(
        "words in a list",
        net(
            lambda m, x, words: m.o(m.f(x) * m.scale * torch.tensor([[float(len(word))] for word in words])),
            scale=parameter(4),
        ),
        lambda: (normal(4), ["ab" * (1 + number % 3) for number in range(NUM_EXAMPLES)], labels()),
    ),
    Entry(
        "table shared by the batch",
        net(lambda m, x, table: m.o(m.f(x) @ table[0])),
        lambda: (normal(4), torch.ones(1, 4, 4), labels()),
    ),
]
