"""What the AuxNet's segments share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def pool_to(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Average feature maps (B, C, H, W) down to a height and width."""
    if tuple(x.shape[-2:]) == size:
        return x
    height, width = x.shape[-2] // size[0], x.shape[-1] // size[1]
    if x.shape[-2] == height * size[0] and x.shape[-1] == width * size[1]:
        if height == width == 2 and _has_slow_kernels(x):
            halved: Tensor = _Halve.apply(x)
            return halved
        return F.avg_pool2d(x, (height, width))  # same as below, and faster
    return F.adaptive_avg_pool2d(x, size)  # type: ignore[arg-type]


def upsample_to(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Repeat the entries of feature maps (B, C, H, W) up to a height and width."""
    if size == (2 * x.shape[-2], 2 * x.shape[-1]) and _has_slow_kernels(x):
        doubled: Tensor = _Double.apply(x)
        return doubled
    return F.interpolate(x, size=size, mode="nearest")


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """BatchNorm by the batch's own statistics, without running ones."""
    return nn.BatchNorm2d(channels, track_running_stats=False)


# ---- factors of two on a CPU ----------------------------------------------------------------------------------------


def _has_slow_kernels(x: Tensor) -> bool:
    """Whether PyTorch resamples entry by entry: slower than what is below, and `torch.compile` makes its own."""
    is_plain = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and x.is_contiguous()
    return is_plain and not torch.compiler.is_compiling()


class _Halve(torch.autograd.Function):
    """`avg_pool2d(x, 2)`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum_squares(x).mul_(0.25)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _repeat_squares(0.25 * gradient)


class _Double(torch.autograd.Function):
    """`interpolate(x, scale_factor=2, mode="nearest")`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _repeat_squares(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _sum_squares(gradient)


def _sum_squares(x: Tensor) -> Tensor:
    """Sums over squares of 2 x 2 entries: (B, C, 2 H, 2 W) to (B, C, H, W); in PyTorch's order, to the same bits."""
    above, below = x[..., 0::2, :], x[..., 1::2, :]
    total = above[..., 0::2] + above[..., 1::2]
    return total.add_(below[..., 0::2]).add_(below[..., 1::2])


def _repeat_squares(x: Tensor) -> Tensor:
    """Each entry as a square of 2 x 2: (B, C, H, W) to (B, C, 2 H, 2 W)."""
    *lead, height, width = x.shape
    rows = x.new_empty(*lead, height, width, 2)
    rows[..., 0] = x
    rows[..., 1] = x
    out = x.new_empty(*lead, height, 2, 2 * width)
    out[..., 0, :] = out[..., 1, :] = rows.flatten(-2)
    return out.flatten(-3, -2)
