"""Encoded images by PIL: their size from the header, their pixels, and what a user is told of a damaged one.

Both loaders of image files take the sizes from here; the torch loader decodes here as well, and the DALI loader looks
here for the file that DALI could not decode. An orientation in a file's EXIF data is not applied, as in torchvision;
a TIFF that has one is refused, since PIL applies it and DALI does not.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dsaux.data.views import Views, central_views

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Files that count as images, in small or capital letters; torchvision's list."""

GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""Weights of red, green and blue in the grey value (ITU-R BT.601)."""

CONTRAST_CENTER = 128.0
"""The value that a change of contrast leaves as it is; DALI's."""


Where: TypeAlias = Callable[[], str]
"""Says which file an image is, for errors; a function, since to find a name in a shard takes longer than to read."""


class DamagedImageError(RuntimeError):
    """An image file cannot be read or decoded; the message names it."""

    @classmethod
    def of(cls, where: str, error: object) -> DamagedImageError:
        """The error for one image.

        Args:
            where: the file, or where in a file it is.
            error: what went wrong.
        """
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        return cls(
            f"the image {where} cannot be used: {reason}. Replace it by a whole copy (JPEG, PNG or the like, 8 bits a "
            "channel) or remove it from the data set, then go on with --resume (after a removal, start anew)."
        )


def image_size_of(data: bytes, *, where: Where) -> tuple[int, int]:
    """Height and width of an encoded image; its header alone is read.

    Args:
        data: the file's content.
        where: named in errors.

    Raises:
        DamagedImageError: if it is no image, or a `misfit`.
    """
    image = _open(data, where=where)
    return image.height, image.width


def decode(data: bytes, *, where: Where) -> Image:
    """An encoded image in RGB; transparency is dropped and grey repeated.

    Raises:
        DamagedImageError: if it is no image, is cut off, or a `misfit`.
    """
    image = _open(data, where=where)
    try:
        converted: Image = image.convert("RGB")
        return converted
    except Exception as error:  # PIL's plugins raise many kinds
        raise DamagedImageError.of(where(), error) from error


def is_cut_jpeg(data: bytes) -> bool:
    """Whether a JPEG file may be cut off: no end mark follows the last start of a scan.

    Some decoders fill the rest of such an image with grey and say nothing. A thumbnail in front of the image has an end
    mark of its own, so one alone says nothing. Bytes behind the image can look like the start of a scan: ask `decode`.
    """
    if not data.startswith(b"\xff\xd8"):
        return False
    end = data.rfind(b"\xff\xd9")
    return end < 0 or data.find(b"\xff\xda", end) >= 0


def misfit(image: Any, data: bytes) -> str | None:
    """What is not supported of an image that PIL has opened, or None; follows its name in a sentence.

    Args:
        image: PIL's, whose pixels are not loaded yet.
        data: the file's content.
    """
    if image.mode.startswith(("I", "F")) or _bits_a_channel(image, data) > 8:
        return "has more than 8 bits a channel"
    orientation = image.tag_v2.get(274, 1) if image.format == "TIFF" else 1
    if orientation in range(2, 9):  # others mean nothing, and no decoder applies them
        return f"is a TIFF of orientation {orientation} (tag 274); it must be stored upright, with orientation 1"
    return None


def render(image: Image, views: Views, row: int, *, image_size: int) -> NDArray[np.uint8]:
    """The sample that one row of `views` makes of an image.

    Returns:
        uint8, shape (S, S, 3).
    """
    from PIL import Image as Pil

    top, left, height, width = views.window[row].tolist()
    new_height, new_width = views.resized[row].tolist()
    y, x = views.crop[row].tolist()
    resized = image.resize(
        (new_width, new_height), Pil.Resampling.BILINEAR, box=(left, top, left + width, top + height)
    )
    pixels: NDArray[np.uint8] = np.asarray(resized)[y : y + image_size, x : x + image_size]
    if views.flip[row]:
        pixels = pixels[:, ::-1]
    return pixels if views.color is None else change_color(pixels, views.color[row])


def central_square(image: Image, *, shorter_side: int, image_size: int) -> NDArray[np.uint8]:
    """The middle of an image whose shorter side was resized, as a test image; uint8, shape (S, S, 3)."""
    sizes = np.array([(image.height, image.width)], dtype=np.int64)
    views = central_views(sizes, shorter_side=shorter_side, image_size=image_size)
    return render(image, views, 0, image_size=image_size).copy()


def change_color(pixels: NDArray[np.uint8], factors: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Change saturation, then contrast, then brightness, as DALI's color_twist does.

    Args:
        pixels: uint8 (..., 3).
        factors: of brightness, contrast and saturation; 1 leaves as it is.
    """
    brightness, contrast, saturation = factors
    grey = (pixels @ GREY)[..., None]
    changed = saturation * pixels + (1 - saturation) * grey
    changed = brightness * (CONTRAST_CENTER + contrast * (changed - CONTRAST_CENTER))
    result: NDArray[np.uint8] = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
    return result


def _bits_a_channel(image: Any, data: bytes) -> int:
    """Of a PNG, TIFF or PPM, which PIL opens as 8 bits in colours however many there are."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        return int(max(image.tag_v2.get(258, (1,))))
    if image.format == "PPM" and isinstance(decoder := image.tile[0][3], tuple):
        return int(decoder[1]).bit_length()  # of the greatest value
    return 8


def _open(data: bytes, *, where: Where) -> Any:
    from PIL import Image as Pil
    from PIL import UnidentifiedImageError

    try:
        image = Pil.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise DamagedImageError.of(where(), "it is empty" if not data else "it is no image that PIL knows") from error
    except Exception as error:  # PIL's plugins raise many kinds
        raise DamagedImageError.of(where(), error) from error
    if reason := misfit(image, data):
        raise DamagedImageError.of(where(), f"it {reason}")
    return image
