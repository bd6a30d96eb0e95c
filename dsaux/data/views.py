"""Which part of an image file becomes a sample: random-resized crops to train on, the central square to test with.

files.py gives one of the two augmentations to a plan, which draws for a whole epoch. An image's size is known only when
it is read, so a loader then asks for the `Views` of its batch. Both loaders do, and thus treat an image alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dsaux.data.augment import Augmentation, Draws

AREA = (0.08, 1.0)
"""Least and greatest area of a random window, as a share of the image's."""
ASPECT = (3 / 4, 4 / 3)
"""Least and greatest width of a random window, as a multiple of its height."""
TRIES = 10
"""Windows that are drawn; the first one that fits into the image is taken."""
TEST_SCALE = 256 / 224
"""The shorter side of a test image after resizing, as a multiple of the sample's side."""


@dataclass(frozen=True)
class Views:
    """How each image of a batch becomes a sample: cut the window, resize it, crop a square, flip, change colours.

    Attributes:
        window: top, left, height, width in the image; int64 (B, 4).
        resized: height and width that the window is resized to; int64 (B, 2).
        crop: top and left of the square in the resized window; int64 (B, 2).
        flip: mirror from left to right; bool (B,).
        color: factors of brightness, contrast and saturation, float32 (B, 3); None leaves all colours alone.
    """

    window: NDArray[np.int64]
    resized: NDArray[np.int64]
    crop: NDArray[np.int64]
    flip: NDArray[np.bool_]
    color: NDArray[np.float32] | None


class FileAugmentation(Augmentation, Protocol):
    """Draws for images whose size is not known yet."""

    def views(self, draws: Draws, sizes: NDArray[np.int64], *, image_size: int) -> Views:
        """How each image becomes a sample.

        Args:
            draws: of these images.
            sizes: height and width of each, (B, 2).
            image_size: side S of a sample.
        """
        ...

    def has_color(self) -> bool:
        """Whether colours are changed."""
        ...


@dataclass(frozen=True)
class RandomResizedCropFlip:
    """Random windows of any scale, resized to the sample's size, and flips; on request colours change, too.

    Attributes:
        color: strength s: brightness, contrast and saturation are multiplied by factors out of 1 - s .. 1 + s.
    """

    color: float = 0.0

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        """`key`, uint64, that all numbers of a window are made of; `flip`, bool; `color` as in `Views`, if any.

        One key stands for the 22 numbers of a window, which for a million images would take 180 MB.
        """
        draws = {"key": rng.integers(0, 2**64, size=count, dtype=np.uint64), "flip": rng.random(count) < 0.5}
        if self.color:
            low, high = max(0.0, 1.0 - self.color), 1.0 + self.color
            draws["color"] = rng.uniform(low, high, size=(count, 3)).astype(np.float32)
        return draws

    def views(self, draws: Draws, sizes: NDArray[np.int64], *, image_size: int) -> Views:
        """Random windows; see `FileAugmentation`."""
        count = len(sizes)
        return Views(
            window=random_windows(draws["key"], sizes),
            resized=np.full((count, 2), image_size, dtype=np.int64),
            crop=np.zeros((count, 2), dtype=np.int64),
            flip=draws["flip"],
            color=draws.get("color"),
        )

    def has_color(self) -> bool:
        """Whether colours are changed."""
        return self.color > 0


@dataclass(frozen=True)
class CentralSquare:
    """The whole image, its shorter side resized to 256/224 of the sample's side, and the square in its middle."""

    def draw(self, rng: np.random.Generator, count: int) -> Draws:
        """Nothing."""
        del rng, count
        return {}

    def views(self, draws: Draws, sizes: NDArray[np.int64], *, image_size: int) -> Views:
        """The central squares; see `FileAugmentation`."""
        del draws
        return central_views(sizes, shorter_side=shorter_side(image_size), image_size=image_size)

    def has_color(self) -> bool:
        """Never."""
        return False


def shorter_side(image_size: int) -> int:
    """What the shorter side of a test image is resized to before its middle is cut out: 256 for 224."""
    return round(image_size * TEST_SCALE)


def central_views(sizes: NDArray[np.int64], *, shorter_side: int, image_size: int) -> Views:
    """The squares in the middle of images whose shorter side is resized to `shorter_side`."""
    resized = shorter_side * sizes // sizes.min(axis=1, keepdims=True)
    whole = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    crop = np.rint((resized - image_size) / 2).astype(np.int64)
    return Views(whole, resized, crop, np.zeros(len(sizes), dtype=np.bool_), None)


def random_windows(keys: NDArray[np.uint64], sizes: NDArray[np.int64]) -> NDArray[np.int64]:
    """One window for each image: of random area and log-uniform aspect, at a random place.

    The first of TRIES windows that fits is taken. If none does, it is the largest central one of an allowed aspect.

    Args:
        keys: uint64 (B,), one a window.
        sizes: height and width of the images, (B, 2).

    Returns:
        top, left, height, width of each window, int64 (B, 4).
    """
    numbers = uniform_numbers(keys, 2 * TRIES + 2)
    height, width = sizes[:, :1], sizes[:, 1:]
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * numbers[:, :TRIES])
    low, high = np.log(ASPECT)
    aspect = np.exp(low + (high - low) * numbers[:, TRIES : 2 * TRIES])
    heights = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    widths = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
    chosen = np.argmax(fits, axis=1)[:, None]
    extent = np.concatenate([np.take_along_axis(part, chosen, axis=1) for part in (heights, widths)], axis=1)
    corner = np.floor(numbers[:, 2 * TRIES :] * (sizes - extent + 1)).astype(np.int64)
    for row in np.flatnonzero(~fits.any(axis=1)):
        extent[row] = _largest_allowed(int(sizes[row, 0]), int(sizes[row, 1]))
        corner[row] = (sizes[row] - extent[row]) // 2
    return np.concatenate([corner, extent], axis=1)


def uniform_numbers(keys: NDArray[np.uint64], count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each key, by the generator SplitMix64 (Steele, Lea and Flood 2014); (B, count)."""
    state = keys[:, None] + np.uint64(0x9E3779B97F4A7C15) * np.arange(1, count + 1, dtype=np.uint64)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state ^= state >> np.uint64(31)
    numbers: NDArray[np.float64] = (state >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return numbers


def _largest_allowed(height: int, width: int) -> tuple[int, int]:
    if width < ASPECT[0] * height:
        return min(height, max(1, round(width / ASPECT[0]))), width
    if width > ASPECT[1] * height:
        return height, min(width, max(1, round(height * ASPECT[1])))
    return height, width
