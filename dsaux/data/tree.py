"""A tree of image files: one folder a class.

    root/train/<class>/*.jpg        root/val/<class>/*.jpg   (or root/test)

Classes are the names of the folders in order; labels and order of the images are those of torchvision's ImageFolder,
but names that start with a dot are left out: they are other programs' leavings. Nothing is kept on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsaux.config_rules import ConfigError
from dsaux.data.pictures import ENDINGS


class TreeSplit:
    """The images of one folder of classes.

    Args:
        folder: root/train or root/val.
        classes: names of the classes, in order.

    Attributes:
        labels: int64 (N,), sorted.

    Raises:
        ConfigError: if a class has no image.
    """

    def __init__(self, folder: Path, classes: tuple[str, ...]) -> None:
        self._folder = os.fsencode(folder)
        names: list[bytes] = []
        counts = []
        for name in classes:
            before = len(names)
            top = os.path.join(self._folder, os.fsencode(name))
            start = len(self._folder) + 1
            names.extend(path[start:] for path in sorted_images(top))
            counts.append(len(names) - before)
            if counts[-1] == 0:
                raise empty_class(folder / name)
        self.labels: NDArray[np.int64] = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
        # One piece of memory: a million strings would take several times as much, and as long to hand to a worker.
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names])

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:
        """Path of an image."""
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(os.path.join(self._folder, self._names[start : int(self._ends[index])]))

    def read(self, index: int) -> bytes:
        """Content of an image file.

        Raises:
            OSError: if it cannot be read.
        """
        with open(self.where(index), "rb", buffering=0) as file:
            return file.read()


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in a folder, in order.

    Raises:
        ConfigError: if there is none.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise unreadable(folder, error) from error
    if not names:
        raise ConfigError(
            f"{folder} has no class folders; the images of a class must lie in {folder}/<class>/. Put them there, or "
            "change dsaux.data.root."
        )
    return tuple(names)


def count_images(folder: Path, classes: tuple[str, ...]) -> int:
    """Images of all classes; no file is opened.

    Raises:
        ConfigError: if a class has no image.
    """
    total = 0
    for name in classes:
        count = sum(len(files) for _, files in _walk(os.fsencode(folder / name)))
        if not count:
            raise empty_class(folder / name)
        total += count
    return total


def empty_class(folder: Path) -> ConfigError:
    """The error for a class without an image."""
    return ConfigError(
        f"{folder} holds no image ({', '.join(ENDINGS)}); every class needs one at least. Put images there, or remove "
        "the folder from both splits."
    )


def unreadable(folder: Path, error: OSError) -> ConfigError:
    """The error for a folder that cannot be listed."""
    return ConfigError(f"{folder} cannot be read: {error.strerror}. Give the folder the right to be read.")


def sorted_images(top: bytes) -> Iterator[bytes]:
    """Paths of the images below a folder: folders in order, and names in order in each."""
    for folder, files in sorted(_walk(top)):
        for name in sorted(files):
            yield os.path.join(folder, name)


def _walk(top: bytes) -> Iterator[tuple[bytes, list[bytes]]]:
    """Each folder below `top`, itself included, with the names of its images; no order, links are followed."""
    endings = tuple(os.fsencode(ending) for ending in ENDINGS)
    for folder, folders, files in os.walk(top, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(b".")]
        yield folder, [name for name in files if name.lower().endswith(endings) and not name.startswith(b".")]


def _refuse(error: OSError) -> None:
    raise unreadable(Path(os.fsdecode(error.filename)), error) from error
