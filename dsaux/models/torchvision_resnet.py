"""torchvision's residual networks for ImageNet: ResNet, ResNeXt and Wide-ResNet, made of torchvision's own blocks.

He et al., arXiv:1512.03385; Xie et al., arXiv:1611.05431; Zagoruyko and Komodakis, arXiv:1605.07146. Same layers in the
same order as `torchvision.models.NAME`, so weights go both ways (`dsaux.models.network`).
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1

from dsaux.config import ModelConfig
from dsaux.models import Layer, layer_names
from dsaux.models.naming import TORCHVISION_BLOCKS
from dsaux.models.resnet import initialize
from dsaux.models.shapes import SampleSpec

STEM_CHANNELS = 64
WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class Kind:
    """What the blocks of a network have in common, in torchvision's terms."""

    block: type[BasicBlock] | type[Bottleneck] = Bottleneck
    groups: int = 1
    width_per_group: int = 64


KINDS = {
    "resnet18": Kind(BasicBlock),
    "resnet34": Kind(BasicBlock),
    "resnext50_32x4d": Kind(groups=32, width_per_group=4),
    "resnext101_32x8d": Kind(groups=32, width_per_group=8),
    "resnext101_64x4d": Kind(groups=64, width_per_group=4),
    "wide_resnet50_2": Kind(width_per_group=128),
    "wide_resnet101_2": Kind(width_per_group=128),
}
"""The others are a plain `Kind()`."""


def layers(settings: ModelConfig, *, num_classes: int, input_spec: SampleSpec) -> list[Layer]:
    """The network as named layers: "stem", "layer1.0" .. "layer4.2", "head".

    Args:
        settings: the network's name in torchvision, and its options.
        num_classes: number of class scores.
        input_spec: an image, (channels, height, width).
    """
    kind = KINDS.get(settings.name, Kind())
    makers: list[Callable[[], nn.Module]] = [functools.partial(make_stem, input_spec.shape[0])]
    channels = STEM_CHANNELS
    for group, count in enumerate(TORCHVISION_BLOCKS[settings.name]):
        for block in range(count):
            stride = 2 if group > 0 and block == 0 else 1
            make = functools.partial(make_block, kind, channels, WIDTHS[group])
            makers.append(functools.partial(make, stride=stride, zero_init=settings.zero_init))
            channels = WIDTHS[group] * kind.block.expansion
    makers.append(functools.partial(make_head, channels, num_classes))
    names = layer_names(settings)
    return [Layer(name, make, nonnegative=name != names[-1]) for name, make in zip(names, makers, strict=True)]


def make_stem(in_channels: int) -> nn.Module:
    """First layer: 7x7 convolution, BatchNorm, ReLU, max-pooling; a quarter of the resolution."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(in_channels, STEM_CHANNELS, 7, stride=2, padding=3, bias=False),
        bn1=nn.BatchNorm2d(STEM_CHANNELS),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(3, stride=2, padding=1),
    )
    stem = nn.Sequential(parts)
    initialize(stem)
    return stem


def make_block(kind: Kind, in_channels: int, width: int, *, stride: int, zero_init: bool) -> nn.Module:
    """One of torchvision's blocks, with its projection where resolution or channels change.

    Args:
        kind: of the network.
        in_channels: channels of the input.
        width: torchvision's "planes"; the output has `width * kind.block.expansion` channels.
        stride: 1, or 2 to halve the resolution.
        zero_init: start with the shortcut alone, the last BatchNorm's weight being 0.
    """
    out_channels = width * kind.block.expansion
    projection = None
    if stride != 1 or in_channels != out_channels:
        projection = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))
    block: nn.Module = kind.block(in_channels, width, stride, projection, kind.groups, kind.width_per_group)
    initialize(block)
    if zero_init:
        last = block.get_submodule("bn3" if kind.block is Bottleneck else "bn2")
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
    return block


def make_head(in_channels: int, num_classes: int) -> nn.Module:
    """Last layer: mean over all pixels, then one linear layer to the class scores."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        avgpool=nn.AdaptiveAvgPool2d((1, 1)), flatten=nn.Flatten(), fc=nn.Linear(in_channels, num_classes)
    )
    return nn.Sequential(parts)
