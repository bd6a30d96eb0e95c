"""Small data sets of image files, cut out of the photographs of the data set photos: as a tree, and as shards."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from dsaux.config import DataConfig
from dsaux.data.photos import find_pictures

NUM_CLASSES, TRAIN, TEST = 10, 6, 3
"""Images of each class for training and testing."""
SIZE = 32
"""Side of a sample."""


def write_tree(root: Path) -> Path:
    """Images of many sizes and aspects below root/train and root/val; odd kinds among them."""
    rng = np.random.default_rng(0)
    for label, path in enumerate(find_pictures()[:NUM_CLASSES]):
        with Image.open(path) as file:
            picture = file.convert("RGB")
        for split, count in (("train", TRAIN), ("val", TEST)):
            folder = root / split / f"n{label:02d}"
            folder.mkdir(parents=True)
            for number in range(count):
                width, height = (int(side) for side in rng.integers(40, 160, size=2))
                x, y = int(rng.integers(picture.width - width)), int(rng.integers(picture.height - height))
                save(picture.crop((x, y, x + width, y + height)), folder / f"{number}", label=label, number=number)
    return root


def save(image: Image.Image, path: Path, *, label: int, number: int) -> None:
    """A JPEG; in class 1 a PNG with transparency, one with a palette, and a grey JPEG."""
    if (label, number) == (1, 0):
        image.convert("RGBA").save(path.with_suffix(".png"))
    elif (label, number) == (1, 1):
        image.quantize(64).save(path.with_suffix(".PNG"))
    elif (label, number) == (1, 2):
        image.convert("L").save(path.with_suffix(".jpeg"))
    else:
        image.save(path.with_suffix(".JPEG"), "JPEG", quality=90)


def write_shards(root: Path, *, tree: Path, per_shard: int = 17) -> Path:
    """The images of a tree in the same order, as root/train/*.tar and root/val/*.tar without an index."""
    for split in ("train", "val"):
        files = [path for folder in sorted((tree / split).iterdir()) for path in sorted(folder.iterdir())]
        (root / split).mkdir(parents=True)
        for start in range(0, len(files), per_shard):
            with tarfile.open(root / split / f"{split}-{start:04d}.tar", "w") as archive:
                for number, path in enumerate(files[start : start + per_shard], start=start):
                    add(archive, f"{number:06d}{path.suffix.lower()}", path.read_bytes())
                    add(archive, f"{number:06d}.cls", str(int(path.parent.name[1:])).encode())
    return root


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """Put one file into a shard."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def deep_png(*, width: int = 50, height: int = 40) -> bytes:
    """A PNG of 16 bits a colour channel, which PIL cannot write."""
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(range(6)) * width) * height)
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def deep_tiff(*, width: int = 50, height: int = 40) -> bytes:
    """A TIFF of 16 bits a colour channel, which PIL cannot write."""
    pixels = bytes(range(6)) * width * height
    tags = {256: width, 257: height, 258: 134, 259: 1, 262: 2, 273: 140, 277: 3, 278: height, 279: len(pixels), 284: 1}
    entries = [struct.pack("<HHII", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1, tags[tag]) for tag in tags]
    directory = struct.pack("<H", len(tags)) + b"".join(entries) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<HHH", 16, 16, 16) + pixels


def deep_ppm(*, width: int = 50, height: int = 40) -> bytes:
    """A PPM of 16 bits a colour channel."""
    return b"P6 %d %d 65535\n" % (width, height) + bytes(range(6)) * width * height


def with_thumbnail(image: Image.Image, *, progressive: bool = False) -> bytes:
    """A JPEG that has a small JPEG of itself in its EXIF data, as cameras write it."""
    small, whole = io.BytesIO(), io.BytesIO()
    image.resize((40, 30)).save(small, "JPEG")
    thumbnail, place = small.getvalue(), 14 + 2 + 3 * 12 + 4
    entries = [(259, 3, 6), (513, 4, place), (514, 4, len(thumbnail))]  # compression, offset, bytes
    directories = struct.pack("<IHIH", 8, 0, 14, len(entries))  # the first one is empty
    directories += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    exif = b"Exif\0\0II*\0" + directories + struct.pack("<I", 0) + thumbnail
    image.save(whole, "JPEG", quality=90, progressive=progressive, exif=exif)
    return whole.getvalue()


def folder_data(root: Path, *, name: str = "folder", loader: str = "torch", color: float = 0.0) -> DataConfig:
    """The block dsaux.data for one of them."""
    return DataConfig(name=name, root=str(root), loader=loader, image_size=SIZE, color=color)
