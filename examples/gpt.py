"""A small GPT: embedding and positions, causal blocks, norm and head. Trained on Python's documentation by characters:

deepspeed --num_gpus 3 train.py --ds_config ds_configs/gpt_text.json
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsaux.models import Layer
from dsaux.models.shapes import SampleSpec


class Embedding(nn.Module):
    """Symbols (B, T) to tokens (B, T, C)."""

    def __init__(self, vocabulary: int, context: int, dim: int) -> None:
        super().__init__()
        self.symbols, self.positions = nn.Embedding(vocabulary, dim), nn.Parameter(0.02 * torch.randn(context, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Symbols and their places."""
        return self.symbols(x) + self.positions[: x.shape[1]]


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a LayerNorm and beside a shortcut."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.qkv, self.out = nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm2, self.mlp = (
            nn.LayerNorm(dim),
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to the same."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class Head(nn.Module):
    """Tokens (B, T, C) to scores (B, T, classes)."""

    def __init__(self, dim: int, num_classes: int) -> None:
        super().__init__()
        self.norm, self.scores = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the next symbol."""
        return self.scores(self.norm(x))


def gpt(*, num_classes: int, input_spec: SampleSpec, layers: int = 6, heads: int = 4, dim: int = 128) -> list[Layer]:
    """The network as layers that are made on the rank that holds them."""
    (context,) = input_spec.shape
    return [
        Layer("embedding", functools.partial(Embedding, input_spec.vocabulary, context, dim), causal=True),
        *(Layer(f"block{index}", functools.partial(Block, dim, heads), causal=True) for index in range(1, layers + 1)),
        Layer("head", functools.partial(Head, dim, num_classes)),
    ]
