"""The heads of greedy local losses: from what a stage makes to scores, one head per boundary. Used by the module.

    loss_k = cross-entropy(head_(k+1)(X_(k+1)), labels)        k = 0 .. K-2; the last stage has the network's own head

For images the head is the "MLP-SR" of decoupled greedy learning (Belilovsky, Eickenberg, Oyallon, ICML 2020,
arXiv:1901.08164): the resolution is lowered first, so that a head costs a few per cent of its stage. Its sizes are this
project's own. A head is held and trained by its stage alone and never used outside training, so BatchNorm uses the
batch's own statistics and keeps no running ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dsaux.models.resnet import initialize
from dsaux.models.seeding import seeded
from dsaux.models.segment_parts import batch_norm, pool_to
from dsaux.models.shapes import SampleSpec, Shape, as_spec

REDUCTION = 4
"""The side of a feature map is lowered to a quarter of itself, and not below `SMALLEST_SIDE`."""
SMALLEST_SIDE = 2
CONVOLUTIONS = 3
"""1x1 convolutions of an image head."""


class ImageHead(nn.Module):
    """MLP-SR: average pooling, 1x1 convolutions with BatchNorm and ReLU, pooling to 2x2, a small MLP.

    Args:
        channels: of the boundary.
        size: height and width of the boundary.
        num_classes: scores to make.
    """

    def __init__(self, channels: int, size: tuple[int, ...], *, num_classes: int) -> None:
        super().__init__()
        self.reduced = tuple(_reduced(side, by=REDUCTION) for side in size)
        self.last = tuple(min(SMALLEST_SIDE, side) for side in self.reduced)
        parts: list[nn.Module] = []
        for _ in range(CONVOLUTIONS):
            parts += [nn.Conv2d(channels, channels, 1, bias=False), batch_norm(channels), nn.ReLU()]
        self.convolutions = nn.Sequential(*parts)
        numbers = channels * self.last[0] * self.last[1]
        self.mlp = nn.Sequential(nn.Linear(numbers, channels), nn.ReLU(), nn.Linear(channels, num_classes))
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to scores (B, classes)."""
        x = self.convolutions(pool_to(x, self.reduced))
        scores: Tensor = self.mlp(pool_to(x, self.last).flatten(1))
        return scores


class TokenHead(nn.Module):
    """Layer norm and a linear classifier, for every token by itself: no token sees another.

    Args:
        channels: of the boundary.
        num_classes: scores to make.
    """

    def __init__(self, channels: int, *, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to scores (B, T, classes), or (B, C) to (B, classes)."""
        scores: Tensor = self.linear(self.norm(x))
        return scores


class MeanHead(TokenHead):
    """The same on the mean over the tokens, where a sample has one label."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) to scores (B, classes)."""
        return super().forward(x.mean(dim=1))


def build_local_heads(
    specs: Sequence[SampleSpec | Shape], *, scores: SampleSpec | Shape, seed: int = 0
) -> list[nn.Module]:
    """The heads for given boundaries, the same weights whoever builds them.

    Args:
        specs: a sample at each boundary, K-1 of them for K stages: (C, H, W), (T, C) or (C,).
        scores: a sample of the network's output, (classes,) or (T, classes).
        seed: the run's seed.

    Returns:
        Head k is for what stage k makes, k = 0 .. K-2.

    Raises:
        ValueError: if there is no head for a boundary.
    """
    heads = []
    for index, spec in enumerate(specs):
        with seeded(seed, "local head", index):
            heads.append(make_local_head(as_spec(spec), scores=as_spec(scores), boundary=index))
    return heads


def make_local_head(spec: SampleSpec, *, scores: SampleSpec, boundary: int = 0) -> nn.Module:
    """One head, with weights from PyTorch's global generator.

    Args:
        spec: a sample at the boundary.
        scores: a sample of the network's output.
        boundary: number of the boundary, for errors.

    Raises:
        ValueError: if there is no head from the one to the other.
    """
    form = len(spec.shape), len(scores.shape)
    if form not in _HEADS or (form == (2, 2) and spec.shape[0] != scores.shape[0]):
        raise ValueError(
            f"boundary {boundary} has shape {spec.shape} and the network's scores have {scores.shape}; a local head "
            "leads from a feature map (channels, height, width), tokens (tokens, channels) or one vector to one label "
            "a sample, or from tokens to as many labels. Move this cut."
        )
    return _HEADS[form](spec.shape, scores.shape[-1])


_HEADS: dict[tuple[int, int], Callable[[Shape, int], nn.Module]] = {
    (3, 1): lambda shape, classes: ImageHead(shape[0], shape[1:], num_classes=classes),
    (2, 1): lambda shape, classes: MeanHead(shape[1], num_classes=classes),
    (2, 2): lambda shape, classes: TokenHead(shape[1], num_classes=classes),
    (1, 1): lambda shape, classes: TokenHead(shape[0], num_classes=classes),
}
"""By the number of axes of a sample at the boundary, and of its scores."""


def _reduced(side: int, *, by: int) -> int:
    return min(side, max(SMALLEST_SIDE, side // by))
