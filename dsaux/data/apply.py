"""What `dsaux.data.distort` and Cutout have drawn, applied to a batch with PyTorch. The torch loader uses it.

Only operations that treat each number on its own, whose result no number of threads can change.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


def recolour(images: Tensor, maps: NDArray[np.float32]) -> Tensor:
    """Maps the colours of each image.

    Args:
        images: 0 .. 255, float32 (B, 3, H, W).
        maps: (B, 3, 4).

    Returns:
        Images of the same shape, clipped to 0 .. 255.
    """
    entries = torch.from_numpy(maps).to(images.device)[..., None, None]
    red, green, blue = images[:, None].unbind(2)
    mixed = entries[:, :, 0] * red + entries[:, :, 1] * green + entries[:, :, 2] * blue + entries[:, :, 3]
    return mixed.clamp_(0.0, 255.0)


def warp(images: Tensor, maps: NDArray[np.float32]) -> Tensor:
    """Moves the pixels of each image in place; images with the identity for a map are left as they are.

    Args:
        images: float32 (B, C, H, W), 0 where a pixel comes from outside.
        maps: (B, 2, 3), from pixels of the result to pixels of `images`.
    """
    moved = torch.from_numpy(np.flatnonzero((maps != np.eye(2, 3, dtype=np.float32)).any(axis=(1, 2))))
    entries = torch.from_numpy(maps)[moved][..., None, None].to(images.device)
    moved = moved.to(images.device)
    height, width = images.shape[2:]
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    from_x, from_y = (entries[:, row, 0] * x + entries[:, row, 1] * y + entries[:, row, 2] for row in (0, 1))
    grid = torch.stack((2 * from_x / width - 1, 2 * from_y / height - 1), dim=-1)
    images[moved] = F.grid_sample(images[moved], grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return images


def erase(images: Tensor, boxes: NDArray[np.int64]) -> Tensor:
    """Sets a box of each image to 0, in place.

    Args:
        images: (B, C, H, W).
        boxes: top, left, bottom and right, (B, 4); the last two are outside the box.
    """
    height, width = images.shape[2:]
    rows, columns = np.arange(height), np.arange(width)
    top, left, bottom, right = boxes.T[..., None]
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    inside = torch.from_numpy(in_rows[:, :, None] & in_columns[:, None, :])
    return images.masked_fill_(inside[:, None].to(images.device), 0.0)
