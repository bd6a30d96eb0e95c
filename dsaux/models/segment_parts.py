"""What the AuxNet's segments share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def pool_to(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Average feature maps (B, C, H, W) down to a height and width."""
    if tuple(x.shape[-2:]) == size:
        return x
    height, width = x.shape[-2] // size[0], x.shape[-1] // size[1]
    if x.shape[-2] == height * size[0] and x.shape[-1] == width * size[1]:
        return F.avg_pool2d(x, (height, width))  # same as below, and faster
    return F.adaptive_avg_pool2d(x, size)  # type: ignore[arg-type]


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm by the batch's own statistics, without running ones."""
    return nn.BatchNorm2d(channels, track_running_stats=False)
