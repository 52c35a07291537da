"""The count sketch: every way through it is one linear map, unbiased, and as accurate as a dense projection."""

import math

import pytest
import torch
from projection_cases import (
    all_forms,
    assert_is_linear_map,
    assert_unbiased,
    dense,
    embedding,
    matrix_of,
    normal,
    oracle_rows,
    outer,
    relative_errors,
)
from torch import nn
from torch.nn import functional as F

from tracer.gradients.per_sample import DenseGradient, OuterGradient
from tracer.gradients.rows import RowsGradient
from tracer.gradients.windows import WindowGradient
from tracer.projection import row_blocks
from tracer.projection.sketch import lattice
from tracer.projection.sketch import projector as sketch_module
from tracer.projection.sketch import spectral as spectral_way
from tracer.projection.sketch.projector import SketchProjector, fold

# Shapes of one tile, of several row or column tiles, larger than k both ways, wider than k, and with k odd or prime.
SHAPES = [((6, 5), 64), ((13, 7), 16), ((40, 6), 16), ((6, 40), 16), ((35, 37), 16), ((12, 10), 7), ((16, 16), 16)]


WAYS = ["built", "spectral", "lattice"]


def projector(shape, k, seed=0):
    return SketchProjector({"weight": shape}, k, seed)


def force(monkeypatch, way):
    """Make gradients in outer form go one way; a lattice is possible for most, and the others are built."""

    def chosen(self, name, gradient, positions):
        fits = all(lattice.fits for lattice in self._lattices(name, gradient.device))
        return way if way != "lattice" or (fits and not isinstance(gradient, WindowGradient)) else "built"

    monkeypatch.setattr(SketchProjector, "_way", chosen)


def way_of(shape, k, positions, gradient=None):
    """The way that is chosen by itself."""
    gradient = outer(shape, 1, positions, dtype=torch.float32) if gradient is None else gradient
    return projector(shape, k)._way("weight", gradient, positions)


@pytest.mark.parametrize("form", all_forms((3, 2)))
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_every_form_is_the_same_linear_map(form, shape, k):
    assert_is_linear_map(projector(shape, k), "weight", all_forms(shape)[form])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["vector input", "sequence", "long sequence", "unfolded"])
@pytest.mark.parametrize(("shape", "k"), SHAPES)
def test_all_ways_agree(way, form, shape, k, monkeypatch):
    force(monkeypatch, way)
    assert_is_linear_map(projector(shape, k), "weight", all_forms(shape)[form])


CONVS = [
    ((4, 3, 3), {"stride": (1,), "dilation": (1,)}, (11,)),
    ((6, 5, 3, 2), {"stride": (2, 1), "dilation": (1, 2)}, (8, 7)),
    ((20, 18, 3, 3), {"stride": (1, 1), "dilation": (1, 1)}, (4, 4)),
    ((3, 2, 2, 1, 2), {"stride": (1, 1, 2), "dilation": (1, 1, 1)}, (3, 2, 5)),
]


def convolution(shape, options, places, dtype=torch.float64, batch_size=4):
    """A convolution's gradient with random factors; its input is as large as the windows need."""
    settings = zip(places, options["stride"], options["dilation"], shape[2:], strict=True)
    sizes = [(n - 1) * step + (taps - 1) * rate + 1 for n, step, rate, taps in settings]
    padded = normal(batch_size, shape[1], *sizes, dtype=dtype)
    return WindowGradient(padded, normal(batch_size, shape[0], *places, seed=1, dtype=dtype), shape, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k", [7, 16, 64, 1000])
@pytest.mark.parametrize("conv", CONVS, ids=lambda conv: str(conv[0]))
def test_convolutions_go_through_the_same_linear_map(way, k, conv, monkeypatch):
    force(monkeypatch, way)
    gradient = convolution(*conv)
    rows = torch.einsum("bto,bti->boi", *gradient.outer(0, 4)).flatten(1)
    torch.testing.assert_close(gradient.dense(0, 4), rows)
    assert_is_linear_map(projector(conv[0], k), "weight", gradient)


def test_grouped_convolutions_are_built():
    options = {"stride": (1,), "dilation": (1,), "groups": 2}
    gradient = WindowGradient(normal(3, 4, 9), normal(3, 6, 7, seed=1), (6, 2, 3), **options)
    assert gradient.outer(0, 3) is None
    assert_is_linear_map(projector((6, 2, 3), 16), "weight", DenseGradient(gradient.dense(0, 3).reshape(3, 6, 2, 3)))
    assert_is_linear_map(projector((6, 2, 3), 16), "weight", gradient)


@pytest.mark.parametrize("shape", [(30,), (), (1, 30), (30, 1), (2, 3, 2, 2)])
@pytest.mark.parametrize("k", [1, 2, 8, 64])
def test_vectors_scalars_and_kernels_are_linear_too(shape, k):
    assert_is_linear_map(projector(shape, k), "weight", dense(shape))
    assert_is_linear_map(projector(shape, k), "weight", outer(shape))


@pytest.mark.parametrize("step", [1, 3])
def test_blocks_of_samples_and_positions_change_nothing(step, monkeypatch):
    monkeypatch.setattr(sketch_module, "row_blocks", lambda batch_size, *_: row_blocks(batch_size, 1, step))
    monkeypatch.setattr(spectral_way, "SPECTRAL_BYTES", 2 * 16 * 8)
    monkeypatch.setattr(lattice, "VECTOR_BYTES", 600)
    monkeypatch.setattr(lattice, "LATTICE_BYTES", 600)
    for way in WAYS:
        force(monkeypatch, way)
        for gradient in all_forms((13, 7)).values():
            assert_is_linear_map(projector((13, 7), 16), "weight", gradient)


@pytest.mark.parametrize("form", all_forms((3, 2)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precisions_give_float32_features(form, dtype):
    gradient = all_forms((13, 7), dtype=dtype)[form]
    assert projector((13, 7), 16).project({"weight": gradient}).features.dtype == torch.float32
    assert_is_linear_map(projector((13, 7), 16), "weight", gradient, rtol=1e-5)


@pytest.mark.parametrize("form", all_forms((3, 2)))
def test_an_empty_batch_has_empty_features(form):
    result = projector((13, 7), 16).project({"weight": all_forms((13, 7), batch_size=0)[form]})
    assert result.features.shape == (0, 16)
    assert result.squared_norm.shape == (0,)


def test_a_sample_projects_the_same_in_any_batch():
    one = projector((20, 30), 64)
    for gradient in all_forms((20, 30), batch_size=7).values():
        whole = one.project({"weight": gradient})
        if isinstance(gradient, OuterGradient):
            alone = OuterGradient(gradient.left[4:5], gradient.right[4:5], gradient.shape)
        elif isinstance(gradient, RowsGradient):
            alone = RowsGradient(gradient.index[4:5], gradient.values[4:5], gradient.shape)
        else:
            alone = DenseGradient(oracle_rows(gradient)[4:5].reshape(1, 20, 30))
        torch.testing.assert_close(one.project({"weight": alone}).features, whole.features[4:5])


def test_parameters_add_up_and_are_keyed_by_name():
    shapes = {"a": (9, 8), "b": (5,), "c": (9, 8)}
    gradients = {"a": outer((9, 8)), "b": dense((5,)), "c": embedding((9, 8))}
    together = SketchProjector(shapes, 16, 3).project(gradients)
    reordered = SketchProjector(dict(reversed(shapes.items())), 16, 3)
    parts = [reordered.project({name: gradient}) for name, gradient in gradients.items()]
    torch.testing.assert_close(together.features, sum(part.features for part in parts))
    torch.testing.assert_close(together.squared_norm, sum(part.squared_norm for part in parts))
    assert not torch.equal(matrix_of(reordered, "a"), matrix_of(reordered, "c"))


def test_add_alone_gives_what_project_gives():
    one, gradient = projector((300, 400), 256), outer((300, 400), positions=1)
    assert way_of((300, 400), 256, 1) == "spectral"
    features, squared_norm = torch.ones(5, 256, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    one.add("weight", gradient, features, squared_norm)
    result = one.project({"weight": gradient})
    torch.testing.assert_close(features, result.features + 1)
    torch.testing.assert_close(squared_norm, result.squared_norm + 1)


def test_each_entry_has_one_bucket_and_one_sign():
    matrix = matrix_of(projector((13, 7), 16), "weight")
    assert ((matrix != 0).sum(1) == 1).all()
    assert (matrix.abs().sum(1) == 1).all()


def test_projected_values_are_pinned():
    ramp = torch.arange(20, dtype=torch.float32).reshape(1, 4, 5)
    features = projector((4, 5), 8, seed=11).project({"weight": DenseGradient(ramp)}).features
    expected = torch.tensor([[-5.0, 26.0, 12.0, 18.0, 15.0, 9.0, 28.0, 27.0]])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    vector = projector((6,), 4, seed=11).project({"weight": DenseGradient(torch.arange(6.0)[None])}).features
    torch.testing.assert_close(vector, torch.tensor([[0.0, 5.0, 7.0, -3.0]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((20, 6), [-431.0, -154.0, 128.0, -39.0, -262.0, 95.0, -43.0, -302.0]),  # permuted, several row tiles
        ((5, 4, 3), [69.0, 206.0, 14.0, 29.0, 94.0, 22.0, 6.0, 120.0]),  # a convolution, tap by tap
    ],
)
def test_projected_values_of_permuted_tiles_are_pinned(shape, expected):
    ramp = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(1, *shape)
    features = projector(shape, 8, seed=11).project({"weight": DenseGradient(ramp)}).features
    torch.testing.assert_close(features, torch.tensor([expected]), rtol=0, atol=1e-3)


def test_folding_wraps_around():
    for size in (1, 4, 7, 8, 23):
        for offset in range(7):
            flat, expected = normal(2, size), torch.zeros(2, 7, dtype=torch.float64)
            expected.index_add_(1, (torch.arange(size) + offset) % 7, flat)
            features = torch.zeros_like(expected)
            fold(flat, offset, features)
            torch.testing.assert_close(features, expected)


def test_the_way_taken_follows_the_sizes():
    assert way_of((32, 32), 4096, 1) == "built"  # a small layer
    assert way_of((256, 784), 4096, 1) == "lattice"
    assert way_of((256, 256), 4096, 8) == "lattice"
    assert way_of((1024, 1024), 4096, 1) == "spectral"
    conv = convolution((512, 512, 3, 3), {"stride": (1, 1), "dilation": (1, 1)}, (4, 4), torch.float32, 1)
    assert way_of((512, 512, 3, 3), 4096, 16, conv) == "spectral"
    assert way_of((64, 576), 4096, 1024) == "built"


def test_gradients_that_require_grad_and_autocast_do_no_harm():
    gradient = outer((13, 7), dtype=torch.float32)
    expected = projector((13, 7), 16).project({"weight": gradient}).features
    gradient.left.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = projector((13, 7), 16).project({"weight": gradient}).features
    assert not features.requires_grad
    assert torch.equal(features, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("form", all_forms((3, 2)))
def test_devices_agree(form):
    one, gradient = projector((35, 37), 16), all_forms((35, 37))[form]
    expected = one.project({"weight": gradient})
    for holder in getattr(gradient, "parts", [gradient]):
        for part in getattr(holder, "parts", [holder]):
            for key in ("left", "right", "index", "values"):
                if hasattr(part, key):
                    setattr(part, key, getattr(part, key).cuda())
    found = one.project({"weight": gradient})
    torch.testing.assert_close(found.features.cpu(), expected.features)
    torch.testing.assert_close(found.squared_norm.cpu(), expected.squared_norm)


# Accuracy


def test_inner_products_are_unbiased_over_seeds():
    gradient = outer((12, 15), batch_size=4)
    rows = oracle_rows(gradient)
    assert_unbiased(lambda seed: projector((12, 15), 16, seed).project({"weight": gradient}).features, rows)


def per_sample_gradients(model, losses):
    """Return each sample's gradient by parameter: ``[B, *shape]``, by a loop of autograd."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return {name: torch.stack(values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}


class Block(nn.Module):
    """A small causal language model of one attention layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(50, 48), nn.LayerNorm(48)
        self.qkv, self.out = nn.Linear(48, 144), nn.Linear(48, 48)
        self.up, self.down, self.head = nn.Linear(48, 192), nn.Linear(192, 48), nn.Linear(48, 50)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        queries, keys, values = self.qkv(self.norm(hidden)).chunk(3, -1)
        hidden = hidden + self.out(F.scaled_dot_product_attention(queries, keys, values, is_causal=True))
        return self.head(self.down(F.gelu(self.up(hidden))) + hidden)


def conv_gradients():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(4), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    labels = torch.arange(24) % 10
    images = torch.randn(24, 3, 16, 16) + torch.randn(10, 3, 16, 16)[labels]
    return per_sample_gradients(model, F.cross_entropy(model(images), labels, reduction="none"))


def mlp_gradients():
    model = nn.Sequential(nn.Linear(96, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    labels = torch.arange(24) % 10
    inputs = torch.randn(24, 96) + torch.randn(10, 96)[labels]
    inputs[:, ::7] *= 20  # hot input features
    return per_sample_gradients(model, F.cross_entropy(model(inputs), labels, reduction="none"))


def transformer_gradients():
    model, tokens = Block(), torch.randint(50, (24, 12))
    logits = model(tokens[:, :-1]).transpose(1, 2)
    return per_sample_gradients(model, F.cross_entropy(logits, tokens[:, 1:], reduction="none").sum(1))


@pytest.mark.parametrize("make", [conv_gradients, mlp_gradients, transformer_gradients])
@pytest.mark.parametrize("k", [256, 2048])
def test_models_have_errors_of_a_dense_projection(make, k):
    # A dense projection has root mean square error sqrt((1 + cosine²) / k).
    torch.manual_seed(0)
    gradients = make()
    rows = torch.cat([values.flatten(1) for values in gradients.values()], 1)
    shapes = {name: tuple(values.shape[1:]) for name, values in gradients.items()}
    forms = {name: DenseGradient(values) for name, values in gradients.items()}
    errors = [
        relative_errors(SketchProjector(shapes, k, seed).project(forms).features, rows).square().mean()
        for seed in range(5)
    ]
    assert torch.stack(errors).mean().sqrt() <= 1.15 * k**-0.5


def adversarial(kind, positions):
    """Factors of layers [96, 128] whose gradients have most of their energy in few, badly placed entries."""
    left, right = normal(24, positions, 96), normal(24, positions, 128, seed=1)
    row_scale, col_scale = torch.full((96,), 0.02), torch.full((128,), 0.02)
    if "rows" in kind:
        row_scale[:: 8 if "periodic" in kind else 40] = 1.0  # 8 rows of 128 fill k = 1024
    else:
        row_scale[:] = 1.0
    if "columns" in kind:
        col_scale[:: 9 if "periodic" in kind else 60] = 1.0
    else:
        col_scale[:] = 1.0
    return OuterGradient(left * row_scale, right * col_scale, (96, 128))


@pytest.mark.parametrize("kind", ["rows", "columns", "rows and columns", "periodic rows", "periodic columns", "flat"])
@pytest.mark.parametrize("k", [64, 250, 1024])
@pytest.mark.parametrize("positions", [1, 6])
def test_adversarial_energy_has_errors_of_a_dense_projection(kind, k, positions):
    gradient = adversarial(kind, positions)
    rows = oracle_rows(gradient)
    errors = [
        relative_errors(projector((96, 128), k, seed).project({"weight": gradient}).features, rows).square().mean()
        for seed in range(24)
    ]
    assert torch.stack(errors).mean().sqrt() <= 1.15 * k**-0.5


@pytest.mark.parametrize("k", [100, 117, 4096])
def test_inner_products_are_exact_where_all_entries_have_buckets_of_their_own(k):
    shapes = {"conv": (4, 3, 3), "matrix": (6, 8), "vector": (15,), "scalar": ()}
    assert sum(math.prod(shape) for shape in shapes.values()) == 100
    projector = SketchProjector(shapes, k, seed=5)
    for form in all_forms((6, 8)):
        forms = [
            {"conv": dense((4, 3, 3), seed=seed), "vector": dense((15,), seed=seed), "scalar": dense((), seed=seed)}
            | {"matrix": all_forms((6, 8))[form]}
            for seed in (1, 2)
        ]
        rows = [torch.cat([oracle_rows(gradients[name]) for name in shapes], 1) for gradients in forms]
        one, other = (projector.project(gradients).features for gradients in forms)
        torch.testing.assert_close(one @ other.T, rows[0] @ rows[1].T, rtol=1e-9, atol=1e-9)
