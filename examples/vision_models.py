"""Residual networks for small images: ResNet-9, and two of CIFAR's, ResNet-23 and ResNet-56.

Layout: images are ``[B, channels, H, W]``, logits ``[B, num_classes]``. Heights and widths from 8 on will do.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

MODELS = ("resnet9", "resnet23", "resnet56")
WIDTHS = {"resnet9": 64, "resnet23": 64, "resnet56": 16}
"""The width of each as it was published."""


def build_model(name: str, num_classes: int, channels: int = 3, width: int | None = None) -> nn.Module:
    """Return an untrained network.

    Args:
        name: One of `MODELS`.
        num_classes: The number of logits.
        channels: Of the images.
        width: Channels of the first convolution; None: as published.

    Returns:
        The network.

    Raises:
        ValueError: The name is not known.
    """
    builders = {"resnet9": ResNet9, "resnet23": ResNet23, "resnet56": ResNet56}
    if name not in builders:
        raise ValueError(f"model {name!r} is not known; expected one of {', '.join(MODELS)}.")
    model: nn.Module = builders[name](num_classes, channels, width or WIDTHS[name])
    return model


def convolution(inputs: int, outputs: int, size: int = 3, stride: int = 1, relu: bool = True) -> nn.Sequential:
    """Return a convolution that keeps the image's size at stride 1, batch norm and, if asked, ReLU."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU(inplace=True)] if relu else []))


class Residual(nn.Module):
    """Adds a branch to its input, followed by ReLU where the branch ends without one.

    Args:
        branch: What is added.
        relu: Whether ReLU follows the sum.
        stride: The input is thinned out to every stride-th pixel.
        more_channels: The input gets so many channels of zeros (the shortcut "A" of He et al. 2015, without weights).
    """

    def __init__(self, branch: nn.Module, relu: bool, stride: int = 1, more_channels: int = 0) -> None:
        super().__init__()
        self.branch, self.relu, self.stride, self.more_channels = branch, relu, stride, more_channels

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C + more_channels, H / stride, W / stride]``, rounded up."""
        added = self.branch(x)
        if self.stride > 1 or self.more_channels:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more_channels))
        return F.relu(x + added) if self.relu else x + added


class ResNet9(nn.Sequential):
    """The nine-layer residual net of fast CIFAR-10 training (Page 2018): 6.6 million parameters at width 64."""

    def __init__(self, num_classes: int, channels: int, width: int) -> None:
        double, wide = 2 * width, 8 * width
        super().__init__(
            convolution(channels, width),
            nn.Sequential(convolution(width, double), nn.MaxPool2d(2)),
            Residual(nn.Sequential(convolution(double, double), convolution(double, double)), relu=False),
            nn.Sequential(convolution(double, 4 * width), nn.MaxPool2d(2)),
            nn.Sequential(convolution(4 * width, wide), nn.MaxPool2d(2)),
            Residual(nn.Sequential(convolution(wide, wide), convolution(wide, wide)), relu=False),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
            nn.Linear(wide, num_classes),
        )


class ResNet23(nn.Sequential):
    """A convolution, seven bottleneck units of three convolutions each and a linear layer, all of one width.

    It is the network of the neural-network libraries' TracIn example; pooling comes after units two, four and six.
    """

    def __init__(self, num_classes: int, channels: int, width: int) -> None:
        half = width // 2

        def unit(pool: bool) -> nn.Sequential:
            branch = nn.Sequential(
                convolution(width, half, 1), convolution(half, half), convolution(half, width, 1, relu=False)
            )
            return nn.Sequential(Residual(branch, relu=True), *([nn.MaxPool2d(2)] if pool else []))

        units = [unit(pool=number % 2 == 1) for number in range(7)]
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
        super().__init__(convolution(channels, width), *units, *head)


class ResNet56(nn.Sequential):
    """He et al. (2015), section 4.2: three stages of nine units of two convolutions, 0.85 million parameters."""

    def __init__(self, num_classes: int, channels: int, width: int) -> None:
        units, inputs = [], width
        for stage in range(3):
            outputs = width << stage
            for number in range(9):
                stride = 2 if stage and number == 0 else 1
                branch = nn.Sequential(
                    convolution(inputs, outputs, stride=stride), convolution(outputs, outputs, relu=False)
                )
                units.append(Residual(branch, relu=True, stride=stride, more_channels=outputs - inputs))
                inputs = outputs
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))
        super().__init__(convolution(channels, width), *units, *head)
