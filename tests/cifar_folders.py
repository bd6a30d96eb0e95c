"""Folders of CIFAR-10 and CIFAR-100 in their true formats with a few hundred photographs: for tests of the readers."""

from __future__ import annotations

import io
import pickle
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

TRAIN, TEST = 300, 100
EVERYTHING = {"cutout": 6, "rand_augment": 7}
"""Keys of dsaux.data that are off by default, switched on."""


@dataclass(frozen=True)
class Pictures:
    """Images (N, 32, 32, 3) and labels of a training and a test set."""

    train: NDArray[np.uint8]
    test: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    test_labels: NDArray[np.int64]
    num_classes: int


def pictures_for(num_classes: int) -> Pictures:
    """Crops of photographs; the labels are shuffled, and have nothing to do with them."""
    from dsaux.data import photos

    (train, _), (test, _) = photos.make_photos(train_samples=TRAIN, test_samples=TEST, image_size=32)
    rng = np.random.default_rng(5)
    labels = [rng.permutation(np.arange(count) % num_classes) for count in (TRAIN, TEST)]
    return Pictures(train, test, labels[0], labels[1], num_classes)


def rows_of(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """All of the red, then green, then blue values of each image."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(len(images), -1))


def names_for(num_classes: int) -> list[str]:
    """Names of the classes."""
    return [f"class_{number}" for number in range(num_classes)]


class _Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python, which can be extended
    """Writes bytes as Python 2 wrote its strings, as in the official files."""

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]

    def save_bytes(self, text: bytes) -> None:
        short = len(text) < 256
        head = pickle.SHORT_BINSTRING + bytes([len(text)]) if short else pickle.BINSTRING + struct.pack("<i", len(text))
        self.write(head + text)
        self.memoize(text)

    dispatch[bytes] = save_bytes


def as_python_2(value: Any) -> bytes:
    """The pickle of a value as Python 2 would write it, with bytes for its strings."""
    file = io.BytesIO()
    _Python2Pickler(file, protocol=2).dump(value)
    return file.getvalue()


def write_python(root: Path, pictures: Pictures, *, protocol: int | None = None) -> Path:
    """Writes the python layout, as the official files or by a protocol of Python 3 with text for keys."""

    def dump(path: Path, entries: dict[str, object]) -> None:
        if protocol is None:
            path.write_bytes(as_python_2({key.encode(): value for key, value in entries.items()}))
        else:
            path.write_bytes(pickle.dumps(entries, protocol=protocol))

    is_ten = pictures.num_classes == 10
    folder = root / ("cifar-10-batches-py" if is_ten else "cifar-100-python")
    folder.mkdir(parents=True)
    train, test = rows_of(pictures.train), rows_of(pictures.test)
    labels, test_labels = pictures.train_labels.tolist(), pictures.test_labels.tolist()
    names = [name.encode() for name in names_for(pictures.num_classes)]
    if is_ten:
        for number in range(5):
            part = slice(number * TRAIN // 5, (number + 1) * TRAIN // 5)
            entries = {"batch_label": b"training", "labels": labels[part], "data": train[part], "filenames": [b"a.png"]}
            dump(folder / f"data_batch_{number + 1}", entries)
        dump(folder / "test_batch", {"labels": test_labels, "data": test})
        dump(folder / "batches.meta", {"num_cases_per_batch": TEST, "label_names": names, "num_vis": 3072})
    else:
        for name, rows, fine in (("train", train, labels), ("test", test, test_labels)):
            dump(folder / name, {"fine_labels": fine, "coarse_labels": [f // 5 for f in fine], "data": rows})
        dump(folder / "meta", {"fine_label_names": names, "coarse_label_names": names[:20]})
    return folder


def write_binary(root: Path, pictures: Pictures) -> Path:
    """Writes the binary layout."""

    def records(images: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.uint8]:
        fine = labels.astype(np.uint8)[:, None]
        head = [fine] if pictures.num_classes == 10 else [fine // 5, fine]
        return np.concatenate([*head, rows_of(images)], axis=1)

    is_ten = pictures.num_classes == 10
    folder = root / ("cifar-10-batches-bin" if is_ten else "cifar-100-binary")
    folder.mkdir(parents=True)
    train, test = records(pictures.train, pictures.train_labels), records(pictures.test, pictures.test_labels)
    names = "\n".join(names_for(pictures.num_classes))
    if is_ten:
        for number in range(5):
            part = train[number * TRAIN // 5 : (number + 1) * TRAIN // 5]
            (folder / f"data_batch_{number + 1}.bin").write_bytes(part.tobytes())
        (folder / "test_batch.bin").write_bytes(test.tobytes())
        (folder / "batches.meta.txt").write_text(names + "\n\n")  # the official file ends with an empty line
    else:
        (folder / "train.bin").write_bytes(train.tobytes())
        (folder / "test.bin").write_bytes(test.tobytes())
        (folder / "fine_label_names.txt").write_text(names + "\n")
    return folder


def digests_of_everything_on(root: str) -> dict[str, list[int]]:
    """Two epochs, then back into the first, of both loaders and both data sets."""
    from dsaux.config import DataConfig
    from dsaux.data import batch_digest, load_dataset
    from tests.unit.test_stream import stream_of, take

    digests = {}
    for name in ("cifar10", "cifar100"):
        data = DataConfig(name=name, root=root, download=False, verify=False, **EVERYTHING)
        dataset = load_dataset(data)
        for loader in ("torch", "dali"):
            stream = stream_of(dataset, loader=loader, micro_batch_size=100)
            batches = take(stream, 2 * stream.micro_batches_per_epoch)
            stream.seek(1)
            batches += take(stream, 2)
            digests[f"{name} {loader}"] = [batch_digest(*batch) for batch in batches]
            stream.close()
    return digests
