"""Images in memory: the data set of every source whose images are small. `dsaux.data.sources` makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsaux.data.augment import AS_IT_IS, PADDING, Augmentation, CropFlip, StrongAugment

if TYPE_CHECKING:
    from dsaux.data.stream import Loader, LoaderSettings, Plan
    from dsaux.models.shapes import SampleSpec


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
        cutout: side of the square that Cutout greys out in an augmented image; 0 for none.
        rand_augment: strength of the operations as in RandAugment, up to 10; 0 for none.
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
    cutout: int = 0
    rand_augment: int = 0

    @property
    def input_spec(self) -> SampleSpec:
        """An image, (C, H, W)."""
        from dsaux.models.shapes import SampleSpec

        height, width, channels = self.train_images.shape[1:]
        return SampleSpec((int(channels), int(height), int(width)))

    @property
    def num_train(self) -> int:
        """Training images."""
        return len(self.train_labels)

    @property
    def num_test(self) -> int:
        """Test images."""
        return len(self.test_labels)

    @property
    def shorter_side(self) -> None:
        """A test image is not cut out of a larger one."""

    def augmentation(self, *, is_on: bool) -> Augmentation:
        """What is drawn for an image."""
        if not is_on:
            return AS_IT_IS
        if not self.cutout and not self.rand_augment:
            return CropFlip()
        height, width = self.train_images.shape[1:3]
        return StrongAugment((height, width), cutout=self.cutout, rand_augment=self.rand_augment)

    def train_loader(self, plan: Plan, settings: LoaderSettings, *, augment: bool) -> Loader:
        """Makes the batches of a plan over the training images."""
        images, margin = (self.padded_train_images, 2 * PADDING) if augment else (self.train_images, 0)
        return self._loader(
            plan, settings, images=images, labels=self.train_labels, margin=margin, is_augmented=augment
        )

    def test_loader(self, plan: Plan, settings: LoaderSettings) -> Loader:
        """Makes the batches of a plan over the test images, in this process: workers take longer to start than that."""
        own = replace(settings, workers=0)
        return self._loader(plan, own, images=self.test_images, labels=self.test_labels, margin=0, is_augmented=False)

    def _loader(
        self,
        plan: Plan,
        settings: LoaderSettings,
        *,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        margin: int,
        is_augmented: bool,
    ) -> Loader:
        from dsaux.data.stream import LoaderJob, make_loader

        job = LoaderJob(
            images=images,
            labels=labels,
            plan=plan,
            batch_size=settings.batch_size,
            margin=margin,
            mean=self.mean,
            std=self.std,
            device=settings.device,
            cutout=is_augmented and self.cutout > 0,
            rand_augment=is_augmented and self.rand_augment > 0,
        )
        return make_loader(settings.name, job, workers=settings.workers)

    @cached_property
    def padded_train_images(self) -> NDArray[np.uint8]:
        """The training images with PADDING reflected pixels on each side; made once, for all streams."""
        edges = ((0, 0), (PADDING, PADDING), (PADDING, PADDING), (0, 0))
        return np.pad(self.train_images, edges, mode="reflect")


def channel_statistics(images: NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, exact: from the counts of the 256 values."""
    values = np.arange(256, dtype=np.float64)
    mean, std = [], []
    for channel in range(images.shape[-1]):
        share = np.bincount(images[..., channel].ravel(), minlength=256) / images[..., channel].size
        mean.append(float(share @ values))
        std.append(max(float(np.sqrt(share @ (values - mean[-1]) ** 2)), 1.0))  # one grey level: an even image
    return tuple(mean), tuple(std)
