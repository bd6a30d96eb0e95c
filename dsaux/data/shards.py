"""WebDataset shards: tar files of samples `key.jpg` + `key.cls`, with an index each, so that any sample can be read.

The index NAME.idx beside NAME.tar has the format of DALI's wds2idx; `python -m dsaux.data.index` writes it, too:

    v1.2 <samples>
    jpg <offset> <bytes> key.jpg cls <offset> <bytes> key.cls          one line a sample

The labels, some ten bytes a sample, are read once at the start and kept in memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsaux.config_rules import ConfigError, show
from dsaux.data.pictures import ENDINGS

VERSION = "v1.2"
LABEL = "cls"
_READABLE = ("v1.1", VERSION)  # v1.1 has no names
_IMAGES = tuple(ending[1:] for ending in ENDINGS)


class Member(NamedTuple):
    """A file in a shard.

    Attributes:
        ending: of its name, behind the first dot.
        offset: of its first byte in the shard.
        size: in bytes.
        name: empty where the index has none.
    """

    ending: str
    offset: int
    size: int
    name: str


class ShardSplit:
    """The images of some shards, in the order in which they lie there.

    Args:
        shards: tar files, each with its index beside it.

    Attributes:
        labels: int64 (N,).

    Raises:
        ConfigError: if a shard or an index is missing, damaged or does not fit the other.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards = tuple(os.fspath(shard) for shard in shards)
        labels: list[int] = []
        places: list[tuple[int, int, int]] = []
        for number, shard in enumerate(shards):
            with _open_shard(shard) as file:
                length = os.fstat(file.fileno()).st_size
                for line, members in enumerate(read_index(shard), start=2):
                    image, label = _image_and_label(members, shard=shard, line=line)
                    if max(member.offset + member.size for member in members) > length:
                        raise ConfigError(
                            f"{shard} has {length} bytes, but by line {line} of {index_path(shard)} it holds more: the "
                            f"shard is cut off, or the index is another one's. Copy the shard again, or {make(shard)}."
                        )
                    text = os.pread(file.fileno(), label.size, label.offset)
                    if not text.strip().isdigit():
                        raise ConfigError(
                            f"{shard}, member {label.name or line}, holds {show(text[:20].decode(errors='replace'))}; "
                            f"it must be a class, a whole number >= 0. Write the shard anew, or {make(shard)}."
                        )
                    labels.append(int(text))
                    places.append((number, image.offset, image.size))
        self.labels: NDArray[np.int64] = np.array(labels, dtype=np.int64)
        self._places: NDArray[np.int64] = np.array(places, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, index: int) -> str:
        """Shard and name of an image."""
        number, offset, _ = self._places[index].tolist()
        shard = Path(self._shards[number])
        for members in read_index(shard):
            for member in members:
                if member.offset == offset and member.name:
                    return f"{member.name} in {shard}"
        return f"at byte {offset} of {shard}"

    def read(self, index: int) -> bytes:
        """An encoded image.

        Raises:
            OSError: if the shard cannot be read.
        """
        number, offset, size = self._places[index].tolist()
        file = os.open(self._shards[number], os.O_RDONLY)  # not kept open: ImageNet has more shards than a process may
        try:
            return os.pread(file, size, offset)
        finally:
            os.close(file)


def find_shards(folder: Path) -> list[Path]:
    """The tar files of a folder in the order of their names."""
    return sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))


def index_path(shard: Path) -> Path:
    """Where the index of a shard must be."""
    return shard.with_suffix(".idx")


def make(shard: Path) -> str:
    """What to do for a good index, as the end of a sentence."""
    return f"make the index anew: python -m dsaux.data.index {shard}"


def count_samples(shard: Path) -> int:
    """Samples of a shard, by the first line of its index.

    Raises:
        ConfigError: if the index is missing or has another first line.
    """
    path = index_path(shard)
    try:
        with path.open(encoding="utf-8", errors="surrogateescape") as file:
            words = file.readline().split()
    except FileNotFoundError as error:
        raise ConfigError(f"the shard {shard} has no index {path.name} beside it. To {make(shard)}.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give it the right to be read.") from error
    if len(words) != 2 or words[0] not in _READABLE or not words[1].isdigit() or int(words[1]) < 1:
        raise ConfigError(
            f"{path} begins with {show(' '.join(words))}; an index begins with {VERSION} and the number of samples. "
            f"To {make(shard)}."
        )
    return int(words[1])


def read_index(shard: Path) -> Iterator[list[Member]]:
    """The members of each sample of a shard, by its index.

    Raises:
        ConfigError: if the index is missing, cannot be understood or is cut off.
    """
    expected, path, found = count_samples(shard), index_path(shard), 0
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        step = 4 if file.readline().startswith(VERSION) else 3
        for line, text in enumerate(file, start=2):
            words = text.split()
            try:
                yield [
                    Member(words[i], int(words[i + 1]), int(words[i + 2]), words[i + 3] if step == 4 else "")
                    for i in range(0, len(words), step)
                ]
            except (ValueError, IndexError) as error:
                raise ConfigError(
                    f"line {line} of {path} is {show(text.strip())}; it must be groups of ending, offset, size and "
                    f"name, without spaces in them. To {make(shard)}."
                ) from error
            found += 1
    if found != expected:
        raise ConfigError(f"{path} lists {found} samples but says {expected}: it is cut off. To {make(shard)}.")


def _image_and_label(members: list[Member], *, shard: Path, line: int) -> tuple[Member, Member]:
    image = next((member for member in members if member.ending.lower() in _IMAGES), None)
    label = next((member for member in members if member.ending == LABEL), None)
    if image is None or label is None:
        raise ConfigError(
            f"line {line} of {index_path(shard)} has a sample of {show([member.ending for member in members])}; it must"
            f" have an image ({', '.join(_IMAGES)}) and a label ({LABEL}), one behind the other in the shard. Write the"
            " shard anew."
        )
    return image, label


def _open_shard(shard: Path) -> FileIO:
    try:
        return shard.open("rb", buffering=0)
    except OSError as error:
        raise ConfigError(f"{shard} cannot be read: {error.strerror}. Give it the right to be read.") from error
