"""Every layer rule meets the autograd loop in float64, through one harness."""

import pytest
import torch
from oracles import assert_gradients_match
from torch import nn

torch.manual_seed(0)


def mean_square(model, batch):
    return model(*batch).flatten(1).square().mean(1)


def cubes(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def stack(*layers):
    torch.manual_seed(0)
    return nn.Sequential(*layers)


def jitter(model):
    """Give norm layers weights, biases and running statistics that are not 0 and 1."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.add_(0.5 * torch.rand(value.shape, generator=generator))
    return model


@pytest.mark.parametrize("num_rows", [1, 2, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("inner", [(), (7,), (3, 2)])
def test_linear(num_rows, bias, inner):
    assert_gradients_match(
        stack(nn.Linear(4, 3, bias=bias), nn.Tanh()), mean_square, (cubes(num_rows, *inner, 4),), num_rows
    )


CONVS = [
    (1, {}),
    (1, {"stride": 2, "padding": 3, "dilation": 2}),
    (1, {"padding": "same", "dilation": 2}),
    (1, {"groups": 2, "padding": 1, "padding_mode": "circular"}),
    (2, {}),
    (2, {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    (2, {"padding": "same", "padding_mode": "circular"}),
    (2, {"padding": (2, 1), "padding_mode": "reflect"}),
    (2, {"padding": 1, "padding_mode": "replicate", "groups": 4, "bias": False}),
    (2, {"padding": "valid", "groups": 2}),
    (2, {"stride": 3}),
    (3, {}),
    (3, {"stride": (1, 2, 2), "padding": 1, "groups": 2}),
    (3, {"padding": "same", "dilation": (1, 2, 1)}),
]


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize(("dims", "options"), CONVS)
def test_conv(dims, options, num_rows):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    kernel = (3, 2, 3)[:dims] if options.get("padding") != "same" else 3
    model = stack(kind(4, 8, kernel, **options), nn.ReLU(inplace=True), nn.Flatten())
    assert_gradients_match(model, mean_square, (cubes(num_rows, 4, *(7, 6, 5)[:dims]),), num_rows)


def test_convolution_of_even_kernel_with_same_padding():
    model = stack(nn.Conv2d(2, 3, (4, 2), padding="same"), nn.Flatten())
    assert_gradients_match(model, mean_square, (cubes(3, 2, 6, 5),), 3)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}])
def test_embedding(options):
    tokens = torch.tensor([[0, 1, 1, 4], [2, 0, 3, 3], [4, 4, 4, 4]])
    model = stack(nn.Embedding(5, 3, **options), nn.Tanh())
    with torch.no_grad():
        model[0].weight.add_(1.0)  # the padding row must have an output, so that its gradient is withheld, not zero
    assert_gradients_match(model, mean_square, (tokens,), 3)


NORMS = [
    (nn.LayerNorm(6), (5, 6)),
    (nn.LayerNorm((5, 6)), (5, 6)),
    (nn.LayerNorm(6, bias=False), (6,)),
    (nn.RMSNorm(6), (5, 6)),
    (nn.RMSNorm((5, 6), eps=1e-3), (2, 5, 6)),
    (nn.GroupNorm(2, 4), (4, 5, 3)),
    (nn.GroupNorm(2, 4), (4,)),
    (nn.InstanceNorm1d(4, affine=True), (4, 9)),
    (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 5, 3)),
    (nn.InstanceNorm3d(4, affine=True), (4, 3, 2, 3)),
    (nn.BatchNorm1d(4), (4,)),
    (nn.BatchNorm1d(4), (4, 7)),
    (nn.BatchNorm2d(4), (4, 5, 3)),
    (nn.BatchNorm3d(4), (4, 2, 5, 3)),
]


@pytest.mark.parametrize("num_rows", [1, 3])
@pytest.mark.parametrize(("norm", "shape"), NORMS, ids=lambda value: str(value)[:40])
def test_norms(norm, shape, num_rows):
    model = jitter(nn.Sequential(norm, nn.Tanh()))
    assert_gradients_match(model, mean_square, (cubes(num_rows, *shape),), num_rows)


def test_layer_scale_of_transformers():
    from transformers import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2LayerScale

    model = nn.Sequential(nn.Linear(4, 6), Dinov2LayerScale(Dinov2Config(hidden_size=6)))
    engine = assert_gradients_match(model, mean_square, (cubes(3, 5, 4),), 3)
    assert not engine.raw


def test_transformers_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = stack(conv1d(5, 4), nn.Tanh())
    assert_gradients_match(model, mean_square, (cubes(3, 6, 4),), 3)


def test_inplace_activations_after_every_layer():
    model = stack(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Flatten(),
        nn.Linear(64, 5),
        nn.ELU(inplace=True),
    )
    assert_gradients_match(model, mean_square, (cubes(4, 3, 6, 6),), 4)


def test_large_groups_of_samples_and_functional_agree():
    model = stack(nn.Conv2d(2, 4, 3, groups=2), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 3))
    batch = (cubes(4, 2, 6, 6),)
    assert_gradients_match(model, mean_square, batch, 4, method="capture")
    names = [name for name, _ in model.named_parameters()]
    assert_gradients_match(model, mean_square, batch, 4, method="functional", general=names)
