"""Data set "photos": small crops of the photographs that scikit-image and scikit-learn ship in their wheels.

One class a photograph; the table in `dsaux.data` names it. Training crops come from the left of each picture,
test crops from the right, so the test asks for a picture's textures and colours, not for its very pixels:

    0                              0.65 W   2/3 W            W
    |  training crops              |  gap  |  test crops     |

The files are opened by path: neither package is imported, nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsaux.config_rules import ConfigError
from dsaux.data.synthetic import Split, balanced_labels

if TYPE_CHECKING:
    from PIL.Image import Image

SEED = 20_211_210
"""The data set is one and the same in every run; the seed of a run orders and augments it."""

IMAGE_SIZES = (8, 64)
"""Least and greatest side of a crop after resizing: at 64 a crop still varies in scale by a factor of two."""

SCALES = (1.0, 3.0)
"""A crop's side before resizing, as a multiple of the image size."""

LARGEST_SIDE = 128
"""Greatest side of a crop before resizing, for all classes: the right third of `coins` has 128 pixels."""

_SKIMAGE_PICTURES = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
_SKLEARN_PICTURES = ("china.jpg", "flower.jpg")
CLASSES = tuple(Path(name).stem for name in (*_SKIMAGE_PICTURES, *_SKLEARN_PICTURES))
"""Names of the classes, in the order of the labels."""

_PLACES = (
    ("skimage", "scikit-image", "data", _SKIMAGE_PICTURES),
    ("sklearn", "scikit-learn", "datasets/images", _SKLEARN_PICTURES),
)

NUM_CLASSES = len(_SKIMAGE_PICTURES) + len(_SKLEARN_PICTURES)


def find_pictures() -> list[Path]:
    """Returns the files of the photographs in the order of their labels.

    Raises:
        ConfigError: if a package, or a picture in it, is not installed.
    """
    paths = []
    for module, package, folder, names in _PLACES:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f'dsaux.data.name is "photos", which needs the photographs of {package}, but {package} is '
                f"not installed. Install it with pip install {package}, or set dsaux.data.name to "
                '"synthetic".'
            )
        root = Path(spec.submodule_search_locations[0]) / folder
        for name in names:
            if not (root / name).is_file():
                raise ConfigError(
                    f'dsaux.data.name is "photos" but {root / name}, a part of {package}, does not exist. '
                    f"Reinstall it with pip install --force-reinstall {package}, or set dsaux.data.name to "
                    '"synthetic".'
                )
            paths.append(root / name)
    return paths


def make_photos(*, train_samples: int, test_samples: int, image_size: int) -> tuple[Split, Split]:
    """Cuts the training and the test crops, every class equally often (up to one).

    Args:
        train_samples: number of training crops.
        test_samples: number of test crops; they do not depend on `train_samples`.
        image_size: side of the crops in pixels.

    Returns:
        (images, labels) of the training and of the test set: uint8 (N, S, S, 3) and int64 (N,).

    Raises:
        ConfigError: if a photograph is missing or cannot be read.
    """
    pictures = [_read_rgb(path) for path in find_pictures()]
    train_seed, test_seed = np.random.SeedSequence(SEED).spawn(2)
    left = [picture.crop((0, 0, int(0.65 * picture.width), picture.height)) for picture in pictures]
    right = [picture.crop((-(-2 * picture.width // 3), 0, picture.width, picture.height)) for picture in pictures]
    return (
        _cut(left, samples=train_samples, image_size=image_size, seed=train_seed),
        _cut(right, samples=test_samples, image_size=image_size, seed=test_seed),
    )


def _read_rgb(path: Path) -> Image:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise ConfigError(
            f'dsaux.data.name is "photos" but {path} cannot be read: {error}. Reinstall the package it '
            'belongs to, or set dsaux.data.name to "synthetic".'
        ) from error


def _cut(regions: list[Image], *, samples: int, image_size: int, seed: np.random.SeedSequence) -> Split:
    """Random squares of the regions, resized with antialiasing; no pixel outside a region plays a part."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    labels = balanced_labels(samples, num_classes=len(regions))
    scale, along_x, along_y = rng.random((3, samples))
    low, high = SCALES[0] * image_size, min(SCALES[1] * image_size, LARGEST_SIDE)
    sides = np.rint(low + scale * (high - low)).astype(np.int64)
    sizes = np.array([region.size for region in regions])[labels]
    x = np.floor(along_x * (sizes[:, 0] - sides + 1)).astype(np.int64)
    y = np.floor(along_y * (sizes[:, 1] - sides + 1)).astype(np.int64)
    boxes = np.stack([x, y, x + sides, y + sides], axis=1).tolist()
    images: NDArray[np.uint8] = np.empty((samples, image_size, image_size, 3), dtype=np.uint8)
    for sample, (label, box) in enumerate(zip(labels.tolist(), boxes, strict=True)):
        crop = regions[label].resize((image_size, image_size), Image.Resampling.BILINEAR, box=tuple(box))
        images[sample] = np.asarray(crop)
    return images, labels
