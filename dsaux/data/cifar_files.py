"""The files of CIFAR-10 and CIFAR-100 by name, with the sums of the official ones; `dsaux.data.cifar` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dsaux.config import DataConfig

SIDE = 32
PIXELS = 3 * SIDE * SIDE
"""Bytes of an image."""

TRAIN, TEST = 50_000, 10_000
"""Images of the official data sets."""


@dataclass(frozen=True)
class Layout:
    """One way in which the files of a data set are kept.

    Attributes:
        folder: its name in the archive.
        train: files with training images, in their order.
        test: files with test images.
        names: file with the names of the classes.
        is_pickled: the python layout; else the binary one.
        md5: sums of the official files; none are published for the binary layout.
    """

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    is_pickled: bool
    md5: Mapping[str, str] = field(default_factory=dict)

    @property
    def images(self) -> tuple[str, ...]:
        """The files that hold images."""
        return self.train + self.test

    @property
    def files(self) -> tuple[str, ...]:
        """All files."""
        return (*self.train, *self.test, self.names)


@dataclass(frozen=True)
class Kind:
    """One of the two data sets.

    Attributes:
        name: as in dsaux.data.name.
        num_classes: number of classes.
        labels_per_image: bytes before each image of the binary layout; the last is the label.
        label_key: key of the labels in the python layout.
        names_key: key of the classes' names in it.
        layouts: the python layout, the one in the archive, and the binary one.
        url: of the archive.
        archive_md5: of the archive.
        image_sizes: least and greatest side of an image.
    """

    name: str
    num_classes: int
    labels_per_image: int
    label_key: str
    names_key: str
    layouts: tuple[Layout, Layout]
    url: str
    archive_md5: str
    image_sizes: tuple[int, int] = (SIDE, SIDE)

    def check(self, data: DataConfig) -> None:
        """As `dsaux.data.cifar.check_files`."""
        from dsaux.data.cifar import check_files

        check_files(data)


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            name="cifar10",
            num_classes=10,
            labels_per_image=1,
            label_key="labels",
            names_key="label_names",
            layouts=(
                Layout(
                    folder="cifar-10-batches-py",
                    train=_BATCHES,
                    test=("test_batch",),
                    names="batches.meta",
                    is_pickled=True,
                    md5={
                        "data_batch_1": "c99cafc152244af753f735de768cd75f",
                        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                        "data_batch_4": "634d18415352ddfa80567beed471001a",
                        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                        "test_batch": "40351d587109b95175f43aff81a1287e",
                        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
                    },
                ),
                Layout(
                    folder="cifar-10-batches-bin",
                    train=tuple(f"{name}.bin" for name in _BATCHES),
                    test=("test_batch.bin",),
                    names="batches.meta.txt",
                    is_pickled=False,
                ),
            ),
            url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
            archive_md5="c58f30108f718f92721af3b95e74349a",
        ),
        Kind(
            name="cifar100",
            num_classes=100,
            labels_per_image=2,
            label_key="fine_labels",
            names_key="fine_label_names",
            layouts=(
                Layout(
                    folder="cifar-100-python",
                    train=("train",),
                    test=("test",),
                    names="meta",
                    is_pickled=True,
                    md5={
                        "train": "16019d7e3df5f24257cddd939b257f8d",
                        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
                        "meta": "7973b15100ade9c7d40fb424638fde48",
                    },
                ),
                Layout(
                    folder="cifar-100-binary",
                    train=("train.bin",),
                    test=("test.bin",),
                    names="fine_label_names.txt",
                    is_pickled=False,
                ),
            ),
            url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
            archive_md5="eb9058c3a382ffc7106e4002c42a8d85",
        ),
    )
}
