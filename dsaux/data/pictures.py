"""Encoded images by PIL: their size from the header, their pixels, and what a user is told of a damaged one.

Both loaders of image files take the sizes from here; the torch loader decodes here as well, and the DALI loader looks
here for the file that DALI could not decode. An orientation in a file's EXIF data is not applied, as in torchvision.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

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


def image_size_of(data: bytes, *, where: str) -> tuple[int, int]:
    """Height and width of an encoded image; its header alone is read.

    Args:
        data: the file's content.
        where: named in errors.

    Raises:
        DamagedImageError: if it is no image, or has more than 8 bits a channel.
    """
    image = _open(data, where=where)
    return image.height, image.width


def decode(data: bytes, *, where: str) -> Image:
    """An encoded image in RGB; transparency is dropped and grey repeated.

    Raises:
        DamagedImageError: if it is no image, is cut off, or has more than 8 bits a channel.
    """
    image = _open(data, where=where)
    try:
        converted: Image = image.convert("RGB")
        return converted
    except Exception as error:  # PIL's plugins raise many kinds
        raise DamagedImageError.of(where, error) from error


def is_cut_jpeg(data: bytes) -> bool:
    """Whether a JPEG file has no end mark; some decoders fill the rest of such an image with grey and say nothing."""
    return data.startswith(b"\xff\xd8") and b"\xff\xd9" not in data[-4096:] and data.rfind(b"\xff\xd9") < 0


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


def _open(data: bytes, *, where: str) -> Any:
    from PIL import Image as Pil
    from PIL import UnidentifiedImageError

    try:
        image = Pil.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise DamagedImageError.of(where, "it is empty" if not data else "it is no image that PIL knows") from error
    except Exception as error:  # PIL's plugins raise many kinds
        raise DamagedImageError.of(where, error) from error
    if image.mode.startswith(("I", "F")):
        raise DamagedImageError.of(where, "it has more than 8 bits a channel")
    return image
