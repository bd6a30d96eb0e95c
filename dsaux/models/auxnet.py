"""The AuxNet: one chain of low-capacity segments that makes every stage's input from the augmented batch.

    lambda_0 = x,    lambda_k = T_k(lambda_(k-1)),    k = 1 .. K-1

Every rank holds the whole chain and evaluates the part that it needs. BatchNorm uses the batch's own statistics and
keeps no running ones: the AuxNet is never used outside training, and replicas that see other depths stay equal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsaux.config_rules import ConfigError, show
from dsaux.models.bottleneck import BottleneckSegment
from dsaux.models.reference import in_one_line, is_reference, load_function
from dsaux.models.resnet import initialize
from dsaux.models.seeding import seeded
from dsaux.models.segment_parts import batch_norm, pool_to, upsample_to
from dsaux.models.shapes import SampleSpec, Shape
from dsaux.models.token_segment import TokenSegment, check_token_boundary


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
            x: augmented batch, shape (B, C, H, W), or (B, T) whole numbers.
            depth: how many segments to evaluate; all by default.

        Returns:
            lambda_1 .. lambda_depth, lambda_k of shape (B, C_k, H_k, W_k) or (B, T, C_k).
        """
        variables: list[Tensor] = []
        for segment in self.segments[:depth]:
            x = segment(x)
            variables.append(x)
        return variables


class LightSegment(nn.Module):
    """A segment whose blocks work at half the boundary's resolution.

    `y = BN(conv(avgpool(x)))`, the pooling down to the boundary's resolution, then
    `ReLU(y + upsample(blocks(ReLU(avgpool2(y)))))`, the outer ReLU only where the boundary has one.

    Args:
        source: the boundary before, or the images, (C, H, W).
        target: this boundary, (C, H, W).
        depth: residual blocks.
        width: channels inside a block, as a multiple of the boundary's.
        first: whether this segment takes the images; its convolution is 3x3 then, else 1x1.
    """

    def __init__(self, source: SampleSpec, target: SampleSpec, *, depth: int, width: float, first: bool) -> None:
        super().__init__()
        in_shape, out_shape = source.shape, target.shape
        self.nonnegative = target.nonnegative
        kernel = 3 if first else 1
        self.size = tuple(out_shape[1:])
        self.half_size = tuple(max(1, side // 2) for side in self.size)
        self.conv = nn.Conv2d(in_shape[0], out_shape[0], kernel, padding=kernel // 2, bias=False)
        self.bn = batch_norm(out_shape[0])
        self.blocks = nn.Sequential(*(Block(out_shape[0], width=width) for _ in range(depth)))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_(k-1), H_(k-1), W_(k-1)) to (B, C_k, H_k, W_k)."""
        y = self.bn(self.conv(pool_to(x, self.size)))
        z = self.blocks(F.relu(pool_to(y, self.half_size)))
        out = y + upsample_to(z, self.size)
        return F.relu(out) if self.nonnegative else out


class FullSegment(nn.Module):
    """A segment at the boundary's own resolution: `blocks(ReLU(BN(conv3x3(avgpool(x)))))`.

    Args:
        source: the boundary before, or the images, (C, H, W).
        target: this boundary, (C, H, W).
        depth: residual blocks.
        width: channels inside a block, as a multiple of the boundary's.
        first: no difference here; segments share their arguments.
    """

    def __init__(self, source: SampleSpec, target: SampleSpec, *, depth: int, width: float, first: bool) -> None:
        super().__init__()
        in_shape, out_shape = source.shape, target.shape
        self.size = tuple(out_shape[1:])
        self.conv = nn.Conv2d(in_shape[0], out_shape[0], 3, padding=1, bias=False)
        self.bn = batch_norm(out_shape[0])
        ends = (target.nonnegative if block == depth - 1 else True for block in range(depth))
        self.blocks = nn.Sequential(*(Block(out_shape[0], width=width, nonnegative=end) for end in ends))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_(k-1), H_(k-1), W_(k-1)) to (B, C_k, H_k, W_k)."""
        out: Tensor = self.blocks(F.relu(self.bn(self.conv(pool_to(x, self.size)))))
        return out


class Block(nn.Module):
    """Residual block that keeps its shape: `ReLU(x + BN(conv(ReLU(BN(conv(x))))))`.

    Args:
        channels: channels of input and output.
        width: channels between the two 3x3 convolutions, as a multiple of `channels`, rounded, at least 1.
        nonnegative: False leaves out the outer ReLU.
    """

    def __init__(self, channels: int, *, width: float, nonnegative: bool = True) -> None:
        super().__init__()
        self.nonnegative = nonnegative
        inner = max(1, round(width * channels))
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1, bias=False)
        self.bn1 = batch_norm(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = batch_norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        out = x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out) if self.nonnegative else out


SEGMENTS: Mapping[str, Callable[..., nn.Module]] = {
    "light": LightSegment,
    "full": FullSegment,
    "bottleneck": BottleneckSegment,
}


def build_aux_net(
    specs: Sequence[SampleSpec | Shape], *, depth: int = 1, width: float = 1.0, segment: str = "light", seed: int = 0
) -> AuxNet:
    """Build the AuxNet for given boundaries, the same weights on every rank.

    Args:
        specs: one sample of the data, then one at each boundary, K of them for K stages; a plain shape (C, H, W) at a
            boundary stands for a feature map behind a ReLU.
        depth: residual blocks in each segment.
        width: channels inside a block, as a multiple of its boundary's.
        segment: a name in `SEGMENTS`, or `path/to/file.py:function`.
        seed: the run's seed.

    Raises:
        ValueError: if no segment leads from a boundary to the next.
    """
    full = [spec if isinstance(spec, SampleSpec) else SampleSpec(tuple(spec), nonnegative=True) for spec in specs]
    segments = []
    for index, (before, after) in enumerate(itertools.pairwise(full)):
        with seeded(seed, "segment", index):
            segments.append(
                make_segment(before, after, kind=segment, depth=depth, width=width, first=index == 0, boundary=index)
            )
    return AuxNet(segments)


def make_segment(
    source: SampleSpec, target: SampleSpec, *, kind: str, depth: int, width: float, first: bool, boundary: int = 0
) -> nn.Module:
    """The segment from one boundary to the next, with weights from PyTorch's global generator.

    Args:
        source: the boundary before, or the data.
        target: this boundary.
        kind: a name in `SEGMENTS`, or a user's `function(source, target, depth=..., width=..., first=...)`.
        depth: residual blocks.
        width: channels inside a block, as a multiple of the boundary's.
        first: whether the segment takes the data.
        boundary: number of the boundary, for errors.

    Raises:
        ValueError: if there is no segment for these shapes.
        ConfigError: if a user's own function fails, or its segment makes another shape.
    """
    if is_reference(kind):
        return _users_segment(source, target, kind=kind, depth=depth, width=width, first=first)
    if len(target.shape) == 2:
        try:
            check_token_boundary(source, target)
        except ValueError as error:
            raise ValueError(f"boundary {boundary}: {error}. Move this cut.") from None
        return TokenSegment(source, target, depth=depth, width=width, kind=kind)
    check_boundary(source.shape, target.shape, boundary=boundary)
    return SEGMENTS[kind](source, target, depth=depth, width=width, first=first)


def check_boundary(before: Shape, after: Shape, *, boundary: int) -> None:
    """Refuse a boundary that no segment can reach.

    Raises:
        ValueError: names the boundary and both shapes.
    """
    if len(before) != 3 or len(after) != 3:
        raise ValueError(
            f"boundary {boundary} lies between shapes {before} and {after}; the AuxNet's segments make feature maps "
            "(channels, height, width) of those, or tokens (tokens, channels) of anything. Move this cut to a layer "
            "that makes one of the two."
        )
    if any(small > large for small, large in zip(after[1:], before[1:], strict=True)):
        raise ValueError(
            f"boundary {boundary} goes from shape {before} up to {after}; the AuxNet's segments only keep or lower the "
            "resolution. Move this cut."
        )


def _users_segment(
    source: SampleSpec, target: SampleSpec, *, kind: str, depth: int, width: float, first: bool
) -> nn.Module:
    """A segment by a user's own function, tried out without data.

    Raises:
        ConfigError: if the function fails, or what it gives does not lead from `source` to `target`.
    """
    function = load_function(kind, key="dsaux.aux.segment")
    try:
        module = function(source, target, depth=depth, width=width, first=first)
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            trial = function(source, target, depth=depth, width=width, first=first).to("meta")
            shape = tuple(trial(source.empty(2, device="meta")).shape[1:])
    except Exception as error:
        raise ConfigError(
            f"dsaux.aux.segment {show(kind)} failed for a boundary of shape {target.shape} behind {source.shape}: "
            f"{in_one_line(error)}. Mend it."
        ) from error
    if shape != target.shape:
        raise ConfigError(
            f"dsaux.aux.segment {show(kind)} makes {shape} of a sample of shape {source.shape}; the boundary needs "
            f"{target.shape}. Mend it."
        )
    made: nn.Module = module
    return made
