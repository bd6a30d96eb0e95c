"""What is drawn for each training image: where it is cropped, whether it is mirrored, and more.

`dsaux.data.stream` draws for a whole epoch at once, from (seed, epoch) alone; a loader applies what was drawn. So any
batch can be made without those before it, and every rank makes the same one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dsaux.data.distort import draw_distortions

Draws: TypeAlias = Mapping[str, NDArray[Any]]
"""What was drawn by name; the first axis of every array is the sample."""

PADDING = 4
"""Pixels of reflect padding on each side of a small training image: random crops start at 0 .. 2 * PADDING."""


class Augmentation(Protocol):
    """Draws the augmentation of samples."""

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        """Draws for `count` samples, in their order."""
        ...


@dataclass(frozen=True)
class CropFlip:
    """Random crops out of a padded image, and flips.

    Attributes:
        padding: pixels on each side.
        flip: mirror half of the images from left to right.
    """

    padding: int = PADDING
    flip: bool = True

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        """`top` and `left`, first row and column of the crop in the padded image, int64; `flip`, bool."""
        top, left = rng.integers(0, 2 * self.padding, size=(2, count), endpoint=True)
        return {"top": top, "left": left, "flip": (rng.random(count) < 0.5) & self.flip}


AS_IT_IS = CropFlip(padding=0, flip=False)
"""Small images as they are."""


@dataclass(frozen=True)
class StrongAugment:
    """Crops and flips, and behind them Cutout and operations as in RandAugment, of which one may be off.

    The crops and flips are those of `CropFlip`: what comes more is drawn after them.

    Attributes:
        size: height and width of an image.
        cutout: side of the square that is greyed out; 0 draws none.
        rand_augment: strength of the operations, 1 .. 10; 0 draws none.
        base: draws the crops and flips.
    """

    size: tuple[int, int]
    cutout: int = 0
    rand_augment: int = 0
    base: CropFlip = CropFlip()

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        """What `CropFlip` draws; with `cutout` the `erased` boxes; with `rand_augment` the maps `colour` and `warp`.

        `erased`: top, left, bottom and right of a box inside the image, int64 (count, 4); the last two are outside it.
        `colour` and `warp`: see `draw_distortions`.
        """
        draws = dict(self.base.draw(rng, count))
        if self.cutout:
            draws["erased"] = _draw_boxes(rng, count, size=self.size, side=self.cutout)
        if self.rand_augment:
            draws["colour"], draws["warp"] = draw_distortions(rng, count, size=self.size, strength=self.rand_augment)
        return draws


def _draw_boxes(rng: np.random.Generator, count: int, *, size: tuple[int, int], side: int) -> NDArray[np.int64]:
    """Squares around uniform centres, clipped at the edges (DeVries and Taylor, arXiv:1708.04552)."""
    centres = rng.integers(0, np.array(size), size=(count, 2))
    first = centres - side // 2
    return np.concatenate([np.maximum(first, 0), np.minimum(first + side, size)], axis=1)
