"""Residual networks for small images: depth 6n+2, three groups of n blocks with 16, 32 and 64 channels.

The networks of He et al., "Deep Residual Learning for Image Recognition" (arXiv:1512.03385), section 4.2: shortcuts
without parameters, which take every other pixel and fill up with zero channels where the resolution halves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from dsaux.config import ModelConfig
from dsaux.models import Layer, layer_names
from dsaux.models.naming import GROUPS, resnet_blocks
from dsaux.models.shapes import SampleSpec

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """`ReLU(shortcut(x) + BN(conv(ReLU(BN(conv(x))))))` with 3x3 convolutions.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output, `in_channels` or more.
        stride: 1, or 2 to halve the resolution.
        zero_init: start with the shortcut alone, the last BatchNorm's weight being 0.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, zero_init: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.new_channels = stride, out_channels - in_channels
        initialize(self)
        if zero_init:
            nn.init.zeros_(self.bn2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        shortcut = x
        if self.stride != 1 or self.new_channels:
            half = self.new_channels // 2
            shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.new_channels - half))
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + shortcut, inplace=True)


class Head(nn.Module):
    """Mean over all pixels, then one linear layer to the class scores."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, num_classes)."""
        scores: Tensor = self.fc(x.mean(dim=(2, 3)))
        return scores


def initialize(module: nn.Module) -> None:
    """He's normal initialization of all convolutions below `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def make_stem(in_channels: int, out_channels: int) -> nn.Module:
    """First layer: 3x3 convolution, BatchNorm, ReLU; keeps the resolution."""
    stem = nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
    initialize(stem)
    return stem


def layers(settings: ModelConfig, *, num_classes: int, input_spec: SampleSpec) -> list[Layer]:
    """The network as named layers: "stem", "group1.block1" .. "group3.blockn", "head".

    Args:
        settings: the network's name, "resnet" or "cifar_resnet" and the depth, and its options.
        num_classes: number of class scores.
        input_spec: an image, (channels, height, width).
    """
    names = layer_names(settings)
    blocks = resnet_blocks(settings.name)
    assert blocks is not None, "layer_names has refused other names"
    makers: list[Callable[[], nn.Module]] = [functools.partial(make_stem, input_spec.shape[0], WIDTHS[0])]
    channels = WIDTHS[0]
    for group in range(GROUPS):
        for block in range(blocks):
            stride = 2 if group > 0 and block == 0 else 1
            make = functools.partial(BasicBlock, stride=stride, zero_init=settings.zero_init)
            makers.append(functools.partial(make, channels, WIDTHS[group]))
            channels = WIDTHS[group]
    makers.append(functools.partial(Head, channels, num_classes))
    return [Layer(name, make, nonnegative=name != names[-1]) for name, make in zip(names, makers, strict=True)]
