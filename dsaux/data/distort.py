"""Operations as in RandAugment, drawn as one map of the colours and one of the places for each image.

`dsaux.data.augment` draws with it. Two operations are drawn for an image, with equal chances and in their order (Cubuk,
Zoph, Shlens and Le, arXiv:1909.13719). All of them are affine, in the colours of a pixel or in its place, so any
number of them makes one matrix of each kind, which a loader applies in one pass:

    colour      (r, g, b)' = C (r, g, b) + c         then clipped to 0 .. 255
    place       pixel at p is read at W p + w        bilinear; outside lies the mean of the data set

Colours are clipped once, at the end, and not after each operation; and what the first operation moves out of the image
the second may bring back. The operations on a pixel's histogram
(posterize, solarize, equalize, autocontrast) and sharpness are no affine maps and left out.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

OPERATIONS = (
    "identity",
    "brightness",
    "contrast",
    "saturation",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
STRONGEST = 10
"""At this strength a colour is changed by 90 %, and so on."""

PER_IMAGE = 2
"""Operations drawn for each image, maybe twice the same."""

MOST_COLOUR = 0.9
MOST_DEGREES = 30.0
MOST_SHEAR = 0.3
MOST_SHIFT = 150 / 331
"""Of the side of the image; all four as in the paper's images of 331 pixels and in torchvision."""

MID_GREY = 127.5
"""What `contrast` moves colours away from, or towards."""

LUMA = (0.299, 0.587, 0.114)
"""Brightness of red, green and blue to the eye (ITU-R BT.601): `saturation` leaves it as it is."""


def draw_distortions(
    rng: np.random.Generator, count: int, *, size: tuple[int, int], strength: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Draws the operations of `count` images.

    Args:
        rng: where the draws come from.
        count: number of images.
        size: their height and width.
        strength: 1 .. STRONGEST; the sign is drawn.

    Returns:
        The maps of colours in 0 .. 255, [C | c], (count, 3, 4), and of places, [W | w], (count, 2, 3), from (x, y) in
        the distorted image to (x, y) in the one before, in pixels, with the first pixel's centre at (0.5, 0.5).
    """
    operations = rng.integers(len(OPERATIONS), size=(PER_IMAGE, count))
    amounts = np.where(rng.random((PER_IMAGE, count)) < 0.5, -1.0, 1.0) * strength / STRONGEST
    return compose(operations, amounts, size=size)


def compose(
    operations: NDArray[np.int64], amounts: NDArray[np.float64], *, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """One map of each kind out of operations that follow each other.

    Args:
        operations: indices into OPERATIONS, (operations of an image, images).
        amounts: how much of each, -1 .. 1 of the most.
        size: height and width of the images.

    Returns:
        As `draw_distortions`.
    """
    count = operations.shape[1]
    colour = np.broadcast_to(np.eye(4), (count, 4, 4))
    place = np.broadcast_to(np.eye(3), (count, 3, 3))
    for kinds, parts in zip(operations, amounts, strict=True):
        colour = _colour_maps(kinds, parts) @ colour
        place = place @ _inverse_places(kinds, parts, size=size)  # the last operation is undone first
    return colour[:, :3].astype(np.float32), place[:, :2].astype(np.float32)


def _colour_maps(kinds: NDArray[np.int64], amounts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(images, 4, 4) on (r, g, b, 1): a mixture of the image and, by the operation, black, grey or its own grey."""
    others = {
        "brightness": np.zeros((4, 4)),
        "contrast": np.outer((1, 1, 1, 0), (0, 0, 0, MID_GREY)),
        "saturation": np.outer((1, 1, 1, 0), (*LUMA, 0)),
    }
    maps = np.tile(np.eye(4), (len(kinds), 1, 1))
    for name, other in others.items():
        drawn = kinds == OPERATIONS.index(name)
        factors = 1 + MOST_COLOUR * amounts[drawn, None, None]
        maps[drawn] = factors * np.eye(4) + (1 - factors) * other
    maps[:, 3] = (0, 0, 0, 1)
    return maps


def _inverse_places(
    kinds: NDArray[np.int64], amounts: NDArray[np.float64], *, size: tuple[int, int]
) -> NDArray[np.float64]:
    """(images, 3, 3) on (x, y, 1): where a pixel comes from; turned and sheared around the image's centre."""
    height, width = size
    maps = np.tile(np.eye(3), (len(kinds), 1, 1))

    def enter(name: str, row: int, column: int, values: NDArray[np.float64]) -> None:
        drawn = kinds == OPERATIONS.index(name)
        maps[drawn, row, column] = values[drawn]

    angles = np.deg2rad(MOST_DEGREES) * amounts
    for place in (0, 1):
        enter("rotate", place, place, np.cos(angles))
    enter("rotate", 0, 1, -np.sin(angles))
    enter("rotate", 1, 0, np.sin(angles))
    enter("shear_x", 0, 1, -MOST_SHEAR * amounts)
    enter("shear_y", 1, 0, -MOST_SHEAR * amounts)
    centre = np.array([width, height]) / 2
    maps[:, :2, 2] = centre - maps[:, :2, :2] @ centre
    enter("translate_x", 0, 2, -MOST_SHIFT * width * amounts)
    enter("translate_y", 1, 2, -MOST_SHIFT * height * amounts)
    return maps
