"""Data set "synthetic": a smooth random pattern for each class, another one for each image, and noise.

No file is read, so it works wherever NumPy does. `dsaux.data` puts it into its table.
With c the class and z standard normal coefficients of the lowest two-dimensional cosines,

    image = 127.5 + 20 * pattern(z_c) + 40 * pattern(z_image) + 20 * noise      clipped to 0 .. 255
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Split: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Images, uint8 (N, S, S, 3), and their labels, int64 (N,)."""

SEED = 20_211_211
NUM_CLASSES = 10
IMAGE_SIZES = (8, 512)

_FREQUENCIES = 4
_CLASS_CONTRAST = 20.0
_IMAGE_CONTRAST = 40.0
_NOISE = 20.0
_CHUNK = 1024  # images made at once, which bounds the memory


def balanced_labels(samples: int, *, num_classes: int) -> NDArray[np.int64]:
    """Labels 0, 1, .. num_classes - 1, 0, 1, ..: any range of them is balanced up to one."""
    return np.arange(samples, dtype=np.int64) % num_classes


def make_synthetic(*, train_samples: int, test_samples: int, image_size: int) -> tuple[Split, Split]:
    """Makes the training and the test images, every class equally often (up to one).

    Args:
        train_samples: number of training images.
        test_samples: number of test images; they do not depend on `train_samples`.
        image_size: side of the images in pixels.

    Returns:
        (images, labels) of the training and of the test set.
    """
    class_seed, train_seed, test_seed = np.random.SeedSequence(SEED).spawn(3)
    classes = _coefficients(np.random.default_rng(class_seed), NUM_CLASSES)
    return (
        _draw(classes, samples=train_samples, image_size=image_size, seed=train_seed),
        _draw(classes, samples=test_samples, image_size=image_size, seed=test_seed),
    )


def _coefficients(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    return rng.standard_normal((count, 3, _FREQUENCIES, _FREQUENCIES), dtype=np.float32)


def _draw(classes: NDArray[np.float32], *, samples: int, image_size: int, seed: np.random.SeedSequence) -> Split:
    rng = np.random.default_rng(seed)
    labels = balanced_labels(samples, num_classes=len(classes))
    images: NDArray[np.uint8] = np.empty((samples, image_size, image_size, 3), dtype=np.uint8)
    basis = _cosines(image_size)
    for start in range(0, samples, _CHUNK):
        part = labels[start : start + _CHUNK]
        mixed = _CLASS_CONTRAST * classes[part] + _IMAGE_CONTRAST * _coefficients(rng, len(part))
        patterns = basis @ mixed @ basis.T
        noise = rng.standard_normal(patterns.shape, dtype=np.float32)
        pixels = 127.5 + patterns + _NOISE * noise
        images[start : start + _CHUNK] = np.clip(np.rint(pixels), 0, 255).transpose(0, 2, 3, 1)
    return images, labels


def _cosines(image_size: int) -> NDArray[np.float32]:
    """The lowest cosines at the pixels' centres, (image_size, _FREQUENCIES), for patterns of variance 1."""
    centres = (np.arange(image_size) + 0.5) / image_size
    waves = np.cos(np.pi * np.outer(centres, np.arange(_FREQUENCIES)))
    scaled: NDArray[np.float32] = (waves / np.sqrt(np.mean(waves**2, axis=0) * _FREQUENCIES)).astype(np.float32)
    return scaled
