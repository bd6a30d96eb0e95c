"""Wide residual networks for small images: depth 6n+4, three groups of n blocks with 16k, 32k and 64k channels.

Zagoruyko and Komodakis, "Wide Residual Networks" (arXiv:1605.07146). The blocks are pre-activated: nothing follows
their sum, so what lies between two layers has both signs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

from dsaux.config import ModelConfig
from dsaux.models import Layer, layer_names
from dsaux.models.naming import GROUPS, wide_resnet_size
from dsaux.models.resnet import initialize
from dsaux.models.shapes import SampleSpec

STEM_CHANNELS = 16
WIDTHS = (16, 32, 64)


class WideBlock(nn.Module):
    """`shortcut + conv(dropout(ReLU(BN(conv(a)))))` with 3x3 convolutions and `a = ReLU(BN(x))`.

    The shortcut is x itself, or a 1x1 convolution of a where channels or resolution change.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: 1, or 2 to halve the resolution.
        dropout: probability of a zero between the convolutions, in training.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.projection: nn.Module | None = None
        if stride != 1 or in_channels != out_channels:
            self.projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        active = F.relu(self.bn1(x), inplace=True)
        y = self.dropout(F.relu(self.bn2(self.conv1(active)), inplace=True))
        shortcut: Tensor = x if self.projection is None else self.projection(active)
        out: Tensor = shortcut + self.conv2(y)
        return out


class WideHead(nn.Module):
    """BatchNorm and ReLU, the mean over all pixels, then one linear layer to the class scores; its bias starts at 0."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_channels)
        self.fc = nn.Linear(in_channels, num_classes)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, num_classes)."""
        scores: Tensor = self.fc(F.relu(self.bn(x), inplace=True).mean(dim=(2, 3)))
        return scores


def make_stem(in_channels: int) -> nn.Module:
    """First layer: a 3x3 convolution, no more, since the first block begins with BatchNorm; keeps the resolution."""
    stem = nn.Sequential(nn.Conv2d(in_channels, STEM_CHANNELS, 3, padding=1, bias=False))
    initialize(stem)
    return stem


def layers(settings: ModelConfig, *, num_classes: int, input_spec: SampleSpec) -> list[Layer]:
    """The network as named layers: "stem", "group1.block1" .. "group3.blockn", "head".

    Args:
        settings: the network's name, "wrn<depth>_<widening factor>", and its options.
        num_classes: number of class scores.
        input_spec: an image, (channels, height, width).
    """
    names = layer_names(settings)
    size = wide_resnet_size(settings.name)
    assert size is not None, "layer_names has refused other names"
    blocks, widening = size
    makers: list[Callable[[], nn.Module]] = [functools.partial(make_stem, input_spec.shape[0])]
    channels = STEM_CHANNELS
    for group in range(GROUPS):
        for block in range(blocks):
            make = functools.partial(WideBlock, channels, WIDTHS[group] * widening)
            stride = 2 if group > 0 and block == 0 else 1
            makers.append(functools.partial(make, stride=stride, dropout=settings.dropout))
            channels = WIDTHS[group] * widening
    makers.append(functools.partial(WideHead, channels, num_classes))
    return [Layer(name, make) for name, make in zip(names, makers, strict=True)]
