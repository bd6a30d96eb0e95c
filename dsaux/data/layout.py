"""How image files lie below dsaux.data.root, what is refused of it, and the data set that they make.

`dsaux.data` calls `check_files` before any process group exists, and `load_files` in the run. No image is opened here.

    imagenet, folder   root/train/<class>/*.jpg    root/val/<class>/*.jpg      (val or test)
    imagenet           root/train/*.tar + *.idx    root/val/*.tar + *.idx
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsaux.config_rules import ConfigError, show
from dsaux.data.files import FileDataset, Split
from dsaux.data.shards import ShardSplit, count_samples, find_shards
from dsaux.data.tree import TreeSplit, class_names, count_images, unreadable

if TYPE_CHECKING:
    from dsaux.config import DataConfig

IMAGE_SIZE = 224
IMAGE_SIZES = (16, 1024)
TEST_FOLDERS = ("val", "test")
"""Folder of the test images; the first that is there."""

DEFAULT_ROOTS: Mapping[str, str | None] = {"imagenet": "data/imagenet", "folder": None}
"""The data sets of this file, and where they lie if dsaux.data.root does not say so."""


PUBLISHED = {"imagenet": (1000, 1_281_167, 50_000)}
"""Classes, training and test images of a data set that is the same for everybody."""


def is_there(data: DataConfig) -> bool:
    """Whether the folder of the data set exists."""
    return root_of(data).is_dir()


def file_counts(data: DataConfig) -> tuple[int, int]:
    """Training and test images that a run would have, found without opening an image.

    Raises:
        ConfigError: if the folders are not as they must be, or more images are asked for than there are.
    """
    train, test = _folders(data)
    if _has_shards(data, train, test):
        counts = [sum(count_samples(shard) for shard in _shards(folder)) for folder in (train, test)]
    else:
        counts = [count_images(folder, _classes(train, test)) for folder in (train, test)]
    return _asked(data, folders=(train, test), counts=(counts[0], counts[1]))


def check_files(data: DataConfig) -> None:
    """Refuses what can be seen without opening the images.

    Raises:
        ConfigError: names the folder, the file or the key, what is expected and the mend.
    """
    train, test = _folders(data)
    counts = file_counts(data)
    if not _has_shards(data, train, test):
        _check_enough(data, counts=counts, num_classes=len(_classes(train, test)))


def load_files(data: DataConfig) -> FileDataset:
    """Lists the images; of shards it reads the labels, of trees no file.

    Raises:
        ConfigError: as `check_files`, and if an index does not fit its shard or a label is wrong.
    """
    train_folder, test_folder = _folders(data)
    train: Split
    test: Split
    classes: tuple[str, ...] | None
    if _has_shards(data, train_folder, test_folder):
        train, test = (ShardSplit(_shards(folder)) for folder in (train_folder, test_folder))
        classes, num_classes = None, int(train.labels.max()) + 1
        if test.labels.max() >= num_classes:
            raise ConfigError(
                f"the shards in {test_folder} have the class {test.labels.max()}, but the greatest in {train_folder}"
                f" is {num_classes - 1}. Write both with the same classes."
            )
    else:
        classes = _classes(train_folder, test_folder)
        train, test = TreeSplit(train_folder, classes), TreeSplit(test_folder, classes)
        num_classes = len(classes)
    counts = _asked(data, folders=(train_folder, test_folder), counts=(len(train), len(test)))
    _check_enough(data, counts=counts, num_classes=num_classes)
    return FileDataset(
        name=data.name,
        train=train,
        test=test,
        train_subset=spread(train.labels, data.train_samples),
        test_subset=spread(test.labels, data.test_samples),
        num_classes=num_classes,
        classes=classes,
        image_size=data.image_size or IMAGE_SIZE,
        color=data.color,
    )


def spread(labels: NDArray[np.int64], count: int | None) -> NDArray[np.int64]:
    """Which images are used: all, or `count` that are evenly spread over the images sorted by class.

    So each class keeps its share to within one image, and the same images are taken in every run.

    Args:
        labels: of all images, int64 (N,).
        count: how many, at most N; None takes all.

    Returns:
        Increasing indices, int64 (count,).
    """
    if count is None:
        return np.arange(len(labels), dtype=np.int64)
    by_class = np.argsort(labels, kind="stable")
    places = (2 * np.arange(count, dtype=np.int64) + 1) * len(labels) // (2 * count)
    return np.sort(by_class[places])


def _asked(data: DataConfig, *, folders: tuple[Path, Path], counts: tuple[int, int]) -> tuple[int, int]:
    """Training and test images that the configuration asks for, out of those that there are."""
    asked = (data.train_samples, data.test_samples)
    for key, folder, number, count in zip(("train_samples", "test_samples"), folders, asked, counts, strict=True):
        if number is not None and number > count:
            raise ConfigError(
                f"dsaux.data.{key} is {show(number)} but {folder} holds {count} images. Set it to {count} or less, or "
                "leave it out for all."
            )
    return asked[0] or counts[0], asked[1] or counts[1]


def _check_enough(data: DataConfig, *, counts: tuple[int, int], num_classes: int) -> None:
    if num_classes < 2:
        raise ConfigError(
            f"{root_of(data)} has {num_classes} class; a classifier needs two at least. Change dsaux.data.root."
        )
    for key, count in zip(("train_samples", "test_samples"), counts, strict=True):
        if getattr(data, key) is not None and count < num_classes:
            raise ConfigError(
                f"dsaux.data.{key} is {count}, fewer than the {num_classes} classes of {root_of(data)}. Set it to "
                f"{num_classes} or more."
            )


def root_of(data: DataConfig) -> Path:
    """Folder of the data set.

    Raises:
        ConfigError: if none is given and the data set has no usual one.
    """
    root = data.root if data.root is not None else DEFAULT_ROOTS[data.name]
    if root is None or not root.strip():
        raise ConfigError(
            f'dsaux.data.root is {show(data.root)} but dsaux.data.name is "{data.name}", which reads images from there.'
            " Set it to a folder that has train/<class>/ and val/<class>/ with images."
        )
    return Path(root)


def _folders(data: DataConfig) -> tuple[Path, Path]:
    """The folders of the training and of the test images."""
    root = root_of(data)
    wanted = "train/<class>/*.jpg and val/<class>/*.jpg"
    if data.name == "imagenet":
        wanted += ", or train/*.tar and val/*.tar"
    if not root.is_dir():
        raise ConfigError(
            f"there is no folder {root} (dsaux.data.root); {data.name} is read from there and must hold {wanted}. Put "
            "it there, or change dsaux.data.root."
        )
    if not (root / "train").is_dir():
        raise ConfigError(f"{root} has no folder train; it must hold {wanted}. Add it, or change dsaux.data.root.")
    test = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    if test is None:
        raise ConfigError(
            f"{root} has no folder {' or '.join(TEST_FOLDERS)}; it must hold {wanted}. Add it, or change "
            "dsaux.data.root."
        )
    return root / "train", test


def _has_shards(data: DataConfig, train: Path, test: Path) -> bool:
    found = [bool(_shards(folder)) for folder in (train, test)] if data.name == "imagenet" else [False]
    if any(found) and not all(found):
        raise ConfigError(
            f"one of {train} and {test} has shards (*.tar) and the other has not; both must be shards, or both trees."
            " Change one."
        )
    return all(found)


def _shards(folder: Path) -> list[Path]:
    try:
        return find_shards(folder)
    except OSError as error:
        raise unreadable(folder, error) from error


def _classes(train: Path, test: Path) -> tuple[str, ...]:
    """Names of the classes, the same in both folders."""
    names, others = class_names(train), class_names(test)
    if names != others:
        only = [(train, test, sorted({*names} - {*others})), (test, train, sorted({*others} - {*names}))]
        words = "; ".join(f"{_listing(extra)} only in {one}" for one, _, extra in only if extra)
        raise ConfigError(
            f"{train} has {len(names)} classes and {test} has {len(others)}, and they are not the same: {words}. Both "
            "must have the same class folders. Add or remove some."
        )
    return names


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
