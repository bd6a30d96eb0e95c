"""A folder of JPEGs for the input benchmarks: crops of the photographs of the data set photos, as large as ImageNet's.

Made anew from the same seed wherever it is asked for; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dsaux.data import photos

SIZE = (500, 375)
"""Width and height of an image: the median of ImageNet's, about."""
TRAIN, TEST = 768, 64
QUALITY = 90


def make_pictures(root: Path, *, seed: int = 0) -> Path:
    """Fill `root` with train/<class>/*.jpg and val/<class>/*.jpg; the class is the photograph.

    Args:
        root: a new folder.
        seed: of the crops.
    """
    rng = np.random.default_rng(seed)
    pictures = [Image.open(path).convert("RGB") for path in photos.find_pictures()]
    for split, count in (("train", TRAIN), ("val", TEST)):
        for number in range(count):
            label = number % len(pictures)
            picture = pictures[label]
            scale = min(1.0, picture.width / SIZE[0], picture.height / SIZE[1])
            width, height = int(SIZE[0] * scale), int(SIZE[1] * scale)
            left, top = rng.integers(0, picture.width - width + 1), rng.integers(0, picture.height - height + 1)
            crop = picture.crop((int(left), int(top), int(left) + width, int(top) + height)).resize(SIZE)
            folder = root / split / f"class{label:02}"
            folder.mkdir(parents=True, exist_ok=True)
            crop.save(folder / f"{number:05}.jpg", quality=QUALITY)
    return root
