"""The images: which data sets there are, what is refused before a run, and the names the rest of dsaux uses.

`dsaux.config` calls `check_dataset` before any process group exists and `train.py` calls `load_dataset`, so
importing this file brings in neither PyTorch nor DALI. `ReplicaStream`, `test_batches` (stream.py) and
`batch_digest` (guard.py) are loaded when they are first asked for.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dsaux.config_rules import ConfigError, show
from dsaux.data import photos, synthetic

if TYPE_CHECKING:
    from dsaux.config import DataConfig
    from dsaux.data.guard import batch_digest
    from dsaux.data.stream import ReplicaStream, test_batches

__all__ = [
    "ImageDataset",
    "ReplicaStream",
    "batch_digest",
    "check_dataset",
    "load_dataset",
    "require_dali",
    "test_batches",
]

PADDING = 4
"""Pixels of reflect padding on each side of a training image: random crops start at 0 .. 2 * PADDING."""

_LATER = {
    "ReplicaStream": "dsaux.data.stream",
    "test_batches": "dsaux.data.stream",
    "batch_digest": "dsaux.data.guard",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images in memory.

    Attributes:
        name: name of the data set.
        train_images: uint8, shape (N, H, W, C).
        train_labels: int64, shape (N,), values 0 .. num_classes - 1.
        test_images: uint8, shape (M, H, W, C).
        test_labels: int64, shape (M,).
        num_classes: number of classes.
        mean: mean of each channel over the training images, in units of 0 .. 255.
        std: standard deviation of each channel over the training images, in units of 0 .. 255.
        classes: names of the classes in the order of the labels; None where they have none.
    """

    name: str
    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.uint8]
    test_labels: NDArray[np.int64]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] | None = None

    @cached_property
    def padded_train_images(self) -> NDArray[np.uint8]:
        """The training images with PADDING reflected pixels on each side; made once, for all streams."""
        edges = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
        return np.pad(self.train_images, edges, mode="reflect")


@dataclass(frozen=True)
class _Source:
    """One entry of the table of data sets; `make` takes train_samples, test_samples and image_size."""

    num_classes: int
    image_sizes: tuple[int, int]
    check: Callable[[], object]
    make: Callable[..., tuple[synthetic.Split, synthetic.Split]]
    classes: tuple[str, ...] | None = None


_SOURCES: Mapping[str, _Source] = {
    "photos": _Source(photos.NUM_CLASSES, photos.IMAGE_SIZES, photos.find_pictures, photos.make_photos, photos.CLASSES),
    "synthetic": _Source(synthetic.NUM_CLASSES, synthetic.IMAGE_SIZES, lambda: None, synthetic.make_synthetic),
}


def check_dataset(data: DataConfig) -> None:
    """Refuses every mistake in "dsaux.data" that can be seen without making the images.

    Raises:
        ConfigError: names the key, what was given, what is allowed and the mend.
    """
    source = _source(data.name)
    if data.root is not None:
        raise ConfigError(
            f"dsaux.data.root is {show(data.root)} but {data.name} is made in memory and reads no folder; "
            "a root would have no effect. Remove dsaux.data.root."
        )
    low, high = source.image_sizes
    if not low <= data.image_size <= high:
        raise ConfigError(
            f"dsaux.data.image_size is {data.image_size}; {data.name} can be made with {low} .. {high} "
            "pixels. Change it, or leave it out for the default 32."
        )
    for key in ("train_samples", "test_samples"):
        samples = getattr(data, key)
        if samples < source.num_classes:
            raise ConfigError(
                f"dsaux.data.{key} is {samples}, fewer than the {source.num_classes} classes of {data.name}. "
                f"Set it to {source.num_classes} or more."
            )
    if data.loader == "dali":
        require_dali()
        refuse_dali_workers(data.workers)
    source.check()


def load_dataset(data: DataConfig) -> ImageDataset:
    """Makes the images: the same bytes for the same configuration, whatever the seed of the run.

    Raises:
        ConfigError: if the images cannot be had, e.g. a photograph is missing.
    """
    source = _source(data.name)
    (train_images, train_labels), (test_images, test_labels) = source.make(
        train_samples=data.train_samples, test_samples=data.test_samples, image_size=data.image_size
    )
    mean, std = _channel_statistics(train_images)
    return ImageDataset(
        name=data.name,
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        num_classes=source.num_classes,
        mean=mean,
        std=std,
        classes=source.classes,
    )


def require_dali() -> None:
    """Refuses a run that asks for DALI on a machine without it; nothing is imported.

    Raises:
        ConfigError: if nvidia.dali cannot be found.
    """
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except (ImportError, ValueError):  # no package "nvidia" at all
        found = False
    if not found:
        raise ConfigError(
            'dsaux.data.loader is "dali" but NVIDIA DALI is not installed. Install it with pip install '
            "'dsaux[dali-cu13]' (or dali-cu12), or set dsaux.data.loader to \"torch\"."
        )


def refuse_dali_workers(workers: int) -> None:
    """Refuses worker processes for the DALI loader.

    Raises:
        ConfigError: if `workers` is not 0.
    """
    if workers:
        raise ConfigError(
            f'dsaux.data.workers is {workers} but dsaux.data.loader is "dali", which loads in threads of its '
            'own. Remove workers, or set dsaux.data.loader to "torch".'
        )


def _source(name: str) -> _Source:
    if name not in _SOURCES:
        raise ConfigError(f"dsaux.data.name is {show(name)}; it must be one of {', '.join(_SOURCES)}. Change it.")
    return _SOURCES[name]


def _channel_statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, exact: from the counts of the 256 values."""
    values = np.arange(256, dtype=np.float64)
    mean, std = [], []
    for channel in range(images.shape[-1]):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean.append(float(share @ values))
        std.append(max(float(np.sqrt(share @ (values - mean[-1]) ** 2)), 1.0))  # one grey level: an even image
    return tuple(mean), tuple(std)
