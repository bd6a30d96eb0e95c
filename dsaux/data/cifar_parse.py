"""What one file of CIFAR holds, in the python or the binary layout; `dsaux.data.cifar` reads with it.

A pickle is read by `dsaux.data.number_pickle`, which runs nothing that it names.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsaux.config_rules import ConfigError, show
from dsaux.data.cifar_files import PIXELS, Kind, Layout
from dsaux.data.number_pickle import load_numbers


def parse_images(path: Path, raw: bytes, *, kind: Kind, layout: Layout) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pixels (N, 3072) and labels (N,) of one file.

    Args:
        path: names the file in errors.
        raw: its content.
        kind: of which data set it is.
        layout: in which layout.

    Raises:
        ConfigError: if it is damaged, or a file of another kind.
    """
    if layout.is_pickled:
        pixels, labels = _parse_pickle(path, raw, label_key=kind.label_key)
    else:
        rows = np.frombuffer(raw, dtype=np.uint8).reshape(-1, PIXELS + kind.labels_per_image)
        pixels, labels = rows[:, kind.labels_per_image :], rows[:, kind.labels_per_image - 1].astype(np.int64)
    if labels.min(initial=0) < 0 or labels.max(initial=0) >= kind.num_classes:
        raise ConfigError(
            f"{path} has the labels {labels.min()} .. {labels.max()}; {kind.name} has 0 .. {kind.num_classes - 1}. It "
            "is damaged, or a file of another data set. Replace it."
        )
    return pixels, labels


def _parse_pickle(path: Path, raw: bytes, *, label_key: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    entries = _load_dict(path, raw)
    absent = [key for key in ("data", label_key) if key not in entries]
    if absent:
        raise ConfigError(
            f"{path} has no {' and no '.join(absent)}, only {show(sorted(entries))}. It is a file of another data set. "
            "Replace it."
        )
    pixels, labels = entries["data"], entries[label_key]
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.shape[1:] != (PIXELS,):
        given = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ConfigError(f"{path} has data of {given}; it must be an array of uint8 (N, {PIXELS}). Replace it.")
    try:
        numbers = np.array(labels)
    except ValueError:  # lists of different lengths
        numbers = np.array(None)
    if numbers.dtype.kind not in "iu" and numbers.size:
        raise ConfigError(f"{path} has {label_key} that are not all whole numbers. Replace it.")
    if numbers.shape != (len(pixels),) or not len(pixels):
        raise ConfigError(
            f"{path} has {len(pixels)} images and {label_key} of shape {numbers.shape}; it must be one label for each "
            "image, and one image at least. Replace it."
        )
    return pixels, numbers.astype(np.int64)


def parse_names(path: Path, raw: bytes, *, kind: Kind, layout: Layout) -> tuple[str, ...]:
    """Names of the classes in the order of the labels; arguments and errors as `parse_images`."""
    if layout.is_pickled:
        listed = _load_dict(path, raw).get(kind.names_key)
        names = [_text(item) for item in listed] if isinstance(listed, list) else []
    else:
        names = [line.strip() for line in raw.decode("utf-8", "replace").splitlines() if line.strip()]
    if len(names) != kind.num_classes:
        raise ConfigError(
            f"{path} has {len(names)} names of classes; {kind.name} has {kind.num_classes}. It is damaged, or a file of"
            " another data set. Replace it."
        )
    return tuple(names)


def _load_dict(path: Path, raw: bytes) -> dict[str, object]:
    try:
        entries = load_numbers(raw)
    except ValueError as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}. Replace it.") from error
    if not isinstance(entries, dict):
        raise ConfigError(f"{path} holds a {type(entries).__name__}; it must be a dict. Replace it.")
    return {_text(key): value for key, value in entries.items()}


def _text(value: object) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
