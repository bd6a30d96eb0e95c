"""The AuxNet: one chain of low-capacity segments that makes every stage's input from the augmented batch.

    lambda_0 = x,    lambda_k = T_k(lambda_(k-1)),    k = 1 .. K-1

Every rank holds the whole chain and evaluates the part that it needs. BatchNorm uses the batch's own statistics and
keeps no running ones: the AuxNet is never used outside training, and replicas that see other depths stay equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from dsaux.models.resnet import initialize
from dsaux.models.seeding import seeded
from dsaux.models.shapes import Shape


class AuxNet(nn.Module):
    """The chain of segments.

    Args:
        segments: T_1 .. T_(K-1), in order.
    """

    def __init__(self, segments: Sequence[nn.Module]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)

    @property
    def num_boundaries(self) -> int:
        """K - 1, the number of segments."""
        return len(self.segments)

    def forward(self, x: Tensor, depth: int | None = None) -> list[Tensor]:
        """The first auxiliary variables.

        Args:
            x: augmented batch, shape (B, C, H, W).
            depth: how many segments to evaluate; all by default.

        Returns:
            lambda_1 .. lambda_depth, lambda_k of shape (B, C_k, H_k, W_k).
        """
        variables: list[Tensor] = []
        for segment in self.segments[:depth]:
            x = segment(x)
            variables.append(x)
        return variables


class LightSegment(nn.Module):
    """A segment whose blocks work at half the boundary's resolution.

    `y = BN(conv(avgpool(x)))`, the pooling down to the boundary's resolution, then
    `ReLU(y + upsample(blocks(ReLU(avgpool2(y)))))`.

    Args:
        in_shape: (C, H, W) of the boundary before, or of the images.
        out_shape: (C, H, W) of this boundary.
        depth: residual blocks.
        width: channels inside a block, as a multiple of the boundary's.
        first: whether this segment takes the images; its convolution is 3x3 then, else 1x1.
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, *, depth: int, width: float, first: bool) -> None:
        super().__init__()
        kernel = 3 if first else 1
        self.size = tuple(out_shape[1:])
        self.half_size = tuple(max(1, side // 2) for side in self.size)
        self.conv = nn.Conv2d(in_shape[0], out_shape[0], kernel, padding=kernel // 2, bias=False)
        self.bn = _batch_norm(out_shape[0])
        self.blocks = nn.Sequential(*(Block(out_shape[0], width=width) for _ in range(depth)))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_(k-1), H_(k-1), W_(k-1)) to (B, C_k, H_k, W_k)."""
        y = self.bn(self.conv(_pool_to(x, self.size)))
        z = self.blocks(F.relu(_pool_to(y, self.half_size)))
        return F.relu(y + F.interpolate(z, size=self.size, mode="nearest"))


class FullSegment(nn.Module):
    """A segment at the boundary's own resolution: `blocks(ReLU(BN(conv3x3(avgpool(x)))))`.

    Args:
        in_shape: (C, H, W) of the boundary before, or of the images.
        out_shape: (C, H, W) of this boundary.
        depth: residual blocks.
        width: channels inside a block, as a multiple of the boundary's.
        first: no difference here; segments share their arguments.
    """

    def __init__(self, in_shape: Shape, out_shape: Shape, *, depth: int, width: float, first: bool) -> None:
        super().__init__()
        self.size = tuple(out_shape[1:])
        self.conv = nn.Conv2d(in_shape[0], out_shape[0], 3, padding=1, bias=False)
        self.bn = _batch_norm(out_shape[0])
        self.blocks = nn.Sequential(*(Block(out_shape[0], width=width) for _ in range(depth)))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_(k-1), H_(k-1), W_(k-1)) to (B, C_k, H_k, W_k)."""
        out: Tensor = self.blocks(F.relu(self.bn(self.conv(_pool_to(x, self.size)))))
        return out


class Block(nn.Module):
    """Residual block that keeps its shape: `ReLU(x + BN(conv(ReLU(BN(conv(x))))))`.

    Args:
        channels: channels of input and output.
        width: channels between the two 3x3 convolutions, as a multiple of `channels`, rounded, at least 1.
    """

    def __init__(self, channels: int, *, width: float) -> None:
        super().__init__()
        inner = max(1, round(width * channels))
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = _batch_norm(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = _batch_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


SEGMENTS: Mapping[str, Callable[..., nn.Module]] = {"light": LightSegment, "full": FullSegment}


def build_aux_net(
    shapes: Sequence[Shape], *, depth: int = 1, width: float = 1.0, segment: str = "light", seed: int = 0
) -> AuxNet:
    """Build the AuxNet for given boundaries, the same weights on every rank.

    Args:
        shapes: (C, H, W) of one image, then of one sample at each boundary, K shapes for K stages.
        depth: residual blocks in each segment.
        width: channels inside a block, as a multiple of its boundary's.
        segment: a name in `SEGMENTS`.
        seed: the run's seed.

    Raises:
        ValueError: if a boundary has no (C, H, W) or a higher resolution than the one before it.
    """
    segments = []
    for index, (before, after) in enumerate(itertools.pairwise(shapes)):
        check_boundary(before, after, boundary=index)
        with seeded(seed, "segment", index):
            segments.append(SEGMENTS[segment](before, after, depth=depth, width=width, first=index == 0))
    return AuxNet(segments)


def check_boundary(before: Shape, after: Shape, *, boundary: int) -> None:
    """Refuse a boundary that no segment can reach.

    Raises:
        ValueError: names the boundary and both shapes.
    """
    if len(before) != 3 or len(after) != 3:
        raise ValueError(
            f"boundary {boundary} lies between shapes {before} and {after}; the AuxNet's segments take feature maps "
            "(channels, height, width). Move this cut to a layer that makes one."
        )
    if any(small > large for small, large in zip(after[1:], before[1:], strict=True)):
        raise ValueError(
            f"boundary {boundary} goes from shape {before} up to {after}; the AuxNet's segments only keep or lower the "
            "resolution. Move this cut."
        )


def _pool_to(x: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(x.shape[-2:]) == size:
        return x
    height, width = x.shape[-2] // size[0], x.shape[-1] // size[1]
    if x.shape[-2] == height * size[0] and x.shape[-1] == width * size[1]:
        return F.avg_pool2d(x, (height, width))  # same as below, and faster
    return F.adaptive_avg_pool2d(x, size)  # type: ignore[arg-type]


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)
