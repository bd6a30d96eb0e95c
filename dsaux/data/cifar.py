"""Data sets "cifar10" and "cifar100": the files of Krizhevsky (2009) as torchvision keeps them, in either layout.

`dsaux.data` checks them before any process group and reads them into memory. An image is 3072 bytes, all of its red,
then green, then blue values, row by row:

    layout   folder                files                                        what one holds
    python   cifar-10-batches-py   data_batch_1 .. 5, test_batch, batches.meta  a pickled dict: data (N, 3072), labels
             cifar-100-python      train, test, meta                            the same with fine_labels
    binary   cifar-10-batches-bin  data_batch_1 .. 5.bin, test_batch.bin,       N x (label, image)
                                   batches.meta.txt
             cifar-100-binary      train.bin, test.bin, fine_label_names.txt    N x (coarse label, fine label, image)

`dsaux.data.cifar_parse` reads one file, and runs nothing that a pickle names. A subset takes the first image of
each class, then the second of each, and so on: balanced, and contained in every larger one.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dsaux.config_rules import ConfigError, show
from dsaux.data.cifar_files import KINDS, PIXELS, SIDE, TEST, TRAIN, Kind, Layout
from dsaux.data.cifar_parse import parse_images, parse_names
from dsaux.data.fetch import fetch_archive
from dsaux.data.synthetic import Split

if TYPE_CHECKING:
    from dsaux.config import DataConfig

__all__ = ["KINDS", "SIDE", "Kind", "check_files", "read", "sample_counts"]

_DEFAULT_ROOT = "data"


@dataclass(frozen=True)
class _Found:
    """A layout and the folder that holds it."""

    kind: Kind
    layout: Layout
    folder: Path

    @property
    def can_be_fetched_again(self) -> bool:
        """Whether the folder is one that a download makes: only such a one is safe to remove."""
        return self.folder.name == self.kind.layouts[0].folder

    def official_only(self, why: str) -> str:
        """The error for a file that is not the official one."""
        mend = f"Remove {self.folder} so that dsaux.data.download can fetch it again"
        return (
            f"{why}. {mend if self.can_be_fetched_again else 'Replace it'}, or set dsaux.data.verify to false if these"
            " are files of your own in the same format."
        )


def check_files(data: DataConfig) -> None:
    """Finds the files, fetching them where they are missing, and holds their sizes against the format.

    Raises:
        ConfigError: if they are missing and cannot be had, if one is no such file, or has too few images.
    """
    found = _find_or_fetch(data)
    for name in found.layout.images:
        _check_size(found, name, data)
    for key, wanted, there in zip(
        ("train_samples", "test_samples"), (data.train_samples, data.test_samples), _counts(found, data), strict=True
    ):
        if wanted is not None and wanted > there:
            raise ConfigError(
                f"dsaux.data.{key} is {show(wanted)} but {found.folder} has {there} such images. Set it to {there} or "
                "less, or to null for all."
            )


def sample_counts(data: DataConfig) -> tuple[int, int]:
    """Training and test samples of a run; of files that are yet to be fetched, those of the official ones.

    Raises:
        ConfigError: if the files are there but incomplete or of another kind.
    """
    if data.train_samples is not None and data.test_samples is not None:
        return data.train_samples, data.test_samples
    found = _find(data)
    train, test = (TRAIN, TEST) if found is None else _counts(found, data)
    return data.train_samples or train, data.test_samples or test


def read(data: DataConfig) -> tuple[Split, Split, tuple[str, ...]]:
    """Reads the training and the test images and the names of the classes.

    Returns:
        (images, labels) of both sets, uint8 (N, 32, 32, 3) and int64 (N,), in the order of the files, and the names.

    Raises:
        ConfigError: if a file is missing, damaged, or not the official one where `data.verify` is true.
    """
    found = _find_or_fetch(data)
    train, test = (
        _read_split(found, files, data, samples=samples)
        for files, samples in ((found.layout.train, data.train_samples), (found.layout.test, data.test_samples))
    )
    names, raw = found.layout.names, _verified(found, found.layout.names, data)
    return train, test, parse_names(found.folder / names, raw, kind=found.kind, layout=found.layout)


# ---- where the files are ---------------------------------------------------------------------------------------------


def _find(data: DataConfig) -> _Found | None:
    """The first whole layout below or at the root; None where there is no trace of one."""
    kind, root = KINDS[data.name], _root(data)
    for other in KINDS.values():
        if other is not kind and root.name in {layout.folder for layout in other.layouts}:
            raise ConfigError(
                f"dsaux.data.root is {show(data.root)}, a folder of {other.name}, but dsaux.data.name is "
                f"{show(kind.name)}. Change one of them."
            )
    places = [_Found(kind, layout, folder) for layout in kind.layouts for folder in (root / layout.folder, root)]
    missing = [[name for name in place.layout.files if not (place.folder / name).is_file()] for place in places]
    for place, names in zip(places, missing, strict=True):
        if not names:
            return place
    for place, names in zip(places, missing, strict=True):
        present = len(place.layout.files) - len(names)
        # Some names are common words: one or two alone in a folder of another name mean nothing.
        if present > (0 if place.folder.name == place.layout.folder else 2):
            mend = ", or remove the folder so that dsaux.data.download can fetch it again"
            raise ConfigError(
                f"{place.folder} is a folder of {kind.name} but lacks {', '.join(names)}. Put the missing files there"
                f"{mend if place.can_be_fetched_again else ''}."
            )
    return None


def _find_or_fetch(data: DataConfig) -> _Found:
    found = _find(data)
    if found is not None:
        return found
    kind, root = KINDS[data.name], _root(data)
    layout = kind.layouts[0]
    home = root.parent if root.name == layout.folder else root
    mend = f"Unpack {kind.url} into {home}, or set dsaux.data.root to the folder that has the files."
    if not data.download:
        raise ConfigError(
            f"{_missing(kind, root)}, and dsaux.data.download is false. Set it to true, or: {mend[0].lower()}{mend[1:]}"
        )
    try:
        fetch_archive(
            kind.url, md5=kind.archive_md5, into=home, folder=layout.folder, is_there=lambda: _find(data) is not None
        )
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{_missing(kind, root)}, and fetching {kind.url} failed: {reason}. {mend}") from error
    found = _find(data)
    if found is None:
        raise ConfigError(f"{_missing(kind, root)}, though {kind.url} was unpacked into {home}. {mend}")
    return found


def _missing(kind: Kind, root: Path) -> str:
    expected = " or ".join(f"{layout.folder}/ with {', '.join(layout.files)}" for layout in kind.layouts)
    return f"{root.absolute()} has no files of {kind.name} (expected: {expected})"


def _root(data: DataConfig) -> Path:
    return Path(_DEFAULT_ROOT if data.root is None else data.root).expanduser()


# ---- what is in them -------------------------------------------------------------------------------------------------


def _check_size(found: _Found, name: str, data: DataConfig) -> None:
    path, layout = found.folder / name, found.layout
    size = _size(path)
    record = PIXELS + found.kind.labels_per_image
    images = (TEST if name in layout.test else TRAIN // len(layout.train)) if data.verify else 1
    if layout.is_pickled:
        if size < images * PIXELS:
            why = f"{path} has {size} bytes, too few for {images} x {PIXELS}: it is cut off, or another file"
            raise ConfigError(found.official_only(why) if data.verify else f"{why}. Replace it.")
    elif size == 0 or size % record:
        raise ConfigError(
            f"{path} has {size} bytes, not a multiple of {record} ({found.kind.labels_per_image} for the labels, "
            f"{PIXELS} for the image): it is cut off, or another file. Replace it."
        )
    elif data.verify and size != images * record:
        raise ConfigError(
            found.official_only(f"{path} has {size // record} images, but the official file has {images}")
        )


def _counts(found: _Found, data: DataConfig) -> tuple[int, int]:
    """Images of the training and test files. Own pickles have no fixed size and are read for it."""
    layout = found.layout
    if layout.is_pickled and data.verify:
        return TRAIN, TEST
    train, test = (
        sum(
            len(parse_images(found.folder / name, _content(found.folder / name), kind=found.kind, layout=layout)[1])
            if layout.is_pickled
            else _size(found.folder / name) // (PIXELS + found.kind.labels_per_image)
            for name in files
        )
        for files in (layout.train, layout.test)
    )
    return train, test


def _read_split(found: _Found, files: tuple[str, ...], data: DataConfig, *, samples: int | None) -> Split:
    parts = []
    for name in files:
        _check_size(found, name, data)
        raw = _verified(found, name, data)
        parts.append(parse_images(found.folder / name, raw, kind=found.kind, layout=found.layout))
    pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    counts = np.bincount(labels, minlength=found.kind.num_classes)
    if data.verify and not found.layout.md5 and counts.min() != counts.max():
        listing = ", ".join(str(found.folder / name) for name in files)
        raise ConfigError(
            found.official_only(
                f"{listing}: a class has {counts.min()}, another {counts.max()} images; the official ones have as many"
                " of each"
            )
        )
    if samples is not None:
        if samples > len(labels):
            raise ConfigError(
                f"{samples} images were asked for, but {found.folder} has {len(labels)}. Lower train_samples or"
                " test_samples of dsaux.data."
            )
        chosen = balanced_subset(labels, samples)
        pixels, labels = pixels[chosen], labels[chosen]
    return np.ascontiguousarray(pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)), labels


def balanced_subset(labels: NDArray[np.int64], samples: int) -> NDArray[np.int64]:
    """Indices of a subset in which the classes are as even as the labels allow, ascending.

    Args:
        labels: of all samples.
        samples: how many to choose, at most all.
    """
    by_class = np.argsort(labels, kind="stable")
    ordered = labels[by_class]
    nth_of_class = np.empty(len(labels), dtype=np.int64)
    nth_of_class[by_class] = np.arange(len(labels)) - np.searchsorted(ordered, ordered)
    return np.sort(np.lexsort((labels, nth_of_class))[:samples])


def _verified(found: _Found, name: str, data: DataConfig) -> bytes:
    """The content of a file; it is the official one where the configuration asks for it and the sum is known."""
    raw = _content(found.folder / name)
    expected = found.layout.md5.get(name)
    if data.verify and expected is not None:
        given = hashlib.md5(raw, usedforsecurity=False).hexdigest()
        if given != expected:
            raise ConfigError(
                found.official_only(
                    f"{found.folder / name} is not the official file: its MD5 is {given}, not {expected}"
                )
            )
    return raw


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Make it readable.") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Make it readable.") from error
