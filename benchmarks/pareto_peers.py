"""How others featurize the cases of `pareto`: bergson through its own collector, FactGraSS by its algorithm."""

from __future__ import annotations

import contextlib
import io
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bergson:
    """bergson's `GradientCollector`, with the calls that its `CollectorComputer` makes for a batch."""

    def __init__(self, case: Any, num_rows: int, folder: Path, seed: int, size: int) -> None:
        import datasets
        from bergson import GradientCollector, GradientProcessor, IndexConfig
        from bergson.collector.collector import fwd_bwd_factory

        self._is_text = case.rows[0].dtype == torch.int64
        model = _as_bergson(case.model, self._is_text)
        config = IndexConfig(run_path=str(folder), projection_dim=size, loss_reduction="mean")
        with contextlib.redirect_stdout(io.StringIO()):
            self._collector = GradientCollector(
                model=model.base_model,
                data=datasets.Dataset.from_dict({"input_ids": np.zeros((num_rows, 1), np.int64)}),
                cfg=config,
                processor=GradientProcessor(projection_dim=size, projection_seed=seed),
            )
        self._model, self._losses, self._step = model, case.losses, fwd_bwd_factory(config)
        self._done, self.bytes = 0, 4 * sum(self._collector.builder.grad_sizes.values())

    def write(self, batch: tuple[Tensor, Tensor]) -> None:
        """Compute and write the next rows."""
        x, y = batch
        with self._collector.with_batch(None):
            if self._is_text:
                losses = self._step(self._model, x, y, {})
            else:
                losses = self._losses(self._model, x, y)
                losses.sum().backward()
                self._model.zero_grad()
        self._collector.process_batch(list(range(self._done, self._done + len(x))), losses=losses)
        self._done += len(x)

    def features(self) -> np.ndarray:
        """Return projected loss gradients, ``[n, k]``."""
        self._collector.builder.flush()
        return np.array(self._collector.builder.grad_buffer, np.float64)


class _Vectors(nn.Module):
    """A network of vectors as bergson takes it: every layer sees a sequence of one position."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.device = torch.device("cpu")

    @property
    def base_model(self) -> nn.Module:
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D]`` to ``[B, C]``."""
        return self.model(x.unsqueeze(1)).squeeze(1)


def _as_bergson(model: nn.Module, is_text: bool) -> Any:
    """Return a copy of which bergson's way of loading leaves only what starts the backward with a gradient."""
    import copy

    model = copy.deepcopy(model).requires_grad_(False)
    if is_text:
        model.get_input_embeddings().requires_grad_(True)
        return model
    next(each for each in model.modules() if isinstance(each, nn.Linear)).bias.requires_grad_(True)
    return _Vectors(model)


def run_bergson(case: Any, num_rows: int, folder: Path, seed: int, size: int) -> Bergson | None:
    """Return bergson with ``size`` by ``size`` numbers a layer; None without it, or for convolutions."""
    if find_spec("bergson") is None or any(isinstance(each, nn.Conv2d) for each in case.model.modules()):
        return None  # bergson 2.5.1 asserts inputs [N, S, I]
    return Bergson(case, num_rows, folder, seed, size)


class FactGraSS:
    """FactGraSS (Hu et al. 2025): random masks of both factors of a layer, their product, and its sparse projection.

    Of O rows and I columns ``2 sqrt(size)`` each are kept, their outer products are summed over positions, and each of
    these at most ``4 size`` numbers is added with a sign to one of ``size``, scaled so that inner products are
    unbiased. A convolution keeps some channels with all their taps.
    """

    def __init__(self, case: Any, num_rows: int, folder: Path, seed: int, size: int) -> None:
        self._model, self._losses, self._size = case.model, case.losses, size
        generator = torch.Generator().manual_seed(seed)
        names = {name.removesuffix(".weight") for name in case.matrices}
        self._layers = {name: each for name, each in case.model.named_modules() if name in names}
        self._masks = {name: self._draw(layer, generator) for name, layer in self._layers.items()}
        folder.mkdir(parents=True)
        shape = num_rows, size * len(self._layers)
        self._stored = np.lib.format.open_memmap(folder / "features.npy", "w+", np.float32, shape)
        self._done, self.bytes = 0, 4 * shape[1]

    def _draw(self, layer: nn.Module, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return kept rows, kept columns or channels, and bucket and scaled sign of each of their products."""
        weight = layer.weight
        shape = (weight.shape[1], weight.shape[0]) if not isinstance(layer, (nn.Linear, nn.Conv2d)) else weight.shape
        taps = math.prod(weight.shape[2:])
        side = 2 * math.isqrt(self._size)
        rows = torch.randperm(shape[0], generator=generator)[:side].sort().values
        columns = torch.randperm(shape[1], generator=generator)[: max(1, side // taps)].sort().values
        kept = len(rows) * len(columns) * taps
        scale = math.sqrt(weight.numel() / kept)
        signs = torch.randint(2, (kept,), generator=generator) * 2.0 - 1
        buckets = torch.arange(kept) if kept <= self._size else torch.randint(self._size, (kept,), generator=generator)
        return rows, columns, buckets, signs * scale

    def write(self, batch: tuple[Tensor, Tensor]) -> None:
        """Compute and write the next rows."""
        inputs: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        hooks = []
        for name, layer in self._layers.items():

            def forward(module: nn.Module, given: tuple, output: Tensor, name: str = name) -> None:
                inputs[name] = given[0].detach()
                output.register_hook(lambda grad, name=name: found.update({name: self._compress(name, inputs, grad)}))

            hooks.append(layer.register_forward_hook(forward))
        flags = [(each, each.requires_grad) for each in self._model.parameters()]
        self._model.requires_grad_(False)
        for each in self._first():
            each.requires_grad_(True)
        self._losses(self._model, *batch).sum().backward()
        self._model.zero_grad(set_to_none=True)
        for each, flag in flags:
            each.requires_grad_(flag)
        for hook in hooks:
            hook.remove()
        stop = self._done + len(batch[0])
        self._stored[self._done : stop] = torch.cat([found[name] for name in self._layers], 1).numpy()
        self._done = stop

    def _first(self) -> list[Tensor]:
        """Return small parameters at the network's beginning, without whose gradient there would be no backward."""
        embeddings = [each.weight for each in self._model.modules() if isinstance(each, nn.Embedding)]
        return embeddings or list(next(iter(self._layers.values())).parameters())[-1:]

    def _compress(self, name: str, inputs: dict[str, Tensor], grad: Tensor) -> Tensor:
        """Return ``[B, size]`` from a layer's input and the gradient of its output."""
        layer, x = self._layers[name], inputs.pop(name)
        rows, columns, buckets, signs = self._masks[name]
        if isinstance(layer, nn.Conv2d):
            left = grad.index_select(1, rows).flatten(2)
            right = F.unfold(x.index_select(1, columns), layer.kernel_size, padding=layer.padding, stride=layer.stride)
            product = torch.bmm(left, right.transpose(1, 2)).flatten(1)
        elif grad.ndim == 2:
            product = (grad[:, rows].unsqueeze(2) * x[:, columns].unsqueeze(1)).flatten(1)
        else:
            left, right = grad.index_select(2, rows), x.index_select(2, columns)
            product = torch.bmm(left.transpose(1, 2), right).flatten(1)
        return product.new_zeros(len(grad), self._size).index_add_(1, buckets, product * signs)

    def features(self) -> np.ndarray:
        """Return projected loss gradients, ``[n, k]``."""
        self._stored.flush()
        return np.array(self._stored, np.float64)


def run_factgrass(case: Any, num_rows: int, folder: Path, seed: int, size: int) -> FactGraSS:
    """Return FactGraSS with ``size`` numbers a layer."""
    return FactGraSS(case, num_rows, folder, seed, size)
