"""torchvision's VisionTransformer as a list of layers, its own modules cut apart: patches, blocks, head.

deepspeed --num_gpus 3 train.py --ds_config ds_configs/vit_photos.json
"""

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from dsaux.models.shapes import SampleSpec


class Patches(nn.Module):
    """Images (B, 3, H, W) to tokens (B, T, C): the patches, a class token before them, and positions."""

    def __init__(self, whole: VisionTransformer) -> None:
        super().__init__()
        self.conv_proj, self.class_token = whole.conv_proj, whole.class_token
        self.pos_embedding, self.dropout = whole.encoder.pos_embedding, whole.encoder.dropout

    def forward(self, x: Tensor) -> Tensor:
        """Tokens, the class token first."""
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)
        return self.dropout(x + self.pos_embedding)


class Head(nn.Module):
    """Tokens (B, T, C) to class scores (B, classes), by the class token."""

    def __init__(self, whole: VisionTransformer) -> None:
        super().__init__()
        self.ln, self.heads = whole.encoder.ln, whole.heads

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.heads(self.ln(x)[:, 0])


def cut(whole: VisionTransformer) -> nn.Sequential:
    """The network's own modules in a row; they compute what it computes."""
    blocks = dict(whole.encoder.layers.named_children())
    return nn.Sequential(Patches(whole), *blocks.values(), Head(whole))


def vit(
    *, num_classes: int, input_spec: SampleSpec, patch: int = 4, layers: int = 6, heads: int = 4, dim: int = 128
) -> nn.Sequential:
    """A small one for small images; torchvision draws its weights."""
    return cut(
        VisionTransformer(
            image_size=input_spec.shape[1],
            patch_size=patch,
            num_layers=layers,
            num_heads=heads,
            hidden_dim=dim,
            mlp_dim=4 * dim,
            num_classes=num_classes,
        )
    )
