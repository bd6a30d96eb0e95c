"""Data sets "imagenet" and "folder": encoded images on disk, read when they are needed.

layout.py makes them; tree.py and shards.py know how they lie on disk, views.py what of an image becomes a sample:

    read (bytes) -> decode -> window -> resize -> square, flip, colours -> normalise

dali_files.py and torch_files.py do that. Order and draws come from the plan (stream.py), so every rank makes the same
batches on its own, for trees and shards alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from dsaux.data.views import CentralSquare, FileAugmentation, RandomResizedCropFlip, shorter_side

if TYPE_CHECKING:
    import torch

    from dsaux.data.stream import Loader, LoaderSettings, Plan
    from dsaux.models.shapes import SampleSpec

MEAN = (123.675, 116.28, 103.53)
"""Of ImageNet's training images, by channel, in units of 0 .. 255; any image tree is normalised with it."""
STD = (58.395, 57.12, 57.375)
"""As MEAN, the standard deviations."""


class Split(Protocol):
    """The training or the test images. It is handed to worker processes, so it keeps no file open.

    Attributes:
        labels: int64 (N,).
    """

    labels: NDArray[np.int64]

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """An encoded image.

        Raises:
            OSError: if its file cannot be read.
        """
        ...

    def where(self, index: int) -> str:
        """Where an image lies, for errors."""
        ...


@dataclass(frozen=True, eq=False)
class FileJob:
    """All that a loader of image files needs to know.

    Attributes:
        split: the images.
        subset: which of them are samples, int64 (n,).
        plan: what each batch is made of.
        augmentation: what the plan's draws mean.
        batch_size: samples in each batch.
        image_size: side of a sample.
        mean: per channel, in units of 0 .. 255.
        std: per channel, in units of 0 .. 255.
        device: where the batches are put.
    """

    split: Split
    subset: NDArray[np.int64]
    plan: Plan
    augmentation: FileAugmentation
    batch_size: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    device: torch.device


@dataclass(frozen=True, eq=False)
class FileDataset:
    """Encoded images on disk.

    Attributes:
        name: "imagenet" or "folder".
        train: the training images.
        test: the test images.
        train_subset: which of the training images are used, int64 (n,).
        test_subset: which of the test images are used.
        num_classes: number of classes.
        classes: names of the class folders; None for shards, which have numbers alone.
        image_size: side S of a sample.
        color: strength of the colour jitter, as in `RandomResizedCropFlip`.
        mean: subtracted from each channel, in units of 0 .. 255.
        std: each channel is divided by it after that.
    """

    name: str
    train: Split
    test: Split
    train_subset: NDArray[np.int64]
    test_subset: NDArray[np.int64]
    num_classes: int
    classes: tuple[str, ...] | None
    image_size: int
    color: float = 0.0
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    @property
    def input_spec(self) -> SampleSpec:
        """An image, (3, S, S)."""
        from dsaux.models.shapes import SampleSpec

        return SampleSpec((3, self.image_size, self.image_size))

    @property
    def shorter_side(self) -> int:
        """What the shorter side of a test image is resized to before its middle is cut out."""
        return shorter_side(self.image_size)

    @property
    def num_train(self) -> int:
        """Training images."""
        return len(self.train_subset)

    @property
    def num_test(self) -> int:
        """Test images."""
        return len(self.test_subset)

    def augmentation(self, *, is_on: bool) -> FileAugmentation:
        """What is drawn for an image."""
        return RandomResizedCropFlip(self.color) if is_on else CentralSquare()

    def train_loader(self, plan: Plan, settings: LoaderSettings, *, augment: bool) -> Loader:
        """Makes the batches of a plan over the training images."""
        return self._loader(plan, settings, split=self.train, subset=self.train_subset, augment=augment)

    def test_loader(self, plan: Plan, settings: LoaderSettings) -> Loader:
        """Makes the batches of a plan over the test images."""
        return self._loader(plan, settings, split=self.test, subset=self.test_subset, augment=False)

    def _loader(
        self, plan: Plan, settings: LoaderSettings, *, split: Split, subset: NDArray[np.int64], augment: bool
    ) -> Loader:
        job = FileJob(
            split=split,
            subset=subset,
            plan=plan,
            augmentation=self.augmentation(is_on=augment),
            batch_size=settings.batch_size,
            image_size=self.image_size,
            mean=self.mean,
            std=self.std,
            device=settings.device,
        )
        if settings.name == "dali":
            from dsaux.data.dali_files import DaliFileLoader

            return DaliFileLoader(job)
        from dsaux.data.torch_files import make_torch_file_loader

        return make_torch_file_loader(job, workers=settings.workers, num_batches=settings.num_batches)
