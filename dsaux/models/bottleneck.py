"""The AuxNet's segment for boundaries of many channels, where 3x3 convolutions at full width are too dear.

One of `dsaux.models.auxnet.SEGMENTS`. Multiply-accumulates for C channels at H x W: at most C*C for each of the H*W
pixels in the projection, and about C*C/4 in a block, since its width is C/4 and its resolution a half.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from dsaux.models.resnet import initialize
from dsaux.models.segment_parts import batch_norm, pool_to, upsample_to
from dsaux.models.shapes import SampleSpec

STEM_WIDTHS = (16, 32, 64)


class BottleneckSegment(nn.Module):
    """A segment whose blocks are narrow and work at half the boundary's resolution.

    `y = BN(conv1x1(avgpool(x)))`, or x itself where this boundary has the shape of the one before, then
    `ReLU(y + upsample(blocks(ReLU(avgpool2(y)))))`, the outer ReLU only where the boundary has one. The first segment
    takes the images through up to three 3x3 convolutions of stride 2, as far as the boundary's resolution, before its
    projection; at the images' own resolution its projection is 3x3.

    Args:
        source: the boundary before, or the images, (C, H, W).
        target: this boundary, (C, H, W).
        depth: residual blocks.
        width: channels inside a block, as a multiple of a quarter of the boundary's.
        first: whether this segment takes the images.
    """

    def __init__(self, source: SampleSpec, target: SampleSpec, *, depth: int, width: float, first: bool) -> None:
        super().__init__()
        self.nonnegative = target.nonnegative
        channels, *size = target.shape
        self.size = tuple(size)
        self.half_size = tuple(max(1, side // 2) for side in size)
        stem = _strided_stem(source.shape, self.size) if first else []
        in_channels = STEM_WIDTHS[len(stem) - 1] if stem else source.shape[0]
        kernel = 3 if first and not stem else 1
        self.stem = nn.Sequential(*stem)
        self.projection: nn.Module = nn.Identity()
        if first or source.shape != target.shape:
            conv = nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False)
            self.projection = nn.Sequential(conv, batch_norm(channels))
        self.blocks = nn.Sequential(*(BottleneckBlock(channels, width=width) for _ in range(depth)))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_(k-1), H_(k-1), W_(k-1)) to (B, C_k, H_k, W_k)."""
        y = self.projection(pool_to(self.stem(x), self.size))
        z = self.blocks(F.relu(pool_to(y, self.half_size)))
        out = y + upsample_to(z, self.size)
        return F.relu(out) if self.nonnegative else out


class BottleneckBlock(nn.Module):
    """Residual block that keeps its shape: `ReLU(x + BN(conv1x1(ReLU(BN(conv3x3(ReLU(BN(conv1x1(x)))))))))`.

    Args:
        channels: channels of input and output.
        width: channels inside, as a multiple of a quarter of `channels`, rounded, at least 1.
    """

    def __init__(self, channels: int, *, width: float) -> None:
        super().__init__()
        inner = max(1, round(width * channels / 4))
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.bn1 = batch_norm(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.bn2 = batch_norm(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = batch_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(x + self.bn3(self.conv3(y)))


def _strided_stem(image: tuple[int, ...], size: tuple[int, ...]) -> list[nn.Module]:
    """Convolutions that halve the image while it is at least twice as large as `size`."""
    channels, *sides = image
    stem: list[nn.Module] = []
    for width in STEM_WIDTHS:
        if any(side < 2 * goal for side, goal in zip(sides, size, strict=True)):
            break
        conv = nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False)
        stem.append(nn.Sequential(conv, batch_norm(width), nn.ReLU(inplace=True)))
        channels, sides = width, [-(-side // 2) for side in sides]
    return stem
