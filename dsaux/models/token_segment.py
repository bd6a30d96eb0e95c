"""Segments of the AuxNet for rows of tokens (T, C): narrow self-attention and a narrow MLP on a residual stream.

`dsaux.models.auxnet.make_segment` takes them where a boundary has tokens. There are three kinds of sources:

    images (C, H, W)     a convolution over patches, a learned class token where T is one more than the grid, positions
    whole numbers (T,)   embedding and positions
    tokens (T, C')       the stream itself, through a linear layer where C' is another width

LayerNorm only: nothing depends on the batch, so nothing leaks from token to token but by the attention, which is
masked where the boundary is causal.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsaux.models.shapes import SampleSpec, Shape

INNER_SHARE: Mapping[str, float] = {"light": 0.25, "full": 1.0}
"""Kind of segment -> width inside a block as a share of the boundary's, at "dsaux.aux.width" 1; others as light."""
HEAD_WIDTH = 16
"""Channels of an attention head, where the inner width is a multiple of it."""


class TokenSegment(nn.Module):
    """`lambda_k = z + blocks(z)`, z made of lambda_(k-1) as the table above says.

    Args:
        source: the boundary before, or the data.
        target: this boundary, (T, C).
        depth: blocks.
        width: scales the width inside a block.
        kind: a name in `INNER_SHARE`.

    Raises:
        ValueError: if there is no segment for these shapes.
    """

    def __init__(self, source: SampleSpec, target: SampleSpec, *, depth: int, width: float, kind: str) -> None:
        super().__init__()
        check_token_boundary(source, target)
        channels = target.shape[1]
        inner = max(1, round(INNER_SHARE.get(kind, INNER_SHARE["light"]) * width * channels))
        self.nonnegative = target.nonnegative
        self.entry = _entry(source, target)
        self.blocks = nn.Sequential(
            *(TokenBlock(channels, inner, causal=target.causal) for _ in range(depth)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', H, W), (B, T) or (B, T, C') to (B, T, C)."""
        out: Tensor = self.blocks(self.entry(x))
        return F.relu(out) if self.nonnegative else out


class TokenBlock(nn.Module):
    """`x + attention(LN(x))`, then `x + mlp(LN(x))`, both through fewer channels than x has.

    Args:
        channels: of input and output.
        inner: channels of queries, keys, values and of the MLP's hidden layer.
        causal: a token sees those before it and itself alone.
    """

    def __init__(self, channels: int, inner: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.heads = inner // HEAD_WIDTH if inner % HEAD_WIDTH == 0 else 1
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv, self.out = nn.Linear(channels, 3 * inner), nn.Linear(inner, channels)
        self.mlp = nn.Sequential(nn.Linear(channels, inner), nn.GELU(), nn.Linear(inner, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same."""
        parts = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=self.causal)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class PatchEntry(nn.Module):
    """Patches of an image as tokens, with a learned one before them where the boundary has one more.

    Args:
        in_channels: of the image.
        target: the boundary, (T, C).
        patch: height and width of a patch.
        has_class_token: whether T is one more than the patches.
    """

    def __init__(self, in_channels: int, target: Shape, *, patch: tuple[int, int], has_class_token: bool) -> None:
        super().__init__()
        tokens, channels = target
        self.conv = nn.Conv2d(in_channels, channels, patch, stride=patch)
        self.token = nn.Parameter(torch.zeros(1, 1, channels)) if has_class_token else None
        self.positions = nn.Parameter(torch.empty(1, tokens, channels).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', H, W) to (B, T, C)."""
        x = self.conv(x).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return x + self.positions


class NumberEntry(nn.Module):
    """Whole numbers as tokens: embedding and positions.

    Args:
        vocabulary: how many numbers there are.
        target: the boundary, (T, C).
    """

    def __init__(self, vocabulary: int, target: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, target[1])
        self.positions = nn.Parameter(torch.empty(1, *target).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) to (B, T, C)."""
        out: Tensor = self.embedding(x) + self.positions
        return out


def check_token_boundary(source: SampleSpec, target: SampleSpec) -> None:
    """Refuse shapes between which there is no segment.

    Raises:
        ValueError: names both shapes.
    """
    if len(target.shape) != 2:
        raise ValueError(f"shape {target.shape} is no row of tokens (T, C)")
    if len(source.shape) == 3:
        patch_of(source.shape, target.shape)
    elif source.shape[0] != target.shape[0]:
        raise ValueError(f"tokens of shape {source.shape} become {target.shape}; a segment keeps the number of tokens")


def patch_of(image: Shape, target: Shape) -> tuple[tuple[int, int], bool]:
    """Height and width of the patches that make T or T - 1 tokens, and whether a class token comes before them.

    Raises:
        ValueError: if there are none.
    """
    _, height, width = image
    fits = [
        ((height // rows, width // columns), extra == 1)
        for extra in (0, 1)
        for rows in range(1, height + 1)
        for columns in range(1, width + 1)
        if rows * columns + extra == target[0] and height % rows == 0 and width % columns == 0
    ]
    if not fits:
        raise ValueError(f"no patches of an image of shape {image} make {target[0]} tokens, or one fewer")
    return min(fits, key=lambda fit: (abs(fit[0][0] - fit[0][1]), fit[1]))  # the most nearly square patch


def _entry(source: SampleSpec, target: SampleSpec) -> nn.Module:
    if len(source.shape) == 3:
        patch, has_class_token = patch_of(source.shape, target.shape)
        return PatchEntry(source.shape[0], target.shape, patch=patch, has_class_token=has_class_token)
    if source.vocabulary:
        return NumberEntry(source.vocabulary, target.shape)
    same = source.shape[1] == target.shape[1]
    return nn.Identity() if same else nn.Linear(source.shape[1], target.shape[1])
